"""CUDA by NVIDIA's own package, cuda-bindings: the driver's functions, in primary contexts.

The driver's functions leave no pending error behind that torch would find later, and the package
lets the GIL go in all of them since 12.9.1. Older ones are not used: a thread that waits for an
event would stop every other.
"""

from __future__ import annotations

import ctypes
import importlib
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

from . import common
from .runtime import HANDLE_NBYTES, UUID_NBYTES, Copy, Device, GpuError

__all__ = ["BindingsRuntime"]

FIRST_VERSION = (12, 9, 1)
MAX_LOOP_COPIES = 11
"""A batch pays only beyond so many: beside an H200 12 took 97 against 103 us, 8 took 83 to 78."""
NULL_STREAMS = (0, 1)
"""The default one by its two names, which takes no batches."""
UNKNOWN_CODE = re.compile(r"(\d+)(?: is not a valid CUresult)?")
"""How cuda-bindings reports an error of a driver that is newer than it is: KeyError, ValueError."""


class BindingsRuntime(common.CudaRuntime):
    """CUDA by `cuda.bindings.driver`. Only a call loads the driver and initialises it.

    Raises:
        ImportError: cuda-bindings is not installed, or too old.
    """

    name: ClassVar[str] = "bindings"

    def __init__(self) -> None:
        super().__init__()
        self._cuda: Any = importlib.import_module("cuda.bindings.driver")
        self._version = str(importlib.import_module("cuda.bindings").__version__)
        if _numbers(self._version) < FIRST_VERSION:
            raise ImportError(f"cuda-bindings {self._version} holds the GIL: 12.9.1 is needed")
        self._lock = threading.Lock()
        self._is_initialised = False
        self._devices: Sequence[Device] | None = None
        self._contexts: dict[int, Any] = {}
        """The primary context of each device in use, kept until the process ends."""
        self._has_driver = True
        self._has_batches = hasattr(self._cuda, "cuMemcpyBatchAsync")

    def devices(self) -> Sequence[Device]:
        """Return the GPUs that this process sees, by ordinal."""
        self._initialise()
        if self._devices is None:
            count = int(self._call("cuDeviceGetCount"))
            self._devices = tuple(self._described(ordinal) for ordinal in range(count))
        return self._devices

    def versions(self) -> dict[str, str]:
        """Return the versions of the driver, as of the CUDA it can do, and of cuda-bindings."""
        self._process.check()
        driver = common.version_text(int(self._call("cuDriverGetVersion")))
        return {"driver": driver, "cuda-bindings": self._version}

    def allocate(self, device: int, nbytes: int) -> int:
        """Return the address of new memory, whole pieces of 2 MiB."""
        return int(self._call_on(device, "cuMemAlloc", common.rounded(nbytes)))

    def free(self, device: int, address: int) -> None:
        """Free an allocation."""
        self._call_on(device, "cuMemFree", address)

    def export(self, device: int, address: int) -> bytes:
        """Return the handle by which other processes open this allocation."""
        call = "cuIpcGetMemHandle"
        with self._current(device):
            base, _ = self._call("cuMemGetAddressRange", address)
            if int(base) != address:
                text = (
                    f"{address:#x} lies inside an allocation, which can only be shared as a whole"
                )
                raise GpuError(call, common.INVALID_VALUE, text)
            if not self._is_shareable(address):
                raise GpuError(call, common.NOT_SUPPORTED, common.UNSHAREABLE)
            with common.hint(common.INVALID_VALUE, common.UNSHAREABLE):
                handle = self._call(call, address)
        return ctypes.string_at(handle.getPtr(), HANDLE_NBYTES)

    def open(self, device: int, handle: bytes) -> int:
        """Return the address at which `device` reaches another process's allocation."""
        call = "cuIpcOpenMemHandle"
        common.check_handle(call, handle)
        foreign = self._cuda.CUipcMemHandle()
        ctypes.memmove(foreign.getPtr(), handle, HANDLE_NBYTES)
        flags = self._cuda.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
        with common.hint(common.INVALID_CONTEXT, common.SAME_PID):
            return int(self._call_on(device, call, foreign, int(flags)))

    def close(self, device: int, address: int) -> None:
        """Take back :meth:`open`."""
        self._call_on(device, "cuIpcCloseMemHandle", address)

    def device_at(self, address: int) -> int | None:
        """Return the device whose memory lies at `address`; None for memory of the host."""
        self._initialise()
        attributes = self._cuda.CUpointer_attribute
        call = "cuPointerGetAttribute"
        status, values = self._status(call, attributes.CU_POINTER_ATTRIBUTE_MEMORY_TYPE, address)
        if int(status) == common.INVALID_VALUE:
            return None  # CUDA has never heard of it
        self._check(call, status)
        if int(values[0]) != int(self._cuda.CUmemorytype.CU_MEMORYTYPE_DEVICE):
            return None
        return int(self._call(call, attributes.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, address))

    def make_stream(self, device: int) -> int:
        """Return a new stream that waits for no other by itself, not even the default one."""
        flags = self._cuda.CUstream_flags.CU_STREAM_NON_BLOCKING
        return int(self._call_on(device, "cuStreamCreate", int(flags)))

    def destroy_stream(self, device: int, stream: int) -> None:
        """Give a stream back; what it still has to do is done."""
        self._call_on(device, "cuStreamDestroy", stream)

    def make_event(self, device: int) -> int:
        """Return a new event, for which one waits asleep."""
        flags = self._cuda.CUevent_flags
        chosen = int(flags.CU_EVENT_DISABLE_TIMING) | int(flags.CU_EVENT_BLOCKING_SYNC)
        return int(self._call_on(device, "cuEventCreate", chosen))

    def destroy_event(self, device: int, event: int) -> None:
        """Give an event back, also one that somebody still waits for."""
        self._call_on(device, "cuEventDestroy", event)

    def record(self, device: int, event: int, stream: int) -> None:
        """Let `event` be over once all is done that `stream` has been given so far."""
        self._call_on(device, "cuEventRecord", event, stream)

    def wait(self, device: int, stream: int, event: int) -> None:
        """Let what `stream` is given from now on begin after `event` is over."""
        self._call_on(device, "cuStreamWaitEvent", stream, event, 0)

    def query(self, device: int, event: int) -> bool:
        """Whether `event` is over."""
        with self._current(device):
            status, _ = self._status("cuEventQuery", event)
        if int(status) == common.NOT_READY:
            return False
        self._check("cuEventQuery", status)
        return True

    def synchronize(self, device: int, event: int) -> None:
        """Wait until `event` is over, asleep."""
        self._call_on(device, "cuEventSynchronize", event)

    def copy(self, device: int, stream: int, copies: Sequence[Copy]) -> None:
        """Give copies to `stream`: one by one, or as a batch if they are many."""
        with self._current(device):
            common.submit(copies, partial(self._give, stream))

    def pin(self, device: int, address: int, nbytes: int) -> None:
        """Let all GPUs reach memory of the host directly."""
        portable = 1  # CU_MEMHOSTREGISTER_PORTABLE, which is a macro in C
        self._call_on(device, "cuMemHostRegister", address, nbytes, portable)

    def unpin(self, device: int, address: int) -> None:
        """Take back :meth:`pin`."""
        self._call_on(device, "cuMemHostUnregister", address)

    def _give(self, stream: int, copies: Sequence[Copy]) -> None:
        if self._is_batch(stream, copies):
            try:
                return self._give_batch(stream, copies)
            except GpuError as error:
                if error.code not in (common.NOT_FOUND, common.NOT_SUPPORTED):
                    raise
                self._has_batches = False
        for copy in copies:
            self._call("cuMemcpyAsync", copy.target, copy.source, copy.nbytes, stream)
        return None

    def _is_batch(self, stream: int, copies: Sequence[Copy]) -> bool:
        """Whether a batch is possible and pays; it is not meant for memory that is not pinned."""
        if len(copies) <= MAX_LOOP_COPIES or not self._has_batches or stream in NULL_STREAMS:
            return False
        ends = (copies[0].target, copies[0].source)
        return all(self.device_at(address) is not None for address in ends)

    def _give_batch(self, stream: int, copies: Sequence[Copy]) -> None:
        cuda = self._cuda
        attributes = cuda.CUmemcpyAttributes()
        # Another order may read the source before what the stream has been given earlier is done.
        attributes.srcAccessOrder = cuda.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
        targets = [cuda.CUdeviceptr(copy.target) for copy in copies]
        sources = [cuda.CUdeviceptr(copy.source) for copy in copies]
        sizes = [copy.nbytes for copy in copies]
        self._call(
            "cuMemcpyBatchAsync", targets, sources, sizes, len(copies), [attributes], [0], 1, stream
        )

    def _described(self, ordinal: int) -> Device:
        attribute = self._cuda.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_IPC_EVENT_SUPPORTED
        # The first version, where there are two, knows of no MIG.
        has_both = hasattr(self._cuda, "cuDeviceGetUuid_v2")
        device = self._call("cuDeviceGet", ordinal)
        uuid = self._call("cuDeviceGetUuid_v2" if has_both else "cuDeviceGetUuid", device)
        name = self._call("cuDeviceGetName", 256, device)
        return Device(
            ordinal=ordinal,
            uuid=ctypes.string_at(uuid.getPtr(), UUID_NBYTES),
            name=name.split(b"\0")[0].decode(errors="replace"),
            total_nbytes=int(self._call("cuDeviceTotalMem", device)),
            why_no_ipc=""
            if self._call("cuDeviceGetAttribute", attribute, device)
            else common.NO_IPC,
        )

    def _is_shareable(self, address: int) -> bool:
        """Whether memory can be exported, as far as the driver can say that beforehand."""
        attributes = self._cuda.CUpointer_attribute
        status, values = self._status(
            "cuPointerGetAttribute",
            attributes.CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE,
            address,
        )
        return int(status) != 0 or bool(values[0])

    def _initialise(self) -> None:
        self._process.check()
        if not self._is_initialised:
            self._call("cuInit", 0)
            self._is_initialised = True

    def _context(self, device: int) -> Any:
        self._initialise()
        context = self._contexts.get(device)
        if context is not None:
            return context
        with self._lock:
            if device not in self._contexts:
                handle = self._call("cuDeviceGet", device)
                self._contexts[device] = self._call("cuDevicePrimaryCtxRetain", handle)
            return self._contexts[device]

    @contextmanager
    def _current(self, device: int) -> Iterator[None]:
        """Make a device current for this thread, and leave the thread as it was.

        It may be the user's, and torch allocates on the device that is current.
        """
        context = self._context(device)
        before = self._call("cuCtxGetCurrent")
        if int(before) == int(context):
            yield
            return
        self._call("cuCtxSetCurrent", context)
        try:
            yield
        finally:
            self._cuda.cuCtxSetCurrent(before)

    def _call_on(self, device: int, call: str, *arguments: Any) -> Any:
        context = self._context(device)
        if int(self._call("cuCtxGetCurrent")) == int(context):
            return self._call(call, *arguments)
        with self._current(device):
            return self._call(call, *arguments)

    def _call(self, call: str, *arguments: Any) -> Any:
        """Return what CUDA returns: nothing, a value, or several."""
        status, values = self._status(call, *arguments)
        self._check(call, status)
        return values[0] if len(values) == 1 else values

    def _status(self, call: str, *arguments: Any) -> tuple[Any, Sequence[Any]]:
        """Return CUDA's `CUresult` and its values."""
        try:
            status, *values = getattr(self._cuda, call)(*arguments)
        except (RuntimeError, ValueError, KeyError) as exc:
            raise self._foreign(call, str(exc)) from exc
        return status, values

    def _check(self, call: str, status: Any) -> None:
        code = int(status)
        if code:
            text = ": ".join(
                self._told(question, status) for question in ("cuGetErrorName", "cuGetErrorString")
            )
            raise GpuError(call, code, text, is_sticky=common.is_sticky(code))

    def _foreign(self, call: str, text: str) -> GpuError:
        """Return what it means that cuda-bindings raises an error of its own."""
        number = UNKNOWN_CODE.fullmatch(text)
        if number:
            code = int(number[1])
            return GpuError(call, code, "unknown error", is_sticky=common.is_sticky(code))
        if "libcuda" in text or '"cuda"' in text:
            self._has_driver = False
        if not self._has_driver:  # some versions miss it only once, and its functions after that
            return GpuError(call, common.NOT_INITIALIZED, common.NO_DRIVER)
        if call in text:
            return GpuError(call, common.NOT_FOUND, "the CUDA driver is too old, it has no such")
        return GpuError(call, common.NOT_INITIALIZED, text)

    def _told(self, question: str, status: Any) -> str:
        failed, text = getattr(self._cuda, question)(status)
        return "unknown error" if int(failed) else text.decode(errors="replace")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
