"""What receivers wait for at a sender: by id, by redemption, by peer, in order, with a deadline."""

from __future__ import annotations

from aiomm.protocol.wanted import Wanted, WantedRequests


def waiting(*all_wanted: Wanted) -> WantedRequests:
    """Return what waits, in this order."""
    requests = WantedRequests()
    for wanted in all_wanted:
        requests.add(wanted)
    return requests


A1, B1, A2, B2 = (
    Wanted(1, 1, "a", 5.0),
    Wanted(1, 2, "b", 9.0),
    Wanted(2, 1, "a", 9.0),
    Wanted(2, 2, "b", 9.0),
)


def test_who_has_waited_longest_is_served_first() -> None:
    requests = waiting(A1, B1, A2)
    assert [requests.take("a", 0.0) for _ in range(3)] == [A1, A2, None]
    assert len(requests) == 1


def test_who_waits_no_more_is_passed_over() -> None:
    requests = waiting(A1, A2)
    assert requests.take("a", 5.0) == A2
    assert len(requests) == 0


def test_what_is_refused_is_removed_once() -> None:
    requests = waiting(A1, A2)
    for _ in range(2):
        requests.remove(1, 1)
    requests.remove(7, 7)
    assert requests.take("a", 0.0) == A2


def test_all_of_one_peer() -> None:
    requests = waiting(A1, B1, A2, B2)
    assert requests.take_all_of(1) == [A1, B1]
    assert requests.take_all_of(1) == []
    assert [requests.take("a", 0.0), requests.take("b", 0.0)] == [A2, B2]


def test_a_redemption_that_comes_again_replaces_the_first() -> None:
    requests = waiting(A1, A2, A1._replace(request_id="b"))
    assert (requests.take("b", 0.0), requests.take("a", 0.0), len(requests)) == (
        A1._replace(request_id="b"),
        A2,
        0,
    )


def test_deadlines() -> None:
    requests = waiting(A1, B1, A2)
    requests.expire(4.9)
    assert len(requests) == 3
    requests.expire(5.0)
    assert len(requests) == 2
    requests.add(Wanted(3, 1, "c", 6.0))
    requests.expire(8.9)
    assert len(requests) == 2
    requests.expire(9.0)
    assert len(requests) == 0
