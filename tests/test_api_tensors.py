"""What can be sent: dtypes, layouts, libraries, row sizes, and several fields at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy
import pytest
import torch

from aiomm import Field, Lease, Schema
from aiomm._driver import receiving
from aiomm.buffers.memcpy import SharedCopies
from aiomm.planes import copying
from aiomm.planes.copying import Copies

from .support import (
    assert_idle,
    frozen_imports,  # noqa: F401
    granted,
    pair,
    same,
)

pytestmark = pytest.mark.usefixtures("no_leaks")

PLANES = pytest.mark.parametrize("plane", ["shm", "tcp"])


def field_of(tensor: Any) -> Field:
    return Field(str(tensor.dtype).removeprefix("torch."), *tensor.shape[1:])


async def moved(plane: str, **tensors: Any) -> dict[str, torch.Tensor]:
    """Send `tensors` under the schema that they have, and return what arrives."""
    schema = Schema(**{name: field_of(tensor) for name, tensor in tensors.items()})
    async with pair(schema, planes=plane, sender={"planes": plane}) as (receiver, sender):
        transfer = await granted(sender.claim(receiver.expect("r")))
        transfer.send(tensors)
        lease = await receiver.receive("r")
        received = {name: torch.as_tensor(tensor) for name, tensor in lease.detach().items()}
        await transfer
        assert isinstance(lease, Lease)
        assert_idle(receiver, sender)
    return received


_RANDOM = torch.Generator().manual_seed(7)
_BYTES = torch.randint(0, 255, (60, 16), dtype=torch.uint8, generator=_RANDOM)


@PLANES
@pytest.mark.parametrize(
    "dtype",
    ["float8_e4m3fn", "float8_e5m2", "bool", "bfloat16", "float16", "float32", "int64", "int8"],
)
async def test_every_kind_of_dtype(plane: str, dtype: str) -> None:
    """60 tokens in two chunks; every bit arrives, NaN payloads too."""
    source = _BYTES > 100 if dtype == "bool" else _BYTES.view(getattr(torch, dtype))
    assert same(await moved(plane, x=source), {"x": source})


_BASE = torch.arange(240 * 12, dtype=torch.float32).reshape(240, 12)


@PLANES
@pytest.mark.parametrize(
    "source",
    [
        pytest.param(_BASE[::4], id="strided rows"),
        pytest.param(_BASE[7:60, 2:9], id="sliced rows and columns"),
        pytest.param(_BASE[:12].t(), id="transposed"),
        pytest.param(_BASE[:1].expand(50, 12), id="expanded"),
        pytest.param(_BASE[60:120], id="a slice of a larger tensor"),
        pytest.param(_BASE[:60, ::3], id="every third column"),
        pytest.param(_BASE[:60].reshape(60, 3, 4).permute(0, 2, 1), id="permuted rows"),
        pytest.param(_BASE[:0], id="empty"),
        pytest.param(torch.empty(0, 3, 5, dtype=torch.int16).permute(0, 2, 1), id="empty, strided"),
    ],
)
async def test_every_layout(plane: str, source: torch.Tensor) -> None:
    """Strided, sliced, transposed, expanded and empty tensors arrive as what they show."""
    assert same(await moved(plane, x=source), {"x": source})


@PLANES
async def test_numpy_arrays(plane: str) -> None:
    """Dense, strided and read-only arrays."""
    dense = numpy.arange(50 * 6, dtype=numpy.int64).reshape(50, 6)
    read_only = dense.copy()
    read_only.flags.writeable = False
    received = await moved(plane, dense=dense, flipped=dense[::-1], read_only=read_only)
    assert numpy.array_equal(received["dense"].numpy(), dense)
    assert numpy.array_equal(received["flipped"].numpy(), dense[::-1])
    assert numpy.array_equal(received["read_only"].numpy(), read_only)


class Exported:
    """A tensor of some other library, that speaks DLPack."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **arguments: Any) -> Any:
        return self.tensor.__dlpack__(**arguments)

    def __dlpack_device__(self) -> Any:
        return self.tensor.__dlpack_device__()


async def test_dlpack_and_bytes() -> None:
    """Anything with DLPack, and plain bytes, beside a torch tensor."""
    schema = Schema(a=Field("float32", 12), b=Field("int32"), c=Field("bool"))
    flags = bytes([1, 0] * 25)
    async with pair(schema) as (receiver, sender):
        tensors = {
            "a": Exported(_BASE[:50]),
            "b": torch.arange(50, dtype=torch.int32),
            "c": flags,
        }
        await sender.send(receiver.expect("r"), tensors)
        async with receiver.receive("r") as lease:
            assert same({"a": lease["a"]}, {"a": _BASE[:50]})
            assert bytes(lease["c"].numpy()) == flags  # type: ignore[union-attr]


@PLANES
async def test_several_fields_of_different_dtypes_with_deepstack_rows(plane: str) -> None:
    """Rows of 32 KiB beside rows of one byte, in several chunks; every field has its tokens."""
    tensors = {
        "deepstack": torch.randn(70, 4, 4096, generator=_RANDOM).bfloat16(),
        "mask": torch.arange(70) % 3 == 0,
        "ids": torch.arange(70, dtype=torch.int64),
        "scale": torch.rand(70, 3, generator=_RANDOM).to(torch.float8_e4m3fn),
    }
    assert field_of(tensors["deepstack"]).row_nbytes == 32 * 1024
    assert same(await moved(plane, **tensors), tensors)


async def test_a_tensor_that_needs_a_gradient() -> None:
    """An encoder's output is sent as it is; nobody has to detach it first."""
    source = torch.ones(20, 4, requires_grad=True) * 2
    assert same(await moved("shm", x=source), {"x": source.detach()})


@pytest.mark.both_loops
@pytest.mark.parametrize(("num_processors", "moving", "joining"), [(1, 1, 1), (4, 2, 4)])
async def test_long_rows_leave_a_small_pool_by_as_many_threads_as_there_are(
    num_processors: int, moving: int, joining: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 MiB through 16 MiB, with a second field, once while blocks are short for others."""
    monkeypatch.setattr(copying, "num_processors", lambda: num_processors)
    monkeypatch.setattr(receiving, "num_processors", lambda: num_processors)
    shares: dict[str, set[int]] = {"copy": set(), "join": set()}
    monkeypatch.setattr(copying, "LATE_SECONDS", 20.0)
    run_all = Copies.run_all

    async def noted(copies: Copies, works: Sequence[Callable[[], Any]]) -> list[Any]:
        if copies._threads._name in shares and isinstance(
            getattr(works[0], "__self__", None), SharedCopies
        ):
            shares[copies._threads._name].add(len(works))
        return await run_all(copies, works)

    monkeypatch.setattr(Copies, "run_all", noted)
    rows = torch.randint(0, 255, (640, 1 << 16), dtype=torch.uint8, generator=_RANDOM)
    sent = {"rows": rows, "ids": torch.arange(640, dtype=torch.int32)}
    schema = Schema(rows=Field("uint8", 1 << 16), ids=Field("int32"))
    pool: dict[str, Any] = {"blocks": 16, "block_size": 16, "default_blocks": 8}
    async with pair(schema, **pool, max_spare_bytes=0) as (receiver, sender):
        for num_tokens in (640, 200, 250):
            part = {name: tensor[:num_tokens] for name, tensor in sent.items()}
            transfer = sender.claim(receiver.expect(f"r{num_tokens}"), num_tokens=num_tokens)
            transfer.send(part)
            if num_tokens == 200:
                await transfer  # nobody takes it, and the next one needs its blocks
                continue
            async with receiver.receive(f"r{num_tokens}") as lease:
                assert same(dict(lease), part)
            await transfer
        async with receiver.receive("r200") as lease:
            assert not lease.is_view
            assert same(dict(lease), {name: tensor[:200] for name, tensor in sent.items()})
        assert_idle(receiver, sender)
    assert {name: max(each) for name, each in shares.items()} == {"copy": moving, "join": joining}
