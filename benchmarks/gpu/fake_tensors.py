"""Tensors in the memory of a GPU that is none, for a dry run."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from aiomm.gpu.choice import gpu_runtime
from aiomm.gpu.fake import FakeArray, FakeRuntime
from benchmarks.gpu.tensors import Late, Shape, SlowRead, Tensors, on_thread

__all__ = ["FakeTensors"]


class FakeTensors(Tensors):
    """Those of a runtime that is none, for a dry run."""

    sources = ("cuda", "cpu")

    def __init__(self) -> None:
        sys.modules["torch"] = None  # type: ignore[assignment]  # numpy is there much sooner

    @property
    def runtime(self) -> FakeRuntime:
        """This process's."""
        runtime = gpu_runtime()
        assert isinstance(runtime, FakeRuntime)
        return runtime

    def make(self, kind: str, device: int, content: bytes, dtype: str, shape: Shape) -> Any:
        """Return an array in shared memory, or bytes."""
        return content if kind == "cpu" else FakeArray(self.runtime, device, content, dtype, shape)

    def late(self, device: int, content: bytes, dtype: str, shape: Shape, delay: float) -> Late:
        """Fill an array on a fake stream."""
        array = FakeArray(self.runtime, device, bytes(len(content)), dtype, shape)
        stream, over = self.runtime.make_stream(device), threading.Event()
        address = array.address  # and no reference to it: who keeps it is what is looked at

        def work() -> None:
            time.sleep(delay)
            if address in self.runtime._memory:
                ctypes.memmove(address, content, len(content))
            over.set()

        told = time.monotonic_ns()
        self.runtime.run(stream, work)
        return Late(array, stream, told, lambda: delay if over.wait() else 0.0)

    def read_late(self, array: Any, device: int, delay: float) -> SlowRead:
        """Read on a fake stream."""
        stream, over, read = self.runtime.make_stream(device), threading.Event(), bytearray()

        def work() -> None:
            time.sleep(delay)
            read.extend(self.content(array))
            over.set()

        self.runtime.run(stream, work)
        return SlowRead(stream, over.is_set, lambda: bytes(read) if over.wait() else b"")

    def use_stream(self, stream: Any) -> AbstractContextManager[Any]:
        """Make a fake stream the current one."""
        return self.runtime.use_stream(stream)

    def busy(self, device: int) -> Callable[[], None]:
        """Do a little now and then."""
        over = threading.Event()

        def work() -> None:
            while not over.wait(0.001):
                sum(range(1000))

        return on_thread(work, over)

    def check_health(self, device: int) -> None:
        """Allocate."""
        self.runtime.free(device, self.runtime.allocate(device, 4096))

    def free_nbytes(self, device: int) -> int:
        """Return what this process has left."""
        return self.runtime.devices()[device].total_nbytes - self.allocated_nbytes(device)

    def allocated_nbytes(self, device: int) -> int:
        """Return what this process has allocated."""
        memory = list(self.runtime._memory.values())
        return sum(each.nbytes for each in memory if each.is_own and each.device == device)

    def plain_copy(self, device: int, nbytes: int) -> Callable[[int], float]:
        """Return a function that times a memcpy."""
        source, target = bytearray(os.urandom(1 << 20) * (-(-nbytes >> 20))), bytearray(nbytes)
        arrays = [(ctypes.c_ubyte * nbytes).from_buffer(each) for each in (source, target)]

        def copy(count: int) -> float:
            began = time.perf_counter()
            ctypes.memmove(arrays[1], arrays[0], count)
            return time.perf_counter() - began

        return copy
