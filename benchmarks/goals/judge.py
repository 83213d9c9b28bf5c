"""All goals, in the order in which they are told."""

from __future__ import annotations

from collections.abc import Iterator

from .against import fastest, loopback, processor
from .figures import Figures
from .goal import Goal
from .own import checksums, floors, loops, rates, ways
from .peers_file import Peers


def judge(figures: Figures, peers: Peers | None) -> Iterator[Goal]:
    """Yield one row for every goal; without peers not those that they decide.

    Raises:
        LookupError: a figure of ours was not measured.
    """
    yield from floors(figures)
    if peers is not None:
        yield from fastest(peers)
    yield from rates(figures)
    yield from ways(figures)
    if peers is not None:
        yield from loopback(peers)
    yield from loops(figures)
    yield from checksums(figures)
    if peers is not None:
        yield from processor(peers)
