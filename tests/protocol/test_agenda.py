"""The agenda names every session that wants to be looked at, and no other."""

from __future__ import annotations

import random

from aiomm.protocol.agenda import MIN_ENTRIES, Agenda
from aiomm.protocol.session import NEVER, Session

from .test_session import session


def test_changed_sessions_are_taken_once_in_order() -> None:
    agenda, one, two = Agenda(), session(), session()
    for each in (two, one, two):
        agenda.note(each)
    assert list(agenda.take()) == [two, one]
    assert not agenda.take()


def test_due_sessions_have_changed() -> None:
    agenda, one, two = Agenda(), session(), session()
    agenda.schedule(one, 2.0)
    agenda.schedule(two, 1.0)
    assert agenda.due(0.9) == []
    assert agenda.due(1.0) == [two]
    assert agenda.next_deadline() == 2.0
    assert list(agenda.take()) == [two]


def test_the_earliest_deadline_counts_once() -> None:
    """A later one is heard of when the earlier one has come."""
    agenda, one = Agenda(), session()
    for at in (3.0, 1.0, 2.0, 1.0):
        agenda.schedule(one, at)
    assert agenda.next_deadline() == 1.0
    assert agenda.due(1.0) == [one]
    assert agenda.due(9.0) == []
    assert agenda.next_deadline() == NEVER


def test_never_is_no_deadline() -> None:
    agenda = Agenda()
    agenda.schedule(session(), NEVER)
    assert agenda.next_deadline() == NEVER
    assert agenda.due(1e9) == []


def test_a_forgotten_session_never_comes_up() -> None:
    agenda, one = Agenda(), session()
    agenda.schedule(one, 1.0)
    agenda.note(one)
    agenda.forget(one)
    assert agenda.due(9.0) == []
    assert not agenda.take()


def test_it_agrees_with_asking_everybody() -> None:
    """Ten thousand random changes, against a dictionary: nobody is late, and none twice early."""
    rng, agenda = random.Random(7), Agenda()
    sessions = [session() for _ in range(20)]
    deadlines: dict[Session, float] = {}
    looked_at_for_nothing = told = 0
    now = 0.0
    for _ in range(10_000):
        each = rng.choice(sessions)
        deadlines[each] = rng.choice([NEVER, now + rng.random()])
        agenda.schedule(each, deadlines[each])
        told += 1
        assert agenda.next_deadline() <= min(deadlines.values())
        now += 0.001 * rng.random()
        due = agenda.due(now)
        assert len(due) == len(set(due))
        assert {each for each, at in deadlines.items() if at <= now} <= set(due)
        for each in due:
            if deadlines[each] > now:
                looked_at_for_nothing += 1
                agenda.schedule(each, deadlines[each])
            else:
                del deadlines[each]
        assert len(agenda._heap) <= MIN_ENTRIES + 2 * len(sessions)
    assert 0 < looked_at_for_nothing < told


def test_deadlines_that_were_replaced_do_not_pile_up() -> None:
    agenda, one = Agenda(), session()
    for number in range(3 * MIN_ENTRIES):
        agenda.schedule(one, 1e6 - number)
    assert len(agenda._heap) <= MIN_ENTRIES + 4
    assert agenda.next_deadline() == 1e6 - 3 * MIN_ENTRIES + 1
