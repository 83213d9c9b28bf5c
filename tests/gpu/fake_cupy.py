"""A cupy whose CUDA is the fake driver: as much of `cupy.cuda.runtime` as aiomm calls.

It takes what cupy 14.2 takes, in that order: plain integers, and bytes for handles. Like cupy's,
its `eventQuery` returns the number of an error, and leaves it pending as CUDA's runtime does.
"""

# ruff: noqa: N802, N815  (the names are cupy's)

from __future__ import annotations

import ctypes
from types import SimpleNamespace

from .driving import LIBRARY

__all__ = ["cuda", "pending", "uint8"]

__version__ = "14.2.0"
uint8 = "u1"
pending: list[int] = []
"""What `cudaGetLastError` would return."""


class CUDARuntimeError(RuntimeError):
    """What cupy raises."""

    def __init__(self, status: int) -> None:
        super().__init__(f"cudaError{status}: invented")
        self.status = status


class Handle(ctypes.Structure):
    """A handle, which is passed by value."""

    _fields_ = (("reserved", ctypes.c_ubyte * 64),)


def _status(name: str, *arguments: object) -> int:
    library = ctypes.CDLL(LIBRARY)
    library.cuInit(0)
    given = [ctypes.c_void_p(each) if isinstance(each, int) else each for each in arguments]
    return int(getattr(library, name)(*given))


def _check(status: int) -> None:
    if status:
        pending.clear()
        raise CUDARuntimeError(status)


def _call(name: str, *arguments: object) -> None:
    _check(_status(name, *arguments))


def _value(name: str, *arguments: object) -> int:
    value = ctypes.c_uint64(0)
    _call(name, ctypes.byref(value), *arguments)
    return value.value


def _number(name: str, *arguments: object) -> int:
    return _value(name, *arguments) & 0xFFFFFFFF


class Runtime:
    """`cupy.cuda.runtime`."""

    CUDARuntimeError = CUDARuntimeError
    memcpyDefault = 4
    memoryTypeUnregistered = 0
    memoryTypeHost = 1
    memoryTypeDevice = 2
    memoryTypeManaged = 3
    streamNonBlocking = 1
    eventBlockingSync = 1
    eventDisableTiming = 2

    def driverGetVersion(self) -> int:
        return _number("cuDriverGetVersion")

    def runtimeGetVersion(self) -> int:
        return 13020

    def getDeviceCount(self) -> int:
        return _number("cuDeviceGetCount")

    def getDeviceProperties(self, device: int, /) -> dict[str, object]:
        uuid = (ctypes.c_ubyte * 16)()
        _call("cuDeviceGetUuid_v2", uuid, device)
        name = f"Fake GPU {device}".encode()
        return {"name": name, "totalGlobalMem": 1 << 30, "uuid": bytes(uuid)}

    def deviceGetAttribute(self, attribute: int, device: int, /) -> int:
        _check(101 if device < 0 else 0)
        return _number("cuDeviceGetAttribute", attribute, device)

    def setDevice(self, device: int, /) -> None:
        _check(101 if device >= self.getDeviceCount() else 0)
        ctypes.CDLL(LIBRARY).fake_set_current(device)

    def malloc(self, nbytes: int, /) -> int:
        return _value("cuMemAlloc_v2", nbytes)

    def free(self, address: int, /) -> None:
        _call("cuMemFree_v2", address)

    def ipcGetMemHandle(self, address: int, /) -> bytes:
        handle = Handle()
        _call("cuIpcGetMemHandle", ctypes.byref(handle), address)
        return bytes(handle.reserved)

    def ipcOpenMemHandle(self, handle: bytes, flags: int = 1, /) -> int:
        return _value("cuIpcOpenMemHandle_v2", Handle.from_buffer_copy(handle), flags)

    def ipcCloseMemHandle(self, address: int, /) -> None:
        _call("cuIpcCloseMemHandle", address)

    def pointerGetAttributes(self, address: int, /) -> SimpleNamespace:
        kind = ctypes.c_uint(0)
        if _status("cuPointerGetAttribute", ctypes.byref(kind), 2, address):
            return SimpleNamespace(type=self.memoryTypeUnregistered, device=-2)
        device = _number("cuPointerGetAttribute", 9, address)
        return SimpleNamespace(type=kind.value, device=device)

    def streamCreateWithFlags(self, flags: int, /) -> int:
        return _value("cuStreamCreate", flags)

    def streamDestroy(self, stream: int, /) -> None:
        _call("cuStreamDestroy_v2", stream)

    def streamWaitEvent(self, stream: int, event: int, flags: int = 0, /) -> None:
        _call("cuStreamWaitEvent", stream, event, flags)

    def eventCreateWithFlags(self, flags: int, /) -> int:
        return _value("cuEventCreate", flags)

    def eventDestroy(self, event: int, /) -> None:
        _call("cuEventDestroy_v2", event)

    def eventRecord(self, event: int, stream: int, /) -> None:
        _call("cuEventRecord", event, stream)

    def eventQuery(self, event: int, /) -> int:
        status = _status("cuEventQuery", event)
        if status:
            pending.append(status)
        return status

    def eventSynchronize(self, event: int, /) -> None:
        _call("cuEventSynchronize", event)

    def memcpyAsync(self, target: int, source: int, nbytes: int, kind: int, stream: int, /) -> None:
        assert kind == self.memcpyDefault, kind
        _call("cuMemcpyAsync", target, source, nbytes, stream)

    def hostRegister(self, address: int, nbytes: int, flags: int, /) -> None:
        _call("cuMemHostRegister_v2", address, nbytes, flags)

    def hostUnregister(self, address: int, /) -> None:
        _call("cuMemHostUnregister", address)


class Driver:
    """`cupy.cuda.driver`, which knows nothing before the runtime is in use."""

    def ctxGetCurrent(self) -> int:
        assert ctypes.CDLL(LIBRARY).fake_count(b"cuInit"), "CUDA is not initialised"
        return _value("cuCtxGetCurrent")

    def ctxSetCurrent(self, context: int, /) -> None:
        _call("cuCtxSetCurrent", context)


cuda = SimpleNamespace(runtime=Runtime(), driver=Driver())
