"""The receiver's side: views of the pool, and tensors of their own."""

from __future__ import annotations

import gc
import resource
import subprocess
import sys
import threading

import pytest
import torch

from aiomm.buffers import received
from aiomm.buffers.arena import HostArena
from aiomm.buffers.arrays import load_array_library
from aiomm.buffers.layout import Layout
from aiomm.buffers.received import JoinedTensors, PoolTensors
from aiomm.buffers.shm import MemfdArena
from aiomm.buffers.spare import SpareMemory
from aiomm.buffers.tensors import rows_of
from aiomm.errors import Rejected
from aiomm.types import DTYPE_NBYTES, Extent, Field, Schema

SCHEMA = Schema(embeddings=Field("bfloat16", 5), ids=Field("int32"), grid=Field("uint8", 2, 2))
NUM_TOKENS = 96


def source(num_tokens: int = NUM_TOKENS) -> dict[str, torch.Tensor]:
    return {
        "embeddings": torch.randn(num_tokens, 5).to(torch.bfloat16),
        "ids": torch.arange(num_tokens, dtype=torch.int32),
        "grid": torch.randint(0, 256, (num_tokens, 2, 2), dtype=torch.uint8),
    }


def filled(
    tensors: dict[str, torch.Tensor], arena_type: type[HostArena]
) -> tuple[Layout, HostArena]:
    """A pool in which token n is row n of `tensors`."""
    layout = Layout(SCHEMA, NUM_TOKENS, num_probes=1)
    arena = arena_type(layout.nbytes)
    for name, rows in rows_of(SCHEMA, dict(tensors)).items():
        start, stop = layout.field_range(name, Extent(0, NUM_TOKENS))
        rows.copy_into(arena.view(start, stop - start), 0, NUM_TOKENS)
    return layout, arena


def check_equal(actual: object, expected: torch.Tensor) -> None:
    assert isinstance(actual, torch.Tensor)
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert torch.equal(actual, expected)


def test_the_library_is_torch() -> None:
    assert load_array_library() is torch


class TestPoolTensors:
    @pytest.mark.parametrize("arena_type", [HostArena, MemfdArena])
    def test_views_share_the_pool(self, arena_type: type[HostArena]) -> None:
        tensors = source()
        layout, arena = filled(tensors, arena_type)
        pool = PoolTensors(layout, arena)
        for name in SCHEMA:
            for extent in (Extent(0, 96), Extent(16, 48), Extent(7, 7)):
                check_equal(pool.view(name, extent), tensors[name][extent.start : extent.stop])
        start, _ = layout.field_range("ids", Extent(9, 10))
        arena.view(start, 4)[:] = b"\x07\0\0\0"
        seen = pool.view("ids", Extent(9, 10))
        arena.close()
        del pool
        gc.collect()
        assert seen[0] == 7

    @pytest.mark.parametrize("dtype", DTYPE_NBYTES)
    def test_every_dtype(self, dtype: str) -> None:
        layout = Layout(Schema(x=Field(dtype, 2)), 8, num_probes=0)
        arena = HostArena(layout.nbytes)
        view = PoolTensors(layout, arena).view("x", Extent(2, 6))
        assert isinstance(view, torch.Tensor)
        assert (str(view.dtype), view.shape) == (f"torch.{dtype}", (4, 2))


class TestJoinedTensors:
    @pytest.mark.parametrize("num_tokens", [96, None])
    def test_chunks_follow_each_other(self, num_tokens: int | None) -> None:
        tensors = source()
        layout, arena = filled(tensors, HostArena)
        joined = JoinedTensors(SCHEMA, num_tokens, SpareMemory(0))
        chunks = [[Extent(32, 48), Extent(64, 71)], [], [Extent(0, 32), Extent(71, 96)]]
        for chunk in chunks:
            joined.append(layout, arena, chunk)
        joined.append(layout, arena, [Extent(48, 64)])
        assert joined.num_tokens == 96
        order = [*range(32, 48), *range(64, 71), *range(32), *range(71, 96), *range(48, 64)]
        arena.close()
        result = joined.tensors()
        del joined
        gc.collect()
        assert list(result) == list(SCHEMA)
        for name, tensor in result.items():
            check_equal(tensor, tensors[name][order])

    def test_chunks_that_are_copied_by_others(self) -> None:
        """They count at once, and may be copied in any order."""
        tensors = source()
        layout, arena = filled(tensors, HostArena)
        joined = JoinedTensors(SCHEMA, 96, SpareMemory(0))
        chunks = [[Extent(90, 96)], [], [Extent(32, 48), Extent(64, 71)], [Extent(0, 32)]]
        copies = [joined.appending(layout, arena, chunk) for chunk in chunks]
        assert joined.num_tokens == 61
        for each in reversed(copies):
            assert each is not None
            each.run()
        order = [*range(90, 96), *range(32, 48), *range(64, 71), *range(32)]
        assert joined.num_tokens == len(order)
        for name, tensor in joined.tensors().items():
            check_equal(tensor, tensors[name][order])

    def test_where_nobody_knows_the_length_no_other_can_copy(self) -> None:
        """Memory may have to move."""
        layout, arena = filled(source(), HostArena)
        joined = JoinedTensors(SCHEMA, None, SpareMemory(0))
        assert joined.appending(layout, arena, [Extent(0, 96)]) is None
        assert joined.num_tokens == 0

    def test_very_many_extents_are_not_listed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        layout, arena = filled(source(), HostArena)
        extents = [Extent(at, at + 1) for at in range(4)]
        for limit, is_listed in ((4 * len(SCHEMA), True), (4 * len(SCHEMA) - 1, False)):
            monkeypatch.setattr(received, "MAX_LISTED", limit)
            joined = JoinedTensors(SCHEMA, 96, SpareMemory(0))
            assert (joined.appending(layout, arena, extents) is not None) is is_listed
            assert joined.num_tokens == 4 * is_listed

    def test_copies_of_more_than_was_to_come_are_refused(self) -> None:
        layout, arena = filled(source(), HostArena)
        joined = JoinedTensors(SCHEMA, 95, SpareMemory(0))
        with pytest.raises(ValueError, match="96 tokens have come, and only 95 were to"):
            joined.appending(layout, arena, [Extent(0, 96)])
        assert joined.num_tokens == 0

    def test_in_another_thread(self) -> None:
        tensors = source()
        layout, arena = filled(tensors, MemfdArena)
        joined = JoinedTensors(SCHEMA, 96, SpareMemory(0))
        thread = threading.Thread(target=joined.append, args=(layout, arena, [Extent(0, 96)]))
        thread.start()
        thread.join()
        check_equal(joined.tensors()["embeddings"], tensors["embeddings"])

    @pytest.mark.parametrize("num_tokens", [0, None])
    def test_no_tokens(self, num_tokens: int | None) -> None:
        for name, tensor in JoinedTensors(SCHEMA, num_tokens, SpareMemory(0)).tensors().items():
            check_equal(tensor, source(0)[name])

    def test_more_than_was_to_come_is_refused(self) -> None:
        layout, arena = filled(source(), HostArena)
        joined = JoinedTensors(SCHEMA, 95, SpareMemory(0))
        with pytest.raises(ValueError, match="96 tokens have come, and only 95 were to"):
            joined.append(layout, arena, [Extent(0, 96)])
        assert joined.num_tokens == 0

    @pytest.mark.parametrize("num_tokens", [1 << 50, 1 << 70])
    def test_no_memory_is_a_refusal(self, num_tokens: int) -> None:
        with pytest.raises(Rejected, match=r"no memory for .* 'embeddings'") as refused:
            JoinedTensors(SCHEMA, num_tokens, SpareMemory(0)).tensors()
        assert refused.value.retryable

    @pytest.mark.parametrize("knows_length", [True, False])
    def test_peak_memory_is_the_tensor_itself(self, knows_length: bool) -> None:
        schema = Schema(x=Field("uint8", 1 << 16))
        layout = Layout(schema, 64, num_probes=0)
        arena = HostArena(layout.nbytes)
        arena.view(0, 64 << 16)[:] = bytes(range(256)) * (64 << 8)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        joined = JoinedTensors(schema, 64 * 20 if knows_length else None, SpareMemory(0))
        for _ in range(20):
            joined.append(layout, arena, [Extent(0, 64)])
        tensor = joined.tensors()["x"]
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        assert grown < tensor.nbytes + (8 << 20)
        assert tensor[-1, 255] == 255


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from aiomm.types import Extent, Field, Schema
from aiomm.buffers.arena import HostArena
from aiomm.buffers.layout import Layout
from aiomm.buffers.spare import SpareMemory
from aiomm.buffers.arrays import load_array_library
from aiomm.buffers.received import JoinedTensors, PoolTensors
{}
schema = Schema(x=Field("{}", 2))
layout = Layout(schema, 8, num_probes=0)
arena = HostArena(layout.nbytes)
arena.view(0, 64)[:] = bytes(range(64))
joined = JoinedTensors(schema, None, SpareMemory(0))
joined.append(layout, arena, [Extent(4, 6)])
try:
    pool = PoolTensors(layout, arena)
    print(pool.view("x", Extent(4, 6)).tolist() == joined.tensors()["x"].tolist())
    print(type(pool.view("x", Extent(0, 0))).__module__)
except ImportError as exc:
    print(exc)
"""


@pytest.mark.parametrize(
    ("before", "dtype", "expected"),
    [
        ("", "float32", "True\nnumpy"),
        ("", "bfloat16", "numpy has no bfloat16: install torch"),
        ("sys.modules['numpy'] = None", "int8", "received tensors are torch tensors or numpy"),
    ],
)
def test_without_torch(before: str, dtype: str, expected: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH.format(before, dtype)],
        timeout=20,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(expected)


def test_a_dtype_that_torch_has_not_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "uint16")
    layout = Layout(Schema(x=Field("uint16")), 8, num_probes=0)
    with pytest.raises(ImportError, match=r"torch .* has no uint16"):
        PoolTensors(layout, HostArena(layout.nbytes))
