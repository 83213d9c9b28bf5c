"""The memory of a fake GPU: shared memory without a name, and handles that lead to it."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
from typing import NamedTuple, Self

from ..runtime import HANDLE_NBYTES, UUID_NBYTES, GpuError
from .codes import INVALID_VALUE, OUT_OF_MEMORY

__all__ = ["FakeMemory", "Handle", "memory_name", "open_memory"]

_HANDLE = struct.Struct(f"8siiq{UUID_NBYTES}s16s8x")
_MAGIC = b"fakegpu\x01"
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
_MAP_FAILED = ctypes.c_void_p(-1).value
_MAP_FIXED, _MAP_NORESERVE, _PROT_NONE = 0x10, 0x4000, 0


class Handle(NamedTuple):
    """What leads another process to an allocation."""

    process: int
    fd: int
    nbytes: int
    uuid: bytes
    nonce: bytes

    def encoded(self) -> bytes:
        """Return it as CUDA's handles are: 64 bytes."""
        return _HANDLE.pack(_MAGIC, *self)

    @classmethod
    def decoded(cls, handle: bytes) -> Self:
        """Return what a handle says.

        Raises:
            GpuError: it is none.
        """
        if len(handle) != HANDLE_NBYTES or not handle.startswith(_MAGIC):
            raise GpuError("cuIpcOpenMemHandle", INVALID_VALUE, "not a handle")
        return cls(*_HANDLE.unpack(handle)[1:])


class FakeMemory:
    """One mapped allocation, of this process or of another one's. It owns the descriptor.

    Raises:
        GpuError: it cannot be mapped.
    """

    def __init__(
        self, device: int, uuid: bytes, fd: int, nbytes: int, nonce: bytes, *, is_own: bool
    ) -> None:
        self.device = device
        self.uuid = uuid
        """Of the device that it lies on; with another process's, not the one that reaches it."""
        self.fd = fd
        self.nbytes = nbytes
        self.nonce = nonce
        self.is_own = is_own
        address = _libc.mmap(None, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
        if address == _MAP_FAILED:
            os.close(fd)
            raise GpuError("cuMemAlloc", OUT_OF_MEMORY, "out of memory: it cannot be mapped")
        self.address: int = address

    def holds(self, address: int) -> bool:
        """Whether a byte lies in it."""
        return self.address <= address < self.address + self.nbytes

    def end(self) -> None:
        """Unmap, and keep the addresses, so that nobody else's memory is found there."""
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        flags = private | _MAP_FIXED | _MAP_NORESERVE
        _libc.mmap(self.address, self.nbytes, _PROT_NONE, flags, -1, 0)
        os.close(self.fd)


def memory_name(nonce: bytes) -> str:
    """Return what the kernel calls memory, wherever it is open."""
    return f"fake-gpu-{nonce.hex()}"


def open_memory(process: int, number: int, nonce: bytes) -> int:
    """Return a descriptor of another process's memory, which is marked as open until it closes."""
    path = f"/proc/{process}/fd/{number}"
    try:
        if memory_name(nonce) not in os.readlink(path):
            raise FileNotFoundError("another file has its number")
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        text = f"the exporting process is gone, or has freed it: {exc}"
        raise GpuError("cuIpcOpenMemHandle", INVALID_VALUE, text) from exc
    fcntl.flock(fd, fcntl.LOCK_SH)
    return fd
