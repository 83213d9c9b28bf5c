"""Pools in the memory of a GPU, and what is moved out of them."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import PoolClosed, Rejected
from ..gpu.choice import check_device, device_ordinal, gpu_runtime
from ..gpu.memory import DeviceMemory
from ..gpu.pinning import Pin
from ..gpu.runtime import Copy, GpuError, explained
from ..types import Extent, Field, Schema
from .arena import Arena, HostArena
from .arrays import Array, array_of_bytes
from .layout import ByteRange, Layout
from .memcpy import address_of

__all__ = ["CudaArena", "DeviceJoinedTensors"]


class CudaArena(Arena):
    """Memory of one GPU, an allocation of its own, so that it can be shared with other processes.

    The constructor blocks, and initialises CUDA.

    Args:
        nbytes: how many.
        device: such as `"cuda:0"`.

    Raises:
        PlaneUnavailable: there is no such device, or not so much memory on it.
    """

    def __init__(self, nbytes: int, device: str) -> None:
        self.runtime = gpu_runtime()
        self.ordinal = device_ordinal(device)
        self.device = f"cuda:{self.ordinal}"
        self.nbytes = nbytes
        check_device(self.runtime, self.ordinal)
        try:
            self._memory: DeviceMemory | None = DeviceMemory(self.runtime, self.ordinal, nbytes)
        except GpuError as exc:
            raise explained(self.ordinal, exc) from exc

    @property
    def memory(self) -> DeviceMemory:
        """The allocation. Whoever refers to it keeps it from being freed.

        Raises:
            PoolClosed: the arena is closed.
        """
        if self._memory is None:
            raise PoolClosed("the arena is closed")
        return self._memory

    def address(self, offset: int, nbytes: int) -> int:
        """Return where bytes `[offset, offset + nbytes)` lie.

        Raises:
            ValueError: they do not lie inside the arena.
            PoolClosed: the arena is closed.
        """
        self._check_range(offset, nbytes)
        return self.memory.address + offset

    def array(self, offset: int, field: Field, num_tokens: int) -> Array:
        """Return bytes of the arena as an array on its device; see :meth:`Arena.array`."""
        nbytes = num_tokens * field.row_nbytes
        self._check_range(offset, nbytes)
        return device_array(self.memory, offset, field, num_tokens)

    def read(self, offset: int, nbytes: int) -> memoryview:
        """Return a copy on the host; see :meth:`Arena.read`. Blocks: 20 us, and 40 us per MiB."""
        self._check_range(offset, nbytes)
        try:
            return memoryview(self.memory.read(offset, nbytes))
        except GpuError as exc:
            raise explained(self.ordinal, exc) from exc

    def upload(self, source: HostArena, ranges: Sequence[ByteRange]) -> None:
        """Copy `ranges` of an arena on the host to the same places here. Blocks.

        Raises:
            PlaneUnavailable: CUDA has failed.
            PoolClosed: one of them is closed.
        """
        copies = [
            Copy(self.memory.address + start, address_of(source.view(start, 1)), stop - start)
            for start, stop in ranges
            if start < stop
        ]
        try:
            self.memory.copy(copies)
        except GpuError as exc:
            raise explained(self.ordinal, exc) from exc

    def pin(self, source: HostArena) -> Pin:
        """Make copies out of an arena of the host faster. Blocks."""
        return Pin(self.runtime, self.ordinal, source.view(0, source.nbytes))

    def close(self) -> None:
        """Free the memory as soon as nobody refers to it. Idempotent."""
        self._memory = None

    def __repr__(self) -> str:
        closed = ", closed" if self._memory is None else ""
        return f"<CudaArena of {self.nbytes} bytes on {self.device}{closed}>"


class DeviceJoinedTensors:
    """Memory of a GPU into which chunks are moved out of a pool, one behind the other.

    What :class:`~aiomm.buffers.received.JoinedTensors` is on the host. Where nobody knows the
    length, the memory is made anew, twice as long, whenever it is full.

    Args:
        schema: the fields.
        num_tokens: tokens that will come in all, or None if nobody knows.
    """

    def __init__(self, schema: Schema, num_tokens: int | None) -> None:
        self.schema = schema
        self.num_tokens = 0
        """Tokens that are here."""
        self._limit = num_tokens
        self._room = 0
        self._memory: dict[str, DeviceMemory] = {}

    def append(self, layout: Layout, arena: Arena, extents: Sequence[Extent]) -> None:
        """Copy the tokens of `extents` behind those that are here. Blocks.

        Args:
            layout: of the pool.
            arena: the pool's, a :class:`CudaArena`.
            extents: where the tokens are.

        Raises:
            ValueError: they are more than were to come.
            Rejected: there is no memory for them (retryable).
            PlaneUnavailable: CUDA has failed.
        """
        assert isinstance(arena, CudaArena)
        stop = self.num_tokens + sum(extent.num_tokens for extent in extents)
        if self._limit is not None and stop > self._limit:
            raise ValueError(f"{stop} tokens have come, and only {self._limit} were to")
        self._make_room(arena, stop)
        copies = []
        for name, field in self.schema.items():
            target = self._memory[name].address + self.num_tokens * field.row_nbytes
            for extent in extents:
                start, end = layout.field_range(name, extent)
                copies.append(Copy(target, arena.memory.address + start, end - start))
                target += end - start
        self._copy(arena, [copy for copy in copies if copy.nbytes])
        self.num_tokens = stop

    def appending(self, layout: Layout, arena: Arena, extents: Sequence[Extent]) -> None:
        """Return None: a GPU needs no help by threads, :meth:`append` does it."""

    def tensors(self) -> dict[str, Array]:
        """Return the tokens that are here as tensors `[num_tokens, *shape]`, sharing the memory.

        Not before the first :meth:`append`, which may be of no tokens.

        Raises:
            ImportError: no installed library has the dtype of a field.
        """
        return {
            name: device_array(self._memory[name], 0, field, self.num_tokens)
            for name, field in self.schema.items()
        }

    def _make_room(self, arena: CudaArena, num_tokens: int) -> None:
        if self._memory and num_tokens <= self._room:
            return
        room = max(num_tokens, 2 * self._room) if self._limit is None else self._limit
        before, after = self._memory, {}
        for name, field in self.schema.items():
            nbytes = max(room * field.row_nbytes, 1)
            try:
                after[name] = DeviceMemory(arena.runtime, arena.ordinal, nbytes)
            except GpuError as exc:
                message = f"no memory on {arena.device} for {nbytes} bytes of {name!r}: {exc}"
                raise Rejected(message, retryable=True) from exc
        kept = [
            Copy(after[name].address, memory.address, self.num_tokens * field.row_nbytes)
            for (name, field), memory in zip(self.schema.items(), before.values(), strict=False)
        ]
        self._copy(arena, kept)
        self._memory, self._room = after, room

    def _copy(self, arena: CudaArena, copies: Sequence[Copy]) -> None:
        try:
            arena.memory.copy(copies)
        except GpuError as exc:
            raise explained(arena.ordinal, exc) from exc


def device_array(memory: DeviceMemory, offset: int, field: Field, num_tokens: int) -> Array:
    """Return a `[num_tokens, *field.shape]` array over memory of a GPU, which it keeps alive.

    Raises:
        ImportError: there is no library for arrays on a GPU, or it lacks the dtype.
    """
    nbytes = num_tokens * field.row_nbytes
    runtime, address = memory.runtime, memory.address + offset
    flat = runtime.flat_array(memory.device, address, nbytes, memory)
    return array_of_bytes(flat, field, num_tokens)
