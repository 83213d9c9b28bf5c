"""Rows on a GPU, taken from whatever says that it lies there, on a fake GPU."""

from __future__ import annotations

import ctypes
import gc
import threading
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

from aiomm.buffers.device_rows import DeviceRows, stream_of
from aiomm.buffers.tensors import TokenRows, memory_of, rows_of
from aiomm.errors import IncompatibleSchema, PlaneUnavailable
from aiomm.gpu.choice import use_runtime
from aiomm.gpu.fake import FakeArray, FakeRuntime
from aiomm.gpu.lanes import Mark
from aiomm.types import DTYPE_NBYTES, Field, Schema

FIELD = Field("int32", 3)
CONTENT = bytes(range(120))
"""Of ten rows of :data:`FIELD`."""


@pytest.fixture(autouse=True)
def fake(no_leaks: None) -> Iterator[FakeRuntime]:
    """Two devices; none may be abused, and nothing is left of them."""
    runtime = FakeRuntime([0, 1])
    use_runtime(runtime)
    yield runtime
    runtime.faults.release()
    use_runtime(None)
    assert runtime.violations == []
    for thread in threading.enumerate():
        if thread.name == "fake-gpu-stream":
            thread.join()


def array_on(fake: FakeRuntime, device: int = 0, stream: int | None = None) -> FakeArray:
    return FakeArray(fake, device, CONTENT, "int32", (10, 3), stream)


def copied(rows: TokenRows, first: int, count: int) -> bytes:
    """Return rows as they are copied to the host, and nothing beside them."""
    target = bytearray(count * rows.row_nbytes + 2)
    rows.copy_into(memoryview(target)[1:-1], first, count)
    assert (target[0], target[-1]) == (0, 0)
    return bytes(target[1:-1])


def rows_by(tensor: object, stream: int | None) -> TokenRows:
    """Return the rows of a tensor that a stream makes."""
    return rows_of(Schema(x=FIELD), {"x": tensor}, stream=stream)["x"]


def on_device(rows: TokenRows) -> DeviceRows:
    assert rows.on_device is not None
    return rows.on_device


class Gate:
    """A stream on which an array is made as soon as the gate is opened."""

    def __init__(self, fake: FakeRuntime, array: FakeArray, device: int = 0) -> None:
        array.fill(bytes(array.nbytes))
        self._open = threading.Event()
        self.stream = fake.make_stream(device)
        self.fill(fake, self.stream, array)

    def fill(self, fake: FakeRuntime, stream: int, array: FakeArray) -> None:
        def make() -> None:
            assert self._open.wait(10)
            array.fill(CONTENT)

        fake.run(stream, make)

    def opened_by(self, rows: TokenRows) -> bytes:
        """Return the rows as they are copied; the gate is opened only when somebody waits."""
        assert not on_device(rows).ready.is_over()
        results: list[bytes] = []
        thread = threading.Thread(target=lambda: results.append(copied(rows, 0, 10)))
        thread.start()
        self._open.set()
        thread.join()
        return results[0]

    def open(self) -> None:
        self._open.set()


class TestArrays:
    @pytest.mark.parametrize("device", [0, 1])
    def test_say_where_they_lie(self, fake: FakeRuntime, device: int) -> None:
        array = array_on(fake, device)
        rows = TokenRows.of("x", FIELD, array)
        assert (rows.num_tokens, rows.row_nbytes, rows.device) == (10, 12, f"cuda:{device}")
        assert repr(rows) == f"<TokenRows x: 10 x int32[3] on cuda:{device}>"
        there = on_device(rows)
        assert (there.runtime, there.device) == (fake, device)
        assert (there.address, there.row_nbytes) == (array.address, 12)

    def test_are_no_memory_of_the_host(self, fake: FakeRuntime) -> None:
        array = array_on(fake)
        rows = TokenRows.of("x", FIELD, array)
        assert (rows.view(0, 10), rows.address(0)) == (None, None)
        assert memory_of(array)[:3] == (array.address, 10 * rows.row_nbytes, "cuda:0")

    @pytest.mark.parametrize("device", [0, 1])
    @pytest.mark.parametrize(("first", "count"), [(0, 10), (3, 4), (9, 1), (0, 0), (10, 0)])
    def test_are_copied_to_the_host(
        self, fake: FakeRuntime, device: int, first: int, count: int
    ) -> None:
        rows = TokenRows.of("x", FIELD, array_on(fake, device))
        assert copied(rows, first, count) == CONTENT[first * 12 : (first + count) * 12]
        assert fake.copied == ({"DtoH": count * 12} if count else {})

    @pytest.mark.parametrize(("first", "count"), [(0, 11), (-1, 2), (11, 0), (4, -1)])
    def test_have_no_other_rows(self, fake: FakeRuntime, first: int, count: int) -> None:
        rows = TokenRows.of("x", FIELD, array_on(fake))
        with pytest.raises(ValueError, match="of 'x', which has 10"):
            rows.copy_into(memoryview(bytearray(132)), first, count)

    def test_are_copied_to_as_many_bytes(self, fake: FakeRuntime) -> None:
        rows = TokenRows.of("x", FIELD, array_on(fake))
        with pytest.raises(ValueError, match="2 rows of 'x' are 24 bytes, the target has 25"):
            rows.copy_into(memoryview(bytearray(25)), 0, 2)

    def test_live_as_long_as_their_rows(self, fake: FakeRuntime) -> None:
        rows = TokenRows.of("x", FIELD, array_on(fake, 1))
        address = on_device(rows).address
        gc.collect()
        assert fake.device_at(address) == 1
        assert copied(rows, 0, 10) == CONTENT
        del rows
        gc.collect()
        assert fake.device_at(address) is None

    @pytest.mark.parametrize("dtype", DTYPE_NBYTES)
    @pytest.mark.parametrize("shape", [(), (2,), (2, 1, 3)])
    def test_have_every_dtype(self, fake: FakeRuntime, dtype: str, shape: tuple[int, ...]) -> None:
        field = Field(dtype, *shape)
        content = bytes(range(5 * field.row_nbytes % 256)) + bytes(-(5 * field.row_nbytes % -256))
        content = (content * 5)[: 5 * field.row_nbytes]
        rows = TokenRows.of("x", field, FakeArray(fake, 0, content, dtype, (5, *shape)))
        assert copied(rows, 1, 4) == content[field.row_nbytes :]

    @pytest.mark.parametrize(
        ("dtype", "shape", "told"),
        [
            ("float32", (10, 3), r"float32 \[10, 3\]"),
            ("uint32", (10, 3), r"uint32 \[10, 3\]"),
            ("int32", (30,), r"int32 \[30\]"),
            ("int32", (3, 10), r"int32 \[3, 10\]"),
            ("int32", (10, 3, 1), r"int32 \[10, 3, 1\]"),
            ("int32", (), r"int32 \[\]"),
        ],
    )
    def test_must_be_those_of_the_field(
        self, fake: FakeRuntime, dtype: str, shape: tuple[int, ...], told: str
    ) -> None:
        content = bytes(4 * int(numpy.prod(shape)))
        array = FakeArray(fake, 0, content, dtype, shape)
        told = rf"field 'x' is {told}, expected int32 \[num_tokens, 3\]"
        with pytest.raises(IncompatibleSchema, match=told):
            TokenRows.of("x", FIELD, array)

    def test_have_a_dtype_as_numpy_or_torch_name_it(self, fake: FakeRuntime) -> None:
        array: Any = array_on(fake)
        for dtype in (numpy.dtype("int32"), SimpleNamespace(name="int32"), "int32"):
            array.dtype = dtype
            assert TokenRows.of("x", FIELD, array).num_tokens == 10

    def test_may_not_be_strided(self, fake: FakeRuntime) -> None:
        array = array_on(fake)
        strided = Described(array, strides=(12, 4))
        with pytest.raises(IncompatibleSchema, match="'x' is strided on its GPU: make it contig"):
            TokenRows.of("x", FIELD, strided)

    def test_need_no_dtype_beside_their_description(self, fake: FakeRuntime) -> None:
        array = array_on(fake)
        described = Described(array, typestr="<i4")
        del described.dtype
        assert copied(TokenRows.of("x", FIELD, described), 0, 10) == CONTENT

    @pytest.mark.parametrize("field", [FIELD, Field("int32")])
    def test_without_tokens_lie_nowhere(self, fake: FakeRuntime, field: Field) -> None:
        array = FakeArray(fake, 0, b"", "int32", (0, *field.shape))
        rows = TokenRows.of("x", field, Described(array, data=(0, False)))
        assert (rows.num_tokens, rows.on_device) == (0, None)
        assert bytes(rows.view(0, 0) or b"") == b""
        assert copied(rows, 0, 0) == b""
        assert fake._events == {}

    def test_must_lie_on_a_gpu(self, fake: FakeRuntime) -> None:
        host = ctypes.create_string_buffer(120)
        address = ctypes.addressof(host)
        with pytest.raises(IncompatibleSchema, match=f"no memory of a GPU at {address:#x}"):
            TokenRows.of("x", FIELD, Described(array_on(fake), data=(address, False)))

    def test_of_a_transfer_lie_where_they_will(self, fake: FakeRuntime) -> None:
        schema = Schema(here=FIELD, there=FIELD, host=Field("uint8"))
        tensors = {"here": array_on(fake, 0), "there": array_on(fake, 1), "host": bytes(10)}
        rows = rows_of(schema, tensors)
        assert [each.device for each in rows.values()] == ["cuda:0", "cuda:1", "cpu"]
        with pytest.raises(IncompatibleSchema, match="fields differ in tokens"):
            rows_of(schema, {**tensors, "host": bytes(11)})


class Described:
    """An array that describes itself otherwise."""

    def __init__(self, array: FakeArray, **changes: object) -> None:
        self.dtype = array.dtype
        self.array = array
        self.__cuda_array_interface__ = {**array.__cuda_array_interface__, **changes}


class TestStream:
    def test_is_the_current_one_of_this_thread(self, fake: FakeRuntime) -> None:
        array = array_on(fake)
        gate = Gate(fake, array)
        with fake.use_stream(gate.stream):
            rows = TokenRows.of("x", FIELD, array)
        assert gate.opened_by(rows) == CONTENT

    def test_is_the_one_that_the_array_names(self, fake: FakeRuntime) -> None:
        array = array_on(fake)
        gate = Gate(fake, array)
        array.stream = gate.stream
        with fake.use_stream(fake.make_stream(0)):
            rows = TokenRows.of("x", FIELD, array)
        assert gate.opened_by(rows) == CONTENT

    def test_is_the_one_that_is_given(self, fake: FakeRuntime) -> None:
        """The array's own and the current one are held up, and nobody waits for them."""
        array = array_on(fake)
        held = Gate(fake, array)
        array.fill(CONTENT)
        array.stream = held.stream
        with fake.use_stream(held.stream):
            rows = rows_by(array, fake.make_stream(0))
        assert copied(rows, 0, 10) == CONTENT
        on_device(rows).ready.synchronize()
        held.open()

    def test_that_is_given_is_waited_for(self, fake: FakeRuntime) -> None:
        array = array_on(fake, stream=fake.make_stream(0))
        gate = Gate(fake, array)
        rows = rows_by(array, gate.stream)
        assert gate.opened_by(rows) == CONTENT

    @pytest.mark.parametrize(("own", "given"), [(1, None), (None, 0), (1, 0)])
    def test_may_be_the_default_one(
        self, fake: FakeRuntime, own: int | None, given: int | None
    ) -> None:
        """It is 1 where arrays name it, and 0 where anybody else does."""
        array = array_on(fake, stream=own)
        gate = Gate(fake, array)
        gate.open()
        default = Gate(fake, array)
        default.fill(fake, 0, array)
        with fake.use_stream(gate.stream):
            rows = rows_by(array, given)
        assert default.opened_by(rows) == CONTENT

    def test_may_be_on_another_device(self, fake: FakeRuntime) -> None:
        array = array_on(fake, 1)
        gate = Gate(fake, array, device=1)
        assert gate.opened_by(rows_by(array, gate.stream)) == CONTENT

    def test_gives_up_what_it_has_marked(self, fake: FakeRuntime) -> None:
        rows = TokenRows.of("x", FIELD, array_on(fake))
        assert len(fake._events) == 1
        del rows
        gc.collect()
        assert fake._events == {}


class TestProducers:
    def test_are_marked_once_for_all_tensors_of_a_transfer(self, fake: FakeRuntime) -> None:
        arrays = {name: array_on(fake, device) for name, device in (("a", 0), ("b", 1), ("c", 0))}
        arrays["d"] = array_on(fake, stream=fake.make_stream(0))
        rows = rows_of(Schema(**dict.fromkeys(arrays, FIELD)), arrays)
        marks = [on_device(each).ready for each in rows.values()]
        assert marks[0] is marks[2]
        assert len(set(marks)) == len(fake._events) == 3
        assert [mark.device for mark in marks] == [0, 1, 0, 0]

    def test_are_all_the_one_that_is_given(self, fake: FakeRuntime) -> None:
        arrays = {"a": array_on(fake), "b": array_on(fake, stream=fake.make_stream(0))}
        rows = rows_of(Schema(a=FIELD, b=FIELD), arrays, stream=fake.make_stream(0))
        assert on_device(rows["a"]).ready is on_device(rows["b"]).ready


class TestErrors:
    def test_when_a_copy_is_refused(self, fake: FakeRuntime) -> None:
        rows = TokenRows.of("x", FIELD, array_on(fake, 1))
        fake.faults.refuse_at = 1
        with pytest.raises(PlaneUnavailable, match="cuda:1: cuMemcpyAsync: refused on demand"):
            copied(rows, 0, 10)
        assert copied(rows, 0, 10) == CONTENT

    def test_when_the_device_is_lost(self, fake: FakeRuntime) -> None:
        array = array_on(fake)
        rows = TokenRows.of("x", FIELD, array)
        fake.faults.fail_at = 1
        lost = "cuda:0: .*illegal memory access.*the device is lost to this process, restart it"
        with pytest.raises(PlaneUnavailable, match=lost):
            copied(rows, 0, 10)
        with pytest.raises(PlaneUnavailable, match=lost):
            TokenRows.of("x", FIELD, array)

    def test_name_the_device(self, fake: FakeRuntime) -> None:
        array = array_on(fake, 1)
        fake.faults.fail_at = 1
        with pytest.raises(PlaneUnavailable):
            copied(TokenRows.of("x", FIELD, array), 0, 10)
        with pytest.raises(PlaneUnavailable, match="cuda:1: "):
            TokenRows.of("x", FIELD, array)

    def test_when_there_is_no_cuda(
        self, fake: FakeRuntime, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        array = array_on(fake)
        use_runtime(None)
        monkeypatch.setenv("AIOMM_GPU_RUNTIME", "none")
        with pytest.raises(PlaneUnavailable, match="AIOMM_GPU_RUNTIME=none: known are"):
            TokenRows.of("x", FIELD, array)


class CudaTensor(torch.Tensor):
    """A tensor in a fake device's memory, which torch takes for the host's."""

    is_cpu = False
    is_cuda = True

    @classmethod
    def on(cls, fake: FakeRuntime, device: int, tensor: torch.Tensor) -> CudaTensor:
        nbytes = tensor.numel() * tensor.element_size()
        address = fake.allocate(device, max(1, nbytes))
        owner = _Owner()
        weakref.finalize(owner, fake.free, device, address)
        flat: Any = fake.flat_array(device, address, nbytes, owner)
        made: CudaTensor = flat.view(tensor.dtype).view(tensor.shape).as_subclass(cls)
        torch.Tensor.copy_(made, tensor)
        return made

    def contiguous(self, *_: object, **__: object) -> CudaTensor:
        """Return a dense copy, which the current stream makes."""
        if self.is_contiguous():
            return self
        (fake,) = _current
        dense = self.as_subclass(torch.Tensor).contiguous()
        made = CudaTensor.on(fake, 0, torch.zeros_like(dense))
        content, address = bytes(dense.view(torch.uint8).numpy()), made.data_ptr()

        def copy(kept: object = made) -> None:
            assert _may_copy.wait(10)
            ctypes.memmove(address, content, len(content))

        fake.run(fake.current_stream(0), copy)
        return made


def wait_for(event: threading.Event) -> None:
    assert event.wait(10)


class _Owner:
    """Whoever keeps an allocation."""


_current: list[FakeRuntime] = []
_may_copy = threading.Event()
"""Whether the copies of strided tensors may go on."""


class TestTorch:
    @pytest.fixture(autouse=True)
    def current(self, fake: FakeRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where new tensors are made."""
        monkeypatch.setitem(globals(), "_current", [fake])
        _may_copy.set()

    @pytest.mark.parametrize("dtype", ["int32", "bfloat16", "bool", "complex64"])
    def test_tensors_of_a_device(self, fake: FakeRuntime, dtype: str) -> None:
        tensor = torch.arange(30).reshape(10, 3).to(getattr(torch, dtype))
        field = Field(dtype, 3)
        there = CudaTensor.on(fake, 1, tensor)
        rows = TokenRows.of("x", field, there)
        assert (rows.num_tokens, on_device(rows).device) == (10, 1)
        assert on_device(rows).address == there.data_ptr()
        assert (rows.view(0, 10), rows.address(0)) == (None, None)
        expected = bytes(tensor.view(torch.uint8).reshape(-1).numpy())
        assert copied(rows, 2, 8) == expected[2 * field.row_nbytes :]

    def test_strided_tensors_are_made_dense_on_the_device(self, fake: FakeRuntime) -> None:
        tensor = torch.arange(60, dtype=torch.int32).reshape(10, 6)
        there = CudaTensor.on(fake, 0, tensor)[:, ::2]
        rows = TokenRows.of("x", FIELD, there)
        assert on_device(rows).address != there.data_ptr()
        del there
        gc.collect()
        assert copied(rows, 1, 2) == bytes(tensor[1:3, ::2].contiguous().numpy())
        assert fake.copied == {"DtoH": 24}

    def test_strided_tensors_beside_dense_ones_are_waited_for(self, fake: FakeRuntime) -> None:
        """Both are made by the same stream; the second is copied there once the first is known."""
        tensor = torch.arange(60, dtype=torch.int32).reshape(10, 6)
        tensors = {
            "dense": CudaTensor.on(fake, 0, tensor[:, :3].contiguous()),
            "strided": CudaTensor.on(fake, 0, tensor)[:, ::2],
        }
        _may_copy.clear()
        rows = rows_of(Schema(dense=FIELD, strided=FIELD), tensors)
        on_device(rows["dense"]).ready.synchronize()
        is_over = on_device(rows["strided"]).ready.is_over()
        _may_copy.set()
        Mark(fake, 0, 0).synchronize()
        assert not is_over

    def test_strided_tensors_are_not_one_piece_of_memory(self, fake: FakeRuntime) -> None:
        """What would be registered is a dense copy of them, and not theirs."""
        tensor = CudaTensor.on(fake, 0, torch.arange(60, dtype=torch.int32).reshape(10, 6))
        assert memory_of(tensor).nbytes == 240
        with pytest.raises(IncompatibleSchema, match="not one piece of writable memory"):
            memory_of(tensor[:, ::2])

    def test_strided_tensors_are_waited_for_where_they_are_made_dense(
        self, fake: FakeRuntime
    ) -> None:
        """That is the current stream, whatever stream has made the tensor."""
        tensor = torch.arange(60, dtype=torch.int32).reshape(10, 6)
        there = CudaTensor.on(fake, 0, tensor)[:, ::2]
        _may_copy.clear()
        rows, given = rows_by(there, producer := fake.make_stream(0)), Mark(fake, 0, producer)
        given.synchronize()
        is_over = on_device(rows).ready.is_over()
        _may_copy.set()
        Mark(fake, 0, 0).synchronize()
        assert not is_over

    def test_the_given_stream_makes_them(self, fake: FakeRuntime) -> None:
        there = CudaTensor.on(fake, 0, torch.zeros(10, 3, dtype=torch.int32))
        may_finish, stream = threading.Event(), fake.make_stream(0)
        fake.run(stream, lambda: wait_for(may_finish))
        rows = rows_by(there, stream)
        assert not on_device(rows).ready.is_over()
        may_finish.set()
        on_device(rows).ready.synchronize()

    def test_of_no_tokens_lie_nowhere(self, fake: FakeRuntime) -> None:
        there = CudaTensor.on(fake, 0, torch.zeros(0, 3, dtype=torch.int32))
        rows = TokenRows.of("x", FIELD, there)
        assert (rows.num_tokens, rows.on_device) == (0, None)
        assert copied(rows, 0, 0) == b""

    def test_must_be_those_of_the_field(self, fake: FakeRuntime) -> None:
        there = CudaTensor.on(fake, 0, torch.zeros(10, 4, dtype=torch.int32))
        with pytest.raises(IncompatibleSchema, match=r"field 'x' is int32 \[10, 4\]"):
            TokenRows.of("x", FIELD, there)


class _TorchStream:
    def __init__(self, handle: int) -> None:
        self.cuda_stream = handle


class _CupyStream:
    def __init__(self, handle: int) -> None:
        self.ptr = handle


class _CoreStream:
    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


class TestStreamOf:
    @pytest.mark.parametrize("handle", [0, 1, 2, 94_000_000_000_000])
    @pytest.mark.parametrize("kind", [int, _TorchStream, _CupyStream, _CoreStream])
    def test_every_library_gives_its_handle(self, kind: type, handle: int) -> None:
        assert stream_of(kind(handle)) == handle

    def test_handles_of_other_types_are_numbers(self) -> None:
        handle = stream_of(_CupyStream(numpy.uint64(7)))  # type: ignore[arg-type]
        assert (handle, type(handle)) == (7, int)

    def test_none_stays_none(self) -> None:
        assert stream_of(None) is None

    @pytest.mark.parametrize("stream", ["0", 1.0, object(), b"", (0, 5)])
    def test_anything_else_is_none(self, stream: object) -> None:
        told = f"not a CUDA stream: {type(stream).__name__}"
        with pytest.raises(TypeError, match=told):
            stream_of(stream)
