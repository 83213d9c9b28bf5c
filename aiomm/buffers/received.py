"""What has arrived, as tensors: views of the pool, or memory of their own."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import Rejected
from ..types import Extent, Schema
from .arena import Arena, HostArena
from .arrays import Array, array_over
from .layout import Layout
from .memcpy import SharedCopies, address_of
from .spare import PrivateMemory, SpareMemory

__all__ = ["JoinedTensors", "PoolTensors"]

MAX_LISTED = 1024
"""Extents of all fields that :meth:`JoinedTensors.appending` lists, at 1 us each."""
HEAP_NBYTES = 1 << 20
"""Up to here memory comes from the heap: 50 us less than a mapping of one's own."""


class PoolTensors:
    """The fields of a whole pool as tensors, to take views of.

    Call :func:`~aiomm.buffers.arrays.load_array_library` first, off the loop. The tensors keep
    the arena's memory alive, also when the arena is closed.

    Raises:
        ImportError: no installed library has the dtype of a field.
    """

    def __init__(self, layout: Layout, arena: Arena) -> None:
        whole = Extent(0, layout.num_tokens)
        self._fields: dict[str, Array] = {}
        for name, field in layout.schema.items():
            start = layout.field_range(name, whole).start
            self._fields[name] = arena.array(start, field, layout.num_tokens)

    def view(self, name: str, extent: Extent) -> Array:
        """Return the `[num_tokens, *shape]` tensor of one extent, sharing the pool's memory."""
        return self._fields[name][extent.start : extent.stop]


class JoinedTensors:
    """Private memory into which chunks are moved out of a pool, one behind the other.

    A length known from the start is allocated once. Otherwise the memory grows by moving
    pages, not bytes, so at no time more exists than the tokens themselves.

    Not thread-safe: any thread may append, one after the other.

    Args:
        schema: the fields.
        num_tokens: tokens that will come in all, or None if nobody knows.
        spare: where the memory comes from, and goes.
    """

    def __init__(self, schema: Schema, num_tokens: int | None, spare: SpareMemory) -> None:
        self.schema = schema
        self.num_tokens = 0
        """Tokens that are here."""
        self._limit = num_tokens
        self._room = 0
        self._spare = spare
        self._memory: dict[str, PrivateMemory | bytearray] = {}

    def append(self, layout: Layout, arena: Arena, extents: Sequence[Extent]) -> None:
        """Copy the tokens of `extents` behind those that are here.

        Blocks for some 0.1 to 0.6 ms per MiB, without the GIL. Not after :meth:`tensors`.

        Raises:
            ValueError: they are more than were to come.
            Rejected: there is no memory for them (retryable).
        """
        first, stop = self._place(extents)
        self._copies(layout, arena, extents, first).run()
        self.num_tokens = stop

    def appending(
        self, layout: Layout, arena: Arena, extents: Sequence[Extent]
    ) -> SharedCopies | None:
        """Return copies that together do what :meth:`append` does, and count as made.

        None where that is for one thread: nobody knows the length, so memory may have to move, or
        the extents are so many that to list them takes long.

        Raises:
            ValueError: they are more than were to come.
            Rejected: there is no memory for them (retryable).
        """
        if self._limit is None or len(extents) * len(self.schema) > MAX_LISTED:
            return None
        first, stop = self._place(extents)
        copies = self._copies(layout, arena, extents, first)
        self.num_tokens = stop
        return copies

    def tensors(self) -> dict[str, Array]:
        """Return the tokens that are here as tensors `[num_tokens, *shape]`, sharing the memory.

        They stay valid when this object is gone.

        Raises:
            ImportError: no installed library has the dtype of a field.
        """
        self._make_room(self.num_tokens)
        return {
            name: array_over(self._view(name), field, self.num_tokens)
            for name, field in self.schema.items()
        }

    def _place(self, extents: Sequence[Extent]) -> tuple[int, int]:
        """Make room for the tokens of `extents`; return where they will begin and end."""
        stop = self.num_tokens + sum(extent.num_tokens for extent in extents)
        if self._limit is not None and stop > self._limit:
            raise ValueError(f"{stop} tokens have come, and only {self._limit} were to")
        self._make_room(stop)
        return self.num_tokens, stop

    def _copies(
        self, layout: Layout, arena: Arena, extents: Sequence[Extent], first: int
    ) -> SharedCopies:
        """Return the copies of the tokens of `extents` to token `first` and behind."""
        assert isinstance(arena, HostArena)
        pool = arena.view(0, arena.nbytes)
        pool_address, owners = address_of(pool), [pool]
        copies: list[tuple[int, int, int]] = []
        for name, field in self.schema.items():
            joined = self._view(name)
            owners.append(joined)
            target = address_of(joined) + first * field.row_nbytes
            for extent in extents:
                start, end = layout.field_range(name, extent)
                copies.append((target, pool_address + start, end - start))
                target += end - start
        return SharedCopies(copies, owners)

    def _view(self, name: str) -> memoryview:
        memory = self._memory[name]
        return memory.view if isinstance(memory, PrivateMemory) else memoryview(memory)

    def _make_room(self, num_tokens: int) -> None:
        if self._memory and num_tokens <= self._room:
            return
        room = max(num_tokens, 2 * self._room) if self._limit is None else self._limit
        for name, field in self.schema.items():
            nbytes = max(room * field.row_nbytes, 1)  # pages that nobody touches cost nothing
            memory = self._memory.get(name)
            try:
                if isinstance(memory, PrivateMemory):
                    memory.grow(nbytes)
                elif self._limit is not None and nbytes <= HEAP_NBYTES:
                    self._memory[name] = bytearray(nbytes)
                else:
                    self._memory[name] = self._spare.take(nbytes)
            except (OSError, OverflowError) as exc:
                raise Rejected(f"no memory for {nbytes} bytes of {name!r}", retryable=True) from exc
        self._room = room
