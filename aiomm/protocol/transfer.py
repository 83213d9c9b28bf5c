"""What both halves of a transfer share: id, state with its history, length, and runs of extents.

A transfer takes events and returns commands. It shares the table of :mod:`.states` with the
other half and knows neither the link nor the other transfers. `handle` raises
:class:`ProtocolViolation` when an event that stands for a peer's frame is impossible; the
endpoint turns that into an abort.
"""

from __future__ import annotations

from typing import TypeAlias

from ..errors import Failure
from ..types import Extent, TransferId
from .commands import TransferCommand
from .states import Edge, State, next_state

__all__ = ["Commands", "ProtocolViolation", "Transfer", "check_extents", "merged"]

Commands: TypeAlias = list[TransferCommand]


class ProtocolViolation(Exception):
    """The peer did what the protocol does not allow."""


def merged(extents: tuple[Extent, ...]) -> tuple[Extent, ...]:
    """Return `extents` with neighbours merged that follow each other in this order."""
    runs: list[Extent] = []
    for extent in extents:
        if runs and runs[-1].stop == extent.start:
            runs[-1] = Extent(runs[-1].start, extent.stop)
        elif extent.num_tokens:
            runs.append(extent)
    return tuple(runs)


def check_extents(extents: tuple[Extent, ...]) -> None:
    """Refuse extents that are empty, overlap or do not ascend: writes must follow them blindly."""
    end = 0
    for start, stop in extents:
        if not end <= start < stop:
            raise ProtocolViolation(f"extents are not ascending runs: {extents[:8]}")
        end = stop


class Transfer:
    """What both sides have: an id, a state with its history, a length."""

    id: TransferId | None

    def __init__(self, now: float) -> None:
        self.state = State.ALLOC
        self.history: list[tuple[State, float]] = [(State.ALLOC, now)]
        """Every state entered, with the time; the first entry is the beginning."""
        self.total: int | None = None
        self.transferred_tokens = 0
        """Tokens that have landed; only grows."""
        self.granted_tokens = 0
        """Tokens granted so far, over all grants."""
        self.chunks: list[int] = []
        """Tokens that landed under each grant: the `buffered_chunks`."""
        self.failure: Failure | None = None

    @property
    def resumes(self) -> int:
        """How often the transfer was resumed."""
        return max(0, sum(state is State.SENDING for state, _ in self.history) - 1)

    def story(self) -> tuple[str, ...]:
        """Tell the states passed so far with the seconds since the beginning."""
        began = self.history[0][1]
        return tuple(f"{state} at {at - began:.3f}s" for state, at in self.history)

    def _move(self, edge: Edge, now: float) -> None:
        self.state = next_state(self.state, edge)
        self.history.append((self.state, now))

    def _count(self, sequence: int, count: int) -> None:
        if count:
            while len(self.chunks) <= sequence:
                self.chunks.append(0)
            self.chunks[sequence] += count
            self.transferred_tokens += count
