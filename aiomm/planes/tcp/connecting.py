"""How a sender comes to a data connection: it calls, shows its key, and hears how it stands."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Sequence
from typing import NamedTuple

from ...errors import PlaneUnavailable
from .sockets import SocketAddress, configure, configure_connected
from .wire import (
    ANSWER,
    GREETING,
    Answer,
    TcpOffer,
    encode_preamble,
    parse_answers,
    parse_greeting,
)

__all__ = ["Welcome", "connect"]

CONNECT_SECONDS = 5.0


class Welcome(NamedTuple):
    """What comes of a connection that the receiver accepts."""

    connection: socket.socket
    address: SocketAddress
    """Where the receiver was reached."""
    arena_nbytes: int
    answers: list[Answer]
    """How the writes stand that were on their way when the last connection broke."""


async def connect(
    offer: TcpOffer, addresses: Sequence[SocketAddress], *, attachment: int, oldest: int
) -> Welcome:
    """Connect to the receiver behind `offer`, at the first of `addresses` where it is.

    Args:
        offer: the receiver's.
        addresses: what the offer's host stands for.
        attachment: the sender's number for the connections that follow each other.
        oldest: the first write that it has no answer for.

    Raises:
        PlaneUnavailable: nobody listens there, or nobody that lets this sender in.
        OSError: the network has failed, and may be better later.
    """
    preamble = encode_preamble(offer, attachment, oldest)
    error: OSError | PlaneUnavailable = OSError(f"no address for {offer.host!r}")
    for address in addresses:
        try:
            async with asyncio.timeout(CONNECT_SECONDS / len(addresses)):
                return await _connect_to(address, preamble)
        except ConnectionRefusedError as exc:
            error = PlaneUnavailable(f"tcp: nobody listens at {offer.host} port {offer.port}")
            error.__cause__ = exc
        except TimeoutError:
            error = TimeoutError(f"silent for {CONNECT_SECONDS} s")
        except (OSError, PlaneUnavailable) as exc:
            error = exc
    raise error


async def _connect_to(address: SocketAddress, preamble: bytes) -> Welcome:
    connection = socket.socket(address.family, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        configure(connection)
        loop = asyncio.get_running_loop()
        await _establish(connection, address)
        configure_connected(connection)
        await loop.sock_sendall(connection, preamble)
        greeting = parse_greeting(await _receive(connection, GREETING.size))
        answers = parse_answers(await _receive(connection, greeting.num_answers * ANSWER.size))
        return Welcome(connection, address, greeting.arena_nbytes, answers)
    except BaseException:
        connection.close()
        raise


async def _establish(connection: socket.socket, address: SocketAddress) -> None:
    """Do what `loop.sock_connect` does; that of uvloop forgets the interface of an address."""
    code = connection.connect_ex(address.host_and_port)
    if code == errno.EINPROGRESS:
        loop = asyncio.get_running_loop()
        writable = asyncio.Event()
        loop.add_writer(connection.fileno(), writable.set)
        try:
            await writable.wait()
        finally:
            loop.remove_writer(connection.fileno())
        code = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        raise OSError(code, os.strerror(code))


async def _receive(connection: socket.socket, nbytes: int) -> bytes:
    received = b""
    while len(received) < nbytes:
        more = await asyncio.get_running_loop().sock_recv(connection, nbytes - len(received))
        if not more:
            raise ConnectionResetError("closed before the greeting was complete")
        received += more
    return received
