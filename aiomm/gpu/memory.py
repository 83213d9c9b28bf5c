"""Memory of a GPU, freed when nobody refers to it, and no other process has it open."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence

from .lanes import lanes_of
from .runtime import Copy, GpuError, GpuRuntime

__all__ = ["DeviceMemory"]

logger = logging.getLogger("aiomm.gpu")

_leaked: list[DeviceMemory] = []
"""What may never be freed, since another process may still write there."""


class DeviceMemory:
    """One allocation. It is freed with the last reference to this.

    Whoever lets others reach the memory holds a reference for as long as they do. The
    constructor blocks.

    Raises:
        GpuError: there is not so much memory.
    """

    def __init__(self, runtime: GpuRuntime, device: int, nbytes: int) -> None:
        self.runtime = runtime
        self.device = device
        self.nbytes = nbytes
        self.address = runtime.allocate(device, nbytes)
        # Not at exit: then the driver frees it, and knows who else has it.
        weakref.finalize(self, _free, runtime, device, self.address).atexit = False

    def leak(self) -> None:
        """Never free it, until the process ends: somebody may still write there."""
        _leaked.append(self)

    def read(self, offset: int, nbytes: int) -> bytearray:
        """Return bytes of it, copied to the host. Blocks."""
        content = bytearray(nbytes)
        lanes_of(self.runtime, self.device).copy_to_host(content, self.address + offset)
        return content

    def copy(self, copies: Sequence[Copy]) -> None:
        """Copy to, from or within it, and return when that is done. Blocks."""
        lanes_of(self.runtime, self.device).copy_now(copies)

    def __repr__(self) -> str:
        return f"<DeviceMemory of {self.nbytes} bytes on cuda:{self.device}>"


def _free(runtime: GpuRuntime, device: int, address: int) -> None:
    try:
        runtime.free(device, address)
    except GpuError as exc:
        logger.debug("! memory of cuda:%d was not freed: %s", device, exc)
