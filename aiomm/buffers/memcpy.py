"""Copies of bytes, and who has the GIL meanwhile.

On x86-64 they stream past the caches (`_memcpy.c`) if a C compiler was at hand when aiomm was
installed; elsewhere they are libc's, which take half as long again.
"""

from __future__ import annotations

import ctypes
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib import import_module
from typing import NamedTuple, TypeAlias

__all__ = [
    "PIECE_NBYTES",
    "Memcpy",
    "SharedCopies",
    "address_of",
    "copy_bytes",
    "copy_memory",
    "copy_with_gil",
    "copy_without_gil",
    "is_streaming",
]

Memcpy: TypeAlias = Callable[[int, int, int], object]
"""Copies from address to address: target, source, how many bytes. They do not overlap."""

GIL_NBYTES = 1 << 20
"""Up to here a copy keeps the GIL: taking it back beside a busy thread costs up to 5 ms."""
STREAM_NBYTES = 1 << 18
"""From here on copies stream; what is shorter is copied as fast by a slice."""
PIECE_NBYTES = GIL_NBYTES
"""What a thread takes at once of copies that it shares with others, the loop's or not: 0.1 ms."""


class _Functions(NamedTuple):
    with_gil: Memcpy
    without_gil: Memcpy
    shared: Callable[[array[int], array[int]], object]
    """Makes one copy after the other, without the GIL, until others have taken the last."""
    is_streaming: bool


def _compiled() -> _Functions:
    """Return our own.

    Raises:
        ImportError: they were not compiled.
    """
    module = import_module("._memcpy", __package__)
    functions = module.copy_with_gil, module.copy_without_gil, module.copy_shared
    return _Functions(*functions, is_streaming=bool(module.IS_STREAMING))


def _libc() -> _Functions:
    """Return what there is everywhere."""
    copies = ctypes.PyDLL(None).memmove, ctypes.CDLL(None).memmove
    for copy in copies:
        copy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
        copy.restype = None
    with_gil, without_gil = copies
    lock = threading.Lock()

    def shared(copies: array[int], taken: array[int]) -> None:
        while True:
            with lock:
                first = 3 * taken[0]
                taken[0] += 1
            if first >= len(copies):
                return
            without_gil(*copies[first : first + 3])

    return _Functions(with_gil, without_gil, shared, is_streaming=False)


try:
    copy_with_gil, copy_without_gil, _copy_shared, is_streaming = _compiled()
except ImportError:
    copy_with_gil, copy_without_gil, _copy_shared, is_streaming = _libc()


def copy_memory(target: int, source: int, nbytes: int) -> None:
    """Copy bytes from address to address; the GIL is released for large copies."""
    copy = copy_with_gil if nbytes <= GIL_NBYTES else copy_without_gil
    copy(target, source, nbytes)


class SharedCopies:
    """Copies that several threads make together, each the next that none has taken.

    So they end together, whether one begins late or shares its processor with somebody else.

    Args:
        copies: from address to address: target, source, how many bytes.
        owners: of the memory, which is kept as long as this object is.
    """

    def __init__(self, copies: Iterable[tuple[int, int, int]], owners: object) -> None:
        self._owners = owners
        pieces: list[int] = []
        for target, source, nbytes in copies:
            for start in range(0, nbytes, PIECE_NBYTES):
                pieces += target + start, source + start, min(PIECE_NBYTES, nbytes - start)
        self._pieces = array("Q", pieces)
        self._taken = array("Q", [0])

    @property
    def nbytes(self) -> int:
        """Bytes that are copied in all."""
        return sum(self._pieces[2::3])

    @property
    def num_left(self) -> int:
        """Pieces that nobody has taken."""
        return max(0, len(self._pieces) // 3 - self._taken[0])

    def pieces(self, copy: Memcpy = copy_with_gil) -> Iterator[Callable[[], object]]:
        """Take one piece after the other and yield what makes it. Not while a thread runs."""
        while self.num_left:
            first = 3 * self._taken[0]
            self._taken[0] += 1
            yield partial(copy, *self._pieces[first : first + 3])

    def run(self) -> None:
        """Take part until nothing is left to take; what others have taken may still run."""
        _copy_shared(self._pieces, self._taken)


def copy_bytes(target: memoryview, source: memoryview, source_address: int | None = None) -> None:
    """Copy `source` into `target`, which is as long; the GIL is released for large copies.

    Args:
        target: writable bytes.
        source: bytes.
        source_address: where `source` lies. If it is read-only, large copies need it, to stream
            and to release the GIL.
    """
    nbytes = source.nbytes
    if nbytes >= STREAM_NBYTES:
        if source_address is None and not source.readonly:
            source_address = address_of(source)
        if source_address is not None:
            copy_memory(address_of(target), source_address, nbytes)
            return
    for start in range(0, nbytes, GIL_NBYTES):  # other threads get a turn in between
        target[start : start + GIL_NBYTES] = source[start : start + GIL_NBYTES]


def address_of(memory: memoryview) -> int:
    """Return the address of writable bytes, of which there is at least one."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
