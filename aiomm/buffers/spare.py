"""Private memory that is used again.

A fresh page costs as much as the copy into it, and on a virtual machine several times that. So
what one long result leaves is kept for the next.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import NamedTuple

from .mapping import grow_mapping, map_untouched, offer_to_kernel, owned_view, unmap

__all__ = ["PrivateMemory", "SpareMemory"]

UNIT_NBYTES = 2 << 20
"""Longer ones are rounded up to this, a huge page: they get some, and fit more that follow."""


class _Mapping(NamedTuple):
    address: int
    nbytes: int


class PrivateMemory:
    """Memory of one result, which ends with this object and the last view of it.

    Args:
        mapping: what it is at first.
        spare: where it goes at its end.
    """

    def __init__(self, mapping: _Mapping, spare: SpareMemory) -> None:
        self._mapping = mapping
        self._spare = spare
        self.view, self._end = owned_view(*mapping, spare.give_back)
        """All of its bytes. What they are is undefined."""

    def grow(self, nbytes: int) -> None:
        """Make room for `nbytes` by moving pages, not bytes. Nobody may use :attr:`view` yet.

        Raises:
            OSError: there is not so much memory.
            OverflowError: there never will be.
        """
        nbytes = _rounded(nbytes)
        if nbytes <= self._mapping.nbytes:
            return
        grown = _Mapping(grow_mapping(*self._mapping, nbytes), nbytes)
        self._end.detach()
        self._mapping = grown
        self.view, self._end = owned_view(*grown, self._spare.give_back)


class SpareMemory:
    """The memory that results have left, for those to come.

    The kernel may have its pages whenever it is short of memory.

    Thread-safe, and memory may come back at any instruction, as garbage is collected.

    Args:
        max_nbytes: kept at most; the oldest goes first.
    """

    def __init__(self, max_nbytes: int) -> None:
        self._max_nbytes = max_nbytes
        self._kept: list[_Mapping] = []
        """The oldest first."""
        self._lock = threading.Lock()
        self._returned: deque[_Mapping] = deque()
        """What has come back while the lock was held, perhaps further up on this very thread."""

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        with self._lock:
            return sum(mapping.nbytes for mapping in self._kept)

    def take(self, nbytes: int) -> PrivateMemory:
        """Return at least `nbytes`, kept ones if there are some that are not far too many.

        Raises:
            OSError: there is not so much memory.
            OverflowError: there never will be.
        """
        nbytes = _rounded(nbytes)
        with self._lock:
            fitting = [kept for kept in self._kept if nbytes <= kept.nbytes <= 2 * nbytes]
            mapping = min(fitting, key=lambda kept: kept.nbytes, default=None)
            if mapping is not None:
                self._kept.remove(mapping)
        self._keep_returned()
        return PrivateMemory(mapping or _Mapping(map_untouched(nbytes), nbytes), self)

    def give_back(self, address: int, nbytes: int) -> None:
        """Keep memory that nobody uses any more, or unmap it."""
        offer_to_kernel(address, nbytes)
        self._returned.append(_Mapping(address, nbytes))
        self._keep_returned()

    def close(self) -> None:
        """Keep nothing from now on. Idempotent."""
        self._max_nbytes = 0
        with self._lock:
            self._drop_oldest()
        self._keep_returned()

    def _keep_returned(self) -> None:
        """Take in what has come back. If the lock is held, whoever holds it does it afterwards."""
        while self._returned and self._lock.acquire(blocking=False):
            try:
                while self._returned:
                    self._kept.append(self._returned.popleft())
                self._drop_oldest()
            finally:
                self._lock.release()

    def _drop_oldest(self) -> None:
        excess = sum(mapping.nbytes for mapping in self._kept) - self._max_nbytes
        while excess > 0:
            mapping = self._kept.pop(0)
            excess -= mapping.nbytes
            unmap(*mapping)


def _rounded(nbytes: int) -> int:
    return nbytes if nbytes < UNIT_NBYTES else -(-nbytes // UNIT_NBYTES) * UNIT_NBYTES
