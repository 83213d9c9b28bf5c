"""The seam of GPUs: all that aiomm asks of CUDA, and nothing of how.

Devices are ordinals of this process; between processes they are known by their UUID. Addresses,
streams and events are plain integers, as CUDA's own handles are, so that those of torch and cupy
fit. Every call names its device and works on any thread; each makes that device current for the
calling thread first. Nothing here copies to or from memory before it is called for, and nothing
initialises CUDA but a call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from ..errors import PlaneUnavailable

__all__ = ["HANDLE_NBYTES", "UUID_NBYTES", "Copy", "Device", "GpuError", "GpuRuntime", "explained"]

HANDLE_NBYTES = 64
"""Of an exported allocation, as in `cudaIpcMemHandle_t`."""
UUID_NBYTES = 16


class GpuError(Exception):
    """CUDA has refused or failed.

    Args:
        call: what was asked for, such as `cuMemAlloc`.
        code: CUDA's number of the error.
        text: CUDA's name of it, and more where it helps.
        is_sticky: from now on every call on this device fails: the process has to be restarted.
    """

    def __init__(self, call: str, code: int, text: str, *, is_sticky: bool = False) -> None:
        super().__init__(f"{call}: {text} ({code})")
        self.call = call
        self.code = code
        self.text = text
        self.is_sticky = is_sticky


class Device(NamedTuple):
    """One GPU as this process sees it."""

    ordinal: int
    uuid: bytes
    name: str
    total_nbytes: int
    why_no_ipc: str
    """Why memory of it cannot be shared with other processes; empty if it can."""


class Copy(NamedTuple):
    """Bytes from one address to another: of any device that this process reaches, or the host."""

    target: int
    source: int
    nbytes: int


class GpuRuntime(ABC):
    """CUDA, as far as aiomm needs it. All methods raise :class:`GpuError`, if anything.

    Those marked *blocks* may take more than a few microseconds; they let the GIL go.
    """

    name: ClassVar[str]

    @abstractmethod
    def devices(self) -> Sequence[Device]:
        """Return the GPUs that this process sees, by ordinal. The first call *blocks*."""

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Return the versions of driver and libraries, by name."""

    @abstractmethod
    def allocate(self, device: int, nbytes: int) -> int:
        """Return the address of new memory, an allocation of its own. *Blocks*."""

    @abstractmethod
    def free(self, device: int, address: int) -> None:
        """Free an allocation. No other process may have it open. *Blocks*."""

    @abstractmethod
    def export(self, device: int, address: int) -> bytes:
        """Return the handle by which other processes open this allocation.

        `address` must be what :meth:`allocate` has returned, not one inside.
        """

    @abstractmethod
    def open(self, device: int, handle: bytes) -> int:
        """Return the address at which `device` reaches another process's allocation. *Blocks*.

        Once per process, device and handle; never in the process that has exported it.
        """

    @abstractmethod
    def close(self, device: int, address: int) -> None:
        """Take back :meth:`open`. No copy may be under way. *Blocks*."""

    @abstractmethod
    def device_at(self, address: int) -> int | None:
        """Return the device whose memory lies at `address`; None for memory of the host."""

    @abstractmethod
    def make_stream(self, device: int) -> int:
        """Return a new stream that waits for no other by itself. *Blocks*."""

    @abstractmethod
    def destroy_stream(self, device: int, stream: int) -> None:
        """Give a stream back; what it still has to do is done."""

    @abstractmethod
    def make_event(self, device: int) -> int:
        """Return a new event, which counts as over until it is recorded."""

    @abstractmethod
    def destroy_event(self, device: int, event: int) -> None:
        """Give an event back, also one that somebody still waits for."""

    @abstractmethod
    def record(self, device: int, event: int, stream: int) -> None:
        """Let `event` be over once all is done that `stream` has been given so far."""

    @abstractmethod
    def wait(self, device: int, stream: int, event: int) -> None:
        """Let what `stream` is given from now on begin after `event`, of any device, is over."""

    @abstractmethod
    def query(self, device: int, event: int) -> bool:
        """Whether `event` is over. An error of what it stands behind is raised."""

    @abstractmethod
    def synchronize(self, device: int, event: int) -> None:
        """Wait until `event` is over, asleep. *Blocks*."""

    @abstractmethod
    def copy(self, device: int, stream: int, copies: Sequence[Copy]) -> None:
        """Give copies to `stream`, in any order among themselves.

        *Blocks* where memory of the host takes part that is not pinned.
        """

    @abstractmethod
    def pin(self, device: int, address: int, nbytes: int) -> None:
        """Let the GPUs reach memory of the host directly: copies are faster then. *Blocks*."""

    @abstractmethod
    def unpin(self, device: int, address: int) -> None:
        """Take back :meth:`pin`. *Blocks*."""

    @abstractmethod
    def current_device(self) -> int | None:
        """Return the device that this thread's torch or cupy uses; None if neither is in use."""

    @abstractmethod
    def current_stream(self, device: int) -> int:
        """Return the stream on which this thread's torch or cupy works now; 0 is the default."""

    @abstractmethod
    def flat_array(self, device: int, address: int, nbytes: int, owner: object) -> object:
        """Return bytes of a device as a `[nbytes]` array of uint8, not copied.

        It is a tensor of torch where torch is installed, else an array of cupy, and keeps
        `owner` alive.

        Raises:
            ImportError: there is neither.
        """


def explained(device: int, error: GpuError) -> PlaneUnavailable:
    """Return what a user is told of an error of CUDA's."""
    advice = "; the device is lost to this process, restart it" if error.is_sticky else ""
    return PlaneUnavailable(f"cuda:{device}: {error}{advice}")
