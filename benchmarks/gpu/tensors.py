"""What the checks need of tensors and streams: with torch, or with nothing real for a dry run.

All else is the same for both.
"""

from __future__ import annotations

import functools
import importlib
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import Any, NamedTuple

from aiomm.gpu.choice import VARIABLE

__all__ = ["Late", "Shape", "SlowRead", "Tensors", "is_fake", "on_thread", "tensors_here"]

Shape = tuple[int, ...]


class Late(NamedTuple):
    """A tensor that holds zeros until its stream is so far."""

    tensor: Any
    stream: Any
    began: int
    """When the stream was told to wait, in nanoseconds of the monotonic clock."""
    delay: Callable[[], float]
    """How long the stream has waited, in seconds; blocks until it has."""


class SlowRead(NamedTuple):
    """A stream that is busy, and reads a tensor after that."""

    stream: Any
    is_over: Callable[[], bool]
    content: Callable[[], bytes]
    """What it has read; blocks until it has."""


class Tensors(ABC):
    """What the checks need of GPU memory beyond aiomm."""

    sources: tuple[str, ...]
    """What :meth:`make` can make."""

    @abstractmethod
    def make(self, kind: str, device: int, content: bytes, dtype: str, shape: Shape) -> Any:
        """Return a tensor of a kind of source, finished: `cuda`, `cpu`, `strided` or `cupy`."""

    @abstractmethod
    def late(self, device: int, content: bytes, dtype: str, shape: Shape, delay: float) -> Late:
        """Return a tensor whose stream does nothing for `delay` seconds, and then fills it."""

    @abstractmethod
    def read_late(self, array: Any, device: int, delay: float) -> SlowRead:
        """Have a stream do nothing for `delay` seconds, and then read `array`."""

    @abstractmethod
    def use_stream(self, stream: Any) -> AbstractContextManager[Any]:
        """Make a stream the current one."""

    @abstractmethod
    def busy(self, device: int) -> Callable[[], None]:
        """Keep a GPU busy with products of matrices; return what ends that."""

    @abstractmethod
    def check_health(self, device: int) -> None:
        """Allocate and compute. Raises whatever fails."""

    @abstractmethod
    def free_nbytes(self, device: int) -> int:
        """Return the bytes that are free on a GPU."""

    @abstractmethod
    def allocated_nbytes(self, device: int) -> int:
        """Return the bytes of all tensors of this process on a GPU."""

    @abstractmethod
    def plain_copy(self, device: int, nbytes: int) -> Callable[[int], float]:
        """Return a function that copies so many bytes on a GPU, and says how long it took.

        From the call until the GPU is done, on the host's clock.
        """

    def content(self, array: Any) -> bytes:
        """Return the bytes of an array that aiomm has returned."""
        on_host = array.cpu().contiguous().numpy() if hasattr(array, "cpu") else array
        return bytes(on_host.tobytes())

    def fill(self, array: Any, byte: int) -> None:
        """Set all bytes of an array of uint8, and return when they are."""
        array[:] = byte
        self.settle()

    def settle(self) -> None:  # noqa: B027 - what is not real has nothing to wait for
        """Return when all that was asked of the GPU is done."""


def is_fake() -> bool:
    """Whether this is a dry run."""
    return os.environ.get(VARIABLE) == "fake"


@functools.cache
def tensors_here() -> Tensors:
    """Return this process's."""
    name = "fake_tensors:FakeTensors" if is_fake() else "cuda_tensors:CudaTensors"
    module, _, attribute = name.partition(":")
    made: Tensors = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), attribute)()
    return made


def on_thread(work: Callable[[], None], over: threading.Event) -> Callable[[], None]:
    """Run `work`, which ends when `over` is set; return what sets it, and waits."""
    thread = threading.Thread(target=work, name="busy", daemon=True)
    thread.start()

    def stop() -> None:
        over.set()
        with suppress(RuntimeError):
            thread.join()

    return stop
