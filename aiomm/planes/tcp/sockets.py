"""The sockets of data connections: where they listen, what they connect to, and their options."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Iterator
from typing import Any, NamedTuple

__all__ = [
    "LOST_SECONDS",
    "SocketAddress",
    "configure",
    "configure_connected",
    "is_wildcard",
    "listeners",
    "resolve",
]

WILDCARDS = frozenset({"", "*"})
LOST_SECONDS = 30
"""After so long without a sign of life from the peer's kernel a connection is lost."""
RETRANSMIT_SECONDS = 1
"""At least so often the kernel tries again to send what is not acknowledged. By itself it waits
longer and longer, so that a cable that was cut for 2 s is noticed to be whole another second
later, one of 20 s after 12 s. Linux takes no less than 1 s, and before 6.15 nothing at all."""
BACKLOG = 100
LOCAL_SEND_NBYTES = 128 * 1024
"""How much the kernel holds of a connection that stays within one host, doubled by Linux. With so
little it is still in the processor's caches when the receiver takes it: 64 MiB took 11.4 ms, and
16.8 ms with the megabytes that Linux takes by itself."""
TCP_RTO_MAX_MS = 44
"""Python has no name for it."""


class SocketAddress(NamedTuple):
    """One address of a host, and a port, in the form that sockets take."""

    family: int
    host_and_port: tuple[Any, ...]
    """For IPv6 perhaps with flow and scope behind them."""


def is_wildcard(host: str) -> bool:
    """Whether `host` stands for every address of its machine, so that no peer can use it."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host in WILDCARDS
    mapped = getattr(address, "ipv4_mapped", None)
    return address.is_unspecified or (mapped is not None and mapped.is_unspecified)


async def resolve(host: str, port: int) -> list[SocketAddress]:
    """Return the addresses of `host`; one that is a number needs neither name server nor thread.

    A link-local address names the interface as this host calls it: `fe80::1%eth0`.

    Raises:
        OSError: there are none.
    """
    numeric = _numeric(host, port)
    if numeric is not None:
        return [numeric]
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(SocketAddress(family, at) for family, _, _, _, at in found))


async def listeners(host: str, port: int) -> list[socket.socket]:
    """Return sockets that listen on all addresses of `host`, on one and the same port.

    A wildcard is both families where the machine has both. Of several addresses those that
    cannot be bound are left out.

    Raises:
        OSError: none of the addresses can be bound.
    """
    listening: list[socket.socket] = []
    error = OSError(f"no address for {host!r}")
    for address in await _bindable(host, port):
        chosen = listening[0].getsockname()[1] if listening else port
        try:
            listening.append(_listen(address, chosen))
        except OSError as exc:
            error = exc
        else:
            if is_wildcard(host):
                break
    if not listening:
        raise error
    return listening


def configure(connection: socket.socket) -> None:
    """Send at once, try again soon, and notice within half a minute that the peer is gone.

    Connections that a listening socket accepts inherit all of it. Buffers are left to the kernel,
    but for :func:`configure_connected`: with 4 MiB on both ends transfers between two hosts took as
    long or up to 15 % longer.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _options():
        try:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        except OSError:  # this kernel does not know it
            continue


def configure_connected(connection: socket.socket) -> None:
    """Hold little in between if both ends are on this host, as far as the addresses tell."""
    if connection.getsockname()[0] == connection.getpeername()[0]:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LOCAL_SEND_NBYTES)


def _numeric(host: str, port: int) -> SocketAddress | None:
    """Return the address that `host` spells out, and None if it is a name.

    Raises:
        OSError: this host has no interface of that name.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    if address.version == 4:
        return SocketAddress(socket.AF_INET, (host, port))
    if address.scope_id is None:
        return SocketAddress(socket.AF_INET6, (host, port))
    scope = address.scope_id
    index = int(scope) if scope.isdecimal() else socket.if_nametoindex(scope)
    return SocketAddress(socket.AF_INET6, (host.partition("%")[0], port, 0, index))


def _options() -> Iterator[tuple[int, int]]:
    yield socket.TCP_NODELAY, 1
    for name, value in (
        ("TCP_USER_TIMEOUT", LOST_SECONDS * 1000),
        ("TCP_KEEPIDLE", LOST_SECONDS // 2),
        ("TCP_KEEPINTVL", LOST_SECONDS // 6),
    ):
        if hasattr(socket, name):
            yield getattr(socket, name), value
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        yield TCP_RTO_MAX_MS, RETRANSMIT_SECONDS * 1000


async def _bindable(host: str, port: int) -> list[SocketAddress]:
    if not is_wildcard(host) or host == "0.0.0.0":
        return await resolve(host, port)
    return [
        SocketAddress(socket.AF_INET6, ("::", port)),
        SocketAddress(socket.AF_INET, ("0.0.0.0", port)),
    ]


def _listen(address: SocketAddress, port: int) -> socket.socket:
    listening = socket.socket(address.family, socket.SOCK_STREAM)
    try:
        listening.setblocking(False)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if address.family == socket.AF_INET6:
            is_any = address.host_and_port[0] == "::"
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not is_any)
        configure(listening)
        host, _, *rest = address.host_and_port
        listening.bind((host, port, *rest))
        listening.listen(BACKLOG)
    except BaseException:
        listening.close()
        raise
    return listening
