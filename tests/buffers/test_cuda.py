"""Pools in the memory of a GPU, and what is moved out of them, on a fake GPU."""

from __future__ import annotations

import ctypes
import gc
import logging
import sys
import threading
from collections.abc import Callable, Iterator

import numpy
import pytest
import torch

from aiomm.buffers.arena import HostArena
from aiomm.buffers.arrays import Array
from aiomm.buffers.cuda import CudaArena, DeviceJoinedTensors
from aiomm.buffers.layout import ByteRange, Layout
from aiomm.buffers.memcpy import address_of
from aiomm.buffers.received import PoolTensors
from aiomm.buffers.tensors import rows_of
from aiomm.errors import PlaneUnavailable, PoolClosed, Rejected
from aiomm.gpu.choice import use_runtime
from aiomm.gpu.fake import FakeRuntime
from aiomm.gpu.runtime import GpuError
from aiomm.types import DTYPE_NBYTES, Extent, Field, Schema

SCHEMA = Schema(embeddings=Field("bfloat16", 5), ids=Field("int32"), grid=Field("uint8", 2, 2))
NUM_TOKENS = 96
NBYTES = 4096
BYTES = Field("uint8")


class PoorRuntime(FakeRuntime):
    """Two devices that may run out of memory, and that may refuse to pin."""

    def __init__(self) -> None:
        super().__init__([0, 1])
        self.num_left = 1 << 30
        """Allocations for which there is memory."""
        self.pinned: dict[int, int] = {}
        self.refuses_to_pin = False

    def allocate(self, device: int, nbytes: int) -> int:
        if not self.num_left:
            raise GpuError("cuMemAlloc", 2, "out of memory")
        self.num_left -= 1
        return super().allocate(device, nbytes)

    def pin(self, device: int, address: int, nbytes: int) -> None:
        if self.refuses_to_pin:
            raise GpuError("cuMemHostRegister", 801, "operation not supported")
        self.pinned[address] = nbytes

    def unpin(self, device: int, address: int) -> None:
        if address not in self.pinned:
            raise GpuError("cuMemHostUnregister", 713, "not registered")
        del self.pinned[address]


@pytest.fixture(autouse=True)
def runtime(no_leaks: None) -> Iterator[PoorRuntime]:
    """Neither device may be abused, and nothing is left of them."""
    runtime = PoorRuntime()
    use_runtime(runtime)
    yield runtime
    use_runtime(None)
    assert runtime.violations == []
    for thread in threading.enumerate():
        if thread.name == "fake-gpu-stream":
            thread.join()


def addresses(runtime: FakeRuntime) -> set[int]:
    """Return what is allocated and not freed."""
    gc.collect()
    return set(runtime._memory)


def host_arena(content: bytes) -> HostArena:
    arena = HostArena(len(content))
    arena.view(0, len(content))[:] = content
    return arena


def arena_of(content: bytes, device: str = "cuda:0") -> CudaArena:
    arena = CudaArena(len(content), device)
    arena.upload(host_arena(content), [ByteRange(0, len(content))])
    return arena


def random_bytes(nbytes: int) -> bytes:
    return numpy.random.default_rng(7).bytes(nbytes)


def bytes_of(tensor: Array) -> bytes:
    if isinstance(tensor, torch.Tensor):
        return bytes(tensor.contiguous().view(torch.uint8).reshape(-1).numpy())
    return tensor.tobytes()


class TestArena:
    @pytest.mark.parametrize(
        ("told", "device", "ordinal"), [("cuda", "cuda:0", 0), ("cuda:1", "cuda:1", 1)]
    )
    def test_lies_on_its_device(
        self, runtime: FakeRuntime, told: str, device: str, ordinal: int
    ) -> None:
        arena = CudaArena(NBYTES, told)
        assert (arena.device, arena.ordinal, arena.nbytes) == (device, ordinal, NBYTES)
        assert runtime.device_at(arena.memory.address) == ordinal
        assert repr(arena) == f"<CudaArena of 4096 bytes on {device}>"
        arena.close()
        assert repr(arena) == f"<CudaArena of 4096 bytes on {device}, closed>"

    def test_is_an_allocation_of_its_own_that_can_be_exported(self, runtime: FakeRuntime) -> None:
        arenas = [CudaArena(NBYTES, "cuda:0") for _ in range(2)]
        assert len({runtime.export(0, arena.memory.address) for arena in arenas}) == 2

    def test_is_on_no_device_that_there_is_not(self, runtime: FakeRuntime) -> None:
        with pytest.raises(PlaneUnavailable, match="cuda:2: there are 2 GPUs here"):
            CudaArena(NBYTES, "cuda:2")
        assert addresses(runtime) == set()

    def test_is_not_on_the_host(self) -> None:
        with pytest.raises(ValueError, match="expected 'cpu', 'cuda' or 'cuda:0'"):
            CudaArena(NBYTES, "cpu")

    def test_needs_memory(self, runtime: PoorRuntime) -> None:
        runtime.num_left = 0
        with pytest.raises(PlaneUnavailable, match="cuda:1: cuMemAlloc: out of memory"):
            CudaArena(NBYTES, "cuda:1")

    def test_reads_what_was_uploaded(self, runtime: FakeRuntime) -> None:
        content = random_bytes(NBYTES)
        arena = arena_of(content)
        assert arena.read(0, NBYTES) == content
        assert arena.read(4000, 96) == content[4000:]
        assert bytes(arena.read(NBYTES, 0)) == b""
        assert runtime.copied == {"HtoD": NBYTES, "DtoH": NBYTES + 96}

    def test_is_read_as_a_copy(self) -> None:
        arena = arena_of(bytes(8))
        before = arena.read(0, 8)
        ctypes.memset(arena.memory.address, 1, 8)
        assert [bytes(before), bytes(arena.read(0, 8))] == [bytes(8), b"\1" * 8]

    def test_takes_some_ranges_of_the_host_to_the_same_places(self, runtime: FakeRuntime) -> None:
        arena, source = arena_of(bytes(64)), host_arena(bytes(range(64)))
        runtime.copied.clear()
        arena.upload(source, [ByteRange(50, 64), ByteRange(8, 8), ByteRange(1, 3)])
        expected = bytes(at if at >= 50 or at in (1, 2) else 0 for at in range(64))
        assert arena.read(0, 64) == expected
        assert runtime.copied["HtoD"] == 16

    def test_takes_nothing_of_no_ranges(self, runtime: FakeRuntime) -> None:
        CudaArena(64, "cuda:0").upload(HostArena(64), [ByteRange(64, 64)])
        assert runtime.copied == {}

    @pytest.mark.parametrize(("offset", "nbytes"), [(-1, 4), (NBYTES, 1), (0, NBYTES + 1), (8, -4)])
    def test_has_no_bytes_outside(self, offset: int, nbytes: int) -> None:
        arena = CudaArena(NBYTES, "cuda:0")
        with pytest.raises(ValueError, match="are outside the arena's 4096"):
            arena.read(offset, nbytes)
        with pytest.raises(ValueError, match="are outside the arena's 4096"):
            arena.array(offset, BYTES, nbytes)

    def test_says_that_its_device_is_lost(self, runtime: FakeRuntime) -> None:
        arena, source = arena_of(bytes(8)), host_arena(bytes(8))
        runtime.faults.fail_at = runtime.faults.num_copies + 1
        lost = "cuda:0: .* the device is lost to this process, restart it"
        with pytest.raises(PlaneUnavailable, match=lost):
            arena.read(0, 8)
        with pytest.raises(PlaneUnavailable, match=lost):
            arena.upload(source, [ByteRange(0, 8)])
        with pytest.raises(PlaneUnavailable, match=lost):
            CudaArena(8, "cuda:0")

    def test_says_that_a_copy_was_refused(self, runtime: FakeRuntime) -> None:
        arena, source = arena_of(bytes(8)), host_arena(b"contents")
        for _ in range(2):
            runtime.faults.refuse_at = runtime.faults.num_copies + 1
            with pytest.raises(PlaneUnavailable, match="cuda:0: cuMemcpyAsync: refused on demand"):
                arena.upload(source, [ByteRange(0, 8)])
        assert arena.read(0, 8) == bytes(8)


class TestClosing:
    def test_frees_the_memory_and_everything_else_fails(self, runtime: FakeRuntime) -> None:
        arena = CudaArena(NBYTES, "cuda:0")
        arena.close()
        arena.close()
        assert addresses(runtime) == set()
        uses: list[Callable[[], object]] = [
            lambda: arena.memory,
            lambda: arena.read(0, 8),
            lambda: arena.array(0, BYTES, 8),
            lambda: arena.upload(HostArena(8), [ByteRange(0, 8)]),
        ]
        for use in uses:
            with pytest.raises(PoolClosed, match="the arena is closed"):
                use()

    def test_waits_for_whoever_refers_to_the_memory(self, runtime: FakeRuntime) -> None:
        arena = CudaArena(NBYTES, "cuda:0")
        exported = arena.memory
        arena.close()
        assert addresses(runtime) == {exported.address}
        del exported
        assert addresses(runtime) == set()

    def test_leaves_arrays_readable(self, runtime: FakeRuntime) -> None:
        arena = arena_of(bytes(range(64)))
        array, rest = arena.array(0, Field("uint8", 4), 2), arena.array(60, BYTES, 4)
        arena.close()
        del arena
        assert (bytes_of(array), bytes_of(rest)) == (bytes(range(8)), bytes(range(60, 64)))
        part = array[1]
        del array, rest
        assert len(addresses(runtime)) == 1
        assert bytes_of(part) == bytes(range(4, 8))
        del part
        assert addresses(runtime) == set()


class TestPins:
    def test_are_held_until_they_are_released(self, runtime: PoorRuntime) -> None:
        arena, source = CudaArena(NBYTES, "cuda:0"), HostArena(NBYTES)
        pin = arena.pin(source)
        assert runtime.pinned == {address_of(source.view(0, 1)): NBYTES}
        pin.release()
        assert runtime.pinned == {}
        pin.release()
        source.close()
        with pytest.raises(PoolClosed):
            arena.pin(source)

    def test_that_are_refused_do_without(
        self, runtime: PoorRuntime, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Copies work all the same, and there is nothing to release."""
        runtime.refuses_to_pin = True
        arena, source = CudaArena(8, "cuda:1"), host_arena(b"contents")
        with caplog.at_level(logging.DEBUG, "aiomm.gpu"):
            pin = arena.pin(source)
            pin.release()
        told = "cuMemHostRegister: operation not supported (801)"
        assert caplog.messages == [f"! 8 bytes of the host are not pinned: {told}"]
        caplog.clear()  # the error leads to everything here
        arena.upload(source, [ByteRange(0, 8)])
        assert bytes(arena.read(0, 8)) == b"contents"

    def test_that_cannot_be_taken_back_stay(
        self, runtime: PoorRuntime, caplog: pytest.LogCaptureFixture
    ) -> None:
        pin = CudaArena(8, "cuda:0").pin(HostArena(8))
        runtime.pinned.clear()
        with caplog.at_level(logging.DEBUG, "aiomm.gpu"):
            pin.release()
            pin.release()
        told = "cuMemHostUnregister: not registered (713)"
        assert caplog.messages == [f"! memory of the host stays pinned: {told}"]


NUMPY_DTYPES = [name for name in DTYPE_NBYTES if not name.startswith(("bfloat", "float8"))]


class TestArrays:
    @pytest.mark.parametrize("shape", [(), (3,), (2, 2)])
    @pytest.mark.parametrize("dtype", DTYPE_NBYTES)
    def test_are_of_torch_with_every_dtype(self, dtype: str, shape: tuple[int, ...]) -> None:
        field = Field(dtype, *shape)
        arena = arena_of(random_bytes(16 * 64))
        if dtype == "bool":
            arena = arena_of(bytes([0, 1, 1, 0]) * 256)
        array = arena.array(64, field, 3)
        assert isinstance(array, torch.Tensor)
        assert (str(array.dtype), array.shape) == (f"torch.{dtype}", (3, *shape))
        assert array.data_ptr() == arena.memory.address + 64
        assert bytes_of(array) == arena.read(64, 3 * field.row_nbytes)
        assert arena.array(0, field, 0).shape == (0, *shape)

    @pytest.mark.parametrize("shape", [(), (3,)])
    @pytest.mark.parametrize("dtype", NUMPY_DTYPES)
    def test_are_of_numpy_where_there_is_no_torch(
        self, monkeypatch: pytest.MonkeyPatch, dtype: str, shape: tuple[int, ...]
    ) -> None:
        monkeypatch.setitem(sys.modules, "torch", None)
        field, arena = Field(dtype, *shape), arena_of(random_bytes(16 * 64))
        array = arena.array(64, field, 3)
        assert isinstance(array, numpy.ndarray)
        assert (array.dtype.name, array.shape) == (dtype, (3, *shape))
        assert array.ctypes.data == arena.memory.address + 64
        assert array.tobytes() == arena.read(64, 3 * field.row_nbytes)
        assert arena.array(0, field, 0).shape == (0, *shape)

    def test_need_a_library_that_has_the_dtype(self, monkeypatch: pytest.MonkeyPatch) -> None:
        arena = arena_of(bytes(64))
        with monkeypatch.context() as old:
            old.delattr(torch, "uint16")
            with pytest.raises(ImportError, match="torch has no uint16"):
                arena.array(0, Field("uint16"), 4)
        monkeypatch.setitem(sys.modules, "torch", None)
        with pytest.raises(ImportError, match="numpy has no bfloat16: install torch"):
            arena.array(0, Field("bfloat16"), 4)


def source(num_tokens: int = NUM_TOKENS) -> dict[str, torch.Tensor]:
    return {
        "embeddings": torch.randn(num_tokens, 5).to(torch.bfloat16),
        "ids": torch.arange(num_tokens, dtype=torch.int32),
        "grid": torch.randint(0, 256, (num_tokens, 2, 2), dtype=torch.uint8),
    }


def filled(tensors: dict[str, torch.Tensor], device: str = "cuda:0") -> tuple[Layout, CudaArena]:
    """A pool in which token n is row n of `tensors`."""
    layout = Layout(SCHEMA, NUM_TOKENS, num_probes=1)
    staging = HostArena(layout.nbytes)
    for name, rows in rows_of(SCHEMA, dict(tensors)).items():
        start, stop = layout.field_range(name, Extent(0, NUM_TOKENS))
        rows.copy_into(staging.view(start, stop - start), 0, NUM_TOKENS)
    arena = CudaArena(layout.nbytes, device)
    arena.upload(staging, [ByteRange(0, layout.nbytes)])
    return layout, arena


def check_equal(actual: object, expected: torch.Tensor) -> None:
    assert isinstance(actual, torch.Tensor)
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert torch.equal(actual, expected)


def append_all(joined: DeviceJoinedTensors, layout: Layout, arena: CudaArena) -> None:
    for stop in (4, 8, 12):
        joined.append(layout, arena, [Extent(joined.num_tokens, stop)])


def test_views_share_the_pool() -> None:
    tensors = source()
    layout, arena = filled(tensors)
    pool = PoolTensors(layout, arena)
    for name in SCHEMA:
        for extent in (Extent(0, 96), Extent(16, 48), Extent(7, 7)):
            check_equal(pool.view(name, extent), tensors[name][extent.start : extent.stop])
    start, _ = layout.field_range("ids", Extent(9, 10))
    ctypes.memmove(arena.memory.address + start, b"\7\0\0\0", 4)
    seen = pool.view("ids", Extent(9, 10))
    arena.close()
    del pool
    gc.collect()
    assert seen[0] == 7


class TestJoinedTensors:
    @pytest.mark.parametrize("num_tokens", [96, None])
    @pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
    def test_chunks_follow_each_other(
        self, runtime: FakeRuntime, num_tokens: int | None, device: str
    ) -> None:
        tensors = source()
        layout, arena = filled(tensors, device)
        runtime.copied.clear()
        joined = DeviceJoinedTensors(SCHEMA, num_tokens)
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
            assert runtime.device_at(tensor.data_ptr()) == int(device[-1])  # type: ignore[union-attr]
        assert set(runtime.copied) == {"DtoD"}

    def test_a_known_length_is_allocated_once(self, runtime: FakeRuntime) -> None:
        layout, arena = filled(source())
        joined, before = DeviceJoinedTensors(SCHEMA, 96), addresses(runtime)
        joined.append(layout, arena, [])
        made = addresses(runtime) - before
        runtime.copied.clear()
        for start in range(0, 96, 12):
            joined.append(layout, arena, [Extent(start, start + 12)])
        assert addresses(runtime) - before == made
        assert len(made) == len(SCHEMA)
        assert runtime.copied == {"DtoD": 96 * SCHEMA.token_nbytes}

    def test_an_unknown_length_doubles_whenever_the_memory_is_full(
        self, runtime: FakeRuntime
    ) -> None:
        tensors = source()
        layout, arena = filled(tensors)
        joined, before, made = DeviceJoinedTensors(SCHEMA, None), addresses(runtime), []
        for start in range(96):
            joined.append(layout, arena, [Extent(start, start + 1)])
            made.append(frozenset(addresses(runtime) - before))
            assert len(made[-1]) == len(SCHEMA)  # what it had before is freed
        assert len(set(made)) == 8  # of 1, 2, 4, 8, 16, 32, 64 and 128 tokens
        for name, tensor in joined.tensors().items():
            check_equal(tensor, tensors[name])

    def test_tensors_taken_before_it_has_grown_stay(self) -> None:
        tensors = source()
        layout, arena = filled(tensors)
        joined = DeviceJoinedTensors(SCHEMA, None)
        joined.append(layout, arena, [Extent(0, 8)])
        early = joined.tensors()
        joined.append(layout, arena, [Extent(8, 96)])
        for name, tensor in joined.tensors().items():
            check_equal(early[name], tensors[name][:8])
            check_equal(tensor, tensors[name])

    @pytest.mark.parametrize("num_tokens", [0, None])
    def test_no_tokens(self, num_tokens: int | None) -> None:
        layout, arena = filled(source())
        joined = DeviceJoinedTensors(SCHEMA, num_tokens)
        joined.append(layout, arena, [])
        joined.append(layout, arena, [Extent(5, 5)])
        for name, tensor in joined.tensors().items():
            check_equal(tensor, source(0)[name])

    def test_no_tokens_and_then_some(self) -> None:
        tensors = source()
        layout, arena = filled(tensors)
        joined = DeviceJoinedTensors(SCHEMA, None)
        for stop in (0, 0, 3, 96):
            joined.append(layout, arena, [Extent(joined.num_tokens, stop)])
        for name, tensor in joined.tensors().items():
            check_equal(tensor, tensors[name])

    def test_more_than_was_to_come_is_refused(self, runtime: FakeRuntime) -> None:
        tensors = source()
        layout, arena = filled(tensors)
        joined = DeviceJoinedTensors(SCHEMA, 95)
        before = addresses(runtime)
        with pytest.raises(ValueError, match="96 tokens have come, and only 95 were to"):
            joined.append(layout, arena, [Extent(0, 96)])
        assert (joined.num_tokens, addresses(runtime)) == (0, before)
        joined.append(layout, arena, [Extent(0, 90)])
        with pytest.raises(ValueError, match="96 tokens have come, and only 95 were to"):
            joined.append(layout, arena, [Extent(90, 96)])
        check_equal(joined.tensors()["ids"], tensors["ids"][:90])

    @pytest.mark.parametrize("num_left", [0, 1, 2])
    def test_no_memory_is_a_refusal(self, runtime: PoorRuntime, num_left: int) -> None:
        layout, arena = filled(source())
        joined, before = DeviceJoinedTensors(SCHEMA, 96), addresses(runtime)
        runtime.num_left = num_left
        name = list(SCHEMA)[num_left]
        nbytes = 96 * SCHEMA[name].row_nbytes
        told = f"no memory on cuda:0 for {nbytes} bytes of '{name}': cuMemAlloc: out of memory"
        with pytest.raises(Rejected, match=told) as refused:
            joined.append(layout, arena, [Extent(0, 8)])
        assert refused.value.retryable
        del refused
        assert addresses(runtime) == before

    def test_no_memory_to_grow_leaves_what_is_there(self, runtime: PoorRuntime) -> None:
        tensors = source()
        layout, arena = filled(tensors)
        joined = DeviceJoinedTensors(SCHEMA, None)
        joined.append(layout, arena, [Extent(0, 8)])
        runtime.num_left = 2
        with pytest.raises(Rejected, match="for 64 bytes of 'grid'"):
            joined.append(layout, arena, [Extent(8, 9)])
        assert joined.num_tokens == 8
        runtime.num_left = 3
        joined.append(layout, arena, [Extent(8, 9)])
        for name, tensor in joined.tensors().items():
            check_equal(tensor, tensors[name][:9])

    @pytest.mark.parametrize("at", [1, 2, 3])
    def test_a_copy_that_is_refused_adds_nothing(self, runtime: FakeRuntime, at: int) -> None:
        """Be it into its first memory, out of its old one, or into its new one."""
        tensors = source()
        layout, arena = filled(tensors)
        joined = DeviceJoinedTensors(SCHEMA, None)
        runtime.faults.refuse_at = runtime.faults.num_copies + at
        refused = "cuda:0: cuMemcpyAsync: refused on demand"
        with pytest.raises(PlaneUnavailable, match=refused):
            append_all(joined, layout, arena)
        joined.append(layout, arena, [Extent(joined.num_tokens, 96)])
        for name, tensor in joined.tensors().items():
            check_equal(tensor, tensors[name])

    def test_a_closed_pool_is_refused(self) -> None:
        layout, arena = filled(source())
        arena.close()
        with pytest.raises(PoolClosed):
            DeviceJoinedTensors(SCHEMA, 96).append(layout, arena, [Extent(0, 8)])

    def test_tensors_keep_their_memory_and_nothing_else(self, runtime: FakeRuntime) -> None:
        layout, arena = filled(source())
        joined = DeviceJoinedTensors(SCHEMA, 96)
        joined.append(layout, arena, [Extent(0, 96)])
        ids = joined.tensors()["ids"]
        arena.close()
        del joined, arena
        assert len(addresses(runtime)) == 1
        check_equal(ids, source()["ids"])
        del ids
        assert addresses(runtime) == set()
