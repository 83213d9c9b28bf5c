"""An arena that other processes of this host can map: a sealed memfd.

A memfd has no name, so nothing is left behind whoever is killed, and how. Its pages exist
before anybody writes, so a short memory is an error here and not a SIGBUS in the middle of a
copy; and it is sealed against shrinking, so no peer can take pages away under a mapping.
"""

from __future__ import annotations

import fcntl
import os

from ..errors import PlaneUnavailable
from .arena import HostArena
from .mapping import map_memory

__all__ = ["MemfdArena", "map_peer"]

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class MemfdArena(HostArena):
    """Zeroed memory behind a sealed descriptor, mapped and faulted in; for senders to map.

    The constructor blocks for some 0.5 ms per MiB, without the GIL: call it in a thread.

    Raises:
        PlaneUnavailable: this machine has no memfd, or not so much memory.
    """

    fd: int
    """The descriptor to pass to senders; -1 when closed. Mappings outlive it."""

    def _map(self) -> memoryview:
        self.fd = _sealed_memfd(self.nbytes)
        try:
            return map_memory(self.nbytes, self.fd)
        except BaseException:
            self._close_fd()
            raise

    def close(self) -> None:
        """Close the descriptor; unmap as soon as no view is left. Idempotent."""
        super().close()
        self._close_fd()

    def _close_fd(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:
            self._close_fd()


def map_peer(fd: int, nbytes: int) -> memoryview:
    """Map a receiver's arena for writing; `fd` stays the caller's and may be closed after.

    Blocks for some 0.1 ms per MiB, without the GIL. The memory is unmapped as soon as no view
    of it is left.

    Raises:
        PlaneUnavailable: this is not a sealed memfd of exactly `nbytes` bytes, so that a write
            might end in a SIGBUS; or it cannot be mapped.
    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        size = os.fstat(fd).st_size
    except OSError as exc:
        raise PlaneUnavailable(f"the peer's descriptor is no memfd: {exc.strerror}") from exc
    if seals & SEALS != SEALS:
        raise PlaneUnavailable(f"the peer's memory is not sealed against resizing ({seals:#x})")
    if size != nbytes:
        raise PlaneUnavailable(f"the peer's memory has {size} bytes, expected {nbytes}")
    return map_memory(nbytes, fd)


def _sealed_memfd(nbytes: int) -> int:
    if nbytes > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE"):
        # Asked for so much, Linux would kill processes rather than refuse.
        raise PlaneUnavailable(f"cannot share {nbytes} bytes: more than this machine's memory")
    fd = -1
    try:
        fd = os.memfd_create("aiomm", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.posix_fallocate(fd, 0, nbytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    except OSError as exc:
        if fd >= 0:
            os.close(fd)
        raise PlaneUnavailable(f"cannot share {nbytes} bytes of memory: {exc.strerror}") from exc
    return fd
