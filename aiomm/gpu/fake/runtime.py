"""The fake runtime: CUDA's calls over shared memory and threads, and what it does not forgive."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

from ..runtime import Copy, Device, GpuError, GpuRuntime
from .codes import (
    ALREADY_MAPPED,
    ALREADY_PINNED,
    ILLEGAL_ADDRESS,
    INVALID_CONTEXT,
    INVALID_DEVICE,
    INVALID_HANDLE,
    INVALID_VALUE,
    NOT_INITIALIZED,
    NOT_PINNED,
    OUT_OF_MEMORY,
)
from .faults import FakeFaults
from .memory import FakeMemory, Handle, memory_name, open_memory
from .streams import FakeEvent, FakeStream

__all__ = ["FakeRuntime"]

DEVICES_VARIABLE = "AIOMM_FAKE_GPUS"
"""How many devices there are, or which, in the order in which this process sees them: `1,0`."""
TOTAL_NBYTES = 8 << 30


class _Range(NamedTuple):
    """Memory that is gone."""

    start: int
    stop: int


class FakeRuntime(GpuRuntime):
    """Devices out of shared memory.

    Args:
        devices: the numbers of the host's devices that this process sees, in its order; by
            default what `AIOMM_FAKE_GPUS` says, else one.
        faults: what shall go wrong; nothing by default.
    """

    name: ClassVar[str] = "fake"

    def __init__(
        self, devices: Sequence[int] | None = None, *, faults: FakeFaults | None = None
    ) -> None:
        self.faults = FakeFaults() if faults is None else faults
        self.copied: Counter[str] = Counter()
        """Bytes copied so far, by way: `HtoD`, `DtoH`, `DtoD` and `PtoP` between two devices."""
        self.violations: list[str] = []
        """Whatever CUDA would not have forgiven."""
        self.pinned: dict[int, int] = {}
        """Bytes of the host's memory that is pinned, by address."""
        self._numbers = _numbers() if devices is None else list(devices)
        self._process = os.getpid()
        self._memory: dict[int, FakeMemory] = {}
        self._gone: list[_Range] = []
        self._streams: dict[int, FakeStream] = {}
        self._events: dict[int, FakeEvent] = {}
        self._next = 1
        self._lost: dict[int, str] = {}
        """Devices that have failed, and how."""
        self._lock = threading.RLock()
        self._current = threading.local()

    # The devices.

    def devices(self) -> Sequence[Device]:
        """Return the devices that this process sees."""
        self._check_process("cuInit")
        return [
            Device(ordinal, _uuid(number), f"fake GPU {number}", TOTAL_NBYTES, "")
            for ordinal, number in enumerate(self._numbers)
        ]

    def versions(self) -> dict[str, str]:
        """Return that nothing is real."""
        return {"fake": "1"}

    # Memory.

    def allocate(self, device: int, nbytes: int) -> int:
        """Return the address of new zeroed memory."""
        self._check("cuMemAlloc", device)
        if nbytes < 1:
            raise GpuError("cuMemAlloc", INVALID_VALUE, f"{nbytes} bytes")
        if nbytes > TOTAL_NBYTES:
            raise GpuError("cuMemAlloc", OUT_OF_MEMORY, f"out of memory: {nbytes} bytes")
        nonce, uuid = secrets.token_bytes(16), _uuid(self._numbers[device])
        try:
            fd = os.memfd_create(memory_name(nonce), os.MFD_CLOEXEC)
        except OSError as exc:
            raise GpuError("cuMemAlloc", OUT_OF_MEMORY, f"out of memory: {exc}") from exc
        os.ftruncate(fd, nbytes)
        return self._keep(FakeMemory(device, uuid, fd, nbytes, nonce, is_own=True))

    def free(self, device: int, address: int) -> None:
        """Free an allocation of this process's, which no other one may have open."""
        self._check("cuMemFree", device, sticky=False)
        memory = self._own("cuMemFree", address)
        try:
            fcntl.flock(memory.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._violated("memory was freed that another process has open")
        self._drop(memory)

    def export(self, device: int, address: int) -> bytes:
        """Return the handle of an allocation."""
        self._check("cuIpcGetMemHandle", device)
        memory = self._own("cuIpcGetMemHandle", address)
        handle = Handle(os.getpid(), memory.fd, memory.nbytes, memory.uuid, memory.nonce)
        return handle.encoded()

    def open(self, device: int, handle: bytes) -> int:
        """Map another process's allocation."""
        call = "cuIpcOpenMemHandle"
        self._check(call, device)
        process, number, nbytes, uuid, nonce = Handle.decoded(handle)
        if self._is_own(process):
            raise GpuError(call, INVALID_CONTEXT, "the handle is of this very process")
        opened = (memory for memory in self._memory.values() if not memory.is_own)
        if any((memory.nonce, memory.device) == (nonce, device) for memory in opened):
            self._violated("a handle was opened twice")
            raise GpuError(call, ALREADY_MAPPED, "already mapped")
        fd = open_memory(process, number, nonce)
        return self._keep(FakeMemory(device, uuid, fd, nbytes, nonce, is_own=False))

    def _is_own(self, process: int) -> bool:
        return process == os.getpid()

    def close(self, device: int, address: int) -> None:
        """Unmap another process's allocation."""
        self._check("cuIpcCloseMemHandle", device, sticky=False)
        memory = self._memory.get(address)
        if memory is None or memory.is_own:
            self._violated("what is not open was closed")
            raise GpuError("cuIpcCloseMemHandle", INVALID_VALUE, "not open")
        self._drop(memory)

    def device_at(self, address: int) -> int | None:
        """Return the device whose memory is mapped at `address`."""
        self._check_process("cuPointerGetAttribute")
        memory = self._at(address)
        return None if memory is None else memory.device

    # Streams and events.

    def make_stream(self, device: int) -> int:
        """Return a new stream."""
        self._check("cuStreamCreate", device)
        stream = self._number()
        self._streams[stream] = FakeStream()
        return stream

    def destroy_stream(self, device: int, stream: int) -> None:
        """Forget a stream, whose thread ends with its work."""
        self._check("cuStreamDestroy", device, sticky=False)
        self._stream(stream)
        del self._streams[stream]

    def make_event(self, device: int) -> int:
        """Return a new event."""
        self._check("cuEventCreate", device)
        event = self._number()
        self._events[event] = FakeEvent()
        return event

    def destroy_event(self, device: int, event: int) -> None:
        """Forget an event."""
        self._check("cuEventDestroy", device, sticky=False)
        self._event(event)
        del self._events[event]

    def record(self, device: int, event: int, stream: int) -> None:
        """Let `event` be over after what `stream` has by now."""
        self._check("cuEventRecord", device)
        recorded = self._event(event)
        ticket = recorded.issue()
        self._stream(stream).give(lambda: recorded.finish(ticket))

    def wait(self, device: int, stream: int, event: int) -> None:
        """Let `stream` wait for `event` as it is recorded now."""
        self._check("cuStreamWaitEvent", device)
        awaited = self._event(event)
        ticket = awaited.issued
        self._stream(stream).give(lambda: awaited.wait(ticket))

    def query(self, device: int, event: int) -> bool:
        """Whether `event` is over."""
        self._check("cuEventQuery", device)
        asked = self._event(event)
        return asked.done >= asked.issued

    def synchronize(self, device: int, event: int) -> None:
        """Wait until `event` is over."""
        self._check("cuEventSynchronize", device)
        asked = self._event(event)
        asked.wait(asked.issued)
        self._check("cuEventSynchronize", device)

    def run(self, stream: int, work: Callable[[], None]) -> None:
        """Do some work on a stream, as a kernel would; 0 is the default stream."""
        self._stream(stream).give(work)

    def current_device(self) -> int | None:
        """Return the device that :meth:`use_device` has named on this thread, if any."""
        device: int | None = getattr(self._current, "device", None)
        return device

    def use_device(self, device: int) -> None:
        """Work on a device on this thread, as `torch.cuda.set_device` has it."""
        self._current.device = device

    def current_stream(self, device: int) -> int:
        """Return the stream that :meth:`use_stream` has named on this thread."""
        return int(getattr(self._current, "stream", 0))

    def join(self) -> None:
        """Return when no thread of a stream is left: what is stalled has to be released before."""
        for stream in list(self._streams.values()):
            stream.join()

    @contextmanager
    def use_stream(self, stream: int) -> Iterator[None]:
        """Work on `stream` on this thread, until the block ends."""
        before = self.current_stream(0)
        self._current.stream = stream
        try:
            yield
        finally:
            self._current.stream = before

    # Copies.

    def copy(self, device: int, stream: int, copies: Sequence[Copy]) -> None:
        """Give copies to `stream`. All their memory must be there now, and when its turn comes."""
        self._check("cuMemcpyAsync", device)
        self.faults.num_copies += 1
        number = self.faults.num_copies
        if number == self.faults.refuse_at:
            raise GpuError("cuMemcpyAsync", INVALID_VALUE, "refused on demand")
        for each in copies:
            self._check_memory(each)
        self._stream(stream).give(lambda: self._copy(device, number, copies))

    def pin(self, device: int, address: int, nbytes: int) -> None:
        """Note that this memory is pinned; it makes no difference here."""
        self._check("cuMemHostRegister", device)
        if address in self.pinned:
            raise GpuError("cuMemHostRegister", ALREADY_PINNED, "already registered")
        self.pinned[address] = nbytes

    def unpin(self, device: int, address: int) -> None:
        """Note that it is not any more."""
        self._check("cuMemHostUnregister", device, sticky=False)
        if self.pinned.pop(address, None) is None:
            self._violated("memory was unpinned that is not pinned")
            raise GpuError("cuMemHostUnregister", NOT_PINNED, "not registered")

    def flat_array(self, device: int, address: int, nbytes: int, owner: object) -> object:
        """Return a tensor of torch, on the CPU, over the device's memory; or numpy's array."""
        if not nbytes:
            memory: Any = bytearray()
        else:
            memory = (ctypes.c_ubyte * nbytes).from_address(address)
            memory.owner = owner
        try:
            import torch
        except ImportError:
            import numpy

            return numpy.frombuffer(memory, numpy.uint8)
        if not nbytes:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(memory, dtype=torch.uint8)

    def _copy(self, device: int, number: int, copies: Sequence[Copy]) -> None:
        """Copy, on the stream's thread."""
        self.faults.hold(number)
        if number == self.faults.fail_at:
            self._lost[device] = "an illegal memory access was encountered, on demand"
            return
        for target, source, nbytes in copies:
            try:
                way = self._check_memory(Copy(target, source, nbytes))
            except GpuError as exc:
                self._lost[device] = exc.text
                return
            count = nbytes // 2 if number == self.faults.short_at else nbytes
            ctypes.memmove(target, source, count)
            self.copied[way] += count

    def _check_memory(self, copy: Copy) -> str:
        """Return the way of a copy, if its memory is there."""
        places = [self._place(copy.target, copy.nbytes), self._place(copy.source, copy.nbytes)]
        match places:
            case [None, None]:
                return "HtoH"
            case [None, _]:
                return "DtoH"
            case [_, None]:
                return "HtoD"
            case [target, source]:
                return "DtoD" if target == source else "PtoP"
        raise AssertionError(places)

    def _place(self, address: int, nbytes: int) -> bytes | None:
        """Return the UUID of the device that so many bytes lie on."""
        for start, stop in self._gone:
            if start < address + nbytes and address < stop:
                self._violated("memory was used after it was freed or closed")
                raise GpuError("cuMemcpyAsync", ILLEGAL_ADDRESS, "no such memory any more")
        memory = self._at(address)
        if memory is None:
            return None
        if address + nbytes > memory.address + memory.nbytes:
            self._violated("a copy went over the end of an allocation")
            raise GpuError("cuMemcpyAsync", INVALID_VALUE, "over the end of the allocation")
        return memory.uuid

    # What there is.

    def _check_process(self, call: str) -> None:
        if os.getpid() != self._process:
            self._violated("CUDA was used after a fork")
            text = "CUDA does not survive a fork: spawn processes instead"
            raise GpuError(call, NOT_INITIALIZED, text)

    def _check(self, call: str, device: int, *, sticky: bool = True) -> None:
        self._check_process(call)
        if not 0 <= device < len(self._numbers):
            raise GpuError(call, INVALID_DEVICE, f"there is no device {device}")
        if device in self._lost and sticky:
            raise GpuError(call, ILLEGAL_ADDRESS, self._lost[device], is_sticky=True)

    def _violated(self, how: str) -> None:
        self.violations.append(how)

    def _number(self) -> int:
        with self._lock:
            self._next += 1
            return self._next

    def _stream(self, stream: int) -> FakeStream:
        with self._lock:
            if not stream:
                return self._streams.setdefault(stream, FakeStream())
            if stream in self._streams:
                return self._streams[stream]
        self._violated("a stream was used that is destroyed")
        raise GpuError("cuStream", INVALID_HANDLE, "no such stream")

    def _event(self, event: int) -> FakeEvent:
        with self._lock:
            if event in self._events:
                return self._events[event]
        self._violated("an event was used that is destroyed")
        raise GpuError("cuEvent", INVALID_HANDLE, "no such event")

    def _keep(self, memory: FakeMemory) -> int:
        with self._lock:
            self._memory[memory.address] = memory
        return memory.address

    def _drop(self, memory: FakeMemory) -> None:
        with self._lock:
            del self._memory[memory.address]
            self._gone.append(_Range(memory.address, memory.address + memory.nbytes))
        memory.end()

    def _own(self, call: str, address: int) -> FakeMemory:
        memory = self._memory.get(address)
        if memory is None or not memory.is_own:
            self._violated(f"{call} of what is no allocation of this process")
            raise GpuError(call, INVALID_VALUE, "not an allocation of this process")
        return memory

    def _at(self, address: int) -> FakeMemory | None:
        with self._lock:
            return next((each for each in self._memory.values() if each.holds(address)), None)


def _numbers() -> list[int]:
    told = os.environ.get(DEVICES_VARIABLE, "1")
    return [int(number) for number in told.split(",")] if "," in told else list(range(int(told)))


def _uuid(number: int) -> bytes:
    return hashlib.md5(f"fake GPU {number}".encode(), usedforsecurity=False).digest()
