"""The sender's side: rows of tensors as bytes."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch

from aiomm.buffers.tensors import TokenRows, rows_of
from aiomm.errors import IncompatibleSchema
from aiomm.types import DTYPE_NBYTES, Field, Schema

FIELD = Field("int32", 3)
NUMPY_DTYPES = [name for name in DTYPE_NBYTES if not name.startswith(("bfloat", "float8"))]


def torch_bytes(tensor: torch.Tensor) -> bytes:
    dense = tensor.detach().resolve_conj().clone(memory_format=torch.contiguous_format)
    return bytes(dense.reshape(-1).view(torch.uint8).tolist())


def random_torch(dtype: str, *shape: int) -> torch.Tensor:
    """Every bit at random, so that NaNs and odd bools are among them."""
    size = DTYPE_NBYTES[dtype]
    generator = torch.Generator().manual_seed(7)
    raw = torch.randint(0, 256, (*shape, size), dtype=torch.uint8, generator=generator)
    if dtype == "bool":
        raw &= 1
    return raw.view(getattr(torch, dtype)).reshape(shape)


def check_rows(rows: TokenRows, expected: bytes, *, is_dense: bool) -> None:
    """Every way to the bytes of every range of rows gives the expected ones."""
    size, total = rows.row_nbytes, rows.num_tokens
    assert len(expected) == size * total
    for first, count in {(0, total), (0, 0), (total, 0), (total // 3, total // 2)}:
        part = expected[first * size : (first + count) * size]
        target = bytearray(count * size + 2)
        rows.copy_into(memoryview(target)[1:-1], first, count)
        assert bytes(target) == b"\0" + part + b"\0"
        view, address = rows.view(first, count), rows.address(first)
        if not is_dense:
            assert (view, address) == (None, None)
            continue
        assert view is not None
        assert (bytes(view), view.ndim, view.format) == (part, 1, "B")
        if address is not None and count:
            assert ctypes.string_at(address, count * size) == part


class TestTorch:
    @pytest.mark.parametrize("dtype", DTYPE_NBYTES)
    def test_every_dtype_dense_and_strided(self, dtype: str) -> None:
        dense = random_torch(dtype, 9, 4)
        check_rows(TokenRows.of("x", Field(dtype, 4), dense), torch_bytes(dense), is_dense=True)
        strided = random_torch(dtype, 9, 8)[:, ::2]
        rows = TokenRows.of("x", Field(dtype, 4), strided)
        check_rows(rows, torch_bytes(strided), is_dense=False)

    @pytest.mark.parametrize(
        ("make", "is_dense"),
        [
            (lambda: torch.arange(60, dtype=torch.int32).view(20, 3)[5:15], True),
            (lambda: torch.arange(60, dtype=torch.int32).view(20, 3)[::2], False),
            (lambda: torch.arange(60, dtype=torch.int32).view(3, 20).T, False),
            (lambda: torch.arange(3, dtype=torch.int32).expand(10, 3), False),
            (lambda: torch.arange(10, dtype=torch.int32)[:, None].expand(10, 3), False),
            (lambda: torch.arange(3, dtype=torch.int32).expand(1, 3), True),
            (lambda: torch.empty(0, 3, dtype=torch.int32), True),
            (lambda: torch.empty(3, 0, dtype=torch.int32).T, True),
        ],
    )
    def test_every_stride(self, make: Callable[[], torch.Tensor], is_dense: bool) -> None:
        tensor = make()
        check_rows(TokenRows.of("x", FIELD, tensor), torch_bytes(tensor), is_dense=is_dense)

    def test_rows_of_one_element_with_odd_strides(self) -> None:
        tensor = torch.arange(12, dtype=torch.int64).view(3, 4).T[:1].T
        check_rows(
            TokenRows.of("x", Field("int64", 1), tensor), torch_bytes(tensor), is_dense=False
        )
        column = torch.arange(7, dtype=torch.int64).as_strided((7, 1), (1, 5))
        check_rows(TokenRows.of("x", Field("int64", 1), column), torch_bytes(column), is_dense=True)

    @pytest.mark.parametrize("tensor", [torch.arange(9), torch.arange(18)[::2]])
    def test_one_element_per_token(self, tensor: torch.Tensor) -> None:
        rows = TokenRows.of("ids", Field("int64"), tensor)
        check_rows(rows, torch_bytes(tensor), is_dense=tensor.is_contiguous())

    def test_rows_of_several_dimensions(self) -> None:
        tensor = torch.arange(120.0).view(5, 4, 3, 2).transpose(1, 3)
        rows = TokenRows.of("x", Field("float32", 2, 3, 4), tensor)
        check_rows(rows, torch_bytes(tensor), is_dense=False)

    def test_a_tensor_that_requires_grad(self) -> None:
        weights = torch.nn.Parameter(torch.ones(4, 6))
        check_rows(
            TokenRows.of("x", Field("float32", 6), weights), torch_bytes(weights), is_dense=True
        )
        check_rows(
            TokenRows.of("x", Field("float32", 4), (weights * 2).T),
            torch_bytes((weights * 2).T),
            is_dense=False,
        )

    def test_a_conjugate_is_resolved(self) -> None:
        tensor = torch.tensor([1 + 2j, 3 - 4j]).conj()
        rows = TokenRows.of("x", Field("complex64"), tensor)
        check_rows(rows, torch_bytes(tensor), is_dense=True)
        negative = tensor.imag
        check_rows(
            TokenRows.of("x", Field("float32"), negative),
            torch_bytes(negative.resolve_neg()),
            is_dense=True,
        )

    @pytest.mark.parametrize(
        ("tensor", "message"),
        [
            (torch.zeros(4, 3), r"'x' is float32 \[4, 3\], expected int32 \[num_tokens, 3\]"),
            (torch.zeros(4, dtype=torch.int32), r"is int32 \[4\], expected"),
            (torch.zeros(4, 3, 1, dtype=torch.int32), r"is int32 \[4, 3, 1\]"),
            (torch.tensor(3, dtype=torch.int32), r"is int32 \[\]"),
            (torch.zeros(4, 3, dtype=torch.int32, device="meta"), "meta"),
            (torch.zeros(4, 3, dtype=torch.int32).to_sparse(), "sparse_coo"),
        ],
    )
    def test_another_dtype_shape_or_kind_is_refused(
        self, tensor: torch.Tensor, message: str
    ) -> None:
        with pytest.raises(IncompatibleSchema, match=message):
            TokenRows.of("x", FIELD, tensor)

    def test_nothing_is_copied_and_the_bytes_outlive_the_rows(self) -> None:
        tensor = torch.zeros(4, 3, dtype=torch.int32)
        rows = TokenRows.of("x", FIELD, tensor)
        assert rows.tensor is tensor
        tensor[1, 0] = 0x01020304
        view = rows.view(1, 1)
        assert view is not None
        del rows, tensor
        assert bytes(view[:4]) == (0x01020304).to_bytes(4, sys.byteorder)

    def test_large_strided_rows_go_straight_into_place(self) -> None:
        source = torch.arange(3000 * 1024, dtype=torch.int16).view(1024, 3000).T
        rows = TokenRows.of("x", Field("int16", 1024), source)
        target = torch.zeros(3000, 1024, dtype=torch.int16)
        rows.copy_into(target.numpy().data.cast("B"), 0, 3000)
        assert torch.equal(target, source)


class TestNumpy:
    @pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
    def test_a_subclass_is_taken_as_the_array_that_it_is(self) -> None:
        """A `matrix` stays two-dimensional whatever is asked of it."""
        matrix = np.matrix([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        rows = TokenRows.of("x", Field("float64", 2), matrix)
        view = rows.view(1, 2)
        assert view is not None
        assert view.tobytes() == matrix[1:].tobytes()

    @pytest.mark.parametrize("dtype", NUMPY_DTYPES)
    def test_every_dtype_dense_and_strided(self, dtype: str) -> None:
        dense = np.random.default_rng(7).integers(0, 2, (9, 4)).astype(dtype)
        check_rows(TokenRows.of("x", Field(dtype, 4), dense), dense.tobytes(), is_dense=True)
        strided = np.repeat(dense, 2, axis=1)[::-1, ::2]
        check_rows(TokenRows.of("x", Field(dtype, 4), strided), strided.tobytes(), is_dense=False)

    def test_read_only_broadcast_and_empty_arrays(self) -> None:
        fixed = np.arange(12, dtype=np.int32).reshape(4, 3)
        fixed.flags.writeable = False
        check_rows(TokenRows.of("x", FIELD, fixed), fixed.tobytes(), is_dense=True)
        spread = np.broadcast_to(np.arange(3, dtype=np.int32), (5, 3))
        check_rows(TokenRows.of("x", FIELD, spread), spread.tobytes(), is_dense=False)
        check_rows(TokenRows.of("x", FIELD, fixed[:0]), b"", is_dense=True)
        check_rows(TokenRows.of("x", FIELD, fixed[::2][:0]), b"", is_dense=True)

    def test_another_byte_order_is_refused(self) -> None:
        swapped = np.zeros((2, 3), dtype=np.dtype(np.int32).newbyteorder())
        with pytest.raises(IncompatibleSchema, match="'x' is >i4, which is not the byte order"):
            TokenRows.of("x", FIELD, swapped)

    @pytest.mark.parametrize(
        "array", [np.zeros((2, 3)), np.array(1, np.int32), np.zeros((2, 3), object)]
    )
    def test_another_dtype_or_shape_is_refused(self, array: object) -> None:
        with pytest.raises(IncompatibleSchema, match=r"expected int32 \[num_tokens, 3\]"):
            TokenRows.of("x", FIELD, array)


class Exporter:
    """Something with DLPack that is neither torch's nor numpy's."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **arguments: object) -> object:
        return self.tensor.__dlpack__(**arguments)  # type: ignore[arg-type]

    def __dlpack_device__(self) -> object:
        return self.tensor.__dlpack_device__()


class Refuser(Exporter):
    def __dlpack__(self, **arguments: object) -> object:
        raise BufferError("not today")


class TestOthers:
    @pytest.mark.parametrize("dtype", ["int32", "bfloat16", "bool"])
    def test_dlpack(self, dtype: str) -> None:
        tensor = random_torch(dtype, 5, 3)
        rows = TokenRows.of("x", Field(dtype, 3), Exporter(tensor))
        check_rows(rows, torch_bytes(tensor), is_dense=True)
        del tensor
        check_rows(rows, torch_bytes(random_torch(dtype, 5, 3)), is_dense=True)

    def test_dlpack_that_nobody_can_read_is_refused(self) -> None:
        with pytest.raises(IncompatibleSchema, match=r"cannot read Refuser .*not today"):
            TokenRows.of("x", FIELD, Refuser(torch.zeros(1)))

    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
    def test_bytes(self, kind: Callable[[bytes], object]) -> None:
        content = bytes(range(48))
        check_rows(TokenRows.of("x", FIELD, kind(content)), content, is_dense=True)
        check_rows(TokenRows.of("x", FIELD, kind(b"")), b"", is_dense=True)

    @pytest.mark.parametrize("kind", [bytes, bytearray])
    def test_large_bytes(self, kind: Callable[[bytes], object]) -> None:
        content = bytes(range(256)) * (3 << 12)
        rows = TokenRows.of("x", Field("uint8", 1 << 10), kind(content))
        target = bytearray(len(content))
        rows.copy_into(memoryview(target), 0, rows.num_tokens)
        assert target == content

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            (b"12345", "5 bytes, which is no whole number of rows of 12"),
            (memoryview(b"123456789abc").cast("i"), "items of 4 bytes"),
            (memoryview(bytes(24))[::2], "in strides of"),
            ([1, 2, 3], "must be a tensor or bytes, got list"),
            (None, "got NoneType"),
        ],
    )
    def test_what_is_no_row_is_refused(self, source: object, message: str) -> None:
        with pytest.raises(IncompatibleSchema, match=f"'x'.*{message}"):
            TokenRows.of("x", FIELD, source)


class TestBounds:
    ROWS = TokenRows.of("x", FIELD, bytes(48))

    @pytest.mark.parametrize(("first", "count"), [(-1, 1), (0, -1), (3, 2), (5, 0)])
    def test_rows_that_are_not_there(self, first: int, count: int) -> None:
        with pytest.raises(ValueError, match=r"of 'x', which has 4"):
            self.ROWS.view(first, count)
        with pytest.raises(ValueError, match=r"of 'x', which has 4"):
            self.ROWS.copy_into(memoryview(bytearray(12)), first, count)

    def test_a_target_of_another_size(self) -> None:
        with pytest.raises(ValueError, match="1 rows of 'x' are 12 bytes, the target has 13"):
            self.ROWS.copy_into(memoryview(bytearray(13)), 0, 1)

    def test_repr(self) -> None:
        assert repr(self.ROWS) == "<TokenRows x: 4 x int32[3] on cpu>"


class TestRowsOf:
    SCHEMA = Schema(a=Field("int32"), b=Field("float32", 2))

    def test_in_the_order_of_the_schema(self) -> None:
        rows = rows_of(self.SCHEMA, {"b": torch.zeros(3, 2), "a": np.zeros(3, np.int32)})
        assert [(name, one.num_tokens) for name, one in rows.items()] == [("a", 3), ("b", 3)]

    def test_missing_and_unknown_fields(self) -> None:
        with pytest.raises(IncompatibleSchema, match=r"missing \['b'\], unknown \['c'\]"):
            rows_of(self.SCHEMA, {"a": bytes(4), "c": bytes(4)})

    def test_fields_of_different_lengths(self) -> None:
        with pytest.raises(IncompatibleSchema, match="'a' has 1, 'b' has 2"):
            rows_of(self.SCHEMA, {"a": bytes(4), "b": bytes(16)})


def test_neither_torch_nor_numpy_is_imported_for_bytes() -> None:
    script = """
import sys
from aiomm.buffers.tensors import rows_of
from aiomm.types import Schema, Field
rows_of(Schema(a=Field("int32")), {"a": bytes(8)})["a"].copy_into(memoryview(bytearray(8)), 0, 2)
assert not {"torch", "numpy"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=20)


def test_torch_without_numpy() -> None:
    script = """
import gc, sys, warnings
sys.modules["numpy"] = None
warnings.simplefilter("ignore")
import torch
from aiomm.buffers.tensors import TokenRows
from aiomm.types import Field
tensor = torch.full((3, 2), 0x0101, dtype=torch.int16)
view = TokenRows.of("x", Field("int16", 2), tensor).view(0, 3)
del tensor
gc.collect()
assert bytes(view) == b"\\x01" * 12, bytes(view)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=25)
