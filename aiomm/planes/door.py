"""Who may come in, where anybody can connect: whoever shows the secret of its link, and soon."""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
from typing import Any, Generic, TypeVar, cast

__all__ = ["HANDSHAKE_SECONDS", "MAX_STRANGERS", "SECRET_NBYTES", "Caller", "Door"]

logger = logging.getLogger(__name__)

SECRET_NBYTES = 16
HANDSHAKE_SECONDS = 5.0
"""After so long a connection that has not shown a secret is closed."""
MAX_STRANGERS = 64
"""Connections that have not shown a secret; one more, and the oldest of them is closed."""

AnyCaller = TypeVar("AnyCaller", bound="Caller")


class Door(Generic[AnyCaller]):
    """The secrets of all links of one export, and the connections that have come to it.

    Args:
        plane: for logs.
    """

    def __init__(self, plane: str) -> None:
        self.plane = plane
        self.callers: set[AnyCaller] = set()
        """All connections."""
        self.strangers: dict[AnyCaller, None] = {}
        """Those that have not shown a secret yet, oldest first."""
        self.is_shut = False
        self._secrets: dict[int, bytes] = {}
        self._nobodys = secrets.token_bytes(SECRET_NBYTES)
        self._has_complained = False

    def secret_of(self, link: int) -> bytes:
        """Return what the sender on `link` must show; the same each time."""
        return self._secrets.setdefault(link, secrets.token_bytes(SECRET_NBYTES))

    def knows(self, link: int, secret: bytes) -> bool:
        """Whether `secret` is that of `link`; takes the same time for every wrong one."""
        return hmac.compare_digest(self._secrets.get(link, self._nobodys), secret)

    def owner_of(self, secret: bytes) -> int | None:
        """Return the link that `secret` is of, if there is one; takes the same time for all."""
        owner = None
        for link, known in self._secrets.items():
            if hmac.compare_digest(known, secret):
                owner = link
        return owner

    def void(self, link: int) -> None:
        """Forget the secret of `link`; who is in stays."""
        self._secrets.pop(link, None)

    def forget(self, link: int) -> None:
        """Forget the secret of `link`, and close its connections."""
        self.void(link)
        for caller in list(self.callers):
            if caller.link == link:
                caller.abort()

    def shut(self) -> None:
        """Let nobody in any more; who is in stays."""
        self.is_shut = True
        self._secrets.clear()

    async def aclose(self) -> None:
        """Let nobody in any more, and close every connection. Idempotent."""
        self.shut()
        for caller in list(self.callers):
            caller.abort()
        if self.callers:
            await asyncio.wait([caller.lost for caller in self.callers])

    def complain(self, address: object, about: str) -> None:
        """Log who misbehaves: the first one as a warning, the rest for debugging."""
        level = logging.DEBUG if self._has_complained else logging.WARNING
        self._has_complained = True
        logger.log(level, "x %s: closed the connection from %s: %s", self.plane, address, about)


class Caller(asyncio.BaseProtocol):
    """One connection: a stranger, until :meth:`let_in` says whose it is.

    A subclass is one of asyncio's protocols, too, and reads the secret.
    """

    def __init__(self, door: Door[Any]) -> None:
        self.link: int | None = None
        """Whose it is; None for a stranger."""
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when nothing of it is left."""
        self._door = door
        self._is_held_back = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin as a stranger, whose time is short."""
        self._transport = cast("asyncio.Transport", transport)
        self._deadline = asyncio.get_running_loop().call_later(HANDSHAKE_SECONDS, self.abort)
        door = self._door
        door.callers.add(self)
        door.strangers[self] = None
        if len(door.strangers) > MAX_STRANGERS:
            next(iter(door.strangers)).abort()
        if door.is_shut:
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Leave the door."""
        self._leave_strangers()
        self._door.callers.discard(self)
        if not self.lost.done():
            self.lost.set_result(None)

    def let_in(self, link: int) -> None:
        """Say whose it is: it has shown the secret of `link`."""
        self.link = link
        self._leave_strangers()

    def hold_back(self, is_full: bool) -> None:
        """Read nothing from it while there is more than can be dealt with."""
        if is_full != self._is_held_back and not self._transport.is_closing():
            self._is_held_back = is_full
            if is_full:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    def abort(self) -> None:
        """Close at once."""
        self._leave_strangers()
        self._transport.abort()

    def complain(self, about: str) -> None:
        """Log what is wrong with it."""
        self._door.complain(self._transport.get_extra_info("peername"), about)

    def _leave_strangers(self) -> None:
        self._deadline.cancel()
        self._door.strangers.pop(self, None)
