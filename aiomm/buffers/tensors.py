"""Tensors on one side, bytes on the other, and no copy in between where none is needed.

This is the sender's side, :class:`TokenRows`; the receiver's is in :mod:`.received`.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import IncompatibleSchema
from ..types import Field, Schema
from .arrays import loaded_instance
from .device_rows import LEGACY_STREAM, DeviceRows, Producers
from .memcpy import address_of, copy_bytes

if TYPE_CHECKING:
    import numpy
    import torch

__all__ = [
    "Memory",
    "TokenRows",
    "memory_of",
    "rows_of",
]


class _Source(NamedTuple):
    """What is known of a tensor once it is checked."""

    num_tokens: int
    flat: memoryview | None = None
    """All bytes, where they lie in the memory of this process without gaps."""
    address: int | None = None
    """Of the first byte, where there are no gaps and it can be known."""
    owner: object = None
    """Keeps the memory at `address` alive."""
    copy: Callable[[memoryview, int, int], None] | None = None
    """Copies rows that have neither `flat` nor `address`: target, first, count."""
    device: str = "cpu"
    on_device: DeviceRows | None = None
    """Where the rows lie on a GPU, if they do."""


class TokenRows:
    """The rows of one field, one per token, of one source. Made by :meth:`of`.

    The source is kept alive, and must not change before the transfer is done.
    """

    __slots__ = (
        "_source",
        "device",
        "field",
        "name",
        "num_tokens",
        "row_nbytes",
        "tensor",
    )

    def __init__(self, name: str, field: Field, tensor: object, source: _Source) -> None:
        self.name = name
        self.field = field
        self.tensor = tensor
        self.num_tokens = source.num_tokens
        self.row_nbytes = field.row_nbytes
        self.device = source.device
        """`"cpu"` or a torch device name."""
        self._source = source

    @classmethod
    def of(
        cls, name: str, field: Field, tensor: object, *, producers: Producers | None = None
    ) -> TokenRows:
        """Check `tensor` against `field`; copy nothing but strided rows of a GPU.

        Args:
            name: the field's name, for errors.
            field: dtype and shape of one row.
            tensor: of shape `[num_tokens, *field.shape]`: a torch tensor, a numpy array,
                anything with DLPack or `__cuda_array_interface__`, or bytes that are a whole
                number of rows.
            producers: the streams that make tensors on a GPU; by default the current ones.

        Raises:
            IncompatibleSchema: it is none of these, or its dtype or shape is another.
            PlaneUnavailable: it is on a GPU, and CUDA fails.
        """
        producers = producers or Producers()
        if loaded_instance(tensor, "torch", "Tensor"):
            source = _torch_source(name, field, tensor, producers)  # type: ignore[arg-type]
        elif hasattr(tensor, "__cuda_array_interface__"):
            source = _cuda_source(name, field, tensor, producers)
        elif loaded_instance(tensor, "numpy", "ndarray"):
            source = _numpy_source(name, field, tensor)  # type: ignore[arg-type]
        elif hasattr(tensor, "__dlpack__"):
            return cls.of(name, field, _from_dlpack(name, tensor))
        else:
            source = _bytes_source(name, field, tensor)
        return cls(name, field, tensor, source)

    def view(self, first: int, count: int) -> memoryview | None:
        """Return the bytes of `count` rows from `first` on, shared with the source.

        None where they are not one piece of this process's memory: strided, or on a device.

        Raises:
            ValueError: there are no such rows.
        """
        self._check_rows(first, count)
        row, (_, flat, address, owner, *_) = self.row_nbytes, self._source
        if flat is None and address is not None:
            return _memory_at(address + first * row, count * row, owner)
        return None if flat is None else flat[first * row : (first + count) * row]

    def address(self, first: int) -> int | None:
        """Return where row `first` lies; None where :meth:`view` is None, or it is unknown.

        Unknown is the address of bytes that are read-only. Valid while this object lives.
        """
        address = self._source.address
        return None if address is None else address + first * self.row_nbytes

    @property
    def on_device(self) -> DeviceRows | None:
        """Where the rows lie on a GPU; None if they do not, or are strided."""
        return self._source.on_device

    def copy_into(self, target: memoryview, first: int, count: int) -> None:
        """Copy `count` rows from `first` on into `target`, strided rows straight into place.

        Blocks until the bytes are there. Large copies release the GIL.

        Raises:
            ValueError: there are no such rows, or `target` has not exactly their bytes.
        """
        self._check_rows(first, count)
        if target.nbytes != count * self.row_nbytes:
            raise ValueError(
                f"{count} rows of {self.name!r} are {count * self.row_nbytes} bytes, "
                f"the target has {target.nbytes}"
            )
        if not count:
            return
        if self._source.copy is not None:
            self._source.copy(target, first, count)
            return
        source = self.view(first, count)
        assert source is not None
        copy_bytes(target, source, self.address(first))

    def _check_rows(self, first: int, count: int) -> None:
        if first < 0 or count < 0 or first + count > self.num_tokens:
            raise ValueError(
                f"rows [{first}, {first + count}) of {self.name!r}, which has {self.num_tokens}"
            )

    def __repr__(self) -> str:
        return f"<TokenRows {self.name}: {self.num_tokens} x {self.field} on {self.device}>"


def rows_of(
    schema: Schema, tensors: Mapping[str, object], *, stream: int | None = None
) -> dict[str, TokenRows]:
    """Check the tensors of a transfer; return the rows of each field, in the schema's order.

    Args:
        schema: the fields.
        tensors: by field.
        stream: of CUDA, which makes those on a GPU; by default the current one.

    Raises:
        IncompatibleSchema: a field is missing or unknown, a tensor does not match its field,
            or two fields have different numbers of tokens.
        PlaneUnavailable: a tensor is on a GPU, and CUDA fails.
    """
    if tensors.keys() != schema.keys():
        missing = [name for name in schema if name not in tensors]
        unknown = [name for name in tensors if name not in schema]
        raise IncompatibleSchema(
            f"the tensors must be those of {schema}; missing {missing}, unknown {unknown}"
        )
    producers = Producers(stream)
    rows = {
        name: TokenRows.of(name, field, tensors[name], producers=producers)
        for name, field in schema.items()
    }
    first, *others = rows.values()
    for other in others:
        if other.num_tokens != first.num_tokens:
            raise IncompatibleSchema(
                f"fields differ in tokens: {first.name!r} has {first.num_tokens}, "
                f"{other.name!r} has {other.num_tokens}"
            )
    return rows


class Memory(NamedTuple):
    """One piece of memory, and who keeps it."""

    address: int
    nbytes: int
    device: str
    """`"cpu"` or a torch device name."""
    owner: object

    def holds(self, address: int, nbytes: int) -> bool:
        """Whether so many bytes from `address` on lie in it."""
        return self.address <= address and address + nbytes <= self.address + self.nbytes


def memory_of(tensor: object) -> Memory:
    """Return where all bytes of a tensor lie, and how many there are.

    Raises:
        IncompatibleSchema: they are not one writable piece of this process's or a GPU's memory.
        PlaneUnavailable: they are on a GPU, and CUDA fails.
    """
    dtype = str(getattr(tensor, "dtype", "uint8")).removeprefix("torch.")
    shape = tuple(getattr(tensor, "shape", (0,)))
    memory = TokenRows.of("memory", Field(dtype, *shape[1:]), tensor)
    flat, on_device = memory.view(0, memory.num_tokens), memory.on_device
    if on_device is not None and on_device.address == _address_on_device(tensor):
        nbytes = memory.num_tokens * memory.row_nbytes
        return Memory(on_device.address, nbytes, memory.device, tensor)
    if not flat or flat.readonly:
        raise IncompatibleSchema(f"not one piece of writable memory: {type(tensor).__name__}")
    return Memory(address_of(flat), flat.nbytes, "cpu", flat)


def _address_on_device(tensor: Any) -> int:
    """Return where a tensor of a GPU begins; its rows may be a dense copy of it."""
    if loaded_instance(tensor, "torch", "Tensor"):
        return int(tensor.data_ptr())
    return int(tensor.__cuda_array_interface__["data"][0])


def _check(name: str, field: Field, dtype: str, shape: Sequence[int]) -> None:
    if dtype != field.dtype or not shape or tuple(shape[1:]) != field.shape:
        expected = ", ".join(["num_tokens", *map(str, field.shape)])
        raise IncompatibleSchema(
            f"field {name!r} is {dtype} {list(shape)}, expected {field.dtype} [{expected}]"
        )


# One function per kind of source. Rows are copied as integers of their size, which every
# library can copy between any strides, and which keeps every bit.


def _torch_source(name: str, field: Field, tensor: torch.Tensor, producers: Producers) -> _Source:
    import torch

    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_meta:
        kind = "nested" if tensor.is_nested else f"{tensor.layout} on {tensor.device}"
        raise IncompatibleSchema(f"field {name!r} has no dense rows in memory: it is {kind}")
    _check(name, field, _dtype_names[tensor.dtype], tensor.shape)
    # Few calls of torch: after some idle milliseconds each costs tens of microseconds.
    rows = tensor.detach().resolve_conj().resolve_neg() if _is_lazy(tensor) else tensor
    if rows.is_cpu and rows.is_contiguous():
        return _dense_torch_source(name, rows)
    if rows.is_cuda:
        return _torch_cuda_source(field, rows, producers)
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    rows, size = rows.detach(), rows.element_size()
    rows = rows.view(integers[size]) if size in integers else rows
    if rows.is_cpu and rows[:1].is_contiguous():
        with suppress(RuntimeError):  # torch without numpy, which copies dense rows much faster
            return _Source(len(rows), copy=partial(_copy_numpy, rows.numpy()))
    return _Source(len(rows), copy=partial(_copy_torch, rows), device=str(rows.device))


def _is_lazy(tensor: torch.Tensor) -> bool:
    """Whether the elements in memory are not the tensor's yet."""
    return tensor.is_conj() or tensor.is_neg()


def _dense_torch_source(name: str, rows: torch.Tensor) -> _Source:
    num_tokens, address = rows.shape[0], rows.data_ptr()  # len() of torch's runs Python
    if not num_tokens:
        return _Source(0, memoryview(b""))
    if not address:
        raise IncompatibleSchema(f"field {name!r} has no memory behind it")
    return _Source(num_tokens, None, address, rows)


class _DtypeNames(dict["torch.dtype", str]):
    """The names of torch's dtypes without `torch.`; each is made once."""

    def __missing__(self, dtype: torch.dtype) -> str:
        return self.setdefault(dtype, str(dtype).removeprefix("torch."))


_dtype_names = _DtypeNames()


def _torch_cuda_source(field: Field, tensor: torch.Tensor, producers: Producers) -> _Source:
    """Strided rows are made dense on the current stream of torch, by one more copy."""
    rows = tensor.detach()
    if not rows.is_contiguous():
        producers.lead(rows.data_ptr())
        rows, producers = rows.contiguous(), Producers()
    on_device = None
    if rows.numel():
        on_device = DeviceRows.at(rows.data_ptr(), field.row_nbytes, producers)
    return _device_source(len(rows), rows, str(rows.device), on_device)


def _cuda_source(name: str, field: Field, array: Any, producers: Producers) -> _Source:
    """Take an array of cupy, or of whoever else says in this way where it lies on a GPU."""
    interface = array.__cuda_array_interface__
    shape, dtype = interface["shape"], _dtype_name(array, interface["typestr"])
    _check(name, field, dtype, shape)
    if interface.get("strides") is not None:
        raise IncompatibleSchema(f"field {name!r} is strided on its GPU: make it contiguous")
    own = interface.get("stream")
    on_device = None
    if all(shape):
        address = interface["data"][0]
        stream = 0 if own == LEGACY_STREAM else own
        on_device = DeviceRows.at(address, field.row_nbytes, producers, stream)
    device = "cpu" if on_device is None else f"cuda:{on_device.device}"
    return _device_source(shape[0], array, device, on_device)


def _dtype_name(array: Any, typestr: str) -> str:
    """Return the torch name of an array's dtype; it may have none but the interface's."""
    dtype = getattr(array, "dtype", None)
    if dtype is not None:
        return getattr(dtype, "name", str(dtype))
    kind, size = typestr[1:2], typestr[2:]
    if kind == "b":
        return "bool"
    return f"{_KINDS.get(kind, kind)}{int(size) * 8}"


_KINDS = {"i": "int", "u": "uint", "f": "float", "c": "complex"}
"""How numpy abbreviates them."""


def _device_source(
    num_tokens: int, owner: object, device: str, on_device: DeviceRows | None
) -> _Source:
    if on_device is None:
        return _Source(num_tokens, memoryview(b""))

    def copy(target: memoryview, first: int, count: int, kept: object = owner) -> None:
        on_device.copy_into(target, first, count)

    return _Source(num_tokens, copy=copy, device=device, on_device=on_device)


def _memory_at(address: int, nbytes: int, owner: object) -> memoryview:
    """Return writable bytes of this process, which keep their owner alive."""
    if not nbytes:
        return memoryview(b"")
    memory = _array_type(nbytes).from_address(address)
    memory.owner = owner  # type: ignore[attr-defined]
    return memoryview(memory).cast("B")


@functools.lru_cache(maxsize=1024)
def _array_type(nbytes: int) -> type[ctypes.Array[ctypes.c_ubyte]]:
    return ctypes.c_ubyte * nbytes


def _copy_torch(rows: torch.Tensor, target: memoryview, first: int, count: int) -> None:
    import torch

    flat = torch.frombuffer(target, dtype=rows.dtype)
    flat.view(count, *rows.shape[1:]).copy_(rows[first : first + count])


def _numpy_source(name: str, field: Field, array: numpy.ndarray[Any, Any]) -> _Source:
    import numpy

    array = numpy.asarray(array)  # a subclass, such as `matrix`, may have another idea of a shape
    if not array.dtype.isnative:
        raise IncompatibleSchema(
            f"field {name!r} is {array.dtype.str}, which is not the byte order of this machine"
        )
    _check(name, field, array.dtype.name, array.shape)
    if array.flags.c_contiguous:
        flat = array.reshape(-1).view(numpy.uint8).data if array.size else memoryview(b"")
        return _Source(len(array), flat, array.__array_interface__["data"][0])
    size = array.dtype.itemsize
    rows = array.view(f"u{size}" if size <= 8 else array.dtype)
    return _Source(len(rows), copy=partial(_copy_numpy, rows))


def _copy_numpy(rows: numpy.ndarray[Any, Any], target: memoryview, first: int, count: int) -> None:
    import numpy

    flat = numpy.frombuffer(target, dtype=rows.dtype)
    numpy.copyto(flat.reshape(count, *rows.shape[1:]), rows[first : first + count])


def _from_dlpack(name: str, tensor: object) -> object:
    """Return a torch tensor or a numpy array over the memory of `tensor`.

    What is imported already comes first; each can read what the other cannot.
    """
    reasons = []
    for library in sorted(("torch", "numpy"), key=lambda library: library not in sys.modules):
        try:
            return importlib.import_module(library).from_dlpack(tensor)
        except Exception as exc:  # the exporter's own code runs here and may raise anything
            reasons.append(f"{library}: {exc}")
    raise IncompatibleSchema(
        f"field {name!r}: cannot read {type(tensor).__name__} by DLPack ({'; '.join(reasons)})"
    )


def _bytes_source(name: str, field: Field, source: object) -> _Source:
    try:
        memory = memoryview(source)  # type: ignore[arg-type]
    except (TypeError, ValueError, BufferError) as exc:
        raise IncompatibleSchema(
            f"field {name!r} must be a tensor or bytes, got {type(source).__name__}"
        ) from exc
    if memory.itemsize != 1 or not memory.c_contiguous:
        raise IncompatibleSchema(
            f"field {name!r} must be dense bytes, got items of {memory.itemsize} bytes "
            f"(format {memory.format!r}) in strides of {memory.strides}"
        )
    num_tokens, left_over = divmod(memory.nbytes, field.row_nbytes)
    if left_over:
        raise IncompatibleSchema(
            f"field {name!r} has {memory.nbytes} bytes, which is no whole number of rows of "
            f"{field.row_nbytes}"
        )
    flat = memory.cast("B") if memory.nbytes else memoryview(b"")
    return _Source(num_tokens, flat, None if flat.readonly else address_of(flat))
