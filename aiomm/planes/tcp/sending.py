"""The sender's side: writes, and the connection that is made anew under them when it breaks."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections.abc import Callable, Sequence
from typing import ClassVar

from ...errors import PlaneUnavailable
from ..base import GrantKey, RemoteArena, Run
from ..copying import Copies, CopyThreads, check_runs
from .connecting import Welcome, connect
from .connection import DataConnection, Write
from .progress import MAX_ENDED
from .sockets import LOST_SECONDS, resolve
from .wire import MAX_RUNS, Status, TcpOffer

__all__ = ["TcpArena"]

logger = logging.getLogger(__name__)

MAX_PAUSE = 1.0
"""Seconds between two attempts to connect, at most; the first come in quick succession."""

STATUS_TEXTS = {
    Status.NOT_PERMITTED: "the receiver has not granted these bytes",
    Status.REVOKED: "the receiver has withdrawn the grant",
}


class TcpArena(RemoteArena):
    """A receiver's arena behind one data connection at a time.

    When the connection breaks, the writes that are on their way wait for the next one and go on
    where they were. That ends when the receiver refuses, when nobody listens any more, and when
    no byte has landed for :data:`LOST_SECONDS`.
    """

    carries_notes: ClassVar[bool] = True

    def __init__(
        self, offer: TcpOffer, attachment: int, welcome: Welcome, threads: CopyThreads
    ) -> None:
        self._offer = offer
        self._attachment = attachment
        self._address = welcome.address
        self._arena_nbytes = welcome.arena_nbytes
        self._connection = DataConnection(welcome.connection)
        self._copies = Copies(threads)
        self._numbers = itertools.count()
        self._room = asyncio.Semaphore(MAX_ENDED)
        self._unanswered: dict[int, Write] = {}
        self._reconnecting: asyncio.Task[DataConnection] | None = None
        self._is_closed = False
        self._num_ended = 0
        self._progress = (0, 0)
        """Writes that had ended at the last break, and bytes of the others that had landed."""
        self._vain_since: float | None = None
        """When a connection broke, if no byte has landed since then."""

    @classmethod
    async def attach(cls, offer: TcpOffer, threads: CopyThreads) -> TcpArena:
        """Connect to the receiver behind `offer`.

        Raises:
            PlaneUnavailable: it cannot be reached within 5 s, or refuses the offer's key.
        """
        attachment = secrets.randbits(64)
        try:
            addresses = await resolve(offer.host, offer.port)
            welcome = await connect(offer, addresses, attachment=attachment, oldest=0)
        except OSError as exc:
            where = f"{offer.host} port {offer.port}"
            raise PlaneUnavailable(f"tcp: {where} cannot be reached: {exc}") from exc
        return cls(offer, attachment, welcome, threads)

    async def write(self, grant: GrantKey, runs: Sequence[Run]) -> None:
        """Send `runs`; return once the receiver says that every byte has landed.

        Raises:
            PlaneUnavailable: the receiver refuses the write, or is gone.
        """
        await self._write_all(grant, runs, None)

    async def write_and_note(
        self, grant: GrantKey, runs: Sequence[Run], note: Callable[[], bytes]
    ) -> None:
        """Send `runs` and a note; return once the receiver says that everything is there.

        Raises:
            PlaneUnavailable: the receiver refuses the write, or is gone.
        """
        await self._write_all(grant, runs, note)

    async def _write_all(
        self, grant: GrantKey, runs: Sequence[Run], note: Callable[[], bytes] | None
    ) -> None:
        check_runs(runs, self._arena_nbytes)
        full = [run for run in runs if run.nbytes]
        for start in range(0, len(full), MAX_RUNS):
            part = full[start : start + MAX_RUNS]
            is_last = start + MAX_RUNS >= len(full)
            async with self._room:
                await self._write(
                    Write(next(self._numbers), grant, part, note if is_last else None)
                )

    async def _write(self, write: Write) -> None:
        self._unanswered[write.number] = write
        try:
            await self._carry(write)
        finally:
            del self._unanswered[write.number]
            self._num_ended += 1

    async def quiesce(self) -> None:
        """Return at once: a failed write's connection is closed, or its bytes were counted.

        What is still under way inside the network is the receiver's to throw away; its
        `revoke` always can.
        """
        await self._copies.drain()

    async def aclose(self) -> None:
        """Close the connection; running writes fail."""
        self._is_closed = True
        self._connection.lose(PlaneUnavailable("tcp: detached"))
        if self._reconnecting is not None:
            self._reconnecting.cancel()
            await asyncio.wait([self._reconnecting])
        await self._connection.packing.aclose(self._copies)
        await self._copies.aclose()

    async def _carry(self, write: Write) -> None:
        """Send what is left of `write` over one connection after the other."""
        while write.status is Status.UNFINISHED:
            connection = await self._connected()
            if write.status is Status.UNFINISHED:
                await connection.carry(write, self._copies)
        if write.status is not Status.LANDED:
            raise PlaneUnavailable(f"tcp: {STATUS_TEXTS[write.status]}")

    async def _connected(self) -> DataConnection:
        """Return the connection; if it is broken, the next one, which all writes wait for."""
        if self._is_closed:
            raise PlaneUnavailable("tcp: detached")
        if not self._connection.has_ended:
            return self._connection
        if self._reconnecting is None:
            self._reconnecting = asyncio.get_running_loop().create_task(self._reconnect())
            self._reconnecting.add_done_callback(self._reconnected)
        task = self._reconnecting
        await asyncio.wait([task])
        if task.cancelled():
            raise PlaneUnavailable("tcp: detached")
        return task.result()

    def _reconnected(self, task: asyncio.Task[DataConnection]) -> None:
        self._reconnecting = None
        if not task.cancelled():
            task.exception()  # perhaps every write that waited for it has been cancelled

    async def _reconnect(self) -> DataConnection:
        """Connect again until that succeeds, or is in vain."""
        error: Exception | None = self._connection.error
        logger.info("! tcp: %s; connecting anew", error)
        while True:
            await asyncio.sleep(self._pause(error))  # between attempts, not for anybody
            try:
                welcome = await connect(
                    self._offer,
                    [self._address],
                    attachment=self._attachment,
                    oldest=min(self._unanswered, default=0),
                )
            except OSError as exc:
                error = exc
                continue
            broken, self._connection = self._connection, DataConnection(welcome.connection)
            self._resume(welcome)
            await broken.packing.aclose(self._copies)
            return self._connection

    def _pause(self, error: Exception | None) -> float:
        """Return the seconds until the next attempt: as many as have passed in vain, to a limit.

        Raises:
            PlaneUnavailable: nothing has landed for too long.
        """
        now = asyncio.get_running_loop().time()
        progress = (self._num_ended, sum(write.landed for write in self._unanswered.values()))
        if self._vain_since is None or progress != self._progress:
            self._progress, self._vain_since = progress, now
        passed = now - self._vain_since
        if passed > LOST_SECONDS:
            self._vain_since = None
            raise PlaneUnavailable(f"tcp: nothing has landed for {LOST_SECONDS} s: {error}")
        return min(passed, MAX_PAUSE)

    def _resume(self, welcome: Welcome) -> None:
        """Put every write where the receiver says that it stands."""
        for write in self._unanswered.values():
            write.landed = 0
        try:
            if welcome.arena_nbytes != self._arena_nbytes:
                raise PlaneUnavailable("tcp: another receiver has taken the place of the first")
            for answer in welcome.answers:
                if answer.number in self._unanswered:
                    self._unanswered[answer.number].hear(answer)
        except PlaneUnavailable as exc:
            self._connection.lose(exc)
            raise
