"""Memory mapped without Python's `mmap`.

Python's `mmap` keeps a duplicate of the descriptor for as long as any view lives, cannot be
closed while one does, and holds the GIL while pages are faulted in (0.6 ms per MiB). Here a
mapping is a memoryview: it lives as long as the last view of it, and no longer.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref

from ..errors import PlaneUnavailable

__all__ = ["map_memory"]

_MADV_POPULATE_WRITE = 23  # since Linux 5.14; not in Python's mmap
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
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    flags = private if fd is None else mmap.MAP_SHARED
    address = _libc.mmap(
        None, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1 if fd is None else fd, 0
    )
    if address == _MAP_FAILED:
        raise PlaneUnavailable(f"cannot map {nbytes} bytes: {os.strerror(ctypes.get_errno())}")
    memory = (ctypes.c_ubyte * nbytes).from_address(address)
    # Never at exit: tensors over the mapping may outlive this module.
    weakref.finalize(memory, _libc.munmap, address, nbytes).atexit = False
    if fd is None:
        _libc.madvise(address, nbytes, mmap.MADV_HUGEPAGE)  # only faster, so it may fail
    else:
        _libc.madvise(address, nbytes, mmap.MADV_DONTFORK)
    if _libc.madvise(address, nbytes, _MADV_POPULATE_WRITE) and fd is None:
        ctypes.memset(address, 0, nbytes)  # an older kernel
    return memoryview(memory).cast("B")
