"""The memory behind a pool: who allocated it, and how bytes of it are reached."""

from __future__ import annotations

from abc import ABC, abstractmethod

from ..errors import PoolClosed
from ..types import Field
from .arrays import Array, array_over
from .mapping import map_memory

__all__ = ["Arena", "HostArena"]


class Arena(ABC):
    """A fixed piece of memory that a receiver owns. It knows nothing of blocks or tokens."""

    nbytes: int
    device: str
    """`"cpu"` or a torch device name."""

    @abstractmethod
    def array(self, offset: int, field: Field, num_tokens: int) -> Array:
        """Return the bytes from `offset` on as a `[num_tokens, *field.shape]` array, not copied.

        Call :func:`~aiomm.buffers.arrays.load_array_library` first, off the loop. The array
        keeps the memory alive, also when the arena is closed.

        Raises:
            ImportError: no installed library has the dtype.
            PoolClosed: the arena is closed.
        """

    @abstractmethod
    def read(self, offset: int, nbytes: int) -> memoryview:
        """Return bytes `[offset, offset + nbytes)` on the host, copied there if need be.

        Raises:
            ValueError: they do not lie inside the arena.
            PoolClosed: the arena is closed.
        """

    @abstractmethod
    def close(self) -> None:
        """Give the memory back. Idempotent; views that still exist stay readable."""

    def _check_range(self, offset: int, nbytes: int) -> None:
        if not 0 <= offset <= offset + nbytes <= self.nbytes:
            raise ValueError(
                f"bytes [{offset}, {offset + nbytes}) are outside the arena's {self.nbytes}"
            )


class HostArena(Arena):
    """Private zeroed memory of this process, faulted in.

    The constructor blocks for some 0.1 ms per MiB or more, without the GIL: call it in a thread.

    Raises:
        PlaneUnavailable: there is not so much memory.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.device = "cpu"
        self._memory: memoryview | None = self._map()

    def _map(self) -> memoryview:
        return map_memory(self.nbytes)

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Return writable bytes `[offset, offset + nbytes)`, shared with the arena, not copied.

        Raises:
            ValueError: they do not lie inside the arena.
            PoolClosed: the arena is closed.
        """
        if self._memory is None:
            raise PoolClosed("the arena is closed")
        self._check_range(offset, nbytes)
        return self._memory[offset : offset + nbytes]

    def array(self, offset: int, field: Field, num_tokens: int) -> Array:
        """Return bytes of the arena as an array; see :meth:`Arena.array`."""
        return array_over(self.view(offset, num_tokens * field.row_nbytes), field, num_tokens)

    def read(self, offset: int, nbytes: int) -> memoryview:
        """Return bytes of the arena, not copied; see :meth:`Arena.read`."""
        return self.view(offset, nbytes)

    def close(self) -> None:
        """Unmap the memory as soon as no view of it is left. Idempotent."""
        self._memory = None

    def __repr__(self) -> str:
        closed = ", closed" if self._memory is None else ""
        return f"<{type(self).__name__} of {self.nbytes} bytes{closed}>"
