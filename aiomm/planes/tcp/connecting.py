"""How a sender comes to a data connection: it calls, shows its key, and hears how it stands."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Sequence
from typing import NamedTuple

from ...errors import PlaneUnavailable
from .sockets import Endpoint, configure, configure_connected
from .wire import (
    ANSWER,
    GREETING,
    Answer,
    Offer,
    encode_preamble,
    parse_answers,
    parse_greeting,
)

__all__ = ["Welcome", "connect"]

CONNECT_SECONDS = 5.0


class Welcome(NamedTuple):
    """What comes of a connection that the receiver accepts."""

    connection: socket.socket
    endpoint: Endpoint
    """Where the receiver was reached."""
    arena_nbytes: int
    answers: list[Answer]
    """How the writes stand that were on their way when the last connection broke."""


async def connect(
    offer: Offer, endpoints: Sequence[Endpoint], *, attachment: int, oldest: int
) -> Welcome:
    """Connect to the receiver behind `offer`, at the first of `endpoints` where it is.

    Args:
        offer: the receiver's.
        endpoints: what the offer's host stands for.
        attachment: the sender's number for the connections that follow each other.
        oldest: the first write that it has no answer for.

    Raises:
        PlaneUnavailable: nobody listens there, or nobody that lets this sender in.
        OSError: the network has failed, and may be better later.
    """
    preamble = encode_preamble(offer, attachment, oldest)
    error: OSError | PlaneUnavailable = OSError(f"no address for {offer.host!r}")
    for endpoint in endpoints:
        try:
            async with asyncio.timeout(CONNECT_SECONDS / len(endpoints)):
                return await _connect_to(endpoint, preamble)
        except ConnectionRefusedError as exc:
            error = PlaneUnavailable(f"tcp: nobody listens at {offer.host} port {offer.port}")
            error.__cause__ = exc
        except TimeoutError:
            error = TimeoutError(f"silent for {CONNECT_SECONDS} s")
        except (OSError, PlaneUnavailable) as exc:
            error = exc
    raise error


async def _connect_to(endpoint: Endpoint, preamble: bytes) -> Welcome:
    connection = socket.socket(endpoint.family, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        configure(connection)
        loop = asyncio.get_running_loop()
        await _establish(connection, endpoint)
        configure_connected(connection)
        await loop.sock_sendall(connection, preamble)
        greeting = parse_greeting(await _receive(connection, GREETING.size))
        answers = parse_answers(await _receive(connection, greeting.num_answers * ANSWER.size))
        return Welcome(connection, endpoint, greeting.arena_nbytes, answers)
    except BaseException:
        connection.close()
        raise


async def _establish(connection: socket.socket, endpoint: Endpoint) -> None:
    """Do what `loop.sock_connect` does; that of uvloop forgets the interface of an address."""
    code = connection.connect_ex(endpoint.address)
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
