"""Which addresses are understood, and which leave the host."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiomm.control.address import IpcAddress, TcpAddress, parse_address, require_allowed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tcp://127.0.0.1:5555", TcpAddress("127.0.0.1", 5555)),
        ("tcp://127.0.0.1:*", TcpAddress("127.0.0.1", 0)),
        ("tcp://[::1]:0", TcpAddress("::1", 0)),
        ("tcp://*:80", TcpAddress("*", 80)),
        ("tcp://encoder.example.org:65535", TcpAddress("encoder.example.org", 65535)),
        (f"tcp://[::1]:7?key={'0a' * 32}", TcpAddress("::1", 7, "0a" * 32)),
        ("ipc:///run/aiomm/control.sock", IpcAddress(Path("/run/aiomm/control.sock"))),
    ],
)
def test_an_address_is_read(text: str, expected: TcpAddress | IpcAddress) -> None:
    assert parse_address(text) == expected
    assert parse_address(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "127.0.0.1:5555",
        "udp://127.0.0.1:5555",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:",
        "tcp://127.0.0.1:65536",
        "tcp://127.0.0.1:-1",
        "tcp://127.0.0.1:٣",
        "tcp://:5555",
        "tcp://::1:5555",
        "tcp://[127.0.0.1]:5555",
        "tcp://[::1:5555",
        "tcp://eth0;127.0.0.1:5555",
        "tcp://a b:5555",
        "tcp://127.0.0.1:7?key=",
        "tcp://127.0.0.1:7?key=0a",
        f"tcp://127.0.0.1:7?key={'0A' * 32}",
        f"tcp://127.0.0.1:7?secret={'0a' * 32}",
        "ipc://",
        "ipc://*",
        "ipc://@abstract",
        "ipc:///" + "x" * 107,
        "inproc://name",
        "unix://@name",
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="address"):
        parse_address(text)


@pytest.mark.parametrize(
    ("text", "stays"),
    [
        ("tcp://127.0.0.1:1", True),
        ("tcp://127.255.0.9:1", True),
        ("tcp://localhost:1", True),
        ("tcp://[::1]:1", True),
        ("ipc:///run/x", True),
        ("tcp://localhost.example.org:1", False),
        ("tcp://10.0.0.1:1", False),
        ("tcp://0.0.0.0:1", False),
        ("tcp://*:1", False),
        ("tcp://[::]:1", False),
        ("tcp://[fe80::1]:1", False),
    ],
)
def test_only_loopback_needs_no_word(text: str, stays: bool) -> None:
    address = parse_address(text)
    assert address.is_loopback is stays
    require_allowed(address, has_keys=False, insecure=True)
    require_allowed(address, has_keys=True, insecure=False)
    if stays:
        require_allowed(address, has_keys=False, insecure=False)
    else:
        with pytest.raises(ValueError, match="insecure=True"):
            require_allowed(address, has_keys=False, insecure=False)


def test_all_interfaces_are_given_a_reachable_name() -> None:
    reachable = TcpAddress("0.0.0.0", 0).reachable(7)
    assert not reachable.is_any
    assert reachable.port == 7
    assert TcpAddress("127.0.0.1", 0).reachable(7) == TcpAddress("127.0.0.1", 7)
