"""Copies of bytes, and who has the GIL meanwhile.

They stream past the caches (`_memcpy.c`) where a C compiler was at hand when aiomm was installed;
elsewhere they are libc's, which take half as long again.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from importlib import import_module
from typing import TypeAlias

__all__ = [
    "Copy",
    "address_of",
    "copy_bytes",
    "copy_memory",
    "copy_with_gil",
    "is_streaming",
]

Copy: TypeAlias = Callable[[int, int, int], object]
"""Copies from address to address: target, source, how many bytes. They do not overlap."""

GIL_NBYTES = 1 << 20
"""Up to here a copy keeps the GIL: taking it back beside a busy thread costs up to 5 ms."""
SLICE_NBYTES = 1 << 16
"""Up to here it takes longer to find the address of bytes than to copy them as a slice."""


def _libc() -> tuple[Copy, Copy]:
    """Return the copy that keeps the GIL, and the one that does not."""
    copies = ctypes.PyDLL(None).memmove, ctypes.CDLL(None).memmove
    for copy in copies:
        copy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
        copy.restype = None
    return copies


def _compiled() -> tuple[Copy, Copy]:
    """Return the same of ours.

    Raises:
        ImportError: it was not compiled.
    """
    module = import_module("._memcpy", __package__)
    return module.copy_with_gil, module.copy_without_gil


try:
    copy_with_gil, copy_without_gil = _compiled()
    is_streaming = True
except ImportError:
    copy_with_gil, copy_without_gil = _libc()
    is_streaming = False


def copy_memory(target: int, source: int, nbytes: int) -> None:
    """Copy bytes from address to address; the GIL is released for large copies."""
    copy = copy_with_gil if nbytes <= GIL_NBYTES else copy_without_gil
    copy(target, source, nbytes)


def copy_bytes(target: memoryview, source: memoryview, source_address: int | None = None) -> None:
    """Copy `source` into `target`, which is as long; the GIL is released for large copies.

    Args:
        target: writable bytes.
        source: bytes.
        source_address: where `source` lies, needed only for large copies when it is read-only.
    """
    nbytes = source.nbytes
    if nbytes > SLICE_NBYTES:
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
