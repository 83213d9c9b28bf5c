"""Memory of a GPU lives exactly as long as somebody refers to it."""

from __future__ import annotations

import ctypes
import gc
import logging
import subprocess
import sys
import threading

import pytest

from aiomm.gpu import memory as memory_module
from aiomm.gpu.fake import FakeRuntime
from aiomm.gpu.memory import DeviceMemory
from aiomm.gpu.runtime import Copy, GpuError

pytestmark = pytest.mark.usefixtures("no_leaks")


def filled(fake: FakeRuntime, content: bytes, device: int = 0) -> DeviceMemory:
    memory = DeviceMemory(fake, device, len(content))
    ctypes.memmove(memory.address, content, len(content))
    return memory


class TestLife:
    def test_begins_with_an_allocation_on_the_device(self, fake: FakeRuntime) -> None:
        memory = DeviceMemory(fake, 1, 4096)
        assert [fake.device_at(memory.address + at) for at in (0, 4095)] == [1, 1]
        assert (memory.runtime, memory.device, memory.nbytes) == (fake, 1, 4096)
        assert repr(memory) == "<DeviceMemory of 4096 bytes on cuda:1>"

    def test_ends_with_the_last_reference_and_not_before(self, fake: FakeRuntime) -> None:
        memory = DeviceMemory(fake, 0, 64)
        address, other = memory.address, memory
        del memory
        gc.collect()
        assert fake.device_at(address) == 0
        del other
        assert fake.device_at(address) is None

    def test_ends_on_whatever_thread(self, fake: FakeRuntime) -> None:
        references = [DeviceMemory(fake, 0, 64)]
        address = references[0].address
        thread = threading.Thread(target=references.clear)
        thread.start()
        thread.join()
        assert fake.device_at(address) is None

    def test_never_ends_once_it_is_leaked(
        self, fake: FakeRuntime, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(memory_module, "_leaked", [])
        memory = DeviceMemory(fake, 0, 64)
        address = memory.address
        memory.leak()
        del memory
        gc.collect()
        assert fake.device_at(address) == 0

    def test_does_not_begin_where_there_is_no_memory(self, fake: FakeRuntime) -> None:
        with pytest.raises(GpuError, match="no device 2"):
            DeviceMemory(fake, 2, 64)
        assert fake._memory == {}

    def test_ends_with_a_remark_where_it_cannot_be_freed(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Refusing(FakeRuntime):
            def free(self, device: int, address: int) -> None:
                super().free(device, address)
                raise GpuError("cuMemFree", 700, "an illegal memory access was encountered")

        caplog.set_level(logging.DEBUG, "aiomm.gpu")
        memory = DeviceMemory(Refusing([0]), 0, 64)
        del memory
        assert caplog.messages == [
            "! memory of cuda:0 was not freed: "
            "cuMemFree: an illegal memory access was encountered (700)"
        ]


AT_EXIT = """
import sys
from aiomm.gpu.fake import FakeRuntime
from aiomm.gpu.memory import DeviceMemory

class Telling(FakeRuntime):
    def free(self, device, address):
        print("freed", flush=True)
        super().free(device, address)

memory = DeviceMemory(Telling([0]), 0, 64)
DeviceMemory(memory.runtime, 0, 64)
print("end", flush=True)
"""


def test_nothing_is_freed_at_exit() -> None:
    """Another process may have it open still: that is left to the driver."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", AT_EXIT],
        timeout=20,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout.split(), done.stderr) == (["freed", "end"], "")


class TestContent:
    def test_is_read_to_the_host(self, fake: FakeRuntime) -> None:
        memory = filled(fake, bytes(range(256)))
        assert memory.read(0, 256) == bytes(range(256))
        assert memory.read(250, 6) == bytes(range(250, 256))
        assert memory.read(256, 0) == b""
        assert fake.copied == {"DtoH": 262}

    def test_is_copied_within_and_from_elsewhere(self, fake: FakeRuntime) -> None:
        memory, other = filled(fake, b"contents"), filled(fake, b"retained", device=1)
        host = ctypes.create_string_buffer(b"!?", 2)
        begin, away = memory.address, other.address
        memory.copy([Copy(begin, begin + 4, 4)])
        memory.copy([Copy(begin + 4, away, 2), Copy(begin + 6, ctypes.addressof(host), 2)])
        assert memory.read(0, 8) == b"entsre!?"
        assert fake.copied == {"DtoD": 4, "PtoP": 2, "HtoD": 2, "DtoH": 8}

    def test_is_there_when_the_copy_returns(self, fake: FakeRuntime) -> None:
        fake.faults.stall_at = 1
        memory = filled(fake, b"contents")
        copying = threading.Thread(
            target=memory.copy, args=([Copy(memory.address, memory.address + 4, 4)],)
        )
        copying.start()
        assert fake.faults.stalled.wait(10)
        assert copying.is_alive()
        fake.faults.release()
        copying.join()
        assert ctypes.string_at(memory.address, 8) == b"entsents"

    def test_of_a_lost_device_is_lost(self, fake: FakeRuntime) -> None:
        fake.faults.fail_at = 1
        memory = filled(fake, b"contents")
        with pytest.raises(GpuError, match="illegal memory access"):
            memory.copy([Copy(memory.address, memory.address + 4, 4)])
        with pytest.raises(GpuError, match="illegal memory access"):
            memory.read(0, 8)
