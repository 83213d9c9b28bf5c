"""The fake GPU enforces what CUDA demands, between two processes too, and goes wrong on demand."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy
import pytest
import torch

from aiomm.gpu.fake import FakeArray, FakeFaults, FakeRuntime, codes
from aiomm.gpu.runtime import HANDLE_NBYTES, Copy, GpuError

from .driving import Gpu, error_of, in_child

AFTER_END = "memory was used after it was freed or closed"
FREED_TOO_EARLY = "memory was freed that another process has open"
LOST = "an illegal memory access was encountered, on demand"
NO_FORK = "CUDA does not survive a fork"


def obey(pipe: Connection) -> None:
    """Call what the pipe says of a runtime with two devices, until it says nothing any more."""
    runtime, content = FakeRuntime([0, 1]), b""
    while (told := pipe.recv()) is not None:
        name, *arguments = told
        try:
            match name:
                case "new":
                    runtime = FakeRuntime([0, 1])
                case "string_at":
                    content = ctypes.string_at(*arguments)
                case "fill":
                    ctypes.memmove(arguments[0], arguments[1], len(arguments[1]))
                case "copy":
                    Gpu(runtime, arguments[0]).copy([Copy(*each) for each in arguments[1:]])
            known = {
                "new": None,
                "string_at": content,
                "fill": None,
                "copy": dict(runtime.copied),
                "violations": runtime.violations,
            }
            result = known[name] if name in known else getattr(runtime, name)(*arguments)
            pipe.send((result, None))
        except GpuError as exc:
            pipe.send((None, (exc.call, exc.code, exc.text)))


class Other:
    """Another process with a fake runtime of the same two devices."""

    def __init__(self) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(target=obey, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def call(self, *told: object) -> Any:
        """Return what a method returns there; raise the error that it raises there."""
        self.pipe.send(told)
        result, error = self.pipe.recv()
        if error is not None:
            raise GpuError(*error)
        return result

    def kill(self) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()

    def close(self) -> None:
        if self.process.is_alive():
            self.pipe.send(None)
        self.process.join()
        self.process.close()
        self.pipe.close()


@pytest.fixture(scope="module")
def lasting() -> Iterator[Other]:
    other = Other()
    yield other
    other.close()


@pytest.fixture
def other(lasting: Other) -> Other:
    """Another process with a new runtime."""
    lasting.call("new")
    return lasting


@pytest.fixture
def runtime() -> Iterator[FakeRuntime]:
    """Two devices that may be abused."""
    runtime = FakeRuntime([0, 1])
    yield runtime
    runtime.faults.release()


@pytest.fixture
def gpu(runtime: FakeRuntime) -> Gpu:
    return Gpu(runtime)


def host(nbytes: int) -> int:
    """Return the address of memory of the host, which is never given back."""
    memory = ctypes.create_string_buffer(nbytes)
    _kept.append(memory)
    return ctypes.addressof(memory)


_kept: list[object] = []


class TestDevices:
    def test_are_told_by_number_and_known_by_uuid(self) -> None:
        devices, turned = FakeRuntime([0, 1]).devices(), FakeRuntime([1, 0]).devices()
        assert [device.ordinal for device in turned] == [0, 1]
        assert [device.uuid for device in turned] == [device.uuid for device in devices][::-1]
        assert len({device.uuid for device in devices}) == 2
        assert {len(device.uuid) for device in devices} == {16}
        assert [(each.total_nbytes > 0, each.why_no_ipc) for each in devices] == [(True, "")] * 2

    @pytest.mark.parametrize(
        ("told", "names"),
        [
            (None, ["fake GPU 0"]),
            ("2", ["fake GPU 0", "fake GPU 1"]),
            ("3,1", ["fake GPU 3", "fake GPU 1"]),
        ],
    )
    def test_are_those_that_the_environment_names(
        self, monkeypatch: pytest.MonkeyPatch, told: str | None, names: list[str]
    ) -> None:
        monkeypatch.delenv("AIOMM_FAKE_GPUS", raising=False)
        if told is not None:
            monkeypatch.setenv("AIOMM_FAKE_GPUS", told)
        assert [device.name for device in FakeRuntime().devices()] == names

    @pytest.mark.parametrize("device", [-1, 2])
    def test_there_are_no_others(self, runtime: FakeRuntime, device: int) -> None:
        error = error_of(runtime.allocate, device, 64)
        assert (error.code, error.is_sticky) == (101, False)
        assert f"no device {device}" in error.text

    def test_have_no_real_version(self, runtime: FakeRuntime) -> None:
        assert runtime.versions() == {"fake": "1"}


class TestMemory:
    def test_is_zero_and_lies_on_its_device(self, runtime: FakeRuntime) -> None:
        for device in (0, 1):
            address = runtime.allocate(device, 4096)
            assert ctypes.string_at(address, 4096) == bytes(4096)
            assert [runtime.device_at(address + at) for at in (0, 4095)] == [device] * 2
        assert runtime.device_at(host(16)) is None

    def test_that_was_freed_lies_nowhere_and_is_never_found_again(
        self, runtime: FakeRuntime
    ) -> None:
        address = runtime.allocate(0, 4096)
        runtime.free(0, address)
        assert runtime.device_at(address) is None
        assert runtime.allocate(0, 4096) != address
        assert runtime.violations == []

    def test_out_of_descriptors_is_out_of_memory(
        self, runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(name: str, flags: int) -> int:
            raise OSError(24, "Too many open files")

        monkeypatch.setattr(os, "memfd_create", refuse)
        error = error_of(runtime.allocate, 0, 64)
        assert (error.call, error.code) == ("cuMemAlloc", codes.OUT_OF_MEMORY)

    @pytest.mark.parametrize("nbytes", [0, 1 << 50, 1 << 63])
    def test_as_much_as_nobody_has_is_refused(self, runtime: FakeRuntime, nbytes: int) -> None:
        with pytest.raises(GpuError):
            runtime.allocate(0, nbytes)

    @pytest.mark.parametrize("call", ["free", "export"])
    @pytest.mark.parametrize("offset", [8, 4096])
    def test_an_address_inside_is_no_allocation(
        self, runtime: FakeRuntime, call: str, offset: int
    ) -> None:
        address = runtime.allocate(0, 8192)
        assert error_of(getattr(runtime, call), 0, address + offset).code == codes.INVALID_VALUE
        assert "of what is no allocation of this process" in runtime.violations[0]
        assert runtime.device_at(address) == 0

    @pytest.mark.parametrize("call", ["free", "export", "close"])
    def test_after_it_was_freed_nothing_works(self, runtime: FakeRuntime, call: str) -> None:
        address = runtime.allocate(0, 64)
        runtime.free(0, address)
        assert error_of(getattr(runtime, call), 0, address).code == codes.INVALID_VALUE
        assert len(runtime.violations) == 1

    def test_of_this_process_is_freed_and_not_closed(self, runtime: FakeRuntime) -> None:
        address = runtime.allocate(0, 64)
        assert error_of(runtime.close, 0, address).code == codes.INVALID_VALUE
        assert runtime.violations == ["what is not open was closed"]
        assert runtime.device_at(address) == 0

    def test_of_the_host_is_pinned_once_and_unpinned_once(self, runtime: FakeRuntime) -> None:
        address = host(64)
        runtime.pin(0, address, 64)
        assert error_of(runtime.pin, 1, address, 64).code == codes.ALREADY_PINNED
        assert runtime.pinned == {address: 64}
        runtime.unpin(1, address)
        assert (runtime.pinned, runtime.violations) == ({}, [])
        assert error_of(runtime.unpin, 0, address).code == codes.NOT_PINNED
        assert runtime.violations == ["memory was unpinned that is not pinned"]


class TestCopies:
    def test_are_counted_by_their_way(self, runtime: FakeRuntime, gpu: Gpu) -> None:
        first, second, away = (runtime.allocate(device, 64) for device in (0, 0, 1))
        one, two = host(64), host(64)
        ctypes.memmove(one, bytes(range(64)), 64)
        ways = [(first, one, 16), (second, first, 8), (away, second, 4), (two, away, 2)]
        for copy in ways:
            gpu.copy([Copy(*copy)])
        gpu.copy([Copy(two + 8, one, 1), Copy(two + 9, one + 1, 1)])
        assert runtime.copied == {"HtoD": 16, "DtoD": 8, "PtoP": 4, "DtoH": 2, "HtoH": 2}
        assert ctypes.string_at(two, 10) == b"\0\1" + bytes(6) + b"\0\1"

    @pytest.mark.parametrize("is_target", [True, False])
    @pytest.mark.parametrize(("offset", "nbytes"), [(0, 65), (60, 5), (63, 2)])
    def test_over_the_end_of_an_allocation_are_refused(
        self, runtime: FakeRuntime, gpu: Gpu, is_target: bool, offset: int, nbytes: int
    ) -> None:
        address, elsewhere = runtime.allocate(0, 64) + offset, host(128)
        ends = (address, elsewhere) if is_target else (elsewhere, address)
        error = error_of(gpu.copy, [Copy(*ends, nbytes)])
        assert (error.code, error.is_sticky) == (codes.INVALID_VALUE, False)
        assert runtime.violations == ["a copy went over the end of an allocation"]

    @pytest.mark.parametrize("is_target", [True, False])
    def test_of_freed_memory_are_refused(
        self, runtime: FakeRuntime, gpu: Gpu, is_target: bool
    ) -> None:
        address, elsewhere = runtime.allocate(0, 64), host(128)
        runtime.free(0, address)
        ends = (address + 60, elsewhere) if is_target else (elsewhere, address + 60)
        assert error_of(gpu.copy, [Copy(*ends, 8)]).code == codes.ILLEGAL_ADDRESS
        assert runtime.violations == [AFTER_END]

    def test_whose_memory_is_freed_before_their_turn_lose_the_device(
        self, runtime: FakeRuntime, gpu: Gpu
    ) -> None:
        runtime.faults.stall_at = 1
        address = runtime.allocate(0, 64)
        runtime.copy(0, gpu.stream, [Copy(address, host(64), 64)])
        assert runtime.faults.stalled.wait(10)
        runtime.free(0, address)
        runtime.faults.release()
        assert error_of(gpu.finish).is_sticky
        assert runtime.violations == [AFTER_END]

    def test_are_done_on_the_default_stream_too(self, runtime: FakeRuntime, gpu: Gpu) -> None:
        address = runtime.allocate(0, 8)
        source = host(8)
        ctypes.memmove(source, b"contents", 8)
        runtime.copy(0, 0, [Copy(address, source, 8)])
        runtime.record(0, gpu.event, 0)
        runtime.synchronize(0, gpu.event)
        assert ctypes.string_at(address, 8) == b"contents"


class TestStreams:
    def test_work_in_order_and_wait_for_no_other(self, runtime: FakeRuntime) -> None:
        gate, done, order = threading.Event(), threading.Event(), list[int]()
        first, second = runtime.make_stream(0), runtime.make_stream(0)
        runtime.run(first, lambda: wait_for(gate))
        for number in range(100):
            runtime.run(first, lambda number=number: order.append(number))  # type: ignore[misc]
        runtime.run(first, done.set)
        passed = threading.Event()
        runtime.run(second, passed.set)
        wait_for(passed)
        assert order == []
        gate.set()
        wait_for(done)
        assert order == list(range(100))

    def test_keep_their_thread_no_longer_than_there_is_work(self, runtime: FakeRuntime) -> None:
        threads = []
        for _ in range(2):
            done = threading.Event()
            runtime.run(0, lambda: threads.append(threading.current_thread()))
            runtime.run(0, done.set)
            wait_for(done)
            threads[-1].join(10)
            assert not threads[-1].is_alive()
        assert threads[0] is not threads[1]

    def test_that_are_destroyed_finish_their_work(self, runtime: FakeRuntime) -> None:
        gate, done = threading.Event(), threading.Event()
        stream = runtime.make_stream(0)
        runtime.run(stream, lambda: wait_for(gate))
        runtime.run(stream, done.set)
        runtime.destroy_stream(0, stream)
        gate.set()
        wait_for(done)

    @pytest.mark.parametrize(
        "call",
        [
            lambda runtime, stream, event: runtime.destroy_stream(0, stream),
            lambda runtime, stream, event: runtime.destroy_event(0, event),
            lambda runtime, stream, event: runtime.query(0, event),
            lambda runtime, stream, event: runtime.record(0, runtime.make_event(0), stream),
            lambda runtime, stream, event: runtime.copy(0, stream, []),
        ],
    )
    def test_and_events_that_are_destroyed_are_no_more(
        self, runtime: FakeRuntime, call: Callable[[FakeRuntime, int, int], object]
    ) -> None:
        stream, event = runtime.make_stream(0), runtime.make_event(0)
        runtime.destroy_stream(0, stream)
        runtime.destroy_event(0, event)
        error_of(call, runtime, stream, event)
        assert len(runtime.violations) == 1

    def test_the_current_one_is_that_of_the_thread(self, runtime: FakeRuntime) -> None:
        first, second, seen = runtime.make_stream(0), runtime.make_stream(0), list[int]()
        with runtime.use_stream(first):
            with runtime.use_stream(second):
                thread = threading.Thread(target=lambda: seen.append(runtime.current_stream(0)))
                thread.start()
                thread.join()
                seen.append(runtime.current_stream(0))
            seen.append(runtime.current_stream(1))
        assert [*seen, runtime.current_stream(0)] == [0, second, first, 0]

    def test_the_current_one_comes_back_after_an_error(self, runtime: FakeRuntime) -> None:
        stream = runtime.make_stream(0)
        with pytest.raises(ZeroDivisionError), runtime.use_stream(stream):
            _ = 1 / 0
        assert runtime.current_stream(0) == 0


class TestEvents:
    def test_never_recorded_is_over(self, runtime: FakeRuntime, gpu: Gpu) -> None:
        event, passed = runtime.make_event(0), threading.Event()
        assert runtime.query(0, event)
        runtime.synchronize(0, event)
        runtime.wait(0, gpu.stream, event)
        runtime.run(gpu.stream, passed.set)
        wait_for(passed)

    def test_is_over_when_its_stream_is_so_far(self, runtime: FakeRuntime, gpu: Gpu) -> None:
        gate, later = threading.Event(), threading.Event()
        runtime.run(gpu.stream, lambda: wait_for(gate))
        runtime.record(0, gpu.event, gpu.stream)
        runtime.run(gpu.stream, lambda: wait_for(later))
        assert not runtime.query(0, gpu.event)
        gate.set()
        runtime.synchronize(0, gpu.event)
        assert runtime.query(0, gpu.event)
        later.set()

    def test_recorded_twice_is_over_after_the_second(self, runtime: FakeRuntime, gpu: Gpu) -> None:
        first, second = threading.Event(), threading.Event()
        passed = threading.Event()
        runtime.run(gpu.stream, lambda: wait_for(first))
        runtime.record(0, gpu.event, gpu.stream)
        runtime.run(gpu.stream, passed.set)
        runtime.run(gpu.stream, lambda: wait_for(second))
        runtime.record(0, gpu.event, gpu.stream)
        first.set()
        wait_for(passed)
        assert not runtime.query(0, gpu.event)
        second.set()
        runtime.synchronize(0, gpu.event)
        assert runtime.query(0, gpu.event)

    def test_is_waited_for_as_it_is_recorded_by_then(self, runtime: FakeRuntime, gpu: Gpu) -> None:
        gate, waiter, passed = threading.Event(), runtime.make_stream(1), threading.Event()
        runtime.record(0, gpu.event, gpu.stream)
        runtime.wait(1, waiter, gpu.event)
        runtime.run(gpu.stream, lambda: wait_for(gate))
        runtime.record(0, gpu.event, gpu.stream)  # which the other stream does not wait for
        runtime.run(waiter, passed.set)
        wait_for(passed)
        gate.set()
        gpu.finish()

    def test_holds_a_stream_of_another_device(self, runtime: FakeRuntime, gpu: Gpu) -> None:
        gate, waiter, order = threading.Event(), runtime.make_stream(1), list[str]()
        runtime.run(gpu.stream, lambda: wait_for(gate))
        runtime.run(gpu.stream, lambda: order.append("first"))
        runtime.record(0, gpu.event, gpu.stream)
        runtime.wait(1, waiter, gpu.event)
        runtime.run(waiter, lambda: order.append("second"))
        after = Gpu(runtime, 1).event
        runtime.record(1, after, waiter)
        assert not runtime.query(1, after)
        gate.set()
        runtime.synchronize(1, after)
        assert order == ["first", "second"]

    def test_that_is_destroyed_is_still_waited_for(self, runtime: FakeRuntime, gpu: Gpu) -> None:
        gate, waiter, passed = threading.Event(), runtime.make_stream(0), threading.Event()
        runtime.run(gpu.stream, lambda: wait_for(gate))
        event = runtime.make_event(0)
        runtime.record(0, event, gpu.stream)
        runtime.wait(0, waiter, event)
        runtime.run(waiter, passed.set)
        runtime.destroy_event(0, event)
        assert not passed.is_set()
        gate.set()
        wait_for(passed)


class TestFaults:
    def test_nothing_goes_wrong_by_itself(self, runtime: FakeRuntime, gpu: Gpu) -> None:
        address = gpu.allocate(b"contents")
        assert gpu.read(address, 8) == b"contents"
        assert (runtime.faults.num_copies, runtime.violations) == (2, [])

    def test_a_delay_makes_every_copy_longer(self) -> None:
        gpu = Gpu(FakeRuntime(faults=FakeFaults(delay=0.01)))
        begin = time.monotonic()
        gpu.allocate(b"contents")
        gpu.allocate(b"contents")
        assert time.monotonic() - begin >= 0.02

    def test_a_stalled_copy_waits_until_it_is_released(self) -> None:
        runtime = FakeRuntime(faults=FakeFaults(stall_at=2))
        gpu = Gpu(runtime)
        address, source = gpu.allocate(bytes(8)), host(8)
        ctypes.memmove(source, b"contents", 8)
        runtime.copy(0, gpu.stream, [Copy(address, source, 8)])
        runtime.record(0, gpu.event, gpu.stream)
        assert runtime.faults.stalled.wait(10)
        assert not runtime.query(0, gpu.event)
        assert ctypes.string_at(address, 8) == bytes(8)
        assert Gpu(runtime).read(address, 8) == bytes(8)  # on a stream that does not wait
        runtime.faults.release()
        runtime.synchronize(0, gpu.event)
        assert ctypes.string_at(address, 8) == b"contents"

    def test_one_copy_is_refused(self) -> None:
        runtime = FakeRuntime(faults=FakeFaults(refuse_at=2))
        gpu = Gpu(runtime)
        address = gpu.allocate(b"contents")
        error = error_of(gpu.copy, [Copy(address, address + 4, 4)])
        assert (error.code, error.is_sticky) == (codes.INVALID_VALUE, False)
        assert gpu.read(address, 8) == b"contents"

    def test_a_copy_that_fails_loses_the_device(self) -> None:
        runtime = FakeRuntime(faults=FakeFaults(fail_at=3))
        gpu = Gpu(runtime)
        address, kept = gpu.allocate(b"contents"), gpu.allocate(b"retained")
        runtime.copy(0, gpu.stream, [Copy(address, kept, 8)])  # asynchronously: no error yet
        assert error_of(gpu.finish).text == LOST
        calls: list[Callable[[], object]] = [
            lambda: runtime.allocate(0, 8),
            lambda: runtime.export(0, address),
            lambda: runtime.open(0, bytes(HANDLE_NBYTES)),
            lambda: runtime.make_stream(0),
            lambda: runtime.make_event(0),
            lambda: runtime.record(0, gpu.event, gpu.stream),
            lambda: runtime.wait(0, gpu.stream, gpu.event),
            lambda: runtime.query(0, gpu.event),
            lambda: runtime.synchronize(0, gpu.event),
            lambda: runtime.copy(0, gpu.stream, []),
            lambda: runtime.pin(0, kept, 8),
        ]
        for call in calls:
            error = error_of(call)
            assert (error.code, error.text, error.is_sticky) == (700, LOST, True)
        assert ctypes.string_at(address, 8) == b"contents"

    def test_what_a_lost_device_has_is_given_back_as_ever(self) -> None:
        runtime = FakeRuntime(faults=FakeFaults(fail_at=1))
        gpu, address, pinned = Gpu(runtime), runtime.allocate(0, 8), host(8)
        runtime.pin(0, pinned, 8)
        error_of(gpu.copy, [Copy(address, pinned, 8)])
        runtime.destroy_event(0, gpu.event)
        runtime.destroy_stream(0, gpu.stream)
        runtime.unpin(0, pinned)
        runtime.free(0, address)
        assert runtime.device_at(address) is None

    def test_one_who_waits_is_woken_when_the_device_is_lost(self) -> None:
        runtime = FakeRuntime(faults=FakeFaults(stall_at=1, fail_at=1))
        gpu, address, caught = Gpu(runtime), runtime.allocate(0, 8), list[GpuError]()
        runtime.copy(0, gpu.stream, [Copy(address, host(8), 8)])
        thread = threading.Thread(target=lambda: caught.append(error_of(gpu.finish)))
        thread.start()
        runtime.faults.release()
        thread.join()
        assert [error.is_sticky for error in caught] == [True]

    def test_a_short_copy_copies_half_and_says_nothing(self) -> None:
        runtime = FakeRuntime(faults=FakeFaults(short_at=1))
        gpu = Gpu(runtime)
        address = gpu.allocate(b"contents")
        assert (gpu.read(address, 8), runtime.copied["HtoD"]) == (b"cont\0\0\0\0", 4)

    def test_another_device_is_not_lost(self, runtime: FakeRuntime, gpu: Gpu) -> None:
        runtime.faults.fail_at = 1
        error_of(gpu.allocate, b"contents")
        assert runtime.allocate(1, 8)


class TestArrays:
    def test_are_tensors_that_share_the_memory_and_keep_its_owner(
        self, runtime: FakeRuntime
    ) -> None:
        address, owner = runtime.allocate(0, 64), Owner()
        alive = weakref.ref(owner)
        array = runtime.flat_array(0, address + 8, 16, owner)
        del owner
        assert isinstance(array, torch.Tensor)
        assert (array.dtype, array.shape, array.data_ptr()) == (torch.uint8, (16,), address + 8)
        ctypes.memmove(address + 8, b"\7", 1)
        assert array[0] == 7
        assert alive() is not None
        del array
        gc.collect()
        assert alive() is None

    def test_are_of_numpy_where_there_is_no_torch(
        self, runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "torch", None)
        address, owner = runtime.allocate(0, 64), Owner()
        alive = weakref.ref(owner)
        array = runtime.flat_array(0, address, 16, owner)
        del owner
        assert isinstance(array, numpy.ndarray)
        assert (array.dtype, array.shape, array.ctypes.data) == (numpy.uint8, (16,), address)
        assert alive() is not None

    @pytest.mark.parametrize("library", ["torch", "numpy"])
    def test_of_no_bytes(
        self, runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch, library: str
    ) -> None:
        if library == "numpy":
            monkeypatch.setitem(sys.modules, "torch", None)
        array: Any = runtime.flat_array(0, runtime.allocate(0, 64), 0, None)
        assert type(array).__module__ == library
        assert (tuple(array.shape), str(array.dtype).removeprefix("torch.")) == ((0,), "uint8")

    def test_of_others_say_where_they_lie(self, runtime: FakeRuntime) -> None:
        array = FakeArray(runtime, 1, b"contents", "float16", (2, 2), stream=5)
        interface = array.__cuda_array_interface__
        assert (interface["shape"], interface["strides"]) == ((2, 2), None)
        assert (interface["typestr"], interface["stream"]) == ("|V2", 5)
        assert runtime.device_at(interface["data"][0]) == 1
        assert ctypes.string_at(interface["data"][0], 8) == b"contents"
        array.fill(b"CON")
        assert ctypes.string_at(array.address, 8) == b"CONtents"

    def test_of_others_are_freed_with_their_last_reference(self, runtime: FakeRuntime) -> None:
        array, empty = FakeArray(runtime, 0, b"x", "uint8", (1,)), None
        empty = FakeArray(runtime, 0, b"", "uint8", (0, 4))
        assert empty.nbytes == 0
        addresses = [array.address, empty.address]
        assert [runtime.device_at(address) for address in addresses] == [0, 0]
        del array, empty
        gc.collect()
        assert [runtime.device_at(address) for address in addresses] == [None, None]
        assert runtime.violations == []

    def test_of_others_that_were_never_made_need_no_freeing(self, runtime: FakeRuntime) -> None:
        assert error_of(FakeArray, runtime, 2, b"x", "uint8", (1,)).code == 101
        gc.collect()


class Owner:
    """Somebody whose end can be seen."""


class TestTwoProcesses:
    def test_share_memory_by_its_handle(self, runtime: FakeRuntime, gpu: Gpu, other: Other) -> None:
        address = gpu.allocate(b"contents")
        handle = runtime.export(0, address)
        assert len(handle) == HANDLE_NBYTES
        opened = other.call("open", 0, handle)
        assert other.call("string_at", opened, 8) == b"contents"
        other.call("fill", opened, b"CON")
        assert gpu.read(address, 8) == b"CONtents"
        other.call("close", 0, opened)
        runtime.free(0, address)
        assert (runtime.violations, other.call("violations")) == ([], [])

    def test_reach_memory_of_another_device_by_their_own(
        self, runtime: FakeRuntime, gpu: Gpu, other: Other
    ) -> None:
        """It is found on the device that reaches it, but lies where it was allocated."""
        opened = other.call("open", 1, runtime.export(0, gpu.allocate(b"contents")))
        assert other.call("device_at", opened) == 1
        near, far = (other.call("allocate", device, 8) for device in (0, 1))
        copied = other.call("copy", 1, (near, opened, 8), (far, opened, 4))
        assert copied == {"DtoD": 8, "PtoP": 4}
        assert other.call("string_at", far, 8) == b"cont\0\0\0\0"
        other.call("close", 1, opened)

    def test_open_once_on_each_device(self, runtime: FakeRuntime, other: Other) -> None:
        handle = other.call("export", 0, other.call("allocate", 0, 8))
        opened = [runtime.open(device, handle) for device in (0, 1)]
        assert opened[0] != opened[1]
        assert runtime.violations == []
        assert error_of(runtime.open, 1, handle).code == codes.ALREADY_MAPPED
        assert runtime.violations == ["a handle was opened twice"]
        runtime.close(1, opened[1])
        ctypes.memmove(opened[0], b"contents", 8)
        again = runtime.open(1, handle)
        assert ctypes.string_at(again, 8) == b"contents"
        runtime.close(1, again)
        runtime.close(0, opened[0])
        assert len(runtime.violations) == 1

    def test_have_no_memory_freed_that_one_has_open(
        self, runtime: FakeRuntime, gpu: Gpu, other: Other
    ) -> None:
        early, late = gpu.allocate(b"early"), gpu.allocate(b"later")
        for address in (early, late):
            handle = runtime.export(0, address)
            opened = [other.call("open", device, handle) for device in (0, 1)]
            other.call("close", 0, opened[0])
            if address == late:
                other.call("close", 1, opened[1])
            runtime.free(0, address)
            assert runtime.violations == [FREED_TOO_EARLY]
        assert runtime.device_at(early) is None

    def test_close_what_they_have_opened_once(
        self, runtime: FakeRuntime, gpu: Gpu, other: Other
    ) -> None:
        opened = other.call("open", 0, runtime.export(0, gpu.allocate(b"contents")))
        for call in ("free", "export"):
            assert error_of(other.call, call, 0, opened).code == codes.INVALID_VALUE
        other.call("close", 0, opened)
        assert error_of(other.call, "close", 0, opened).code == codes.INVALID_VALUE
        assert other.call("device_at", opened) is None
        told = "of what is no allocation of this process"
        assert other.call("violations") == [
            f"cuMemFree {told}",
            f"cuIpcGetMemHandle {told}",
            "what is not open was closed",
        ]

    def test_do_not_use_what_they_have_closed(
        self, runtime: FakeRuntime, gpu: Gpu, other: Other
    ) -> None:
        opened = other.call("open", 0, runtime.export(0, gpu.allocate(b"contents")))
        own = other.call("allocate", 0, 8)
        other.call("close", 0, opened)
        assert error_of(other.call, "copy", 0, (own, opened, 8)).code == codes.ILLEGAL_ADDRESS
        assert other.call("violations") == [AFTER_END]

    def test_do_not_copy_over_the_end_of_what_they_have_opened(
        self, runtime: FakeRuntime, gpu: Gpu, other: Other
    ) -> None:
        opened = other.call("open", 0, runtime.export(0, gpu.allocate(b"contents")))
        own = other.call("allocate", 0, 16)
        assert error_of(other.call, "copy", 0, (opened, own, 9)).code == codes.INVALID_VALUE
        assert other.call("violations") == ["a copy went over the end of an allocation"]
        other.call("close", 0, opened)

    def test_do_not_open_what_is_freed(self, runtime: FakeRuntime, other: Other) -> None:
        """Neither while its descriptor is nobody's, nor when it is that of something else."""
        address = other.call("allocate", 0, 8)
        handle = other.call("export", 0, address)
        other.call("free", 0, address)
        assert "is gone, or has freed it" in error_of(runtime.open, 0, handle).text
        other.call("allocate", 0, 8)  # takes its descriptor
        assert "another file has its number" in error_of(runtime.open, 0, handle).text

    def test_of_which_one_is_the_exporter_itself(self, runtime: FakeRuntime, gpu: Gpu) -> None:
        handle = runtime.export(0, gpu.allocate(b"contents"))
        for opener in (runtime, FakeRuntime([0, 1])):
            assert error_of(opener.open, 1, handle).code == codes.INVALID_CONTEXT

    @pytest.mark.parametrize("handle", [b"", bytes(HANDLE_NBYTES), b"fakegpu\x01"])
    def test_open_nothing_but_handles(self, runtime: FakeRuntime, handle: bytes) -> None:
        assert error_of(runtime.open, 0, handle).text == "not a handle"

    def test_see_devices_by_their_own_order(
        self, runtime: FakeRuntime, gpu: Gpu, other: Other
    ) -> None:
        turned = FakeRuntime([1, 0])
        far = other.call("allocate", 0, 8)
        opened = turned.open(1, other.call("export", 0, far))
        own = Gpu(turned, 1)
        own.copy([Copy(opened, own.allocate(b"contents"), 8)])
        assert turned.copied == {"HtoD": 8, "DtoD": 8}
        assert other.call("string_at", far, 8) == b"contents"
        turned.close(1, opened)

    def test_of_which_the_exporter_is_killed(self, runtime: FakeRuntime) -> None:
        """What is open stays, and nobody opens it any more."""
        exporter = Other()
        far = exporter.call("allocate", 0, 8)
        exporter.call("fill", far, b"contents")
        handle = exporter.call("export", 0, far)
        opened = runtime.open(0, handle)
        exporter.kill()
        assert ctypes.string_at(opened, 8) == b"contents"
        assert "is gone" in error_of(runtime.open, 1, handle).text
        runtime.close(0, opened)
        assert runtime.violations == []
        exporter.close()

    def test_of_which_the_one_that_has_it_open_is_killed(
        self, runtime: FakeRuntime, gpu: Gpu
    ) -> None:
        opener = Other()
        address = gpu.allocate(b"contents")
        opener.call("open", 0, runtime.export(0, address))
        opener.kill()
        runtime.free(0, address)
        assert runtime.violations == []
        opener.close()


def uses(runtime: FakeRuntime, gpu: Gpu, address: int) -> list[Callable[[], object]]:
    """Return everything that can be asked of a runtime, but what reads its own notes only."""
    return [
        runtime.devices,
        lambda: runtime.allocate(0, 8),
        lambda: runtime.free(0, address),
        lambda: runtime.export(0, address),
        lambda: runtime.open(0, bytes(HANDLE_NBYTES)),
        lambda: runtime.close(0, address),
        lambda: runtime.make_stream(0),
        lambda: runtime.destroy_stream(0, gpu.stream),
        lambda: runtime.make_event(0),
        lambda: runtime.destroy_event(0, gpu.event),
        lambda: runtime.record(0, gpu.event, gpu.stream),
        lambda: runtime.wait(0, gpu.stream, gpu.event),
        lambda: runtime.query(0, gpu.event),
        lambda: runtime.synchronize(0, gpu.event),
        lambda: runtime.copy(0, gpu.stream, []),
        lambda: runtime.pin(0, address, 8),
        lambda: runtime.unpin(0, address),
    ]


class TestFork:
    def test_nothing_works_in_a_forked_child(self, runtime: FakeRuntime, gpu: Gpu) -> None:
        address = gpu.allocate(b"contents")

        def check() -> None:
            for use in uses(runtime, gpu, address):
                error = error_of(use)
                assert NO_FORK in error.text
                assert error.code == codes.NOT_INITIALIZED

        in_child(check)
        assert gpu.read(address, 8) == b"contents"

    def test_what_a_forked_child_does_is_a_violation(self, runtime: FakeRuntime, gpu: Gpu) -> None:
        address = gpu.allocate(b"contents")

        def check() -> None:
            for use in uses(runtime, gpu, address):
                error_of(use)
            assert len(runtime.violations) == len(uses(runtime, gpu, address))

        in_child(check)

    def test_no_address_is_looked_up_in_a_forked_child(
        self, runtime: FakeRuntime, gpu: Gpu
    ) -> None:
        address = gpu.allocate(b"contents")
        in_child(lambda: assert_forked(lambda: runtime.device_at(address)))

    def test_a_runtime_of_its_own_works_in_a_forked_child(self) -> None:
        in_child(lambda: check_own(FakeRuntime([0])))


def assert_forked(use: Callable[[], object]) -> None:
    assert NO_FORK in error_of(use).text


def check_own(runtime: FakeRuntime) -> None:
    gpu = Gpu(runtime)
    assert gpu.read(gpu.allocate(b"contents"), 8) == b"contents"


def wait_for(event: threading.Event) -> None:
    assert event.wait(10)
