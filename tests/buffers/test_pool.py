"""The pool's accounting, case by case; the stateful model is in test_pool_model.py."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from aiomm.buffers.arena import HostArena
from aiomm.buffers.layout import Layout
from aiomm.buffers.pool import BlockPool, BlockState, PoolError
from aiomm.types import Allocation, Extent, Field, Schema

ISSUE_ORDER = [15, 16, 17, 18, 19, 14, 13, 12, 11, 10]
OUT_OF_ORDER = [*ISSUE_ORDER, *(b for b in range(64) if b not in ISSUE_ORDER)]


def granted(pool: BlockPool, num_blocks: int, num_tokens: int | None = None) -> Allocation:
    allocation = pool.allocate(num_blocks, num_tokens=num_tokens)
    assert allocation is not None
    return allocation


class TestAllocate:
    def test_one_run_as_a_set_in_free_list_order(self) -> None:
        pool = BlockPool(num_blocks=64, block_size=128, free_blocks=OUT_OF_ORDER)
        allocation = granted(pool, 10)
        assert allocation.block_indices == (15, 16, 17, 18, 19, 14, 13, 12, 11, 10)
        assert allocation.start_offset == 1280
        assert allocation.extents == ((1280, 2560),)
        assert allocation.num_tokens == 1280

    def test_beside_another_allocation_nothing_overlaps(self) -> None:
        pool = BlockPool(64, 128, free_blocks=[5, 6, 7, 8, 9, *ISSUE_ORDER])
        first, second = granted(pool, 5), granted(pool, 10)
        assert first.extents == ((640, 1280),)
        assert second.extents == ((1280, 2560),)

    def test_scattered_blocks_give_two_extents(self) -> None:
        pool = BlockPool(64, 128, free_blocks=[15, 16, 14, 13, 10])
        allocation = granted(pool, 5)
        assert allocation.block_indices == (15, 16, 14, 13, 10)
        assert allocation.start_offset == 1280
        assert allocation.extents == ((1280, 1408), (1664, 2176))

    def test_a_write_into_scattered_blocks_leaves_the_neighbours_alone(self) -> None:
        """`min(block_indices)` layout overwrites blocks it does not own (list item 19)."""
        pool = BlockPool(64, 128, free_blocks=[15, 16, 14, 13, 10])
        schema = Schema(embeddings=Field("float32", 4), ids=Field("int32"))
        layout = Layout(schema, 64 * 128, num_probes=1)
        arena = HostArena(layout.nbytes)
        arena.view(0, layout.nbytes)[:] = b"\xaa" * layout.nbytes
        for name, extent in itertools.product(schema, granted(pool, 5).extents):
            start, stop = layout.field_range(name, extent)
            arena.view(start, stop - start)[:] = b"\x55" * (stop - start)
        for name, field in schema.items():
            for block in range(64):
                start, stop = layout.field_range(name, Extent(block * 128, block * 128 + 128))
                expected = b"\x55" if block in (10, 13, 14, 15, 16) else b"\xaa"
                content = bytes(arena.view(start, stop - start))
                assert content == expected * (128 * field.row_nbytes), (name, block)
        arena.close()

    def test_the_shortest_run_that_is_long_enough_comes_before_several_runs(self) -> None:
        pool = BlockPool(32, 4, free_blocks=[20, 0, 1, 2, 3, 4, 5, 22, 10, 11, 12, 13])
        assert granted(pool, 3).block_indices == (10, 11, 12)
        assert granted(pool, 6).block_indices == (0, 1, 2, 3, 4, 5)

    def test_else_the_fewest_runs(self) -> None:
        pool = BlockPool(32, 4, free_blocks=[0, 2, 10, 11, 20, 21, 22, 30])
        assert granted(pool, 5).block_indices == (10, 11, 20, 21, 22)

    def test_the_last_run_is_used_in_part(self) -> None:
        pool = BlockPool(32, 4, free_blocks=[30, 20, 21, 22, 10, 11])
        assert granted(pool, 4).extents == ((40, 44), (80, 92))

    def test_freed_blocks_go_to_the_front_in_their_order(self) -> None:
        """What was used last is used first, while it may be in the caches."""
        pool = BlockPool(4, 8, free_blocks=[2, 3, 1, 0])
        first, second = granted(pool, 2), granted(pool, 1)
        pool.free(first)
        pool.free(second)
        assert granted(pool, 4).block_indices == (1, 2, 3, 0)

    def test_not_enough_free_changes_nothing(self) -> None:
        pool = BlockPool(4, 8)
        assert pool.allocate(5) is None
        assert pool.num_free == 4

    def test_tokens_trim_the_last_extent(self) -> None:
        """Grant rounding: 8000 requested tokens are not 63 * 128 (list item 1)."""
        allocation = granted(BlockPool(64, 128), 63, 8000)
        assert allocation.num_tokens == 8000
        assert allocation.extents == ((0, 8000),)

    def test_tokens_trim_the_highest_block_of_several_runs(self) -> None:
        allocation = granted(BlockPool(8, 10, free_blocks=[7, 0, 2]), 3, 21)
        assert allocation.extents == ((0, 10), (20, 30), (70, 71))

    @pytest.mark.parametrize(
        ("blocks", "tokens"), [(2, 8), (1, 9), (0, 1), (1, 0), (-1, None), (-1, -8)]
    )
    def test_tokens_and_blocks_must_fit(self, blocks: int, tokens: int | None) -> None:
        with pytest.raises(PoolError, match="do not need exactly"):
            BlockPool(4, 8).allocate(blocks, num_tokens=tokens)

    def test_an_empty_allocation_lives_like_any_other(self) -> None:
        pool = BlockPool(4, 8)
        empty = granted(pool, 0)
        assert (empty.block_indices, empty.extents, empty.start_offset) == ((), (), 0)
        pool.fill(empty)
        pool.lease(empty)
        pool.free(empty)
        with pytest.raises(PoolError, match="not live"):
            pool.free(empty)


class TestStates:
    @pytest.mark.parametrize(
        "arguments",
        [(0, 8, None), (8, 0, None), (4, 8, [0, 0]), (4, 8, [4]), (4, 8, [-1])],
    )
    def test_impossible_pools_are_refused(
        self, arguments: tuple[int, int, list[int] | None]
    ) -> None:
        num_blocks, block_size, free_blocks = arguments
        with pytest.raises(ValueError, match=r"a pool has|must be distinct"):
            BlockPool(num_blocks, block_size, free_blocks=free_blocks)

    LEGAL = frozenset(
        {
            ("granted", "fill", "filled"),
            ("granted", "quarantine", "quarantined"),
            ("granted", "free", "free"),
            ("granted", "extend", "granted"),
            ("granted", "trim", "granted"),
            ("granted", "reallocate", "granted"),
            ("filled", "lease", "leased"),
            ("filled", "quarantine", "quarantined"),
            ("filled", "free", "free"),
            ("filled", "extend", "granted"),
            ("filled", "trim", "filled"),
            ("leased", "free", "free"),
            ("quarantined", "free", "free"),
        }
    )
    OPERATIONS = ("fill", "lease", "quarantine", "free", "extend", "trim", "reallocate")
    PATHS = (
        ("granted", ()),
        ("filled", ("fill",)),
        ("leased", ("fill", "lease")),
        ("quarantined", ("quarantine",)),
    )

    @pytest.mark.parametrize(("before", "path"), PATHS)
    @pytest.mark.parametrize("operation", OPERATIONS)
    def test_every_state_against_every_operation(
        self, before: str, path: tuple[str, ...], operation: str
    ) -> None:
        pool = BlockPool(8, 4)
        allocation = granted(pool, 4)
        for step in path:
            getattr(pool, step)(allocation)
        arguments = {"extend": (20,), "trim": (4,), "reallocate": (8,)}.get(operation, ())
        apply: Callable[..., Allocation | None] = getattr(pool, operation)
        counts, shown = pool.counts(), repr(pool)
        afterwards = {after for b, o, after in self.LEGAL if (b, o) == (before, operation)}
        if not afterwards:
            with pytest.raises(PoolError, match=f"cannot {operation} .* it is {before}"):
                apply(allocation, *arguments)
            assert (pool.counts(), repr(pool)) == (counts, shown)
            assert pool.state(allocation).value == before
            return
        result = apply(allocation, *arguments)
        if result is not None:
            assert {pool.state(result).value} == afterwards
        for gone in (allocation,) if result is not allocation else ():
            if operation in ("free", "extend", "trim", "reallocate"):
                with pytest.raises(PoolError, match="not live"):
                    pool.state(gone)
            else:
                assert {pool.state(gone).value} == afterwards

    def test_double_free_is_noticed_even_when_an_equal_allocation_lives(self) -> None:
        pool = BlockPool(4, 8)
        first = granted(pool, 4)
        pool.free(first)
        second = granted(pool, 4)
        assert first == second
        with pytest.raises(PoolError, match="not live"):
            pool.free(first)
        pool.free(second)

    def test_foreign_free_is_noticed(self) -> None:
        pool, other = BlockPool(4, 8), BlockPool(4, 8)
        granted(pool, 2)
        with pytest.raises(PoolError, match="another pool"):
            pool.free(granted(other, 2))
        with pytest.raises(PoolError, match="not live"):
            pool.free(Allocation((0,), 8, (Extent(0, 8),)))
        assert pool.num_free == 2

    def test_figures(self) -> None:
        pool = BlockPool(16, 8, free_blocks=range(4, 14))
        assert (pool.capacity, pool.num_free, pool.blocks_for(17)) == (10, 10, 3)
        parts = [granted(pool, n) for n in (1, 2, 3)]
        pool.fill(parts[0])
        pool.lease(parts[0])
        pool.quarantine(parts[1])
        assert pool.counts() == {
            BlockState.FREE: 4,
            BlockState.GRANTED: 3,
            BlockState.FILLED: 0,
            BlockState.LEASED: 1,
            BlockState.QUARANTINED: 2,
        }
        assert repr(pool) == (
            "<BlockPool 16 x 8 tokens: 4 free, 3 granted, 1 leased, 2 quarantined>"
        )


class TestExtend:
    def test_into_the_blocks_behind(self) -> None:
        pool = BlockPool(8, 10)
        allocation = granted(pool, 2, 15)
        larger = pool.extend(allocation, 32)
        assert larger == Allocation((0, 1, 2, 3), 32, (Extent(0, 32),))
        assert pool.num_free == 4

    def test_into_the_rest_of_the_last_block(self) -> None:
        pool = BlockPool(2, 10)
        allocation = granted(pool, 1, 5)
        granted(pool, 1)
        assert pool.extend(allocation, 10) == Allocation((0,), 10, (Extent(0, 10),))

    def test_behind_the_last_of_several_extents(self) -> None:
        pool = BlockPool(8, 10, free_blocks=[5, 2, 6])
        pool.free(granted(pool, 1))
        allocation = granted(pool, 2, 12)
        assert allocation.extents == ((50, 62),)
        scattered = BlockPool(8, 10, free_blocks=[2, 5, 7])
        part = granted(scattered, 2, 12)
        assert part.extents == ((20, 30), (50, 52))
        larger = scattered.extend(part, 20)
        assert larger is not None
        assert larger.extents == ((20, 30), (50, 60))
        assert scattered.extend(larger, 21) is None

    def test_none_where_the_block_behind_is_taken(self) -> None:
        pool = BlockPool(4, 10)
        first = granted(pool, 2)
        granted(pool, 1)
        assert pool.extend(first, 21) is None
        assert pool.state(first) is BlockState.GRANTED

    def test_none_past_the_end_of_the_pool(self) -> None:
        pool = BlockPool(4, 10)
        assert pool.extend(granted(pool, 3), 50) is None

    def test_none_for_an_empty_allocation(self) -> None:
        pool = BlockPool(4, 10)
        assert pool.extend(granted(pool, 0), 5) is None

    def test_the_same_length_is_the_same_allocation(self) -> None:
        pool = BlockPool(4, 10)
        allocation = granted(pool, 2)
        pool.fill(allocation)
        assert pool.extend(allocation, 20) is allocation
        assert pool.state(allocation) is BlockState.FILLED

    def test_smaller_is_refused(self) -> None:
        pool = BlockPool(4, 10)
        with pytest.raises(PoolError, match="cannot extend 20 tokens to 19"):
            pool.extend(granted(pool, 2), 19)


class TestTrim:
    def test_frees_the_highest_blocks(self) -> None:
        pool = BlockPool(64, 128, free_blocks=ISSUE_ORDER)
        smaller = pool.trim(granted(pool, 10), 500)
        assert smaller == Allocation((13, 12, 11, 10), 500, (Extent(1280, 1780),))
        assert granted(pool, 6).block_indices == (15, 16, 17, 18, 19, 14)

    def test_to_nothing(self) -> None:
        pool = BlockPool(4, 8)
        assert pool.trim(granted(pool, 4), 0) == Allocation((), 0, ())
        assert pool.num_free == 4

    def test_the_same_length_is_the_same_allocation(self) -> None:
        pool = BlockPool(4, 8)
        allocation = granted(pool, 2)
        assert pool.trim(allocation, 16) is allocation

    @pytest.mark.parametrize("num_tokens", [17, -1])
    def test_larger_or_negative_is_refused(self, num_tokens: int) -> None:
        pool = BlockPool(4, 8)
        with pytest.raises(PoolError, match="cannot trim 16 tokens"):
            pool.trim(granted(pool, 2), num_tokens)


class TestReallocate:
    def test_smaller_is_trimmed(self) -> None:
        pool = BlockPool(8, 8)
        assert pool.reallocate(granted(pool, 4), 9).block_indices == (0, 1)

    def test_larger_is_extended(self) -> None:
        pool = BlockPool(8, 8)
        assert pool.reallocate(granted(pool, 2), 30).block_indices == (0, 1, 2, 3)

    def test_moves_where_only_that_gives_the_need(self) -> None:
        pool = BlockPool(8, 8)
        first, second = granted(pool, 2), granted(pool, 1)
        moved = pool.reallocate(first, 40)
        assert moved.extents == ((24, 64),)
        pool.free(second)
        assert pool.num_free == 3

    def test_its_own_blocks_count(self) -> None:
        pool = BlockPool(4, 8)
        first, second = granted(pool, 2), granted(pool, 1)
        moved = pool.reallocate(first, 24)
        assert moved.extents == ((0, 16), (24, 32))
        assert pool.num_free == 0
        pool.free(second)

    def test_scattered_blocks_are_given_up_for_one_run(self) -> None:
        pool = BlockPool(16, 8, free_blocks=[0, 2, 4, 6])
        scattered, blocker = granted(pool, 3), granted(pool, 1)
        assert len(scattered.extents) == 3
        pool.free(blocker)
        assert len(pool.reallocate(scattered, 8).extents) == 1

    def test_an_empty_one_grows(self) -> None:
        pool = BlockPool(4, 8)
        assert pool.reallocate(granted(pool, 0), 8).num_tokens == 8

    def test_unchanged_where_the_need_is_out_of_reach(self) -> None:
        pool = BlockPool(4, 8)
        allocation = granted(pool, 2)
        assert pool.reallocate(allocation, 33) is allocation

    def test_negative_is_refused(self) -> None:
        pool = BlockPool(4, 8)
        with pytest.raises(PoolError, match="cannot reallocate to -1"):
            pool.reallocate(granted(pool, 0), -1)
