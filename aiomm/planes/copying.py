"""What planes do with runs: check their bounds, and copy them on the loop's thread or another."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any, TypeVar

from ..errors import PlaneUnavailable
from .base import Run

__all__ = ["Copies", "CopyThread", "LoopCopies", "LoopTime", "check_runs", "part_of", "pieces_of"]

Result = TypeVar("Result")

TURN_SECONDS = 1e-3
"""How long short work may hold the loop in one turn, but for two pieces of it."""
PIECE_NBYTES = 1 << 20


def check_runs(runs: Sequence[Run], arena_nbytes: int) -> int:
    """Return the bytes of all `runs` together.

    Raises:
        PlaneUnavailable: one of them leaves the arena, or its rows do not exist.
    """
    total = 0
    for run in runs:
        nbytes = run.nbytes
        if run.first < 0 or run.count < 0 or run.first + run.count > run.rows.num_tokens:
            raise PlaneUnavailable(
                f"rows [{run.first}, {run.first + run.count}) are not in a source of "
                f"{run.rows.num_tokens} rows"
            )
        if run.offset < 0 or run.offset + nbytes > arena_nbytes:
            raise PlaneUnavailable(
                f"bytes [{run.offset}, {run.offset + nbytes}) are not in an arena of "
                f"{arena_nbytes} bytes"
            )
        total += nbytes
    return total


def pieces_of(run: Run, max_nbytes: int) -> Iterator[Run]:
    """Cut `run` into runs of at most `max_nbytes`, or one row."""
    step = max(1, max_nbytes // run.rows.row_nbytes)
    for done in range(0, run.count, step):
        yield part_of(run, done, min(step, run.count - done))


def part_of(run: Run, done: int, count: int) -> Run:
    """Return `count` rows of `run` behind the first `done`."""
    return Run(run.rows, run.first + done, count, run.offset + done * run.rows.row_nbytes)


class LoopTime:
    """The time that short work may take of one turn of the loop, all together."""

    def __init__(self) -> None:
        self._is_up_at: float | None = None
        """In this turn; None before its first work."""

    def is_left(self) -> bool:
        """Whether a piece of work may be done in this turn."""
        if self._is_up_at is None:
            self._is_up_at = time.monotonic() + TURN_SECONDS
            asyncio.get_running_loop().call_soon(self._turn_ended)
            return True
        return time.monotonic() < self._is_up_at

    def _turn_ended(self) -> None:
        self._is_up_at = None


class LoopCopies:
    """Copies on the loop's own thread: shorter than the way to another one and back."""

    def __init__(self) -> None:
        self.time = LoopTime()
        self._one_at_a_time = asyncio.Lock()

    async def run(self, copy: Callable[[Run], None], runs: Iterable[Run]) -> None:
        """Copy piece after piece, in as many turns as that takes; who came first is done first."""
        async with self._one_at_a_time:
            for piece in chain.from_iterable(pieces_of(run, PIECE_NBYTES) for run in runs):
                if not self.time.is_left():
                    await asyncio.sleep(0)
                copy(piece)

    async def drain(self) -> None:
        """Return once none of those that have begun runs."""
        async with self._one_at_a_time:
            return


class CopyThread:
    """One thread for long copies, shared by all attachments of a plane.

    It starts with the first long copy and ends when the last attachment lets go of it. One
    is enough: a second copying thread gains at most 20 %. An attachment that is never let
    go of does not keep the process alive: executor threads are told to end at exit.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._holders = 0
        self._executor: ThreadPoolExecutor | None = None

    def hold(self) -> None:
        """Count one more attachment."""
        self._holders += 1

    def let_go(self) -> None:
        """Count one attachment less; with the last one the thread ends."""
        self._holders -= 1
        if not self._holders and self._executor is not None:
            self._executor.shutdown()
            self._executor = None

    def start(self, work: Callable[[], Result]) -> asyncio.Future[Result]:
        """Run `work` on the thread; the future tells of its end, in one hand-back."""
        loop = asyncio.get_running_loop()
        finished: asyncio.Future[Result] = loop.create_future()
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix=f"aiomm-{self._name}")

        def job() -> None:
            result: Any = None
            error: BaseException | None = None
            try:
                result = work()
            except BaseException as exc:
                error = exc
            try:
                loop.call_soon_threadsafe(_finish, finished, result, error)
            except RuntimeError:
                # The loop was closed in the meantime; nobody waits any more.
                return

        self._executor.submit(job)
        return finished


class Copies:
    """The long copies of one attachment: what of them still runs, and when none does."""

    def __init__(self, thread: CopyThread) -> None:
        self._thread = thread
        self._running: set[asyncio.Future[Any]] = set()
        self._is_closed = False
        thread.hold()

    async def run(self, work: Callable[[], Result]) -> Result:
        """Run `work` on the thread. Cancelling the wait does not stop it."""
        finished = self._thread.start(work)
        self._running.add(finished)
        finished.add_done_callback(self._running.discard)
        return await asyncio.shield(finished)

    async def drain(self) -> None:
        """Return once no copy runs."""
        while self._running:
            await asyncio.wait(self._running)

    async def aclose(self) -> None:
        """Wait for the running copies and let go of the thread. Idempotent."""
        await self.drain()
        if not self._is_closed:
            self._is_closed = True
            self._thread.let_go()


def _finish(finished: asyncio.Future[Any], result: object, error: BaseException | None) -> None:
    if finished.cancelled():
        return
    if error is None:
        finished.set_result(result)
    else:
        finished.set_exception(error)
