"""What both ways to CUDA share: its numbers of errors, the fork, neighbouring copies, arrays."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .runtime import HANDLE_NBYTES, Copy, GpuError, GpuRuntime

__all__ = [
    "INVALID_CONTEXT",
    "INVALID_VALUE",
    "NOT_FOUND",
    "NOT_INITIALIZED",
    "NOT_READY",
    "NOT_SUPPORTED",
    "NO_DRIVER",
    "NO_IPC",
    "SAME_PID",
    "UNSHAREABLE",
    "CudaRuntime",
    "check_handle",
    "foreign_errors",
    "hint",
    "is_sticky",
    "merged",
    "rounded",
    "submit",
    "version_text",
]

INVALID_VALUE = 1
NOT_INITIALIZED = 3
INSUFFICIENT_DRIVER = 35
"""Of CUDA's runtime: also where there is no driver."""
INVALID_CONTEXT = 201
NOT_FOUND = 500
NOT_READY = 600
NOT_SUPPORTED = 801
STICKY = frozenset(
    {4, 214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 810, 911, 999}
)
"""Those of which CUDA says that the process must be ended, and those after which nothing works."""
ALLOCATION_NBYTES = 2 << 20
"""What CUDA maps at least; a shared allocation is made of whole pieces of it."""

NO_DRIVER = "no CUDA driver: libcuda.so.1 is missing"
NO_IPC = "the driver has no CUDA IPC for this device"
SAME_PID = "same PID value in both containers? share the PID namespace"
UNSHAREABLE = (
    "this memory cannot be shared with other processes: it must come from cudaMalloc, and not from "
    "torch's expandable_segments, cudaMallocAsync or managed memory"
)


class OneProcess:
    """Lets only the process go on that has made the first call."""

    def __init__(self) -> None:
        self._process: int | None = None

    def check(self) -> None:
        """Do nothing in the process of the first call.

        Raises:
            GpuError: this is a forked child of it.
        """
        own = os.getpid()
        if self._process is None:
            self._process = own
        elif self._process != own:
            text = "CUDA does not survive a fork: spawn processes instead"
            raise GpuError("fork", NOT_INITIALIZED, text)


def is_sticky(code: int) -> bool:
    """Whether no call on the device will succeed any more after this error."""
    return code in STICKY


@contextmanager
def hint(code: int, advice: str) -> Iterator[None]:
    """Add advice to an error of this number.

    Raises:
        GpuError: that error, with more in its text, or any other as it is.
    """
    try:
        yield
    except GpuError as error:
        if error.code != code:
            raise
        text = f"{error.text}; {advice}"
        raise GpuError(error.call, code, text, is_sticky=error.is_sticky) from error


@contextmanager
def foreign_errors(call: str) -> Iterator[None]:
    """Map the errors of cupy and torch, which are all RuntimeErrors.

    Raises:
        GpuError: instead of them.
    """
    try:
        yield
    except RuntimeError as exc:
        text, code = str(exc), int(getattr(exc, "status", NOT_INITIALIZED))
        if "libcuda.so.1" in text or code == INSUFFICIENT_DRIVER:
            text = f"{NO_DRIVER}, or too old for this cupy"
        raise GpuError(call, code, text, is_sticky=is_sticky(code)) from exc


def rounded(nbytes: int) -> int:
    """Return how large an allocation becomes: whole pieces of 2 MiB."""
    return -(-nbytes // ALLOCATION_NBYTES) * ALLOCATION_NBYTES


def check_handle(call: str, handle: bytes) -> None:
    """Do nothing if a handle has its right length.

    Raises:
        GpuError: it has not.
    """
    if len(handle) != HANDLE_NBYTES:
        text = f"a handle has {HANDLE_NBYTES} bytes, this one {len(handle)}"
        raise GpuError(call, INVALID_VALUE, text)


def version_text(number: int) -> str:
    """Return CUDA's number of a version as people write it: 13.0 for 13000."""
    return f"{number // 1000}.{number % 1000 // 10}"


def merged(copies: Sequence[Copy]) -> list[Copy]:
    """Return the same bytes in fewer copies, where one begins as the one before it ends.

    Empty ones are left out.
    """
    result: list[Copy] = []
    for copy in copies:
        last = result[-1] if result else None
        if last is not None and _follows(last, copy):
            result[-1] = Copy(last.target, last.source, last.nbytes + copy.nbytes)
        elif copy.nbytes:
            result.append(copy)
    return result


def _follows(last: Copy, copy: Copy) -> bool:
    return copy.target == last.target + last.nbytes and copy.source == last.source + last.nbytes


def submit(copies: Sequence[Copy], give: Callable[[Sequence[Copy]], None]) -> None:
    """Give copies to CUDA merged, and as they are if it refuses that.

    It refuses a copy across two allocations, even if they happen to be neighbours. What has been
    given before it does is given again, which changes nothing.

    Raises:
        GpuError: CUDA refuses them as they are, too.
    """
    few = merged(copies)
    try:
        give(few)
    except GpuError as error:
        if error.code != INVALID_VALUE or len(few) == len(copies):
            raise
        give([copy for copy in copies if copy.nbytes])


class DeviceBytes:
    """Memory of a device, as torch wants to hear of it. Keeps `owner` alive."""

    def __init__(self, address: int, nbytes: int, owner: object) -> None:
        self.owner = owner
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
        }


class CudaRuntime(GpuRuntime):
    """What the runtimes of CUDA share: arrays and streams are those of torch or cupy."""

    def __init__(self) -> None:
        self._process = OneProcess()

    def current_device(self) -> int | None:
        """Return the device of this thread's torch, or else cupy; None if neither is in use.

        Raises:
            GpuError: cupy finds no CUDA, or this is a forked child.
        """
        cuda: Any = getattr(sys.modules.get("torch"), "cuda", None)
        cupy = sys.modules.get("cupy")
        self._process.check()
        with foreign_errors("current_device"):
            if hasattr(cuda, "is_initialized") and cuda.is_initialized():  # else half imported
                return int(cuda.current_device())
            if cupy is not None:
                return int(cupy.cuda.Device().id)
        return None

    def current_stream(self, device: int) -> int:
        """Return the stream of this thread's torch, or else cupy; 0 if neither is in use.

        Raises:
            GpuError: cupy finds no CUDA, or this is a forked child.
        """
        cuda: Any = getattr(sys.modules.get("torch"), "cuda", None)
        cupy = sys.modules.get("cupy")
        self._process.check()
        with foreign_errors("current_stream"):
            if hasattr(cuda, "is_initialized") and cuda.is_initialized():  # else half imported
                return int(cuda.current_stream(device).cuda_stream)
            if cupy is not None:
                return int(cupy.cuda.get_current_stream(device).ptr)
        return 0

    def flat_array(self, device: int, address: int, nbytes: int, owner: object) -> object:
        """Return bytes of a device as a `[nbytes]` array of uint8, of torch or else of cupy.

        Raises:
            ImportError: there is no cupy, and no torch that knows CUDA.
            GpuError: no CUDA, no memory of it at `address`, or this is a forked child.
        """
        self._process.check()
        with foreign_errors("flat_array"):
            torch = _imported("torch")
            if torch is not None and torch.cuda.is_available():
                return torch.as_tensor(DeviceBytes(address, nbytes, owner), device=f"cuda:{device}")
            cupy = _imported("cupy")
            if cupy is None:
                raise ImportError("arrays on a GPU need torch, built for CUDA, or cupy")
            memory = cupy.cuda.UnownedMemory(address, nbytes, owner, device)
            return cupy.ndarray((nbytes,), cupy.uint8, cupy.cuda.MemoryPointer(memory, 0))


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
