"""How a receiver hands its memory to senders of the same host and user: over a Unix socket.

The socket's name is random and abstract, so a killed receiver leaves nothing behind. Whoever
connects is known by the kernel's word on its user, and shows a secret that it has from its own
offer. The connection stays: its end tells each side that the other is gone.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from ..errors import PlaneUnavailable
from ..processes import peer_credentials
from .door import SECRET_NBYTES, Caller, Door

__all__ = ["Desk", "HandedOver", "Invitation", "Visitor", "collect"]

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 5.0
"""How long a sender waits for what it is handed."""
BACKLOG = 1024
NAME_NBYTES = 16
REFUSED = "the receiver refuses this process (another user, or a void offer) or has just ended"


class Invitation(msgspec.Struct, frozen=True, array_like=True):
    """Where to go, and what to show there; part of an offer."""

    name: Annotated[bytes, Meta(min_length=NAME_NBYTES, max_length=NAME_NBYTES)]
    secret: Annotated[bytes, Meta(min_length=SECRET_NBYTES, max_length=SECRET_NBYTES)]


class Desk:
    """The receiver's side: hands over to everybody who is invited.

    Args:
        plane: for logs.
        hand: what to hand over: a message, and descriptors that go with it.
        heard: what a visitor says after it was handed everything; by default it has nothing to
            say, and is sent away.
    """

    def __init__(
        self,
        plane: str,
        hand: Callable[[Visitor], tuple[bytes, list[int]]],
        heard: Callable[[Visitor, bytes], None] | None = None,
    ) -> None:
        self.plane = plane
        self.hand = hand
        self.heard = heard
        self.door: Door[Visitor] = Door(plane)
        self.user = os.geteuid()
        self._name = secrets.token_bytes(NAME_NBYTES)
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        """Begin to listen.

        Raises:
            PlaneUnavailable: no socket can be made.
        """
        try:
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError as exc:
            raise PlaneUnavailable(f"{self.plane}: no socket can be made: {exc}") from exc
        try:
            listener.bind(b"\0" + self._name)
            self._server = await asyncio.get_running_loop().create_unix_server(
                lambda: Visitor(self), sock=listener, backlog=BACKLOG
            )
        except OSError as exc:
            listener.close()
            raise PlaneUnavailable(f"{self.plane}: cannot listen: {exc}") from exc
        except BaseException:
            listener.close()
            raise

    def invite(self, link: int) -> Invitation:
        """Return what the sender on `link` needs to come here; the same each time."""
        return Invitation(self._name, self.door.secret_of(link))

    def forget(self, link: int) -> None:
        """Void the secret of a link, and send its sender away."""
        self.door.forget(link)

    def refuse_more(self) -> None:
        """Hand nothing over any more; who is here stays."""
        self.door.shut()
        if self._server is not None:
            self._server.close()

    async def aclose(self) -> None:
        """Send everybody away. Idempotent."""
        self.refuse_more()
        await self.door.aclose()
        if self._server is not None:
            await self._server.wait_closed()


class Visitor(Caller, asyncio.Protocol):
    """One connection: shows a secret, is handed what there is, stays until its end."""

    def __init__(self, desk: Desk) -> None:
        super().__init__(desk.door)
        self._desk = desk
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Learn from the kernel whose process it is."""
        super().connection_made(transport)
        if self._door.is_shut:
            return
        try:
            with self.socket() as connection:
                user = peer_credentials(connection).uid
        except OSError as exc:  # out of descriptors: whoever it is stays outside
            self._refuse(f"somebody unknown ({exc})")
            return
        if user != self._desk.user:
            self._refuse(f"user {user}")

    def data_received(self, data: bytes) -> None:
        """Take the secret; afterwards, whatever the plane lets senders say."""
        if self.link is not None:
            self._hear(data)
            return
        self._received += data
        if len(self._received) < SECRET_NBYTES:
            return
        link = self._door.owner_of(self._received)
        if link is None:
            self._refuse("a stranger without a secret")
            return
        self.let_in(link)
        try:
            message, descriptors = self._desk.hand(self)
            with self.socket() as connection:
                socket.send_fds(connection, [message], descriptors)
        except (OSError, PlaneUnavailable) as exc:
            self._refuse(f"a sender that cannot be handed the arena ({exc})")

    def say(self, message: bytes) -> None:
        """Tell it something short, if it still listens.

        Not by the transport: that would throw away what it has said before it left.
        """
        with suppress(OSError), self.socket() as connection:
            connection.send(message)

    def socket(self) -> socket.socket:
        """Return the socket with a descriptor of its own, which the caller closes."""
        descriptor = self._transport.get_extra_info("socket").fileno()
        return socket.fromfd(descriptor, socket.AF_UNIX, socket.SOCK_STREAM)

    def _hear(self, data: bytes) -> None:
        if self._desk.heard is None:
            self._refuse("a sender that goes on talking")
        else:
            self._desk.heard(self, data)

    def _refuse(self, whom: str) -> None:
        logger.warning("x %s: refused %s", self._desk.plane, whom)
        self.abort()


class HandedOver(NamedTuple):
    """What a sender was handed."""

    connection: socket.socket
    """Open and not blocking; its end is the receiver's."""
    message: bytes
    descriptors: list[int]


async def collect(plane: str, invitation: Invitation, nbytes: int, num_fds: int) -> HandedOver:
    """Show the secret of an invitation; return what is handed over, which the caller closes.

    Args:
        plane: for errors.
        invitation: from the offer.
        nbytes: of the message.
        num_fds: descriptors that come with it.

    Raises:
        PlaneUnavailable: the receiver is on another host or in another network namespace, runs
            as another user, refuses the secret, or is gone; or no descriptor is free here.
    """
    loop = asyncio.get_running_loop()
    try:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    except OSError as exc:
        raise PlaneUnavailable(f"{plane}: no socket can be made: {exc}") from exc
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            await loop.sock_connect(connection, b"\0" + invitation.name)
            if peer_credentials(connection).uid != os.geteuid():
                raise PlaneUnavailable(f"{plane}: the receiver runs as another user")
            await loop.sock_sendall(connection, invitation.secret)
            await _readable(connection)
        return HandedOver(connection, *_take(plane, connection, nbytes, num_fds))
    except OSError as exc:
        connection.close()
        raise PlaneUnavailable(f"{plane}: {_explain(exc)}") from exc
    except BaseException:
        connection.close()
        raise


def _take(
    plane: str, connection: socket.socket, nbytes: int, num_fds: int
) -> tuple[bytes, list[int]]:
    message, descriptors, flags, _ = socket.recv_fds(connection, nbytes, max(1, num_fds))
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    is_whole = len(message) == nbytes and not flags & socket.MSG_CTRUNC
    if not is_whole or len(descriptors) != num_fds:
        for descriptor in descriptors:
            os.close(descriptor)
        if flags & socket.MSG_CTRUNC and len(descriptors) < num_fds:
            raise PlaneUnavailable(f"{plane}: this process has no descriptor free for what it got")
        raise PlaneUnavailable(f"{plane}: {REFUSED}")
    return message, list(descriptors)


def _explain(exc: OSError) -> str:
    match exc:
        case ConnectionRefusedError():
            return "no such receiver; it is gone, or in another network namespace or host"
        case ConnectionError():
            return REFUSED
        case TimeoutError():
            return f"the receiver has not answered for {ANSWER_SECONDS} s"
        case _:
            return f"the receiver cannot be reached: {exc}"


async def _readable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(connection.fileno(), _wake, ready)
    try:
        await ready
    finally:
        loop.remove_reader(connection.fileno())


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
