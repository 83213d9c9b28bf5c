"""The state machine of a transfer, whole, on one page.

Two rules. Every transition stands in :data:`TRANSITIONS`: a missing key is an illegal step,
and nothing else in the package decides what state comes next. And this page does not know
which side it plays: sender and receiver pass through the same states.

=================  ===============================  ========================================
state              sender                           receiver
=================  ===============================  ========================================
ALLOC              waits for a grant                waits for a claim and for free blocks
SENDING            writes the granted extents       the peer writes
AWAITING_RESUME    the granted extents are full     holds buffered chunks, waits for blocks
DONE, FAILED       terminal                         terminal
=================  ===============================  ========================================

A sender that has written everything stays in SENDING until the receiver has accepted.
`Accepted` also ends AWAITING_RESUME: a sender that streams may learn only at the border of a
grant that nothing is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import TypeAlias

from .events import Accepted, Failed, Granted, GrantFilled, Resumed

__all__ = ["TRANSITIONS", "Edge", "IllegalTransition", "State", "next_state", "to_mermaid"]


class State(StrEnum):
    """Where a transfer stands."""

    ALLOC = "ALLOC"
    SENDING = "SENDING"
    AWAITING_RESUME = "AWAITING_RESUME"
    DONE = "DONE"
    FAILED = "FAILED"

    @property
    def is_terminal(self) -> bool:
        """No event leads out of this state."""
        return not TRANSITIONS[self]


Edge: TypeAlias = type[Granted] | type[GrantFilled] | type[Resumed] | type[Accepted] | type[Failed]

TRANSITIONS: Mapping[State, Mapping[Edge, State]] = MappingProxyType(
    {
        State.ALLOC: {
            Granted: State.SENDING,
            Failed: State.FAILED,
        },
        State.SENDING: {
            GrantFilled: State.AWAITING_RESUME,
            Accepted: State.DONE,
            Failed: State.FAILED,
        },
        State.AWAITING_RESUME: {
            Resumed: State.SENDING,
            Accepted: State.DONE,
            Failed: State.FAILED,
        },
        State.DONE: {},
        State.FAILED: {},
    }
)


class IllegalTransition(Exception):
    """An event that the table does not allow in this state. Whose fault it is, the caller knows."""

    def __init__(self, state: State, edge: Edge) -> None:
        super().__init__(f"{edge.__name__} is not possible in state {state}")


def next_state(state: State, edge: Edge) -> State:
    """Return the state that follows.

    Raises:
        IllegalTransition: the table has no such step.
    """
    try:
        return TRANSITIONS[state][edge]
    except KeyError:
        raise IllegalTransition(state, edge) from None


def to_mermaid() -> str:
    """Draw the table as a mermaid state diagram."""
    lines = ["stateDiagram-v2", "    [*] --> ALLOC"]
    for state, row in TRANSITIONS.items():
        lines += [f"    {state} --> {target}: {edge.__name__}" for edge, target in row.items()]
        if state.is_terminal:
            lines.append(f"    {state} --> [*]")
    return "\n".join(lines)
