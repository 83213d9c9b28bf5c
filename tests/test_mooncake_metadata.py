"""Engines that find each other through a metadata server: Mooncake's own over HTTP, and etcd."""

from __future__ import annotations

import asyncio
import shutil
import socket
import sys
from asyncio.subprocess import PIPE, STDOUT
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from aiomm.planes.mooncake import METADATA_VARIABLE
from tests.planes.test_mooncake import MISSING
from tests.processes import DEADLINE, child

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(60),
    pytest.mark.skipif(bool(MISSING), reason=MISSING),
]


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on right now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@asynccontextmanager
async def server(command: list[str], ready: bytes) -> AsyncIterator[None]:
    """Run a server until the block ends, which begins when the server says that it is `ready`."""
    process = await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=STDOUT)
    assert process.stdout is not None
    try:
        async with asyncio.timeout(DEADLINE):
            while ready not in (line := await process.stdout.readline()):
                assert line, "the server has ended"
        yield
    finally:
        process.kill()
        await process.communicate()


async def test_over_http(monkeypatch: pytest.MonkeyPatch) -> None:
    (port,) = free_ports(1)
    options = ["--host", "127.0.0.1", "--port", str(port)]
    command = [sys.executable, "-m", "mooncake.http_metadata_server", *options]
    async with server(command, b"Server started on"):
        await one_moves(f"http://127.0.0.1:{port}/metadata", monkeypatch)


@pytest.mark.skipif(shutil.which("etcd") is None, reason="there is no command 'etcd'")
async def test_over_etcd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clients, peers = (f"http://127.0.0.1:{port}" for port in free_ports(2))
    command = ["etcd", "--data-dir", str(tmp_path / "etcd")]
    command += ["--listen-client-urls", clients, "--advertise-client-urls", clients]
    command += ["--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers]
    command += ["--initial-cluster", f"default={peers}"]
    async with server(command, b"ready to serve client requests"):
        await one_moves(f"etcd://{clients.removeprefix('http://')}", monkeypatch)


async def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    (port,) = free_ports(1)
    monkeypatch.setenv(METADATA_VARIABLE, f"http://127.0.0.1:{port}/metadata")
    with pytest.raises(
        AssertionError, match=f"no engine at 127.0.0.1 with http://127.0.0.1:{port}"
    ):
        async with child("receiver", bind="tcp://127.0.0.1:*", planes="mooncake"):
            pass


async def one_moves(metadata: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Move one request between two processes that know of each other by that server."""
    monkeypatch.setenv(METADATA_VARIABLE, metadata)
    bind = "tcp://127.0.0.1:*"
    async with (
        child("receiver", bind=bind, planes="mooncake") as receiver,
        child("sender", planes="mooncake") as sender,
    ):
        expected = await receiver.ask("expect", "ticket", request_id="one")
        sender.tell("send", ticket=expected["ticket"], seed=1, num_tokens=3000)
        sent = await sender.hear("ended", request_id="one")
        assert (sent["error"], sent.get("plane")) == (None, "mooncake"), sent
        assert (await receiver.hear("ended", request_id="one"))["is_right"]
