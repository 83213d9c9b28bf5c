"""What planes do with runs: check their bounds, and copy them on the loop's thread or another."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import chain, count, islice
from typing import Any, TypeVar

from ..buffers.memcpy import PIECE_NBYTES, SharedCopies, copy_without_gil
from ..errors import PlaneUnavailable
from .base import Run

__all__ = [
    "MAX_THREADS",
    "PIECE_NBYTES",
    "STRIDED_NBYTES",
    "Copies",
    "CopyThreads",
    "LoopCopies",
    "LoopTime",
    "check_runs",
    "is_dense",
    "num_processors",
    "part_of",
    "pieces_of",
    "shares_of",
]

Result = TypeVar("Result")

TURN_SECONDS = 1e-3
"""After so long in one turn of the loop no more short work begins: a piece, or a short write."""
LATE_SECONDS = 2.5e-3
"""Half of the time for which a busy thread may keep the GIL."""
STRIDED_NBYTES = 1 << 17
"""Of rows with gaps, up to here on the loop: each element may take 7 ns, and be a byte."""
SHARE_NBYTES = 2 << 20
"""At least so much of a long copy is for each of the threads that share it."""
MAX_THREADS = 4
"""Threads that share one copy, unless the plane is told otherwise."""
FEW_PROCESSORS = 3
"""On so few processors the threads compete with the loop and with the peer's threads: each share is
twice as long."""


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


def is_dense(run: Run) -> bool:
    """Whether the bytes of `run` lie together, at an address that is known."""
    return run.rows.address(run.first) is not None


def piece_nbytes(run: Run) -> int:
    """Return how much of `run` is copied on the loop in one piece."""
    return PIECE_NBYTES if is_dense(run) else STRIDED_NBYTES


def pieces_of(run: Run, max_nbytes: int) -> Iterator[Run]:
    """Cut `run` into runs of at most `max_nbytes`, or one row."""
    if run.count and run.nbytes <= max_nbytes:
        yield run
        return
    step = max(1, max_nbytes // run.rows.row_nbytes)
    for done in range(0, run.count, step):
        yield part_of(run, done, min(step, run.count - done))


def part_of(run: Run, done: int, count: int) -> Run:
    """Return `count` rows of `run` behind the first `done`."""
    return Run(run.rows, run.first + done, count, run.offset + done * run.rows.row_nbytes)


def shares_of(runs: Sequence[Run], num_shares: int) -> list[list[Run]]:
    """Share `runs` out, each share as many bytes, but for a row; at most `num_shares`."""
    share_nbytes = -(-sum(run.nbytes for run in runs) // num_shares)
    shares: list[list[Run]] = []
    room = 0
    for run in runs:
        done = 0
        while done < run.count:
            if room <= 0:
                shares.append([])
                room = share_nbytes
            part = part_of(run, done, min(-(-room // run.rows.row_nbytes), run.count - done))
            shares[-1].append(part)
            room -= part.nbytes
            done += part.count
    return shares


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

    async def run(self, pieces: Iterable[Callable[[], object]]) -> None:
        """Make piece after piece, in as many turns as that takes; who came first is done first."""
        async with self._one_at_a_time:
            for copy in pieces:
                if not self.time.is_left():
                    await asyncio.sleep(0)
                copy()

    async def copy(self, copy: Callable[[Run], object], runs: Iterable[Run]) -> None:
        """Do the same with `runs`, cut into pieces."""
        pieces = chain.from_iterable(pieces_of(run, piece_nbytes(run)) for run in runs)
        await self.run(partial(copy, piece) for piece in pieces)

    async def drain(self) -> None:
        """Return once none of those that have begun runs."""
        async with self._one_at_a_time:
            return


class CopyThreads:
    """Threads for long copies, shared by all attachments of a plane.

    They start with the first long copies and end when the last attachment lets go of them. An
    attachment that is never let go of does not keep the process alive: executor threads are
    told to end at exit.

    Args:
        name: of the plane.
        max_threads: at most so many, and not more than there are processors.
    """

    def __init__(self, name: str, max_threads: int = 1) -> None:
        self._name = name
        processors = num_processors()
        self.num_threads = min(max_threads, processors)
        self.share_nbytes = SHARE_NBYTES * (2 if processors <= FEW_PROCESSORS else 1)
        """Fewer bytes than this are not worth waking a thread."""
        self.are_late = False
        """Whether works began late when the threads had nothing to do, or would: others keep the
        GIL, or the processors. To hand a copy over, and to be told of its end, may take longer
        than it."""
        self._num_unfinished = 0
        self._lock = threading.Lock()
        self._holders = 0
        self._executor: ThreadPoolExecutor | None = None

    def hold(self) -> None:
        """Count one more attachment."""
        self._holders += 1

    def let_go(self) -> None:
        """Count one attachment less; with the last one the threads end."""
        self._holders -= 1
        if not self._holders and self._executor is not None:
            self._executor.shutdown()
            self._executor = None

    def start(self, works: Sequence[Callable[[], Result]]) -> asyncio.Future[list[Result]]:
        """Run `works` side by side; the future tells of the end of all, in one hand-back.

        If any of them fails, so does the future, but not before the others have ended.

        Raises:
            PlaneUnavailable: nobody holds the threads any more.
        """
        if not self._holders:
            raise PlaneUnavailable(f"the threads of {self._name} have ended")
        loop = asyncio.get_running_loop()
        finished: asyncio.Future[list[Result]] = loop.create_future()
        if not works:
            finished.set_result([])
            return finished
        if self._executor is None:
            self._executor = self._make_executor()
        results: list[Any] = [None] * len(works)
        errors: list[BaseException] = []
        pending, running = dict(enumerate(works)), set(range(len(works)))
        with self._lock:
            were_idle = not self._num_unfinished
            self._num_unfinished += 1
        submitted, begun = time.monotonic(), [0.0] * len(works)

        def run(number: int) -> None:
            work = pending.pop(number, None)
            if work is None:
                return  # given up before a thread could take it
            begun[number] = time.monotonic()
            try:
                results[number] = work()
            except BaseException as exc:
                errors.append(exc)
            del work  # kept by nobody here: memory is free as soon as its last work is over
            end(number)

        def end(number: int) -> None:
            with self._lock:
                running.remove(number)
                if running:
                    return
                self._num_unfinished -= 1
                if were_idle:
                    self.are_late = max(begun) - submitted > LATE_SECONDS
            try:
                loop.call_soon_threadsafe(_finish, finished, results, errors)
            except RuntimeError:
                # The loop was closed in the meantime; nobody waits any more.
                return

        try:
            for number in range(len(works)):
                self._executor.submit(run, number)
        except RuntimeError as exc:  # no thread can be started: those that run go on to their end
            errors.append(PlaneUnavailable(f"{self._name}: {exc}"))
            for number in range(len(works)):
                if pending.pop(number, None) is not None:
                    end(number)
        return finished

    def _make_executor(self) -> ThreadPoolExecutor:
        prefix = f"aiomm-{self._name}"
        if self.num_threads == 1:
            return ThreadPoolExecutor(1, thread_name_prefix=prefix)
        keep_apart = partial(_keep_apart, count(), self.num_threads)
        return ThreadPoolExecutor(self.num_threads, prefix, keep_apart)


class Copies:
    """The long copies of one attachment: what of them still runs, and when none does.

    Args:
        threads: that make them.
        on_loop: makes them where threads would be late; by default one for these copies alone.
    """

    def __init__(self, threads: CopyThreads, on_loop: LoopCopies | None = None) -> None:
        self._threads = threads
        self._on_loop = on_loop or LoopCopies()
        self._running: set[asyncio.Future[Any]] = set()
        self._is_closed = False
        threads.hold()

    async def run(self, work: Callable[[], Result]) -> Result:
        """Run `work` on a thread. Cancelling the wait does not stop it."""
        (result,) = await self.run_all([work])
        return result

    async def share_out(self, copy: Callable[[Run], object], runs: Sequence[Run]) -> None:
        """Have each thread `copy` its share of `runs`, or the loop's own if threads are late.

        Cancelling the wait does not stop threads.
        """
        if self.are_late:
            await self._on_loop.copy(copy, runs)
            self.look_again()
            return
        shares = shares_of(runs, self.num_shares(sum(run.nbytes for run in runs)))
        await self.run_all([partial(_copy_each, copy, share) for share in shares])

    @property
    def are_late(self) -> bool:
        """Whether it takes threads long to begin; see :attr:`CopyThreads.are_late`."""
        return self._threads.are_late

    async def share(self, copies: SharedCopies, *, probes: bool) -> None:
        """Make `copies` by threads, or on the loop's own if they are or would be late.

        What is one piece is made on the loop's in any case. Cancelling the wait does not stop
        threads.

        Args:
            copies: which nobody makes yet.
            probes: find out by the first piece, and not only by threads that were late.
        """
        if self.are_late:
            await self._on_loop.run(copies.pieces())
            self.look_again()
            return
        begins_here = (probes or copies.num_left == 1) and self._on_loop.time.is_left()
        if begins_here and self._would_be_late(copies):
            await self._on_loop.run(copies.pieces())
        elif copies.num_left:
            await self.run_all([copies.run] * self.num_shares(copies.nbytes))

    def _would_be_late(self, copies: SharedCopies) -> bool:
        """Make the first piece here, without the GIL: is that long in coming back?"""
        for copy in islice(copies.pieces(copy_without_gil), 1):
            begun = time.monotonic()
            copy()
            self._threads.are_late = time.monotonic() - begun > LATE_SECONDS
        return self._threads.are_late

    def look_again(self) -> None:
        """Find out whether threads begin in time again, without anything to do for them."""
        if not self._is_closed:
            self.start([lambda: None])

    def is_long(self, nbytes: float) -> bool:
        """Whether the loop's own thread takes longer for so many bytes than threads that share."""
        return nbytes > 2 * self._threads.share_nbytes

    def num_shares(self, nbytes: int) -> int:
        """Return into how many shares to divide work on so many bytes."""
        return max(1, min(self._threads.num_threads, -(-nbytes // self._threads.share_nbytes)))

    async def run_all(self, works: Sequence[Callable[[], Result]]) -> list[Result]:
        """Run `works` side by side on the threads. Cancelling the wait does not stop them."""
        return await asyncio.shield(self.start(works))

    def start(self, works: Sequence[Callable[[], Result]]) -> asyncio.Future[list[Result]]:
        """Do the same, and return what is over when they are. Do not cancel it."""
        finished = self._threads.start(works)
        self._running.add(finished)
        finished.add_done_callback(self._running.discard)
        return finished

    async def drain(self) -> None:
        """Return once no copy runs."""
        while self._running:
            await asyncio.wait(self._running)

    async def aclose(self) -> None:
        """Wait for the running copies and let go of the threads. Idempotent."""
        await self.drain()
        if not self._is_closed:
            self._is_closed = True
            self._threads.let_go()


def _copy_each(copy: Callable[[Run], object], runs: Sequence[Run]) -> None:
    for run in runs:
        copy(run)


def _finish(
    finished: asyncio.Future[list[Any]], results: list[Any], errors: list[BaseException]
) -> None:
    if finished.cancelled():
        return
    if errors:
        finished.set_exception(errors[0])
    else:
        finished.set_result(results)


def num_processors() -> int:
    """Return how many this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


def _keep_apart(numbers: Iterator[int], num_threads: int) -> None:
    """Bind this thread to its own part of the processors, if there is one for each.

    Threads that one thread wakes begin on its processor, and the second then waits there until
    the first has had its slice of 3 ms, whatever else is idle: as long as the whole copy takes.
    """
    processors = sorted(os.sched_getaffinity(0))
    if len(processors) >= num_threads:
        with suppress(OSError):  # only faster, and a sandbox may forbid it
            os.sched_setaffinity(0, processors[next(numbers) :: num_threads])
