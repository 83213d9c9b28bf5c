"""Rows that lie in the memory of a GPU: where, and when they can be read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import IncompatibleSchema
from ..gpu.choice import gpu_runtime
from ..gpu.lanes import Mark, lanes_of
from ..gpu.runtime import GpuError, GpuRuntime, explained

__all__ = ["DeviceRows", "Producers", "stream_of"]

LEGACY_STREAM = 1
"""How `__cuda_array_interface__` names the default stream, which is 0 for everybody else."""


class Producers:
    """The streams that make the tensors of one transfer, and how far each has to come.

    Args:
        stream: that makes all of them; None for the current one of each device.
    """

    def __init__(self, stream: int | None = None) -> None:
        self._stream = stream
        self._marks: dict[tuple[int, int], Mark] = {}

    def mark(self, runtime: GpuRuntime, device: int, own: int | None) -> Mark:
        """Return how far the stream has to come that makes a tensor on `device`.

        Args:
            runtime: of this process.
            device: the tensor's.
            own: the stream that the tensor itself names, if it does.
        """
        stream = own if self._stream is None else self._stream
        if stream is None:
            stream = runtime.current_stream(device)
        mark = self._marks.get((device, stream))
        if mark is None:
            mark = self._marks[device, stream] = Mark(runtime, device, stream)
        return mark

    def lead(self, address: int) -> None:
        """Let the current stream go on only when they have made the tensor at `address`.

        Raises:
            PlaneUnavailable: there is no CUDA here, or it has failed.
        """
        runtime, device = gpu_runtime(), None
        try:
            device = runtime.device_at(address)
            if device is not None and self._stream is not None:
                current = runtime.current_stream(device)
                if current != self._stream:
                    self.mark(runtime, device, None).delay(current)
        except GpuError as exc:
            raise explained(device or 0, exc) from exc


@dataclass(frozen=True, slots=True)
class DeviceRows:
    """Dense rows of a tensor on a GPU. Whoever has this keeps the tensor."""

    runtime: GpuRuntime
    device: int
    address: int
    row_nbytes: int
    ready: Mark
    """Over when the stream that makes the tensor has made it."""

    @classmethod
    def at(
        cls, address: int, row_nbytes: int, producers: Producers, own: int | None = None
    ) -> DeviceRows:
        """Return the rows at `address`, which one of `producers` makes, or their own stream.

        Raises:
            PlaneUnavailable: there is no CUDA here, or it has failed.
            IncompatibleSchema: no GPU has such an address.
        """
        runtime, device = gpu_runtime(), None
        try:
            device = runtime.device_at(address)
            if device is None:
                raise IncompatibleSchema(f"there is no memory of a GPU at {address:#x}")
            ready = producers.mark(runtime, device, own)
            return cls(runtime, device, address, row_nbytes, ready)
        except GpuError as exc:
            raise explained(device or 0, exc) from exc

    def copy_into(self, target: memoryview, first: int, count: int) -> None:
        """Copy rows to the host, once they are ready. Blocks.

        Raises:
            PlaneUnavailable: CUDA has failed.
        """
        source = self.address + first * self.row_nbytes
        try:
            lanes_of(self.runtime, self.device).copy_to_host(target, source, [self.ready])
        except GpuError as exc:
            raise explained(self.device, exc) from exc


def stream_of(stream: object) -> int | None:
    """Return CUDA's handle of a stream: of torch, cupy or cuda.core, or the number itself.

    None stays None.

    Raises:
        TypeError: it is none of these.
    """
    if stream is None or isinstance(stream, int):
        return stream
    for attribute in ("cuda_stream", "ptr"):
        handle = getattr(stream, attribute, None)
        if handle is not None:
            return int(handle)
    protocol: Any = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        return int(protocol()[1])
    raise TypeError(f"not a CUDA stream: {type(stream).__name__}")
