"""The goals that our own figures decide."""

from __future__ import annotations

from collections.abc import Iterator

from aiomm.bench.plan import AIOMM, AIOMM_BUSY, MEMCPY, MEMCPY_ACK, size_name

from .figures import Figures
from .goal import Goal, goal, told
from .plans import (
    ARRIVALS,
    BUSY,
    CHECKED,
    CHECKED_NBYTES,
    FEW,
    KIB,
    LONG_NBYTES,
    MIB,
    ONE,
    PLAIN,
    RESUMED,
    STREAMED,
    TOKEN_NBYTES,
    WHOLE,
    timed,
)
from .spread import Spread

TIMES_FLOOR = {
    64 * MIB: (1.10, MEMCPY),
    8 * MIB: (1.5, MEMCPY),
    1 * MIB: (4.0, MEMCPY_ACK),
    64 * KIB: (5.0, MEMCPY_ACK),
}
"""How often which floor, by size."""
PER_SECOND = 8000
TIMES_WHOLE = {RESUMED: 1.25, STREAMED: 2.2}
HELD_MS = 5.0
TIMES_QUIET = 2.0
TIMES_PLAIN = 1.2


def floors(figures: Figures) -> Iterator[Goal]:
    """One granted transfer at a time, against the copy that cannot be avoided."""
    for nbytes, (times, floor) in TIMES_FLOOR.items():
        for arrival in ARRIVALS:
            copied = figures.seconds(ONE, nbytes, floor, arrival).median
            took = figures.seconds(ONE, nbytes, arrival=arrival).over(copied)
            yield goal(f"shm {size_name(nbytes)}, {arrival}", took, "at most", times, f"x {floor}")


def rates(figures: Figures) -> Iterator[Goal]:
    """Many requests of one small token at a time."""
    few = figures.seconds_in_flight(FEW, TOKEN_NBYTES)
    name = f"shm {size_name(TOKEN_NBYTES)}"
    yield goal(f"{name}, {FEW} in flight", few.into(1.0), "at least", PER_SECOND, "requests/s")
    most = figures.in_flight()[-1]
    each = figures.seconds_in_flight(most, TOKEN_NBYTES).over(few.median)
    what = f"{name}, {most} in flight, time of each"
    yield goal(what, each, "at most", 1.0, f"x {FEW} in flight")


def ways(figures: Figures) -> Iterator[Goal]:
    """Transfers that are not granted at once."""
    whole = figures.seconds(WHOLE, LONG_NBYTES).median
    names = {RESUMED: "with one resume", STREAMED: "through a pool of a quarter"}
    for name, times in TIMES_WHOLE.items():
        took = figures.seconds(name, LONG_NBYTES).over(whole)
        what = f"shm {size_name(LONG_NBYTES)} {names[name]}"
        yield goal(what, took, "at most", times, f"x {WHOLE}")


def loops(figures: Figures) -> Iterator[Goal]:
    """How long an event loop is held, and what a busy thread costs."""
    for name, path in (("quiet", AIOMM), ("busy", AIOMM_BUSY)):
        held = figures.held_ms(path)
        note = f"the {held.process}'s; by the clock {held.wall:.1f} ms"
        what = f"loop held by {size_name(LONG_NBYTES)}, {name}"
        yield goal(what, held.processor, "at most", HELD_MS, "ms of processor time", note)
    for busy in BUSY:
        what, took = (
            f"shm {size_name(LONG_NBYTES)}, {busy} busy",
            _times_quiet(figures, timed(busy)),
        )
        if busy == "both":
            yield told(what, took, "x quiet")
        else:
            yield goal(what, took, "at most", TIMES_QUIET, "x quiet")


def checksums(figures: Figures) -> Iterator[Goal]:
    """What it costs to checksum every chunk, and to verify it."""
    plain = figures.seconds(PLAIN, CHECKED_NBYTES).median
    took = figures.seconds(CHECKED, CHECKED_NBYTES).over(plain)
    what = f"shm {size_name(CHECKED_NBYTES)} {CHECKED}"
    yield goal(what, took, "at most", TIMES_PLAIN, f"x {PLAIN}")


def _times_quiet(figures: Figures, name: str) -> Spread:
    quiet = figures.seconds(name, LONG_NBYTES, AIOMM).median
    return figures.seconds(name, LONG_NBYTES, AIOMM_BUSY).over(quiet)
