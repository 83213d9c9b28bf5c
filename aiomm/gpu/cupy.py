"""CUDA by cupy, where cuda-bindings is not installed: the runtime's functions.

It can do less: many copies are given one by one, which takes longer, and some of its calls hold the
GIL, all of them short ones. cupy clears the error that a failed call leaves pending.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, ClassVar

from . import common
from .runtime import UUID_NBYTES, Copy, Device, GpuError

__all__ = ["CupyRuntime"]

IPC_EVENT_SUPPORT = 125
"""`cudaDevAttrIpcEventSupport`, for which cupy has no name."""
PORTABLE = 1
"""`cudaHostRegisterPortable`: for all devices."""
NO_UUID = "this cupy does not tell the UUID of a device, without which its peers cannot know it"


class CupyRuntime(common.CudaRuntime):
    """CUDA by `cupy.cuda.runtime`, of cupy 13 or later.

    Raises:
        ImportError: cupy is not installed.
    """

    name: ClassVar[str] = "cupy"

    def __init__(self) -> None:
        super().__init__()
        cupy = importlib.import_module("cupy")
        self._cuda: Any = cupy.cuda.runtime
        self._driver: Any = cupy.cuda.driver
        self._version = str(cupy.__version__)
        self._lock = threading.Lock()
        self._devices: Sequence[Device] | None = None
        self._allocations: set[int] = set()

    def devices(self) -> Sequence[Device]:
        """Return the GPUs that this process sees, by ordinal."""
        self._process.check()
        if self._devices is None:
            count = int(self._call("getDeviceCount"))
            self._devices = tuple(self._described(ordinal) for ordinal in range(count))
        return self._devices

    def versions(self) -> dict[str, str]:
        """Return the versions of the driver, as of the CUDA it can do, of CUDA, and of cupy."""
        self._process.check()
        driver = int(self._call("driverGetVersion"))
        if not driver:
            raise GpuError("driverGetVersion", common.NOT_INITIALIZED, common.NO_DRIVER)
        return {
            "driver": common.version_text(driver),
            "runtime": common.version_text(int(self._call("runtimeGetVersion"))),
            "cupy": self._version,
        }

    def allocate(self, device: int, nbytes: int) -> int:
        """Return the address of new memory, whole pieces of 2 MiB."""
        address = int(self._call_on(device, "malloc", common.rounded(nbytes)))
        with self._lock:
            self._allocations.add(address)
        return address

    def free(self, device: int, address: int) -> None:
        """Free an allocation."""
        with self._lock:
            self._allocations.discard(address)
        self._call_on(device, "free", address)

    def export(self, device: int, address: int) -> bytes:
        """Return the handle by which other processes open this allocation.

        cupy cannot tell where other memory begins: it must come from :meth:`allocate`.
        """
        call = "ipcGetMemHandle"
        if address not in self._allocations:
            raise GpuError(call, common.INVALID_VALUE, f"{address:#x} is not of this runtime")
        with common.hint(common.INVALID_VALUE, common.UNSHAREABLE):
            return bytes(self._call_on(device, call, address))

    def open(self, device: int, handle: bytes) -> int:
        """Return the address at which `device` reaches another process's allocation."""
        call = "ipcOpenMemHandle"
        common.check_handle(call, handle)
        with common.hint(common.INVALID_CONTEXT, common.SAME_PID):
            return int(self._call_on(device, call, handle))

    def close(self, device: int, address: int) -> None:
        """Take back :meth:`open`."""
        self._call_on(device, "ipcCloseMemHandle", address)

    def device_at(self, address: int) -> int | None:
        """Return the device whose memory lies at `address`; None for memory of the host."""
        self._process.check()
        attributes = self._call("pointerGetAttributes", address)
        kinds = (self._cuda.memoryTypeDevice, self._cuda.memoryTypeManaged)
        return int(attributes.device) if attributes.type in kinds else None

    def make_stream(self, device: int) -> int:
        """Return a new stream that waits for no other by itself, not even the default one."""
        return int(self._call_on(device, "streamCreateWithFlags", self._cuda.streamNonBlocking))

    def destroy_stream(self, device: int, stream: int) -> None:
        """Give a stream back; what it still has to do is done."""
        self._call_on(device, "streamDestroy", stream)

    def make_event(self, device: int) -> int:
        """Return a new event, for which one waits asleep."""
        flags = self._cuda.eventDisableTiming | self._cuda.eventBlockingSync
        return int(self._call_on(device, "eventCreateWithFlags", flags))

    def destroy_event(self, device: int, event: int) -> None:
        """Give an event back, also one that somebody still waits for."""
        self._call_on(device, "eventDestroy", event)

    def record(self, device: int, event: int, stream: int) -> None:
        """Let `event` be over once all is done that `stream` has been given so far."""
        self._call_on(device, "eventRecord", event, stream)

    def wait(self, device: int, stream: int, event: int) -> None:
        """Let what `stream` is given from now on begin after `event` is over."""
        self._call_on(device, "streamWaitEvent", stream, event)

    def query(self, device: int, event: int) -> bool:
        """Whether `event` is over."""
        call = "eventQuery"
        with self._current(device):
            code = int(self._call(call, event))
            if code:
                self._clear_error()
        if code in (0, common.NOT_READY):
            return not code
        with common.foreign_errors(call):
            raise self._cuda.CUDARuntimeError(code)

    def synchronize(self, device: int, event: int) -> None:
        """Wait until `event` is over, asleep."""
        self._call_on(device, "eventSynchronize", event)

    def copy(self, device: int, stream: int, copies: Sequence[Copy]) -> None:
        """Give copies to `stream`, one by one."""
        with self._current(device):
            common.submit(copies, partial(self._give, stream))

    def pin(self, device: int, address: int, nbytes: int) -> None:
        """Let all GPUs reach memory of the host directly."""
        self._call_on(device, "hostRegister", address, nbytes, PORTABLE)

    def unpin(self, device: int, address: int) -> None:
        """Take back :meth:`pin`."""
        self._call_on(device, "hostUnregister", address)

    def _give(self, stream: int, copies: Sequence[Copy]) -> None:
        kind = self._cuda.memcpyDefault
        for copy in copies:
            self._call("memcpyAsync", copy.target, copy.source, copy.nbytes, kind, stream)

    def _described(self, ordinal: int) -> Device:
        properties = self._call("getDeviceProperties", ordinal)
        has_ipc = self._call("deviceGetAttribute", IPC_EVENT_SUPPORT, ordinal)
        uuid = bytes(properties.get("uuid", b""))
        reason = "" if has_ipc else common.NO_IPC
        return Device(
            ordinal=ordinal,
            uuid=uuid or bytes(UUID_NBYTES),
            name=properties["name"].decode(errors="replace"),
            total_nbytes=int(properties["totalGlobalMem"]),
            why_no_ipc=reason if uuid else NO_UUID,
        )

    @contextmanager
    def _current(self, device: int) -> Iterator[None]:
        """Make a device current for this thread, and leave the thread as it was.

        It may be the user's. Its context is put back and not its device, for to set a device is to
        make a context there, which takes some hundred MiB of it.
        """
        self.devices()  # initialises the driver, which has no context to tell of before
        with common.foreign_errors("ctxGetCurrent"):
            before = self._driver.ctxGetCurrent()
        self._call("setDevice", device)
        try:
            yield
        finally:
            self._driver.ctxSetCurrent(before)

    def _clear_error(self) -> None:
        """Take the error back that cupy's `eventQuery` leaves pending, and torch would report.

        cupy has no function for it, but clears whatever is pending whenever a call fails.
        """
        with suppress(self._cuda.CUDARuntimeError):
            self._cuda.deviceGetAttribute(IPC_EVENT_SUPPORT, -1)

    def _call_on(self, device: int, call: str, *arguments: Any) -> Any:
        with self._current(device):
            return self._call(call, *arguments)

    def _call(self, call: str, *arguments: Any) -> Any:
        with common.foreign_errors(call):
            return getattr(self._cuda, call)(*arguments)
