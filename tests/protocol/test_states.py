"""The table of states, against an oracle that was written by hand and not from it."""

from __future__ import annotations

from typing import get_args

import pytest

from aiomm.protocol.events import Accepted, Failed, Granted, GrantFilled, Resumed
from aiomm.protocol.states import (
    TRANSITIONS,
    Edge,
    IllegalTransition,
    State,
    next_state,
    to_mermaid,
)

EDGES: tuple[Edge, ...] = (Granted, GrantFilled, Resumed, Accepted, Failed)

ORACLE = """
                 Granted  GrantFilled      Resumed  Accepted  Failed
ALLOC            SENDING  -                -        -         FAILED
SENDING          -        AWAITING_RESUME  -        DONE      FAILED
AWAITING_RESUME  -        -                SENDING  DONE      FAILED
DONE             -        -                -        -         -
FAILED           -        -                -        -         -
"""

CELLS = [
    (State(row.split()[0]), edge, target)
    for row in ORACLE.strip().splitlines()[1:]
    for edge, target in zip(EDGES, row.split()[1:], strict=True)
]


@pytest.mark.parametrize(("state", "edge", "target"), CELLS)
def test_every_state_against_every_event(state: State, edge: Edge, target: str) -> None:
    """A step is in the table exactly when it is in the oracle, and leads to the same state."""
    if target == "-":
        with pytest.raises(IllegalTransition, match=f"{edge.__name__} is not possible in state"):
            next_state(state, edge)
    else:
        assert next_state(state, edge) is State(target)


def test_the_oracle_is_complete() -> None:
    """It has a row for each state, and a column for each event that can be an edge."""
    assert {state for state, _, _ in CELLS} == set(State)
    assert {each.__args__[0] for each in get_args(Edge)} == set(EDGES)
    assert set(TRANSITIONS) == set(State)


def test_every_state_is_reached() -> None:
    """From ALLOC every other state can come about, and back to ALLOC nothing leads."""
    reached = {State.ALLOC}
    while more := {next_ for state in reached for next_ in TRANSITIONS[state].values()} - reached:
        reached |= more
    assert reached == set(State)
    assert all(State.ALLOC not in row.values() for row in TRANSITIONS.values())


def test_terminal_states_have_no_way_out() -> None:
    """DONE and FAILED, and only they, are for ever; from all others one can fail."""
    terminal = {state for state in State if state.is_terminal}
    assert terminal == {State.DONE, State.FAILED}
    assert all(Failed in TRANSITIONS[state] for state in State if state not in terminal)


def test_the_table_cannot_be_changed() -> None:
    """Nothing but the page in `states` decides what follows."""
    with pytest.raises(TypeError):
        TRANSITIONS[State.DONE] = {}  # type: ignore[index]


def test_the_diagram() -> None:
    """The drawing in README and docs is made from the table."""
    assert to_mermaid() == (
        "stateDiagram-v2\n"
        "    [*] --> ALLOC\n"
        "    ALLOC --> SENDING: Granted\n"
        "    ALLOC --> FAILED: Failed\n"
        "    SENDING --> AWAITING_RESUME: GrantFilled\n"
        "    SENDING --> DONE: Accepted\n"
        "    SENDING --> FAILED: Failed\n"
        "    AWAITING_RESUME --> SENDING: Resumed\n"
        "    AWAITING_RESUME --> DONE: Accepted\n"
        "    AWAITING_RESUME --> FAILED: Failed\n"
        "    DONE --> [*]\n"
        "    FAILED --> [*]"
    )
