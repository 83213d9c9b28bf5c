"""A heartbeat on the loop tells for how long it is held at a time, while transfers run.

At each beat two things are noted since the beat before. The processor time of the loop's thread
is what its callbacks computed, ours above all. No turn of the loop was longer; but short turns
that follow each other without a pause count together, up to a millisecond. The time by the clock
is that of the beat, and what it came late: by callbacks, the GIL, and the want of a processor.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager

from .messages import Beats, Held
from .plan import Process

__all__ = ["BOUNDS_MS", "Heart"]

BOUNDS_MS = (0.25, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Of the histograms; a time that equals a bound is within it."""
BEAT_SECONDS = 0.001


class Heart:
    """Beats on the running loop while at least one transfer runs.

    Args:
        process: whose loop it is.
    """

    def __init__(self, process: Process) -> None:
        self._process = process
        self._beats: dict[str, Beats] = {}
        self._running = 0
        self._timer: asyncio.TimerHandle | None = None
        self._last = (0, 0)

    def beats(self) -> list[Beats]:
        """Return what was noted up to now, on every path."""
        return list(self._beats.values())

    @contextmanager
    def beating(self, path: str) -> Iterator[None]:
        """Beat meanwhile. The end is a beat too, so that short transfers are not missed."""
        self._running += 1
        if self._running == 1:
            self._last = _now()
            self._wait(path)
        try:
            yield
        finally:
            self._running -= 1
            if not self._running:
                self._note(path)
                assert self._timer is not None
                self._timer.cancel()

    def _beat(self, path: str) -> None:
        self._note(path)
        self._wait(path)

    def _wait(self, path: str) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(BEAT_SECONDS, self._beat, path)

    def _note(self, path: str) -> None:
        beats = self._beats.get(path)
        if beats is None:
            beats = self._beats[path] = Beats(self._process, path, _never(), _never())
        now = _now()
        for held, before, after in zip((beats.processor, beats.wall), self._last, now, strict=True):
            held.counts[bisect_left(BOUNDS_MS, (after - before) / 1e6)] += 1
            held.longest = max(held.longest, after - before)
        self._last = now


def _now() -> tuple[int, int]:
    """Return the nanoseconds of this thread, and those of the clock."""
    return time.thread_time_ns(), time.monotonic_ns()


def _never() -> Held:
    return Held([0] * (len(BOUNDS_MS) + 1))
