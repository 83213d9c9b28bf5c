"""The agenda names every session that wants to be looked at, and no other."""

from __future__ import annotations

import random

from aiomm.protocol.agenda import MIN_ENTRIES, Agenda
from aiomm.protocol.session import Session

from .test_session import session


def test_changed_sessions_are_taken_once_in_order() -> None:
    agenda, one, two = Agenda(), session(), session()
    for each in (two, one, two):
        agenda.note(each)
    assert agenda.take() == [two, one]
    assert agenda.take() == []


def test_due_sessions_have_changed() -> None:
    agenda, one, two = Agenda(), session(), session()
    agenda.schedule(one, 2.0)
    agenda.schedule(two, 1.0)
    assert agenda.due(0.9) == []
    assert agenda.due(1.0) == [two]
    assert agenda.next_deadline() == 2.0
    assert agenda.take() == [two]


def test_the_last_deadline_counts() -> None:
    agenda, one = Agenda(), session()
    for at in (3.0, 1.0, 2.0, 2.0):
        agenda.schedule(one, at)
    assert agenda.next_deadline() == 2.0
    agenda.schedule(one, None)
    assert agenda.next_deadline() is None
    assert agenda.due(9.0) == []


def test_a_forgotten_session_never_comes_up() -> None:
    agenda, one = Agenda(), session()
    agenda.schedule(one, 1.0)
    agenda.note(one)
    agenda.forget(one)
    assert agenda.due(9.0) == agenda.take() == []


def test_it_agrees_with_asking_everybody() -> None:
    """Ten thousand random changes, against a dictionary; what is out of date does not pile up."""
    rng, agenda = random.Random(7), Agenda()
    sessions = [session() for _ in range(20)]
    deadlines: dict[Session, float] = {}
    now = 0.0
    for _ in range(10_000):
        each = rng.choice(sessions)
        at = rng.choice([None, now + rng.random()])
        agenda.schedule(each, at)
        deadlines.pop(each, None)
        if at is not None:
            deadlines[each] = at
        assert agenda.next_deadline() == min(deadlines.values(), default=None)
        now += 0.001 * rng.random()
        due = [each for each, at in deadlines.items() if at <= now]
        assert set(agenda.due(now)) == set(due)
        for each in due:
            del deadlines[each]
        assert len(agenda._heap) <= MIN_ENTRIES + 2 * len(sessions)


def test_deadlines_far_away_do_not_pile_up() -> None:
    agenda, one = Agenda(), session()
    agenda.schedule(session(), 0.0)
    for number in range(3 * MIN_ENTRIES):
        agenda.schedule(one, 100.0 + number)
    assert len(agenda._heap) <= MIN_ENTRIES + 4
    assert agenda.next_deadline() == 0.0
