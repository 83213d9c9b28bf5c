"""Which block belongs to whom: the accounting of a pool, without its memory.

Every block of the pool is free, or part of exactly one live :class:`~aiomm.types.Allocation`
(rule 1 of the protocol). An allocation moves through the states as a whole::

    FREE -> GRANTED -> FILLED -> LEASED -> FREE
               |         |
               +----+----+--> QUARANTINED -> FREE     (and GRANTED, FILLED -> FREE)

The pool tells allocations apart by identity, not by value: an allocation that was freed, or
replaced by a larger or smaller one, is dead even when an equal one is handed out later.
Not thread-safe; every call takes microseconds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from itertools import count, islice

from ..types import Allocation, Extent
from .runs import FreeRuns, grouped

__all__ = ["BlockPool", "BlockState", "PoolError"]


class PoolError(AssertionError):
    """A bug of the caller, such as a double free. The pool is as it was before the call."""


class BlockState(StrEnum):
    """Who may touch a block."""

    FREE = "free"
    """Nobody; no write can land in it."""
    GRANTED = "granted"
    """A sender may write it."""
    FILLED = "filled"
    """Its tokens have arrived."""
    LEASED = "leased"
    """The user reads it."""
    QUARANTINED = "quarantined"
    """Nobody may read it, and a late write may still land in it."""


_FREE, _GRANTED, _FILLED, _LEASED, _QUARANTINED = BlockState

_MOVES: Mapping[str, Mapping[BlockState, BlockState]] = {
    "fill": {_GRANTED: _FILLED},
    "lease": {_FILLED: _LEASED},
    "quarantine": {_GRANTED: _QUARANTINED, _FILLED: _QUARANTINED},
    "free": {_GRANTED: _FREE, _FILLED: _FREE, _LEASED: _FREE, _QUARANTINED: _FREE},
    "extend": {_GRANTED: _GRANTED, _FILLED: _GRANTED},
    "trim": {_GRANTED: _GRANTED, _FILLED: _FILLED},
    "reallocate": {_GRANTED: _GRANTED},
}
"""Operation -> state before -> state after. What is not here is illegal."""


class _Live:
    """An allocation that has not ended, and the state of all its blocks."""

    __slots__ = ("allocation", "state")

    def __init__(self, allocation: Allocation, state: BlockState) -> None:
        self.allocation = allocation
        self.state = state


class BlockPool:
    """The accounting of `num_blocks` blocks of `block_size` tokens each.

    Args:
        num_blocks: blocks of the pool, numbered from 0.
        block_size: tokens per block.
        free_blocks: the free list, what is taken first first; all blocks in ascending order if
            not given.
            Blocks left out are somebody else's: never handed out, counted nowhere.

    Raises:
        ValueError: a number is out of range, or a block is named twice.
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, free_blocks: Iterable[int] | None = None
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool has blocks and tokens, got {num_blocks} x {block_size}")
        first = list(range(num_blocks) if free_blocks is None else free_blocks)
        if len(set(first)) != len(first) or not all(0 <= block < num_blocks for block in first):
            raise ValueError(f"free blocks must be distinct and below {num_blocks}, got {first}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.capacity = len(first)
        """Blocks that can ever be handed out."""
        self._live: dict[int, _Live] = {}  # by id(allocation), which _Live keeps alive
        # The free list twice: block -> its place, in that order; and as runs.
        self._free: OrderedDict[int, int] = OrderedDict(zip(first, count()))
        self._front = 0
        self._free_runs = FreeRuns(num_blocks)
        for run in grouped(first):
            self._free_runs.add(run)
        self._counts = dict.fromkeys(BlockState, 0)

    # What is there

    @property
    def num_free(self) -> int:
        """Blocks that are free now."""
        return len(self._free)

    def counts(self) -> dict[BlockState, int]:
        """Return the number of blocks in each state; they add up to `capacity`."""
        return {**self._counts, _FREE: len(self._free)}

    def blocks_for(self, num_tokens: int) -> int:
        """Return the number of blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def state(self, allocation: Allocation) -> BlockState:
        """Return the state of all blocks of `allocation`.

        Raises:
            PoolError: the allocation is not live.
        """
        live = self._live.get(id(allocation))
        if live is None:
            raise PoolError(f"{allocation} is not live: freed, replaced, or of another pool")
        return live.state

    def __repr__(self) -> str:
        used = (f"{count} {state.value}" for state, count in self.counts().items() if count)
        return f"<BlockPool {self.num_blocks} x {self.block_size} tokens: {', '.join(used)}>"

    # Handing out and taking back

    def allocate(self, num_blocks: int, *, num_tokens: int | None = None) -> Allocation | None:
        """Take blocks off the free list; None when not enough are free.

        Those at its front are taken when they form one run as a set, else the shortest free run
        that is long enough, else the fewest runs.

        Args:
            num_blocks: how many; 0 gives an empty allocation.
            num_tokens: usable tokens, which must need `num_blocks` blocks; all if not given.

        Raises:
            PoolError: the two numbers do not fit together.
        """
        if num_tokens is None:
            num_tokens = num_blocks * self.block_size
        if num_blocks < 0 or self.blocks_for(num_tokens) != num_blocks:
            raise PoolError(f"{num_tokens} tokens do not need exactly {num_blocks} blocks")
        if num_blocks > len(self._free):
            return None
        blocks = self._choose(num_blocks)
        runs = grouped(blocks)
        self._remove_from_free_list(blocks, runs)
        allocation = Allocation(tuple(blocks), num_tokens, self._extents(runs, num_tokens))
        self._enter(allocation, _GRANTED)
        return allocation

    def free(self, allocation: Allocation) -> None:
        """Put all blocks of `allocation` at the front of the free list, in their order.

        What was used last is used first: it may still be in the caches, and the blocks that a
        pool never needs stay together.

        Raises:
            PoolError: it is not live: a double free, or a foreign one.
        """
        self._state_after("free", allocation)
        self._leave(allocation)
        self._put_in_front(allocation.block_indices)

    def fill(self, allocation: Allocation) -> None:
        """Note that all tokens of a granted allocation have arrived.

        Raises:
            PoolError: it is not live, or not granted.
        """
        self._move("fill", allocation)

    def lease(self, allocation: Allocation) -> None:
        """Note that the user reads a filled allocation.

        Raises:
            PoolError: it is not live, or not filled.
        """
        self._move("lease", allocation)

    def quarantine(self, allocation: Allocation) -> None:
        """Keep a granted or filled allocation away from everybody until it is freed.

        Raises:
            PoolError: it is not live, or leased, or quarantined already.
        """
        self._move("quarantine", allocation)

    # Larger and smaller. What these return replaces what was passed in, which is then dead.

    def extend(self, allocation: Allocation, num_tokens: int) -> Allocation | None:
        """Enlarge a granted or filled allocation to `num_tokens` tokens in all; granted again.

        The new tokens lie directly behind its last extent: in the rest of its last block and
        in the blocks that follow. None, and nothing changes, where those are not free.

        Raises:
            PoolError: it is not live, in another state, or larger already.
        """
        state = self._state_after("extend", allocation)
        if num_tokens < allocation.num_tokens:
            raise PoolError(f"cannot extend {allocation.num_tokens} tokens to {num_tokens}")
        if num_tokens == allocation.num_tokens:
            return allocation
        if not allocation.extents:
            return None
        following = max(allocation.block_indices) + 1
        missing = self.blocks_for(num_tokens) - len(allocation.block_indices)
        extra = range(following, following + missing)
        if not self._free_runs.covers(extra):
            return None
        self._remove_from_free_list(extra, (extra,))
        return self._replace(allocation, (*allocation.block_indices, *extra), num_tokens, state)

    def trim(self, allocation: Allocation, num_tokens: int) -> Allocation:
        """Keep the first `num_tokens` tokens of a granted or filled allocation.

        The blocks that are no longer needed are freed.

        Raises:
            PoolError: it is not live, in another state, or smaller already.
        """
        state = self._state_after("trim", allocation)
        if not 0 <= num_tokens <= allocation.num_tokens:
            raise PoolError(f"cannot trim {allocation.num_tokens} tokens to {num_tokens}")
        if num_tokens == allocation.num_tokens:
            return allocation
        kept = set(sorted(allocation.block_indices)[: self.blocks_for(num_tokens)])
        smaller = self._replace(
            allocation,
            tuple(block for block in allocation.block_indices if block in kept),
            num_tokens,
            state,
        )
        self._put_in_front([b for b in allocation.block_indices if b not in kept])
        return smaller

    def reallocate(self, allocation: Allocation, num_tokens: int) -> Allocation:
        """Change a reservation that nobody writes yet to exactly `num_tokens` tokens.

        Other blocks are taken where only that gives one run, or gives the whole need at all.
        Returned unchanged where even that does not reach the need.

        Raises:
            PoolError: it is not live, or not granted, or the number is negative.
        """
        self._state_after("reallocate", allocation)
        if num_tokens < 0:
            raise PoolError(f"cannot reallocate to {num_tokens} tokens")
        if len(allocation.extents) == 1:
            if num_tokens <= allocation.num_tokens:
                return self.trim(allocation, num_tokens)
            extended = self.extend(allocation, num_tokens)
            if extended is not None:
                return extended
        need = self.blocks_for(num_tokens)
        if need > len(self._free) + len(allocation.block_indices):
            return allocation
        self.free(allocation)
        replacement = self.allocate(need, num_tokens=num_tokens)
        assert replacement is not None
        return replacement

    # The free list

    def _choose(self, num_blocks: int) -> Sequence[int]:
        """Name free blocks, in the order of the free list; there are enough of them."""
        first = list(islice(self._free, num_blocks))
        if not first or max(first) - min(first) + 1 == num_blocks:
            return first
        run = self._free_runs.shortest(num_blocks)
        chosen = list(run[:num_blocks]) if run is not None else self._fewest_runs(num_blocks)
        return sorted(chosen, key=self._free.__getitem__)

    def _fewest_runs(self, num_blocks: int) -> list[int]:
        blocks: list[int] = []
        runs = self._free_runs.longest_first()
        while len(blocks) < num_blocks:
            blocks += next(runs)[: num_blocks - len(blocks)]
        return blocks

    def _put_in_front(self, blocks: Sequence[int]) -> None:
        for block in reversed(blocks):
            self._front -= 1
            self._free[block] = self._front
            self._free.move_to_end(block, last=False)
        for run in grouped(blocks):
            self._free_runs.add(run)

    def _remove_from_free_list(self, blocks: Sequence[int], runs: Iterable[range]) -> None:
        for block in blocks:
            del self._free[block]
        for run in runs:
            self._free_runs.remove(run)

    # The live allocations

    def _state_after(self, operation: str, allocation: Allocation) -> BlockState:
        """Return the state after `operation`; change nothing."""
        before = self.state(allocation)
        after = _MOVES[operation].get(before)
        if after is None:
            raise PoolError(f"cannot {operation} {allocation}: it is {before.value}")
        return after

    def _move(self, operation: str, allocation: Allocation) -> None:
        after = self._state_after(operation, allocation)
        live, num_blocks = self._live[id(allocation)], len(allocation.block_indices)
        self._counts[live.state] -= num_blocks
        self._counts[after] += num_blocks
        live.state = after

    def _replace(
        self, old: Allocation, blocks: tuple[int, ...], num_tokens: int, state: BlockState
    ) -> Allocation:
        self._leave(old)
        new = Allocation(blocks, num_tokens, self._extents(grouped(blocks), num_tokens))
        self._enter(new, state)
        return new

    def _enter(self, allocation: Allocation, state: BlockState) -> None:
        self._live[id(allocation)] = _Live(allocation, state)
        self._counts[state] += len(allocation.block_indices)

    def _leave(self, allocation: Allocation) -> None:
        live = self._live.pop(id(allocation))
        self._counts[live.state] -= len(allocation.block_indices)

    def _extents(self, runs: Iterable[range], num_tokens: int) -> tuple[Extent, ...]:
        """Return `runs` of blocks as runs of tokens, the last one cut to `num_tokens` in all."""
        size = self.block_size
        extents = []
        for run in runs:
            start = run.start * size
            stop = min(run.stop * size, start + num_tokens)
            extents.append(Extent(start, stop))
            num_tokens -= stop - start
        return tuple(extents)
