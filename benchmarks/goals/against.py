"""The goals that the peers' figures decide; ours are those of the same run as theirs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from aiomm.bench.plan import MEMCPY, size_name

from .goal import Goal, goal, skipped_if_missing
from .peers_file import Peers
from .plans import ARRIVALS, KIB, LONG_NBYTES, MIB

SHM, TCP = "aiomm shm", "aiomm tcp"
NIXL, PICKLED, MOONCAKE, RAW_TCP = "nixl", "pickle over pyzmq", "mooncake sync write", "raw tcp"

FASTER_THAN_ALL = (1 * MIB, 8 * MIB, LONG_NBYTES)
FASTER_THAN_ALL_BUT_NIXL = 64 * KIB
TIMES_NIXL = 6.0
"""At most, of that size."""
SHM_AS_FAST = {NIXL: 2.5, PICKLED: 8.0}
TCP_AS_FAST = {RAW_TCP: 0.9, MOONCAKE: 1.8}
"""How often as fast as which, at 64 MiB."""
TIMES_CPU = 1.3


def fastest(peers: Peers) -> Iterator[Goal]:
    """What one would pick instead of `shm`."""
    for nbytes in FASTER_THAN_ALL:
        for arrival in ARRIVALS:
            what = f"shm {size_name(nbytes)}, {arrival}, against every peer"
            yield _faster_than_all(what, peers, nbytes, arrival)
    yield from _as_fast_as_each(peers, SHM, SHM_AS_FAST)
    nbytes = FASTER_THAN_ALL_BUT_NIXL
    for arrival in ARRIVALS:
        name = f"shm {size_name(nbytes)}, {arrival}"
        what = f"{name}, against every peer but {NIXL}"
        yield _faster_than_all(what, peers, nbytes, arrival, without=(NIXL,))
        yield _within(f"{name}, time against {NIXL}", peers, nbytes, arrival)


def loopback(peers: Peers) -> Iterator[Goal]:
    """What one would pick instead of `tcp`."""
    yield from _as_fast_as_each(peers, TCP, TCP_AS_FAST)


def processor(peers: Peers) -> Iterator[Goal]:
    """What a transfer costs the processors, of both processes."""
    for arrival in ARRIVALS:
        what = f"shm {size_name(LONG_NBYTES)}, {arrival}, processor time"
        yield _processor_time(what, peers, arrival)


def _as_fast_as_each(peers: Peers, ours: str, wanted: dict[str, float]) -> Iterator[Goal]:
    name = f"{ours.removeprefix('aiomm ')} {size_name(LONG_NBYTES)}"
    for other, times in wanted.items():
        for arrival in ARRIVALS:
            yield _as_fast(
                f"{name}, {arrival}, against {other}", peers, arrival, ours, other, times
            )


@skipped_if_missing
def _faster_than_all(
    what: str, peers: Peers, nbytes: int, arrival: str, without: Sequence[str] = ()
) -> Goal:
    ours = peers.row(SHM, nbytes, arrival).microseconds
    others = peers.others(nbytes, arrival, without)
    ahead = [each.path for each in others if each.median_us <= ours.median]
    note = f"ahead: {', '.join(ahead)}" if ahead else f"next: {others[0].path}"
    return goal(what, ours.into(others[0].median_us), "over", 1.0, "x as fast", note)


@skipped_if_missing
def _as_fast(what: str, peers: Peers, arrival: str, ours: str, other: str, times: float) -> Goal:
    theirs = peers.row(other, LONG_NBYTES, arrival).median_us
    mine = peers.row(ours, LONG_NBYTES, arrival).microseconds
    return goal(what, mine.into(theirs), "at least", times, "x as fast")


@skipped_if_missing
def _within(what: str, peers: Peers, nbytes: int, arrival: str) -> Goal:
    ours = peers.row(SHM, nbytes, arrival).microseconds
    theirs = peers.row(NIXL, nbytes, arrival).median_us
    return goal(what, ours.over(theirs), "at most", TIMES_NIXL, f"x {NIXL}")


@skipped_if_missing
def _processor_time(what: str, peers: Peers, arrival: str) -> Goal:
    ours = peers.row(SHM, LONG_NBYTES, arrival).cpu_seconds_per_gb
    theirs = peers.row(MEMCPY, LONG_NBYTES, arrival).cpu_seconds_per_gb
    return goal(what, ours / theirs, "at most", TIMES_CPU, f"x {MEMCPY}")
