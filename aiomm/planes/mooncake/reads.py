"""Reads from peers' memory, begun and watched on one thread per engine.

The engine tells nobody when a read has ended: it has to be asked. This thread asks, sleeps in
between, and blocks while there is nothing to ask for.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from ...buffers.arena import HostArena
from ...buffers.cuda import CudaArena
from ...buffers.memcpy import address_of
from .library import TransferEngine

__all__ = ["Reads", "Target", "target_in"]

MAX_RUNNING = 256
"""Of more than 2048 at once the engine loses some for ever."""
FIRST_PAUSE, LONGEST_PAUSE = 30e-6, 200e-6
"""Seconds between two questions: they get fewer while nothing ends."""
DONE, FAILED = 1, -1
"""The statuses that are final; after one the read must not be asked for again."""


class Target(NamedTuple):
    """Where the bytes of a read go."""

    address: int
    nbytes: int
    memory: object
    """Stays until the read has ended, since this refers to it."""


def target_in(arena: HostArena | CudaArena, offset: int, nbytes: int) -> Target:
    """Return bytes of an arena, at least one.

    Raises:
        ValueError: they do not lie inside the arena.
        PoolClosed: the arena is closed.
    """
    if isinstance(arena, CudaArena):
        return Target(arena.address(offset, nbytes), nbytes, arena.memory)
    view = arena.view(offset, nbytes)
    return Target(address_of(view), nbytes, view)


class _Read(NamedTuple):
    session: str
    source: int
    target: Target
    loop: asyncio.AbstractEventLoop
    ended: asyncio.Future[bool]


class Reads:
    """The reads of one engine.

    When one has ended, nothing of it can land any more: the target is this process's memory,
    and the engine has closed the connection or emptied it.
    """

    def __init__(self, engine: TransferEngine) -> None:
        self._engine = engine
        self._changed = threading.Condition()
        self._waiting: deque[_Read] = deque()
        self._running: dict[int, _Read] = {}
        self._holders = 0
        self._thread: threading.Thread | None = None

    def hold(self) -> None:
        """Count one more who reads."""
        with self._changed:
            self._holders += 1

    def let_go(self) -> None:
        """Count one less; after the last one the thread ends with the last read."""
        with self._changed:
            self._holders -= 1
            thread = self._thread
            is_idle = not (self._holders or self._waiting or self._running)
            self._changed.notify()
        if thread is not None and is_idle:
            thread.join()

    def start(self, session: str, source: int, target: Target) -> asyncio.Future[bool]:
        """Read the peer's bytes from address `source` on into `target`.

        The future tells whether they are there. It is never done before the read has ended,
        and must not be cancelled.
        """
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[bool] = loop.create_future()
        with self._changed:
            self._waiting.append(_Read(session, source, target, loop, ended))
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._work, name="aiomm-mooncake-reads", daemon=True
                )
                self._thread.start()
            self._changed.notify()
        return ended

    def _work(self) -> None:
        pause = FIRST_PAUSE
        while (begun := self._next(pause)) is not None:
            ended = [(read, False) for read in begun if not self._begin(read)]
            ended += self._ended()
            _tell(ended)
            pause = FIRST_PAUSE if ended or begun else min(1.5 * pause, LONGEST_PAUSE)

    def _next(self, pause: float) -> list[_Read] | None:
        """Return the reads to begin, after a while or at once; None when it is all over."""
        with self._changed:
            if self._running and not self._waiting:
                self._changed.wait(pause)
            while not (self._running or self._waiting):
                if not self._holders:
                    self._thread = None
                    return None
                self._changed.wait()
            room = min(MAX_RUNNING - len(self._running), len(self._waiting))
            return [self._waiting.popleft() for _ in range(room)]

    def _begin(self, read: _Read) -> bool:
        address, nbytes, _ = read.target
        batch = self._engine.batch_transfer_async_read(
            read.session, [address], [read.source], [nbytes]
        )
        if batch:
            self._running[batch] = read
        return batch != 0

    def _ended(self) -> list[tuple[_Read, bool]]:
        """Ask for every running read; drop those that have ended and return how."""
        ended = []
        for batch in list(self._running):
            status = self._engine.transfer_check_status(batch)
            if status in (DONE, FAILED):
                ended.append((self._running.pop(batch), status == DONE))
        return ended


def _tell(ended: Sequence[tuple[_Read, bool]]) -> None:
    """Tell each loop of its reads in one call."""
    for loop in {read.loop for read, _ in ended}:
        own = [(read.ended, landed) for read, landed in ended if read.loop is loop]
        try:
            loop.call_soon_threadsafe(_resolve, own)
        except RuntimeError:
            continue  # the loop was closed in the meantime; nobody waits any more


def _resolve(ended: Sequence[tuple[asyncio.Future[bool], bool]]) -> None:
    for future, landed in ended:
        if not future.done():
            future.set_result(landed)
