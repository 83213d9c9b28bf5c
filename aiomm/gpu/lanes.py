"""Copies of a GPU: each on a stream that nobody else uses meanwhile, so that none holds up another.

A copy that waits for a slow encoder keeps its lane, and the next one takes another.
"""

from __future__ import annotations

import _thread
import asyncio
import ctypes
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

from .runtime import Copy, GpuError, GpuRuntime

__all__ = ["Lanes", "Mark", "finished", "lanes_of"]

MAX_LANES = 32
"""On each device. More copies at once wait for one of them in line."""
MOMENT = 150e-6
"""Seconds in which the end of a copy is looked for at every turn of the loop. To wake a thread and
then the loop takes 80 to 130 us on an H200's host, and there 256 MiB are copied in as many."""


class Mark:
    """A point in a stream's work: over when all is done that the stream had been given by then.

    Args:
        runtime: of this process.
        device: the stream's.
        stream: CUDA's handle.
        event: to use, which stays the caller's; by default a new one.

    Raises:
        GpuError: CUDA refuses.
    """

    def __init__(
        self, runtime: GpuRuntime, device: int, stream: int, event: int | None = None
    ) -> None:
        self.runtime = runtime
        self.device = device
        self._is_own = event is None
        self._event = runtime.make_event(device) if event is None else event
        runtime.record(device, self._event, stream)

    def is_over(self) -> bool:
        """Whether it is over.

        Raises:
            GpuError: what comes before it has failed.
        """
        return self.runtime.query(self.device, self._event)

    def delay(self, stream: int) -> None:
        """Let `stream` of the same process go on only when this is over."""
        self.runtime.wait(self.device, stream, self._event)

    def synchronize(self) -> None:
        """Return when it is over. Blocks.

        Raises:
            GpuError: what comes before it has failed.
        """
        self.runtime.synchronize(self.device, self._event)

    def __del__(self) -> None:
        if hasattr(self, "_event") and self._is_own:
            try:
                self.runtime.destroy_event(self.device, self._event)
            except GpuError:
                return  # the device is lost, and its events with it


async def finished(mark: Mark) -> None:
    """Return when `mark` is over: at once, within a moment, or when a sleeping thread is woken.

    Raises:
        GpuError: what comes before it has failed.
    """
    until = time.perf_counter() + MOMENT
    while not mark.is_over():
        if time.perf_counter() > until:
            await _synchronized(mark)
            return
        await asyncio.sleep(0)


async def _synchronized(mark: Mark) -> None:
    """Have a thread of its own wait: one event may be over long before another."""
    loop = asyncio.get_running_loop()
    over: asyncio.Future[None] = loop.create_future()

    def wait() -> None:
        error: GpuError | None = None
        try:
            mark.synchronize()
        except GpuError as exc:
            error = exc
        try:
            loop.call_soon_threadsafe(_resolve, over, error)
        except RuntimeError:
            return  # the loop was closed in the meantime

    # `Thread.start` would wait for the thread, and beside a busy one for milliseconds.
    _thread.start_new_thread(wait, ())
    await over


def _resolve(over: asyncio.Future[None], error: GpuError | None) -> None:
    if over.done():
        return
    if error is None:
        over.set_result(None)
    else:
        over.set_exception(error)


class Lane(NamedTuple):
    """One stream, and an event to see how far it is."""

    stream: int
    event: int


class Lanes:
    """The streams of one device that aiomm copies on."""

    def __init__(self, runtime: GpuRuntime, device: int) -> None:
        self._runtime = runtime
        self._device = device
        self._free: list[Lane] = []
        self._num_made = 0
        self._lock = threading.Lock()
        self._line: deque[tuple[asyncio.AbstractEventLoop, asyncio.Future[Lane]]] = deque()

    async def copy(self, copies: Sequence[Copy], after: Sequence[Mark] = ()) -> None:
        """Copy when all of `after` is over; return when it is done. It must not be cancelled.

        Raises:
            GpuError: it has failed, and nothing of it lands any more.
        """
        lane = await self._take()
        try:
            error = self._begin(lane, copies, after)
            await finished(self._end_of(lane))
        finally:
            self._give(lane)
        if error is not None:
            raise error

    def copy_now(self, copies: Sequence[Copy], after: Sequence[Mark] = ()) -> None:
        """Do the same, on a thread that may block.

        Raises:
            GpuError: it has failed, and nothing of it lands any more.
        """
        with self._own_lane() as lane:
            error = self._begin(lane, copies, after)
            self._end_of(lane).synchronize()
        if error is not None:
            raise error

    def copy_to_host(
        self, target: bytearray | memoryview, source: int, after: Sequence[Mark] = ()
    ) -> None:
        """Copy as many bytes as `target` has, from the device's address `source` on. Blocks.

        Raises:
            GpuError: it has failed.
        """
        if len(target):
            array = (ctypes.c_ubyte * len(target)).from_buffer(target)
            self.copy_now([Copy(ctypes.addressof(array), source, len(target))], after)

    def _begin(self, lane: Lane, copies: Sequence[Copy], after: Sequence[Mark]) -> GpuError | None:
        """Give copies to a lane. After an error some may be under way: wait for the lane."""
        try:
            for mark in after:
                mark.delay(lane.stream)
            if copies:
                self._runtime.copy(self._device, lane.stream, copies)
        except GpuError as exc:
            return exc
        return None

    @contextmanager
    def _own_lane(self) -> Iterator[Lane]:
        """Use a stream beyond all counting: whoever blocks a thread is few."""
        with self._lock:
            lane = self._free.pop() if self._free else None
        if lane is None:
            lane = self._made()
        try:
            yield lane
        finally:
            self._give(lane)

    def _end_of(self, lane: Lane) -> Mark:
        return Mark(self._runtime, self._device, lane.stream, lane.event)

    def _made(self) -> Lane:
        """Return a new lane: with its event, since later there may be no memory for one."""
        event = self._runtime.make_event(self._device)
        try:
            return Lane(self._runtime.make_stream(self._device), event)
        except GpuError:
            self._runtime.destroy_event(self._device, event)
            raise

    async def _take(self) -> Lane:
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[Lane] | None = None
        with self._lock:
            if self._free:
                return self._free.pop()
            if self._num_made < MAX_LANES:
                self._num_made += 1
            else:
                turn = loop.create_future()
                self._line.append((loop, turn))
        if turn is not None:
            return await turn
        try:
            return self._made()
        except GpuError as exc:
            self._not_made(exc)
            raise

    def _not_made(self, error: GpuError) -> None:
        """Count one lane less; if there is none at all, whoever waits for one waits in vain."""
        with self._lock:
            self._num_made -= 1
            in_vain = [] if self._num_made else list(self._line)
            if in_vain:
                self._line.clear()
        for loop, turn in in_vain:
            with suppress(RuntimeError):  # that loop was closed in the meantime
                loop.call_soon_threadsafe(_fail, turn, error)

    def _give(self, lane: Lane) -> None:
        with self._lock:
            while self._line:
                loop, turn = self._line.popleft()
                try:
                    loop.call_soon_threadsafe(self._pass_on, turn, lane)
                except RuntimeError:
                    continue  # that loop was closed in the meantime
                return
            self._free.append(lane)

    def _pass_on(self, turn: asyncio.Future[Lane], lane: Lane) -> None:
        if turn.done():  # who waited was cancelled
            self._give(lane)
        else:
            turn.set_result(lane)


def _fail(turn: asyncio.Future[Lane], error: GpuError) -> None:
    if not turn.done():
        turn.set_exception(error)


_lanes: dict[tuple[GpuRuntime, int], Lanes] = {}
_lanes_lock = threading.Lock()


def lanes_of(runtime: GpuRuntime, device: int) -> Lanes:
    """Return the lanes of a device, which all of this process share."""
    with _lanes_lock:
        return _lanes.setdefault((runtime, device), Lanes(runtime, device))
