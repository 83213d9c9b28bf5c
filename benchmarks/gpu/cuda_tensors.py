"""Tensors of torch on real GPUs, and of cupy."""

from __future__ import annotations

import functools
import importlib
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from benchmarks.gpu.tensors import Late, Shape, SlowRead, Tensors, on_thread

__all__ = ["CudaTensors"]

WARM_UP_CYCLES = 1 << 26
MATRIX = 8192


class CudaTensors(Tensors):
    """Torch's, and one of cupy's."""

    sources = ("cuda", "cpu", "strided", "cupy")

    def __init__(self) -> None:
        self.torch: Any = importlib.import_module("torch")

    def make(self, kind: str, device: int, content: bytes, dtype: str, shape: Shape) -> Any:
        """Return a tensor, finished."""
        host = self.torch.frombuffer(bytearray(content), dtype=self.torch.uint8)
        host = host.view(getattr(self.torch, dtype)).reshape(shape)
        if kind == "cpu":
            return host
        if kind == "cupy":
            cupy: Any = importlib.import_module("cupy")
            with cupy.cuda.Device(device):
                array = cupy.asarray(host.numpy())
                cupy.cuda.get_current_stream().synchronize()
            return array
        tensor = host.to(f"cuda:{device}")
        if kind == "strided":
            wide = self.torch.zeros(
                (2 * shape[0], *shape[1:]), dtype=host.dtype, device=tensor.device
            )
            wide[::2] = tensor
            tensor = wide[::2]
        # Not the whole device: another stream may be busy on purpose.
        self.torch.cuda.current_stream(device).synchronize()
        return tensor

    def late(self, device: int, content: bytes, dtype: str, shape: Shape, delay: float) -> Late:
        """Return a tensor that is filled later."""
        cuda = self.torch.cuda
        final = self.make("cpu", device, content, dtype, shape).pin_memory()
        tensor = self.torch.zeros(shape, dtype=final.dtype, device=f"cuda:{device}")
        began, ended = (cuda.Event(enable_timing=True) for _ in range(2))
        stream = cuda.Stream(device)
        cycles = self._cycles(device, delay)
        cuda.synchronize(device)
        with cuda.device(device), cuda.stream(stream):
            told = time.monotonic_ns()
            began.record()
            cuda._sleep(cycles)
            ended.record()
            tensor.copy_(final, non_blocking=True)

        def waited(kept: object = final) -> float:
            ended.synchronize()
            return float(began.elapsed_time(ended)) / 1000

        return Late(tensor, stream, told, waited)

    def read_late(self, array: Any, device: int, delay: float) -> SlowRead:
        """Have a stream read after it was busy."""
        cuda = self.torch.cuda
        stream = cuda.Stream(device)
        read = self.torch.empty_like(array)
        cycles = self._cycles(device, delay)
        cuda.synchronize(device)
        with cuda.device(device), cuda.stream(stream):
            cuda._sleep(cycles)
            read.copy_(array)

        def content() -> bytes:
            stream.synchronize()
            return self.content(read)

        return SlowRead(stream, stream.query, content)

    def use_stream(self, stream: Any) -> AbstractContextManager[Any]:
        """Make a stream the current one."""
        context: AbstractContextManager[Any] = self.torch.cuda.stream(stream)
        return context

    def busy(self, device: int) -> Callable[[], None]:
        """Multiply matrices on a thread, four products ahead at most."""
        torch, over = self.torch, threading.Event()

        def work() -> None:
            stream = torch.cuda.Stream(device)
            with torch.cuda.device(device), torch.cuda.stream(stream):
                matrix = torch.randn(MATRIX, MATRIX, dtype=torch.bfloat16, device=f"cuda:{device}")
                while not over.is_set():
                    for _ in range(4):
                        matrix @ matrix
                    stream.synchronize()

        return on_thread(work, over)

    def check_health(self, device: int) -> None:
        """Multiply two matrices of ones."""
        ones = self.torch.ones(512, 512, device=f"cuda:{device}")
        found = float((ones @ ones)[3, 3].item())
        if found != 512:
            raise ArithmeticError(f"a product of matrices is {found}, not 512")

    def free_nbytes(self, device: int) -> int:
        """Return what is free, without what torch only keeps."""
        self.torch.cuda.empty_cache()
        return int(self.torch.cuda.mem_get_info(device)[0])

    def allocated_nbytes(self, device: int) -> int:
        """Return what torch has given to tensors."""
        return int(self.torch.cuda.memory_allocated(device))

    def plain_copy(self, device: int, nbytes: int) -> Callable[[int], float]:
        """Return a function that times torch's copy between two tensors."""
        torch, where = self.torch, f"cuda:{device}"
        source = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device=where)
        target = torch.zeros_like(source)
        stream = torch.cuda.current_stream(device)
        stream.synchronize()

        def copy(count: int) -> float:
            began = time.perf_counter()
            target[:count].copy_(source[:count])
            stream.synchronize()
            return time.perf_counter() - began

        return copy

    def settle(self) -> None:
        """Return when the current device is done."""
        self.torch.cuda.synchronize()

    def _cycles(self, device: int, seconds: float) -> int:
        return int(self._cycles_per_second(device) * seconds)

    @functools.lru_cache(maxsize=16)  # noqa: B019 - there is one of this class
    def _cycles_per_second(self, device: int) -> float:
        """Return how fast the clock of the GPU runs, once it has been woken."""
        cuda = self.torch.cuda
        elapsed = 1.0
        with cuda.device(device):
            for _ in range(3):
                began, ended = (cuda.Event(enable_timing=True) for _ in range(2))
                began.record()
                cuda._sleep(WARM_UP_CYCLES)
                ended.record()
                ended.synchronize()
                elapsed = float(began.elapsed_time(ended)) / 1000
        return WARM_UP_CYCLES / elapsed
