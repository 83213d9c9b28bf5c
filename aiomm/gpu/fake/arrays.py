"""Arrays in the memory of a fake GPU."""

from __future__ import annotations

import ctypes
import math
from typing import Any

from ..runtime import GpuRuntime

__all__ = ["FakeArray"]


class FakeArray:
    """An array in a fake device's memory, as cupy's are seen from outside.

    Args:
        runtime: whose memory; it must be memory of the host in truth, as the fake's is.
        device: on which device.
        content: what it holds.
        dtype: the torch name of the dtype.
        shape: the dtype and shape must make as many bytes.
        stream: on which its content will be ready, for whoever asks the array.
    """

    def __init__(
        self,
        runtime: GpuRuntime,
        device: int,
        content: bytes,
        dtype: str,
        shape: tuple[int, ...],
        stream: int | None = None,
    ) -> None:
        self.dtype = dtype
        self.shape = shape
        self.address = runtime.allocate(device, max(1, len(content)))
        self.nbytes = len(content)
        self.stream = stream
        self._runtime = runtime
        self._device = device
        self.fill(content)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "version": 3,
            "shape": self.shape,
            "typestr": f"|V{self.nbytes // max(1, math.prod(self.shape))}",
            "data": (self.address, False),
            "strides": None,
            "stream": self.stream,
        }

    def fill(self, content: bytes) -> None:
        """Change the content now, whatever streams are about to do."""
        ctypes.memmove(self.address, content, len(content))

    def __del__(self) -> None:
        if hasattr(self, "_runtime"):
            self._runtime.free(self._device, self.address)
