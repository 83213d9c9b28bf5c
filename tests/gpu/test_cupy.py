"""CUDA by cupy, on a fake cupy upon the fake driver, each check in a process of its own.

That the names and the order of arguments are cupy's was compared with cupy 14.2 by hand.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from aiomm.gpu.cupy import CupyRuntime
from aiomm.gpu.runtime import HANDLE_NBYTES, Copy

from .driving import (
    NBYTES,
    Gpu,
    built,
    child,
    error_of,
    fake,
    in_child,
    num_calls,
    pattern,
    scattered,
    turned,
)

pytestmark = pytest.mark.usefixtures("no_leaks")


def cupy_gpu(device: int = 0) -> Gpu:
    """Return a device by the fake cupy."""
    from tests.gpu import fake_cupy

    sys.modules["cupy"] = fake_cupy
    return Gpu(CupyRuntime(), device)


def check_devices() -> None:
    """Devices and versions are told."""
    runtime = cupy_gpu().runtime
    first, second = runtime.devices()
    assert (first.ordinal, first.name, first.why_no_ipc) == (0, "Fake GPU 0", ""), first
    assert (second.uuid, second.total_nbytes) == (bytes(range(1, 256, 16)), 1 << 30), second
    assert runtime.versions() == {"driver": "13.0", "runtime": "13.2", "cupy": "14.2.0"}


def check_memory() -> None:
    """Memory is made, found, pinned and freed."""
    runtime = cupy_gpu().runtime
    address = runtime.allocate(1, 3 << 20)
    assert runtime.device_at(address + (4 << 20) - 1) == 1
    buffer = ctypes.create_string_buffer(NBYTES)
    host = ctypes.addressof(buffer)
    assert runtime.device_at(host) is None
    runtime.pin(0, host, NBYTES)
    assert runtime.device_at(host) is None
    runtime.unpin(0, host)
    assert error_of(runtime.unpin, 0, host).code == 713
    runtime.free(1, address)
    error = error_of(runtime.free, 1, address)
    assert (error.call, error.code, error.is_sticky) == ("free", 1, False), error
    fake().fake_fail_next(b"cuMemAlloc_v2", 700)
    assert error_of(runtime.allocate, 0, 1).is_sticky
    assert error_of(runtime.allocate, 9, 1).call == "setDevice"


def check_sharing() -> None:
    """Another process reads what this one has written, and writes what this one reads."""
    gpu = cupy_gpu(1)
    address = gpu.allocate(pattern())
    handle = gpu.runtime.export(1, address)
    assert len(handle) == HANDLE_NBYTES
    child(check_opening, os.environ, handle.hex())
    assert gpu.read(address, NBYTES) == pattern(seed=1)
    assert "PID" in error_of(gpu.runtime.open, 0, handle).text
    assert "64 bytes" in error_of(gpu.runtime.open, 0, b"short").text
    assert "not of this runtime" in error_of(gpu.runtime.export, 1, address + 1).text
    fake().fake_make_unshareable(address)
    assert "expandable_segments" in error_of(gpu.runtime.export, 1, address).text


def check_opening(text: str) -> None:
    """The other process of :func:`check_sharing`."""
    gpu = cupy_gpu(0)
    address = gpu.runtime.open(0, bytes.fromhex(text))
    assert gpu.read(address, NBYTES) == pattern()
    gpu.copy([Copy(address, gpu.allocate(pattern(seed=1)), NBYTES)])
    gpu.runtime.close(0, address)


def check_streams() -> None:
    """Copies are in the order of their streams; to ask for an event leaves no error pending."""
    from tests.gpu import fake_cupy

    gpu, driver = cupy_gpu(), fake()
    runtime, source = gpu.runtime, gpu.allocate(pattern())
    target, other = runtime.allocate(1, NBYTES), runtime.make_stream(1)
    driver.fake_hold(1)
    runtime.copy(0, gpu.stream, scattered(target, source, 100))
    runtime.record(0, gpu.event, gpu.stream)
    assert not runtime.query(0, gpu.event)
    assert not fake_cupy.pending
    runtime.wait(1, other, gpu.event)
    event = runtime.make_event(1)
    runtime.record(1, event, other)
    driver.fake_hold(0)
    runtime.synchronize(1, event)
    assert runtime.query(0, gpu.event)
    assert gpu.read(target, 6400) == turned(pattern(), 100)
    before = num_calls("cuMemcpyAsync")
    gpu.copy([Copy(target + at, source + at, 64) for at in range(0, NBYTES, 64)])
    assert num_calls("cuMemcpyAsync") - before == 1
    runtime.destroy_event(1, event)
    runtime.destroy_stream(1, other)
    driver.fake_break(719)
    error = error_of(runtime.query, 0, gpu.event)
    assert error.is_sticky, error


def check_current_device() -> None:
    """A thread's current device is the same after each call, also after one that has failed."""
    runtime, driver = cupy_gpu().runtime, fake()
    for current in (-1, 0, 1):
        driver.fake_set_current(current)
        runtime.allocate(1, 1)
        error_of(runtime.allocate, 1, 1 << 40)
        assert driver.fake_current() == current


def check_fork() -> None:
    """A forked child of a process that has used CUDA gets an error."""
    from tests.gpu import fake_cupy

    sys.modules["cupy"] = fake_cupy
    runtime = CupyRuntime()
    runtime.devices()

    def refused() -> None:
        assert "spawn" in error_of(runtime.devices).text
        assert "spawn" in error_of(runtime.allocate, 0, 1).text
        assert "spawn" in error_of(runtime.device_at, 4096).text

    in_child(refused)


CHECKS = (
    check_devices,
    check_memory,
    check_sharing,
    check_streams,
    check_current_device,
    check_fork,
)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of the fake driver."""
    return built(tmp_path_factory.mktemp("driver"))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_runtime(check: Callable[[], None], driver: str) -> None:
    """A check succeeds on the fake driver."""
    child(check, {"LD_LIBRARY_PATH": driver, "FAKE_CUDA_DEVICES": "2"})


def test_not_installed() -> None:
    """The runtime needs cupy, and its module does not."""
    if find_spec("cupy") is not None:
        pytest.skip("cupy is installed")
    with pytest.raises(ImportError):
        CupyRuntime()


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cupy raises without a driver is mapped."""

    class CUDARuntimeError(RuntimeError):
        status = 35

    def fail(*arguments: int) -> None:
        raise CUDARuntimeError("cudaErrorInsufficientDriver")

    runtime = SimpleNamespace(getDeviceCount=fail, driverGetVersion=lambda: 0)
    cuda = SimpleNamespace(runtime=runtime, driver=None, get_current_stream=fail)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda, __version__="14.2.0"))
    gpu = CupyRuntime()
    for function in (gpu.devices, gpu.versions, lambda: gpu.current_stream(0)):
        error = error_of(function)
        assert "libcuda.so.1 is missing" in error.text, error


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
