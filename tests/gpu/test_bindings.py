"""CUDA by cuda-bindings, on a driver that needs no GPU: `fake_driver.c`.

Each test is a process of its own, `python -m tests.gpu.test_bindings CHECK`, that loads the fake
one; the function `check_CHECK` is what happens in it.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import sys
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aiomm.gpu.bindings import MAX_LOOP_COPIES, BindingsRuntime
from aiomm.gpu.common import merged
from aiomm.gpu.runtime import HANDLE_NBYTES, Copy

from .driving import (
    LIBRARY,
    NBYTES,
    Gpu,
    built,
    child,
    error_of,
    fake,
    in_child,
    num_batches,
    num_calls,
    pattern,
    scattered,
    turned,
)

pytestmark = pytest.mark.usefixtures("no_leaks")


# What the children do.


def bindings_gpu(device: int = 0) -> Gpu:
    """Return a device by cuda-bindings."""
    return Gpu(BindingsRuntime(), device)


def check_devices() -> None:
    """There are two, and each is described."""
    runtime = BindingsRuntime()
    first, second = runtime.devices()
    assert (first.ordinal, first.name, first.why_no_ipc) == (0, "Fake GPU 0", ""), first
    assert (second.ordinal, second.name, second.total_nbytes) == (1, "Fake GPU 1", 1 << 30), second
    assert first.uuid == bytes(range(0, 256, 16)), first.uuid
    assert second.uuid == bytes(range(1, 256, 16)), second.uuid
    assert runtime.devices() == (first, second)
    versions = runtime.versions()
    assert versions["driver"] == "13.0", versions
    assert versions["cuda-bindings"].split(".")[0].isdigit(), versions


def check_no_ipc() -> None:
    """A device that cannot share memory says so."""
    (device,) = BindingsRuntime().devices()
    assert "no CUDA IPC" in device.why_no_ipc, device


def check_memory() -> None:
    """Memory is made, found and freed on its device."""
    runtime = BindingsRuntime()
    first, second = runtime.allocate(0, 1), runtime.allocate(1, 3 << 20)
    assert [runtime.device_at(address) for address in (first, second)] == [0, 1]
    assert runtime.device_at(first + (2 << 20) - 1) == 0, "it was not rounded up"
    assert runtime.device_at(second + (4 << 20) - 1) == 1
    buffer = ctypes.create_string_buffer(16)
    assert runtime.device_at(ctypes.addressof(buffer)) is None
    runtime.free(1, second)
    assert runtime.device_at(second) is None
    error = error_of(runtime.free, 1, second)
    assert (error.call, error.code, error.is_sticky) == ("cuMemFree", 1, False), error


def check_sharing() -> None:
    """Another process reads what this one has written, and writes what this one reads."""
    gpu = bindings_gpu(1)
    address = gpu.allocate(pattern())
    handle = gpu.runtime.export(1, address)
    assert len(handle) == HANDLE_NBYTES
    assert handle == gpu.runtime.export(1, address)
    child(check_opening, os.environ, handle.hex())
    assert gpu.read(address, NBYTES) == pattern(seed=1)
    gpu.runtime.free(1, address)


def check_opening(text: str) -> None:
    """The other process of :func:`check_sharing`."""
    gpu = bindings_gpu(0)
    runtime, handle = gpu.runtime, bytes.fromhex(text)
    address = runtime.open(0, handle)
    assert gpu.read(address, NBYTES) == pattern()
    own = gpu.allocate(pattern(seed=1))
    gpu.copy([Copy(address, own, NBYTES)])
    assert gpu.read(address, NBYTES) == pattern(seed=1)
    error = error_of(runtime.export, 0, address)
    assert error.code == 801, error
    runtime.close(0, address)
    assert error_of(runtime.close, 0, address).call == "cuIpcCloseMemHandle"
    stale = bytearray(handle)
    stale[16] ^= 0x40  # the descriptor
    error = error_of(runtime.open, 0, bytes(stale))
    assert (error.call, error.code) == ("cuIpcOpenMemHandle", 400), error
    assert "PID" not in error.text, error


def check_refused_sharing() -> None:
    """What cannot be exported or opened is refused, and why."""
    runtime = BindingsRuntime()
    address = runtime.allocate(0, 1)
    error = error_of(runtime.export, 0, address + 512)
    assert "inside an allocation" in error.text, error
    assert error_of(runtime.export, 0, 4096).call == "cuMemGetAddressRange"
    error = error_of(runtime.open, 0, runtime.export(0, address))
    assert error.code == 201, error
    assert "share the PID namespace" in error.text, error
    assert "64 bytes" in error_of(runtime.open, 0, b"short").text
    fake().fake_fail_next(b"cuPointerGetAttribute", 1)
    assert len(runtime.export(0, address)) == HANDLE_NBYTES, "a driver that cannot tell is tried"
    fake().fake_make_unshareable(address)
    error = error_of(runtime.export, 0, address)
    assert "expandable_segments" in error.text, error
    fake().fake_fail_next(b"cuPointerGetAttribute", 801)
    error = error_of(runtime.export, 0, address)
    assert (error.call, error.code) == ("cuIpcGetMemHandle", 1), error
    assert "expandable_segments" in error.text, error


def check_events() -> None:
    """An event is over when all is done before it, and threads wait for it asleep."""
    gpu, driver = bindings_gpu(), fake()
    runtime, source = gpu.runtime, gpu.allocate(pattern())
    target, event = runtime.allocate(0, NBYTES), runtime.make_event(0)
    assert runtime.query(0, event), "it was never recorded"
    driver.fake_hold(1)
    runtime.copy(0, gpu.stream, [Copy(target, source, NBYTES)])
    runtime.record(0, event, gpu.stream)
    assert not runtime.query(0, event)
    woken = threading.Event()

    def wait() -> None:
        runtime.synchronize(0, event)
        woken.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert not woken.wait(0.1)
    driver.fake_hold(0)
    thread.join()
    assert runtime.query(0, event)
    assert gpu.read(target, NBYTES) == pattern()
    driver.fake_hold(1)
    runtime.record(0, event, gpu.stream)
    assert not runtime.query(0, event), "it was recorded again"
    runtime.destroy_event(0, event)
    runtime.destroy_stream(0, gpu.stream)
    driver.fake_hold(0)


def check_order() -> None:
    """A stream begins what comes after a wait only when the event of another device is over."""
    first, second = bindings_gpu(0), bindings_gpu(1)
    source = first.allocate(pattern())
    buffer = ctypes.create_string_buffer(NBYTES)
    first.runtime.pin(0, ctypes.addressof(buffer), NBYTES)
    middle, event = second.runtime.allocate(1, NBYTES), first.runtime.make_event(0)
    driver = fake()
    driver.fake_hold(1)
    first.runtime.copy(0, first.stream, [Copy(middle, source, NBYTES)])
    first.runtime.record(0, event, first.stream)
    second.runtime.wait(1, second.stream, event)
    second.runtime.copy(1, second.stream, [Copy(ctypes.addressof(buffer), middle, NBYTES)])
    second.runtime.record(1, second.event, second.stream)
    first.runtime.destroy_event(0, event)
    driver.fake_hold(0)
    second.runtime.synchronize(1, second.event)
    assert buffer.raw == pattern()
    error = error_of(first.runtime.record, 0, first.event, second.stream)
    assert error.code == 400, error


def check_copies() -> None:
    """Few copies go one by one, many as a batch; neither on the wrong kind of stream or memory."""
    gpu = bindings_gpu()
    runtime, source = gpu.runtime, gpu.allocate(pattern())
    target = runtime.allocate(0, NBYTES)
    for num_copies in (1, MAX_LOOP_COPIES, MAX_LOOP_COPIES + 1, 1000):
        before = num_calls("cuMemcpyAsync")
        gpu.copy(scattered(target, source, num_copies))
        one_by_one = num_calls("cuMemcpyAsync") - before
        assert one_by_one == (num_copies if num_copies <= MAX_LOOP_COPIES else 0), one_by_one
        assert gpu.read(target, num_copies * 64) == turned(pattern(), num_copies)
    assert num_batches() == 2
    runtime.copy(0, 0, scattered(target, source, 20))  # the default stream
    runtime.record(0, gpu.event, 0)
    runtime.synchronize(0, gpu.event)
    buffer = ctypes.create_string_buffer(pattern(seed=2), NBYTES)
    gpu.copy(scattered(target, ctypes.addressof(buffer), 1000))  # memory that is not pinned
    assert gpu.read(target, 64_000) == turned(pattern(seed=2), 1000)
    gpu.copy([])
    assert num_batches() == 2


def check_merging() -> None:
    """Copies that follow one another are one, but not across two allocations."""
    gpu = bindings_gpu()
    source = gpu.allocate(pattern(2 << 20))
    target = fake().fake_neighbours(1 << 20)
    before = num_calls("cuMemcpyAsync")
    pieces = [Copy(target + at, source + at, 1024) for at in range(0, 1 << 20, 1024)]
    gpu.copy([*pieces, Copy(target, source, 0)])
    assert num_calls("cuMemcpyAsync") - before == 1
    pieces = [Copy(target + at, source + at, 1 << 19) for at in range(0, 2 << 20, 1 << 19)]
    gpu.copy(pieces)
    assert num_calls("cuMemcpyAsync") - before == 1 + 1 + 4
    second = target + (1 << 20)
    data = gpu.read(target, 1 << 20) + gpu.read(second, 1 << 20)
    assert data == pattern(2 << 20)
    error = error_of(gpu.copy, [Copy(target, source, 2 << 20)])
    assert error.call == "cuMemcpyAsync", error


def check_old_driver() -> None:
    """A driver without batches gets many copies one by one."""
    gpu = bindings_gpu()
    source = gpu.allocate(pattern())
    target = gpu.runtime.allocate(0, NBYTES)
    for _ in range(2):
        gpu.copy(scattered(target, source, 100))
        assert gpu.read(target, 6400) == turned(pattern(), 100)
    assert gpu.runtime.versions()["driver"] == "12.6"
    assert num_batches() == 0


def check_pinning() -> None:
    """Pinned memory stays memory of the host, and copies of it do not block."""
    gpu, driver = bindings_gpu(), fake()
    runtime = gpu.runtime
    target = runtime.allocate(0, NBYTES)
    buffer = ctypes.create_string_buffer(pattern(), NBYTES)
    address = ctypes.addressof(buffer)
    runtime.pin(0, address, NBYTES)
    assert runtime.device_at(address) is None
    driver.fake_hold(1)
    runtime.copy(0, gpu.stream, [Copy(target, address, NBYTES)])
    driver.fake_hold(0)
    assert gpu.read(target, NBYTES) == pattern()
    assert error_of(runtime.pin, 0, address, NBYTES).call == "cuMemHostRegister"
    runtime.unpin(0, address)
    error = error_of(runtime.unpin, 0, address)
    assert (error.call, error.code) == ("cuMemHostUnregister", 713), error


def check_errors() -> None:
    """CUDA's errors keep their numbers and names, also those that cuda-bindings does not know."""
    runtime, driver = BindingsRuntime(), fake()
    error = error_of(runtime.allocate, 0, 1 << 40)
    assert (error.call, error.code, error.is_sticky) == ("cuMemAlloc", 2, False), error
    assert error.text == "CUDA_ERROR_OUT_OF_MEMORY: out of memory", error
    assert error_of(runtime.allocate, 9, 1).code == 101
    driver.fake_fail_next(b"cuMemAlloc_v2", 700)
    error = error_of(runtime.allocate, 0, 1)
    assert error.is_sticky, error
    assert "CUDA_ERROR_ILLEGAL_ADDRESS" in str(error), error
    driver.fake_fail_next(b"cuMemAlloc_v2", 12345)
    error = error_of(runtime.allocate, 0, 1)
    assert (error.code, error.text) == (12345, "unknown error"), error


def check_broken_device() -> None:
    """After a sticky error everything raises it, and it wakes who waits."""
    gpu, driver = bindings_gpu(), fake()
    runtime, raised = gpu.runtime, []
    driver.fake_hold(1)
    runtime.record(0, gpu.event, gpu.stream)
    thread = threading.Thread(
        target=lambda: raised.append(error_of(runtime.synchronize, 0, gpu.event))
    )
    thread.start()
    driver.fake_break(700)
    thread.join()
    raised.append(error_of(runtime.query, 0, gpu.event))
    raised.append(error_of(runtime.copy, 0, gpu.stream, [Copy(4096, 8192, 1)]))
    assert all(error.code == 700 and error.is_sticky for error in raised), raised


def check_fork() -> None:
    """A forked child of a process that has used CUDA gets an error; a fresh one does not."""
    runtime = BindingsRuntime()
    in_child(lambda: runtime.devices())  # nobody has used it yet
    runtime.devices()

    def refused() -> None:
        for function in (runtime.devices, runtime.versions):
            assert "spawn" in error_of(function).text
        assert "spawn" in error_of(runtime.allocate, 0, 1).text
        assert "spawn" in error_of(runtime.current_stream, 0).text

    in_child(refused)
    assert runtime.devices()


def check_current_device() -> None:
    """A thread's current device is the same after each call, also after one that has failed."""
    runtime, driver = BindingsRuntime(), fake()
    runtime.devices()
    for current in (-1, 0, 1):
        driver.fake_set_current(current)
        address = runtime.allocate(1, 1)
        error_of(runtime.allocate, 0, 1 << 40)
        assert driver.fake_current() == current
        assert runtime.device_at(address) == 1


def check_arrays() -> None:
    """Streams and arrays come from torch, or else from cupy."""
    runtime = BindingsRuntime()
    sys.modules["torch"] = sys.modules["cupy"] = None  # type: ignore[assignment]
    assert (runtime.current_device(), runtime.current_stream(1)) == (None, 0)
    with pytest.raises(ImportError, match="torch"):
        runtime.flat_array(1, 4096, 5, runtime)
    stub: Any = SimpleNamespace(uint8="u1", ndarray=lambda *arguments: arguments)
    stub.cuda = SimpleNamespace(
        Device=lambda: SimpleNamespace(id=5),
        get_current_stream=lambda device: SimpleNamespace(ptr=device + 50),
        UnownedMemory=lambda *arguments: arguments,
        MemoryPointer=lambda memory, offset: (memory, offset),
    )
    sys.modules["cupy"] = stub
    assert (runtime.current_device(), runtime.current_stream(1)) == (5, 51)
    made: Any = runtime.flat_array(1, 4096, 5, runtime)
    assert made == ((5,), "u1", ((4096, 5, runtime, 1), 0)), made
    torch: Any = SimpleNamespace(as_tensor=lambda source, device: (source, device))
    torch.cuda = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        current_device=lambda: 7,
        current_stream=lambda device: SimpleNamespace(cuda_stream=device + 70),
    )
    sys.modules["torch"] = torch
    assert (runtime.current_device(), runtime.current_stream(1)) == (7, 71)
    made = runtime.flat_array(1, 4096, 5, runtime)
    source, device = made
    assert (source.owner, device) == (runtime, "cuda:1"), made
    interface = source.__cuda_array_interface__
    assert interface["data"] == (4096, False), interface
    assert (interface["shape"], interface["typestr"]) == ((5,), "|u1"), interface


def check_absent_driver() -> None:
    """Without a driver there is a runtime, and every call says what is missing."""
    runtime = BindingsRuntime()
    for function in (runtime.devices, runtime.versions, runtime.devices):
        error = error_of(function)
        assert "libcuda.so.1 is missing" in error.text, error
    assert "no CUDA driver" in str(error_of(runtime.allocate, 0, 1))


def check_no_device() -> None:
    """A driver without a GPU says so each time."""
    runtime = BindingsRuntime()
    for _ in range(2):
        error = error_of(runtime.devices)
        assert (error.call, error.code) == ("cuInit", 100), error
        assert "CUDA_ERROR_NO_DEVICE" in error.text, error


def check_imports() -> None:
    """The module needs no cuda-bindings; the runtime does, and loads no driver by itself."""
    assert not [name for name in sys.modules if name.split(".")[0] == "cuda"]
    BindingsRuntime()
    assert LIBRARY not in Path("/proc/self/maps").read_text()
    sys.modules["cuda.bindings"].__version__ = "12.9.0"  # type: ignore[attr-defined]
    with pytest.raises(ImportError, match=r"12\.9\.0 holds the GIL"):
        BindingsRuntime()
    for name in [name for name in sys.modules if name.split(".")[0] == "cuda"]:
        del sys.modules[name]
    sys.modules["cuda"] = None  # type: ignore[assignment]
    with pytest.raises(ImportError):
        BindingsRuntime()


# The tests, which start them.

CHECKS: dict[Callable[[], None], dict[str, str]] = {
    check_devices: {"FAKE_CUDA_DEVICES": "2"},
    check_no_ipc: {"FAKE_CUDA_NO_IPC": "1"},
    check_memory: {"FAKE_CUDA_DEVICES": "2"},
    check_sharing: {"FAKE_CUDA_DEVICES": "2"},
    check_refused_sharing: {},
    check_events: {},
    check_order: {"FAKE_CUDA_DEVICES": "2"},
    check_copies: {},
    check_merging: {},
    check_old_driver: {"FAKE_CUDA_VERSION": "12060"},
    check_pinning: {},
    check_errors: {},
    check_broken_device: {},
    check_fork: {},
    check_current_device: {"FAKE_CUDA_DEVICES": "2"},
    check_arrays: {},
    check_no_device: {"FAKE_CUDA_FAIL": "cuInit=100"},
    check_imports: {},
}
"""What each check needs in its environment."""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of the fake driver."""
    need_bindings()
    return built(tmp_path_factory.mktemp("driver"))


def need_bindings() -> None:
    """Skip the test where cuda-bindings is not installed."""
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        pytest.skip("cuda-bindings is not installed")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_runtime(check: Callable[[], None], driver: str) -> None:
    """A check succeeds on the fake driver."""
    child(check, CHECKS[check] | {"LD_LIBRARY_PATH": driver})


def test_absent_driver() -> None:
    """A check succeeds without any driver."""
    need_bindings()
    if ctypes.util.find_library("cuda") is not None:
        pytest.skip("this machine has a CUDA driver")
    child(check_absent_driver, {})


def test_merged() -> None:
    """Only copies that follow one another at both ends become one."""
    copies = [
        Copy(100, 500, 10),
        Copy(110, 510, 5),
        Copy(115, 0, 0),
        Copy(115, 515, 1),
        Copy(116, 600, 4),
        Copy(200, 604, 4),
        Copy(100, 500, 10),
    ]
    assert merged(copies) == [
        Copy(100, 500, 16),
        Copy(116, 600, 4),
        Copy(200, 604, 4),
        Copy(100, 500, 10),
    ]
    assert merged([Copy(1, 2, 0)]) == []


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
