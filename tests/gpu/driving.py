"""What the tests on the fake CUDA driver share: how it is made, and the children that load it."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from aiomm.gpu.runtime import Copy, GpuError, GpuRuntime

SOURCE = Path(__file__).with_name("fake_driver.c")
ROOT = Path(__file__).parents[2]
LIBRARY = "libcuda.so.1"
NBYTES = 1 << 16
OPTIONS = ["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"]
CHILD_SECONDS = 20


def built(folder: Path) -> str:
    """Make the fake driver in a folder and return it; skip the test where there is no compiler."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("the fake CUDA driver needs gcc")
    target = [f"-Wl,-soname,{LIBRARY}", "-o", str(folder / LIBRARY), str(SOURCE)]
    subprocess.run([compiler, *OPTIONS, *target], check=True)
    return str(folder)


def child(check: Callable[..., None], environment: Mapping[str, str], *arguments: str) -> None:
    """Run a check in a process of its own.

    Args:
        check: a function of a module that calls what its command line says.
        environment: what it gets besides ours, of which it gets nothing that names a driver.
        arguments: what to call it with.
    """
    spec = sys.modules[check.__module__].__spec__
    assert spec is not None
    drivers = ("LD_LIBRARY_PATH", "FAKE_CUDA_")
    ours = {name: value for name, value in os.environ.items() if not name.startswith(drivers)}
    options = ["-W", "error", "-X", "faulthandler", "-m", spec.name]
    result = subprocess.run(
        [sys.executable, *options, check.__name__, *arguments],
        env={**ours, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=CHILD_SECONDS,
    )
    told = f"{check.__name__}: {result.returncode}\n{result.stdout}{result.stderr}"
    assert result.returncode == 0, told


class Gpu:
    """A runtime, and bytes to and fro on a stream of its own."""

    def __init__(self, runtime: GpuRuntime, device: int = 0) -> None:
        self.runtime = runtime
        self.device = device
        self.stream = self.runtime.make_stream(device)
        self.event = self.runtime.make_event(device)

    def finish(self) -> None:
        """Wait for all that the stream has been given."""
        self.runtime.record(self.device, self.event, self.stream)
        self.runtime.synchronize(self.device, self.event)

    def copy(self, copies: Sequence[Copy]) -> None:
        """Copy, and wait for it."""
        self.runtime.copy(self.device, self.stream, copies)
        self.finish()

    def allocate(self, data: bytes) -> int:
        """Return new memory with these bytes at its beginning."""
        address = self.runtime.allocate(self.device, len(data))
        buffer = ctypes.create_string_buffer(data, len(data))
        self.copy([Copy(address, ctypes.addressof(buffer), len(data))])
        return address

    def read(self, address: int, nbytes: int) -> bytes:
        """Return bytes of the device."""
        buffer = ctypes.create_string_buffer(nbytes)
        self.copy([Copy(ctypes.addressof(buffer), address, nbytes)])
        return buffer.raw


def fake() -> ctypes.CDLL:
    """Return the fake driver, for its functions that CUDA does not have."""
    library = ctypes.CDLL(LIBRARY)
    library.fake_neighbours.restype = ctypes.c_uint64
    library.fake_neighbours.argtypes = [ctypes.c_size_t]
    library.fake_make_unshareable.argtypes = [ctypes.c_uint64]
    return library


def num_calls(*names: str) -> int:
    """Return how often the driver's functions were called."""
    return sum(fake().fake_count(name.encode()) for name in names)


def num_batches() -> int:
    """Return how many batches were given; which of the two there is depends on cuda-bindings."""
    return num_calls("cuMemcpyBatchAsync", "cuMemcpyBatchAsync_v2")


def pattern(nbytes: int = NBYTES, seed: int = 0) -> bytes:
    """Return bytes, other ones for each seed."""
    return random.Random(seed).randbytes(nbytes)


def error_of(function: Callable[..., object], *arguments: object) -> GpuError:
    """Return what a call raises."""
    with pytest.raises(GpuError) as caught:
        function(*arguments)
    return caught.value


def scattered(target: int, source: int, num_copies: int, nbytes: int = 64) -> list[Copy]:
    """Return copies that turn the order of pieces round, so that none follows another."""
    return [
        Copy(target + place * nbytes, source + (num_copies - 1 - place) * nbytes, nbytes)
        for place in range(num_copies)
    ]


def turned(data: bytes, num_copies: int, nbytes: int = 64) -> bytes:
    """Return what :func:`scattered` makes of bytes."""
    pieces = [data[place * nbytes : (place + 1) * nbytes] for place in range(num_copies)]
    return b"".join(reversed(pieces))


def in_child(function: Callable[[], object]) -> None:
    """Call a function in a forked child, which must survive it."""
    process = os.fork()
    if not process:
        try:
            function()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(process, 0)[1] == 0
