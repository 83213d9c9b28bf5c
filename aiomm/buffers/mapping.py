"""Memory mapped without Python's `mmap`.

Python's `mmap` keeps a duplicate of the descriptor for as long as any view lives, cannot be
closed while one does, and holds the GIL while pages are faulted in (0.6 ms per MiB). Here a
mapping is a memoryview: it lives as long as the last view of it, and no longer.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import weakref
from collections.abc import Callable

from ..errors import PlaneUnavailable

__all__ = [
    "grow_mapping",
    "map_memory",
    "map_untouched",
    "offer_to_kernel",
    "owned_view",
    "unmap",
]

_MADV_POPULATE_WRITE = 23  # since Linux 5.14; not in Python's mmap
_MADV_FREE = 8
_MREMAP_MAYMOVE = 1
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.mremap.restype = ctypes.c_void_p
_libc.mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def map_memory(nbytes: int, fd: int | None = None) -> memoryview:
    """Map `nbytes` bytes, of `fd` or of private zeroed memory, with every page faulted in.

    Blocks for about 0.2 to 0.6 ms per MiB of fresh memory, without the GIL. A mapping of a
    descriptor is shared, stays valid when `fd` is closed, and is not inherited by forked
    children, which could otherwise write into blocks that are long somebody else's.

    Raises:
        PlaneUnavailable: there is not so much memory.
    """
    if nbytes < 1:
        raise ValueError(f"cannot map {nbytes} bytes")
    try:
        address = map_untouched(nbytes) if fd is None else _map(nbytes, mmap.MAP_SHARED, fd)
    except (OSError, OverflowError) as exc:
        raise PlaneUnavailable(f"cannot map {nbytes} bytes: {exc}") from exc
    memory, _ = owned_view(address, nbytes, unmap)
    if fd is not None:
        _libc.madvise(address, nbytes, mmap.MADV_DONTFORK)
    if _libc.madvise(address, nbytes, _MADV_POPULATE_WRITE) and fd is None:
        ctypes.memset(address, 0, nbytes)  # an older kernel
    return memory


def map_untouched(nbytes: int) -> int:
    """Return the address of `nbytes` private zeroed bytes, each page of which comes when touched.

    Raises:
        OSError: there is not so much memory.
        OverflowError: there never will be.
    """
    address = _map(nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
    _libc.madvise(address, nbytes, mmap.MADV_HUGEPAGE)  # only faster, so it may fail
    return address


def grow_mapping(address: int, nbytes: int, new_nbytes: int) -> int:
    """Make a private mapping longer, and return where it is now. No byte is copied.

    Raises:
        OSError: there is not so much memory.
        OverflowError: there never will be.
    """
    return _mapped(_libc.mremap(address, nbytes, _checked(new_nbytes), _MREMAP_MAYMOVE))


def offer_to_kernel(address: int, nbytes: int) -> None:
    """Let the kernel take the pages of a private mapping, if it needs some before they are used."""
    _libc.madvise(address, nbytes, _MADV_FREE)


def unmap(address: int, nbytes: int) -> None:
    """End a mapping. Blocks for up to 0.1 ms per MiB."""
    _libc.munmap(address, nbytes)


def owned_view(
    address: int, nbytes: int, end: Callable[[int, int], object]
) -> tuple[memoryview, weakref.finalize[[int, int], ctypes.Array[ctypes.c_ubyte]]]:
    """Return all bytes of a mapping, and what calls `end` when the last view of them is gone."""
    memory = (ctypes.c_ubyte * nbytes).from_address(address)
    ending = weakref.finalize(memory, end, address, nbytes)
    ending.atexit = False  # tensors over the mapping may outlive this module
    return memoryview(memory).cast("B"), ending


def _map(nbytes: int, flags: int, fd: int) -> int:
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    return _mapped(_libc.mmap(None, _checked(nbytes), protection, flags, fd, 0))


def _checked(nbytes: int) -> int:
    """Return `nbytes`, which C would otherwise take modulo 2 ** 64."""
    if nbytes > sys.maxsize:
        raise OverflowError(f"{nbytes} bytes are more than there are addresses")
    return nbytes


def _mapped(address: int | None) -> int:
    if address is None or address == _MAP_FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return address
