"""What is measured for the goals: plans by name, in groups whose plans take turns.

`aiomm.bench` measures one transfer that is already granted; with more in flight it measures the
rate of whole requests. The plans that time a busy thread have no heart, which would ask for the
GIL every millisecond. The largest size comes first: what is measured first in a round, after both
processes have told of the round before, takes up to 0.3 ms longer, which is much of a small floor.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from msgspec.structs import replace

from aiomm.bench.plan import Arrival, Busy, Plan

KIB, MIB = 2**10, 2**20
BACK_TO_BACK: Arrival = "back to back"
SPARSE: Arrival = "sparse"
ARRIVALS = (BACK_TO_BACK, SPARSE)
BUSY: tuple[Busy, ...] = ("encoder", "language", "both")

ONE = "one at a time"
WHOLE, RESUMED, STREAMED = "granted at once", "one resume", "streamed"
PLAIN, CHECKED = "without checksums", "with checksums"
SIZES, LARGE_SIZES = "sizes", "large sizes"

TOKEN_NBYTES = 4 * KIB
LONG_NBYTES = 64 * MIB
CHECKED_NBYTES = 8 * MIB
LARGEST_FIRST = (64 * MIB, 8 * MIB, 1 * MIB, 64 * KIB)
FEW = 64
"""In flight; more cost no more each."""


class Extent(NamedTuple):
    """How much is measured."""

    turns: int
    """Of every group of plans."""
    rounds: int
    """Of a plan in one turn."""
    warm_up_rounds: int
    in_flight: tuple[int, ...]
    sizes: tuple[int, ...]
    """Of which latency is drawn, the largest first."""
    hearts: tuple[Busy, ...]
    """Who is busy while it is found out for how long the loops are held."""


FULL = Extent(3, 5, 2, (1, 4, 16, FEW, 256, 1000), tuple(4**n for n in range(15, 5, -1)), BUSY)
"""Takes 6 GiB of memory: source, pool and the floor's target are twice the largest size."""
QUICK = Extent(1, 1, 0, (1, FEW, 256), tuple(4**n for n in range(9, 5, -1)), ("both",))
"""As little as has all figures; none of them is worth anything."""


class Group(NamedTuple):
    """Plans that are compared: they run one after the other, and that several times over."""

    turns: int
    plans: dict[str, Plan]


def rate(in_flight: int) -> str:
    """Return the name of the plan for the rate with so many in flight."""
    return f"{in_flight} in flight"


def timed(busy: Busy) -> str:
    """Return the name of the plan that times transfers beside a busy thread."""
    return f"busy {busy}"


def held(busy: Busy) -> str:
    """Return the name of the plan that finds out for how long the loops are held."""
    return f"heartbeat, busy {busy}"


def groups(extent: Extent) -> Iterator[Group]:
    """Yield everything that is to be measured."""
    base = Plan(
        plane="shm",
        arrivals=(BACK_TO_BACK,),
        rounds=extent.rounds,
        warm_up_rounds=extent.warm_up_rounds,
    )
    plan = partial(replace, base)
    token, long, checked = (TOKEN_NBYTES,), (LONG_NBYTES,), (CHECKED_NBYTES,)
    one_at_a_time = plan(sizes=LARGEST_FIRST, arrivals=ARRIVALS, rounds=2 * extent.rounds)
    rates = {
        rate(number): plan(
            sizes=token, concurrency=number, warm_up_rounds=min(1, extent.warm_up_rounds)
        )
        for number in extent.in_flight
    }
    ways = {
        WHOLE: plan(sizes=long),
        RESUMED: plan(sizes=long, resume=True),
        STREAMED: plan(sizes=long, stream=True),
    }
    checks = {PLAIN: plan(sizes=checked), CHECKED: plan(sizes=checked, checksum=True)}
    times = {timed(busy): plan(sizes=long, busy=busy) for busy in BUSY}
    hearts = {held(busy): plan(sizes=long, busy=busy, heartbeat=True) for busy in extent.hearts}
    for plans in ({ONE: one_at_a_time}, rates, ways, checks, times, hearts):
        yield Group(extent.turns, plans)
    yield from _over_sizes(extent, base)


def _over_sizes(extent: Extent, base: Plan) -> Iterator[Group]:
    """The large ones have a plan of their own, since they make memory colder for the small."""
    small = tuple(nbytes for nbytes in extent.sizes if nbytes <= LONG_NBYTES)
    yield Group(extent.turns, {SIZES: replace(base, sizes=small, arrivals=ARRIVALS)})
    if large := tuple(nbytes for nbytes in extent.sizes if nbytes > LONG_NBYTES):
        yield Group(1, {LARGE_SIZES: replace(base, sizes=large, arrivals=ARRIVALS)})
