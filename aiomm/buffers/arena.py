"""The memory behind a pool: who allocated it, and how bytes of it are reached."""

from __future__ import annotations

from abc import ABC, abstractmethod

__all__ = ["Arena", "HostArena"]


class Arena(ABC):
    """A fixed piece of memory that a receiver owns. It knows nothing of blocks or tokens."""

    nbytes: int
    device: str
    """`"cpu"` or a torch device name."""

    @abstractmethod
    def view(self, offset: int, nbytes: int) -> memoryview:
        """Return writable bytes `[offset, offset + nbytes)`, shared with the arena, not copied."""

    @abstractmethod
    def close(self) -> None:
        """Give the memory back. Idempotent; views that still exist stay readable."""
