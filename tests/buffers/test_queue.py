"""The queue of waiting requests, case by case and against a model."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from aiomm.buffers.pool import BlockPool, PoolError
from aiomm.buffers.queue import QueueFull, ReservationQueue
from aiomm.types import Allocation


def queue_over(num_blocks: int, *, max_waiting: int = 100) -> ReservationQueue:
    return ReservationQueue(BlockPool(num_blocks, 10), max_waiting=max_waiting)


def tokens(allocation: Allocation | None) -> int | None:
    return None if allocation is None else allocation.num_tokens


def drain(queue: ReservationQueue) -> Allocation:
    """Take everything that is free away from the queue."""
    allocation = queue.pool.allocate(queue.pool.num_free)
    assert allocation is not None
    return allocation


class TestRequest:
    def test_the_whole_need_when_it_is_free(self) -> None:
        queue = queue_over(8)
        assert tokens(queue.request(1, 25, claimed=True)) == 25
        assert tokens(queue.request(2, 0, claimed=True)) == 0
        assert queue.pool.num_free == 5
        assert (queue.num_waiting, queue.num_held) == (0, 0)

    def test_claimed_takes_what_is_free(self) -> None:
        queue = queue_over(4)
        queue.pool.allocate(1)
        assert tokens(queue.request(1, 40, claimed=True)) == 30
        assert queue.request(2, 40, claimed=True) is None

    def test_what_is_longer_than_the_pool_gets_half_of_it(self) -> None:
        """The other half is written while that one is moved out."""
        queue = queue_over(5)
        assert tokens(queue.request(1, 51, claimed=True)) == 20
        assert tokens(queue.request(1, 31, claimed=True)) == 30
        assert tokens(queue_over(1).request(1, 11, claimed=True)) == 10

    def test_expected_takes_its_whole_need_or_waits(self) -> None:
        queue = queue_over(4)
        assert tokens(queue.request(1, 30, claimed=False)) == 30
        assert queue.request(2, 20, claimed=False) is None
        assert (queue.num_waiting, queue.num_held) == (1, 1)

    def test_an_expected_need_beyond_the_pool_is_half_of_it(self) -> None:
        assert tokens(queue_over(4).request(1, 1000, claimed=False)) == 20

    def test_one_grant_has_a_limit(self) -> None:
        queue = ReservationQueue(BlockPool(8, 10), max_waiting=4, max_grant_blocks=3)
        assert tokens(queue.request(1, 1000, claimed=True)) == 30
        assert queue.request_whole(31, None) is None
        assert tokens(queue.request_whole(30, None)) == 30

    def test_nobody_is_overtaken(self) -> None:
        queue = queue_over(4)
        blocker = drain(queue)
        assert queue.request(1, 40, claimed=False) is None
        assert queue.request(2, 20, claimed=True) is None
        assert queue.request(3, 20, claimed=True) is None
        queue.pool.free(blocker)
        assert queue.request(4, 10, claimed=True) is None
        assert queue.request(5, 10, claimed=False) is None
        assert [(key, tokens(one)) for key, one in queue.pump()] == [(2, 20), (3, 20)]

    def test_past_the_limit_the_request_is_refused_and_not_kept(self) -> None:
        queue = queue_over(1, max_waiting=2)
        blocker = drain(queue)
        queue.request(1, 10, claimed=True)
        queue.request(2, 10, claimed=False)
        with pytest.raises(QueueFull, match="2 requests wait") as refused:
            queue.request(3, 10, claimed=True)
        assert refused.value.retryable
        with pytest.raises(QueueFull):
            queue.request(3, 10, claimed=False)
        assert queue.request(2, 10, claimed=True) is None
        queue.pool.free(blocker)
        assert [key for key, _ in queue.pump()] == [1]

    def test_a_waiting_key_changes_its_length_in_place(self) -> None:
        queue = queue_over(4)
        blocker = drain(queue)
        queue.request(1, 40, claimed=True)
        queue.request(2, 10, claimed=True)
        assert queue.request(1, 10, claimed=False) is None
        queue.pool.free(blocker)
        assert [(key, tokens(one)) for key, one in queue.pump()] == [(1, 10), (2, 10)]

    def test_a_waiting_key_that_needs_less_may_be_served(self) -> None:
        queue = queue_over(4)
        queue.pool.allocate(3)
        assert queue.request(1, 40, claimed=False) is None
        assert tokens(queue.request(1, 10, claimed=False)) == 10

    def test_becoming_claimed_goes_to_the_end_of_the_claimed(self) -> None:
        queue = queue_over(4)
        blocker = drain(queue)
        queue.request(1, 10, claimed=False)
        queue.request(2, 10, claimed=True)
        assert queue.request(1, 20, claimed=True) is None
        queue.pool.free(blocker)
        assert [(key, tokens(one)) for key, one in queue.pump()] == [(2, 10), (1, 20)]


class TestSoftHolds:
    def test_a_claim_makes_the_hold_exact(self) -> None:
        for need in (10, 80, 100, 120, 130):
            queue = queue_over(12)
            queue.request(1, 80, claimed=False)
            assert tokens(queue.request(1, need, claimed=True)) == (need if need <= 120 else 60)
            assert queue.num_held == 0

    def test_a_claim_beyond_reach_gets_the_hold(self) -> None:
        queue = queue_over(12)
        queue.request(1, 80, claimed=False)
        queue.pool.allocate(2)
        assert tokens(queue.request(1, 110, claimed=True)) == 80

    def test_thirty_short_claims_fit_a_pool_for_exactly_thirty(self) -> None:
        queue = queue_over(30)
        granted = []
        for key in range(30):
            queue.request(key, 80, claimed=False)
        for key in range(30):
            granted.append(queue.request(key, 10, claimed=True))
            queue.pump()
        assert [tokens(one) for one in granted] == [10] * 30

    def test_the_newest_hold_is_taken_back_first(self) -> None:
        queue = queue_over(4)
        for key in (1, 2):
            queue.request(key, 20, claimed=False)
        queue.request(3, 10, claimed=False)
        taker = queue.request(4, 10, claimed=True)
        assert tokens(taker) == 10
        assert tokens(queue.request(1, 20, claimed=True)) == 20
        assert tokens(queue.request(3, 10, claimed=True)) == 10
        assert queue.request(2, 20, claimed=True) is None

    def test_no_hold_is_taken_back_for_what_is_free(self) -> None:
        queue = queue_over(4)
        queue.request(1, 20, claimed=False)
        assert tokens(queue.request(2, 20, claimed=True)) == 20
        assert queue.num_held == 1

    def test_taken_back_keys_come_first_again(self) -> None:
        queue = queue_over(4)
        queue.request(1, 20, claimed=False)
        queue.request(2, 20, claimed=False)
        queue.request(3, 40, claimed=False)
        taker = queue.request(4, 40, claimed=True)
        assert taker is not None
        assert queue.num_held == 0
        queue.pool.free(taker)
        assert queue.pump() == []
        assert queue.num_held == 2
        assert (
            tokens(queue.request(1, 20, claimed=True)),
            tokens(queue.request(2, 20, claimed=True)),
        ) == (20, 20)

    def test_a_hold_changes_its_length(self) -> None:
        queue = queue_over(4)
        queue.request(1, 10, claimed=False)
        assert tokens(queue.request(1, 30, claimed=False)) == 30
        assert queue.num_held == 1

    def test_a_hold_that_is_taken_back_takes_nobodys_place(self) -> None:
        queue = queue_over(1, max_waiting=1)
        queue.request(1, 0, claimed=False)
        drain(queue)
        assert queue.request(2, 10, claimed=True) is None
        with pytest.raises(QueueFull):
            queue.request(3, 10, claimed=True)

    def test_an_expected_key_does_not_pass_a_claimed_one(self) -> None:
        queue = queue_over(4)
        blocker = drain(queue)
        assert queue.request(1, 40, claimed=True) is None
        queue.pool.free(blocker)
        assert queue.request(2, 10, claimed=False) is None
        assert [key for key, _ in queue.pump()] == [1]

    def test_cancel_frees_a_hold_and_forgets_a_wait(self) -> None:
        queue = queue_over(2)
        queue.request(1, 20, claimed=False)
        queue.request(2, 20, claimed=False)
        queue.cancel(1)
        assert queue.pump() == []
        assert (queue.num_waiting, queue.num_held) == (0, 1)
        queue.cancel(2)
        queue.cancel(2)
        blocker = drain(queue)
        assert queue.request(3, 20, claimed=True) is None
        queue.cancel(3)
        queue.pool.free(blocker)
        assert queue.pump() == []
        assert queue.pool.num_free == 2
        assert repr(queue) == "<ReservationQueue: 0 claimed and 0 expected wait, 0 held>"


class TestRequestWhole:
    def test_enlarges_what_is_there(self) -> None:
        queue = queue_over(8)
        first = queue.request(1, 20, claimed=True)
        assert first is not None
        enlarged = queue.request_whole(25, first)
        assert enlarged is not None
        assert (enlarged.start_offset, enlarged.extents) == (0, ((0, 45),))
        with pytest.raises(PoolError):
            queue.pool.free(first)

    def test_else_a_separate_allocation(self) -> None:
        queue = queue_over(8)
        first = queue.request(1, 20, claimed=True)
        queue.request(2, 10, claimed=True)
        separate = queue.request_whole(30, first)
        assert separate is not None
        assert separate.extents == ((30, 60),)

    def test_all_or_nothing(self) -> None:
        queue = queue_over(4)
        first = queue.request(1, 20, claimed=True)
        assert queue.request_whole(30, first) is None
        assert queue.request_whole(30, None) is None
        assert queue.num_waiting == 0

    def test_soft_holds_stay_and_claimed_keys_are_not_overtaken(self) -> None:
        queue = queue_over(4)
        queue.request(1, 40, claimed=False)
        assert queue.request_whole(10, None) is None
        assert queue.num_held == 1
        queue.cancel(1)
        blocker = drain(queue)
        queue.request(2, 10, claimed=True)
        queue.pool.free(blocker)
        assert queue.request_whole(10, None) is None


def ready(model: Any) -> bool:
    return hasattr(model, "queue")


class QueueModel(RuleBasedStateMachine):
    """Whoever waits is served in the order that two plain lists say."""

    @initialize(num_blocks=st.integers(1, 8), max_waiting=st.integers(1, 6))
    def make(self, num_blocks: int, max_waiting: int) -> None:
        self.pool = BlockPool(num_blocks, 10)
        self.queue = ReservationQueue(self.pool, max_waiting=max_waiting)
        self.max_waiting = max_waiting
        self.room = num_blocks * 10
        self.claimed: list[int] = []
        self.expected: dict[int, None] = {}  # waits or holds; only the queue knows which
        self.granted: list[Allocation] = []
        self.next_key = 0

    def pumped(self) -> None:
        for key, allocation in self.queue.pump():
            assert key == self.claimed.pop(0), "first come, first granted"
            self.granted.append(allocation)

    @precondition(ready)
    @rule(num_tokens=st.integers(0, 100), claimed=st.booleans())
    def request(self, num_tokens: int, claimed: bool) -> None:
        key = self.next_key
        self.next_key += 1
        full = self.queue.num_waiting >= self.max_waiting
        try:
            allocation = self.queue.request(key, num_tokens, claimed=claimed)
        except QueueFull:
            assert full
            self.pumped()
            return
        self.note(key, num_tokens, claimed, allocation)

    def note(self, key: int, num_tokens: int, claimed: bool, got: Allocation | None) -> None:
        half = max(1, self.pool.capacity // 2) * 10
        need = num_tokens if num_tokens <= self.room else half
        if not claimed:
            assert tokens(got) in (None, need)
            self.expected[key] = None
        elif got is None:
            self.claimed.append(key)
        else:
            assert not self.claimed
            assert got.num_tokens <= need
            assert got.num_tokens > 0 or need == 0
            if got.num_tokens < need:
                assert self.pool.num_free < self.pool.blocks_for(need - got.num_tokens)
            self.granted.append(got)
        self.pumped()

    @precondition(lambda self: ready(self) and self.expected)
    @rule(data=st.data(), num_tokens=st.integers(0, 100))
    def claim(self, data: st.DataObject, num_tokens: int) -> None:
        key = data.draw(st.sampled_from(list(self.expected)))
        del self.expected[key]
        held = self.queue.num_held
        allocation = self.queue.request(key, num_tokens, claimed=True)
        if allocation is not None and self.queue.num_held < held:
            self.granted.append(allocation)  # the hold, larger or smaller
            self.pumped()
        else:
            self.note(key, num_tokens, True, allocation)

    @precondition(lambda self: ready(self) and self.granted)
    @rule(data=st.data(), num_tokens=st.integers(1, 60))
    def resume(self, data: st.DataObject, num_tokens: int) -> None:
        behind = data.draw(st.sampled_from(self.granted))
        more = self.queue.request_whole(num_tokens, behind)
        if more is None:
            return
        assert not self.claimed
        if behind.num_tokens and more.start_offset == behind.start_offset:
            assert more.num_tokens == behind.num_tokens + num_tokens
            self.granted = [one for one in self.granted if one is not behind] + [more]
        else:
            assert more.num_tokens == num_tokens
            self.granted.append(more)

    @precondition(lambda self: ready(self) and self.granted)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.granted) - 1))
        self.pool.free(self.granted.pop(index))
        self.pumped()

    @precondition(lambda self: ready(self) and (self.expected or self.claimed))
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from([*self.expected, *self.claimed]))
        self.expected.pop(key, None)
        self.claimed = [one for one in self.claimed if one != key]
        self.queue.cancel(key)
        self.pumped()

    @precondition(ready)
    @invariant()
    def no_block_is_lost_and_nobody_waits_in_vain(self) -> None:
        owned = sum(len(one.block_indices) for one in self.granted)
        if not self.expected:
            assert owned + self.pool.num_free == self.pool.capacity
        if self.claimed:
            assert (self.pool.num_free, self.queue.num_held) == (0, 0)
        assert len(self.claimed) <= self.queue.num_waiting
        waiting_or_held = len(self.claimed) + len(self.expected)
        assert self.queue.num_waiting + self.queue.num_held == waiting_or_held

    def teardown(self) -> None:
        if not ready(self):
            return
        while self.granted:  # every claimed key is served in the end
            self.pool.free(self.granted.pop())
            self.pumped()
        assert not self.claimed
        for key in list(self.expected):
            self.queue.cancel(key)
        assert self.pool.num_free == self.pool.capacity


TestQueueModel = QueueModel.TestCase
TestQueueModel.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
