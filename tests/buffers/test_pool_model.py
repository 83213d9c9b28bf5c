"""The pool against a model that knows only lists, over random histories."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from aiomm.buffers.pool import BlockPool, BlockState
from aiomm.types import Allocation

BLOCK_SIZE = 4


def runs_in(blocks: list[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for block in sorted(blocks):
        if runs and runs[-1][-1] + 1 == block:
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs


def tokens_of(allocation: Allocation) -> list[int]:
    """The tokens of an allocation one by one, from its blocks and its length alone."""
    every = [
        block * BLOCK_SIZE + token
        for block in sorted(allocation.block_indices)
        for token in range(BLOCK_SIZE)
    ]
    return every[: allocation.num_tokens]


def fewest_runs_needed(free: list[int], num_blocks: int) -> int:
    lengths = sorted(map(len, runs_in(free)), reverse=True)
    count = 0
    while num_blocks > 0:
        num_blocks -= lengths[count]
        count += 1
    return count


def in_state(*states: BlockState) -> Callable[[Any], bool]:
    return lambda model: any(state in states for _, state in model.live)


GRANTED, FILLED, LEASED, QUARANTINED = list(BlockState)[1:]


class PoolModel(RuleBasedStateMachine):
    @initialize(data=st.data(), num_blocks=st.integers(1, 24))
    def make(self, data: st.DataObject, num_blocks: int) -> None:
        order = data.draw(st.permutations(range(num_blocks)))
        kept = data.draw(st.integers(1, num_blocks))
        self.free = list(order[:kept])
        self.capacity = kept
        self.live: list[tuple[Allocation, BlockState]] = []
        self.pool = BlockPool(num_blocks, BLOCK_SIZE, free_blocks=list(self.free))

    def pick(self, data: st.DataObject, *states: BlockState) -> tuple[Allocation, BlockState]:
        """Take one live allocation out of the model."""
        index = data.draw(
            st.sampled_from([i for i, (_, state) in enumerate(self.live) if state in states])
        )
        return self.live.pop(index)

    def enter(self, allocation: Allocation, state: BlockState) -> None:
        self.free = [block for block in self.free if block not in allocation.block_indices]
        self.live.append((allocation, state))

    @rule(num_tokens=st.integers(0, 40))
    def allocate(self, num_tokens: int) -> None:
        need = -(-num_tokens // BLOCK_SIZE)
        allocation = self.pool.allocate(need, num_tokens=num_tokens)
        if need > len(self.free):
            assert allocation is None
            return
        assert allocation is not None
        assert allocation.num_tokens == num_tokens
        self.check_choice(list(allocation.block_indices), need)
        self.enter(allocation, GRANTED)

    def check_choice(self, blocks: list[int], need: int) -> None:
        assert blocks == [block for block in self.free if block in blocks], "free-list order"
        assert len(blocks) == need
        if need and len(runs_in(self.free[:need])) == 1:
            assert blocks == self.free[:need]
            return
        assert len(runs_in(blocks)) == fewest_runs_needed(self.free, need)
        long_enough = [run for run in runs_in(self.free) if len(run) >= need]
        if need and long_enough:
            [run] = [run for run in long_enough if blocks[0] in run]
            assert len(run) == min(map(len, long_enough))

    @precondition(in_state(GRANTED))
    @rule(data=st.data())
    def fill(self, data: st.DataObject) -> None:
        allocation, _ = self.pick(data, GRANTED)
        self.pool.fill(allocation)
        self.enter(allocation, FILLED)

    @precondition(in_state(FILLED))
    @rule(data=st.data())
    def lease(self, data: st.DataObject) -> None:
        allocation, _ = self.pick(data, FILLED)
        self.pool.lease(allocation)
        self.enter(allocation, LEASED)

    @precondition(in_state(GRANTED, FILLED))
    @rule(data=st.data())
    def quarantine(self, data: st.DataObject) -> None:
        allocation, _ = self.pick(data, GRANTED, FILLED)
        self.pool.quarantine(allocation)
        self.enter(allocation, QUARANTINED)

    @precondition(in_state(GRANTED, FILLED, LEASED, QUARANTINED))
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        allocation, _ = self.pick(data, GRANTED, FILLED, LEASED, QUARANTINED)
        self.pool.free(allocation)
        self.free = [*allocation.block_indices, *self.free]

    @precondition(in_state(GRANTED, FILLED))
    @rule(data=st.data(), more=st.integers(1, 20))
    def extend(self, data: st.DataObject, more: int) -> None:
        allocation, state = self.pick(data, GRANTED, FILLED)
        before = tokens_of(allocation)
        larger = self.pool.extend(allocation, len(before) + more)
        wanted = range(before[-1] + 1, before[-1] + 1 + more) if before else range(0)
        blocks = {token // BLOCK_SIZE for token in wanted} - set(allocation.block_indices)
        if before and blocks <= set(self.free):
            assert larger is not None
            assert tokens_of(larger) == [*before, *wanted]
            self.enter(larger, GRANTED)
        else:
            assert larger is None
            self.enter(allocation, state)

    @precondition(in_state(GRANTED, FILLED))
    @rule(data=st.data(), part=st.floats(0, 1))
    def trim(self, data: st.DataObject, part: float) -> None:
        allocation, state = self.pick(data, GRANTED, FILLED)
        keep = int(part * allocation.num_tokens)
        smaller = self.pool.trim(allocation, keep)
        assert tokens_of(smaller) == tokens_of(allocation)[:keep]
        freed = [b for b in allocation.block_indices if b not in smaller.block_indices]
        self.free = [*freed, *self.free]
        self.enter(smaller, state)

    @precondition(in_state(GRANTED))
    @rule(data=st.data(), num_tokens=st.integers(0, 60))
    def reallocate(self, data: st.DataObject, num_tokens: int) -> None:
        allocation, _ = self.pick(data, GRANTED)
        other = self.pool.reallocate(allocation, num_tokens)
        reach = len(self.free) + len(allocation.block_indices)
        if -(-num_tokens // BLOCK_SIZE) > reach:
            assert other is allocation
        else:
            assert other.num_tokens == num_tokens
            self.free = [*allocation.block_indices, *self.free]
        self.enter(other, GRANTED)

    @precondition(lambda self: hasattr(self, "pool"))
    @invariant()
    def every_block_has_one_owner(self) -> None:
        owned = [block for one, _ in self.live for block in one.block_indices]
        assert len(set(owned) | set(self.free)) == len(owned) + len(self.free) == self.capacity
        assert self.pool.num_free == len(self.free)
        for state, count in self.pool.counts().items():
            blocks = sum(len(one.block_indices) for one, at in self.live if at is state)
            assert count == (len(self.free) if state is BlockState.FREE else blocks)

    @precondition(lambda self: hasattr(self, "pool"))
    @invariant()
    def extents_are_the_tokens_of_the_blocks(self) -> None:
        for allocation, state in self.live:
            assert self.pool.state(allocation) is state
            tokens = [t for extent in allocation.extents for t in range(*extent)]
            assert tokens == tokens_of(allocation)
            stops = [extent.stop for extent in allocation.extents[:-1]]
            starts = [extent.start for extent in allocation.extents[1:]]
            assert all(stop < start for stop, start in zip(stops, starts, strict=True))


TestPoolModel = PoolModel.TestCase
TestPoolModel.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
