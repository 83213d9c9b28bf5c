"""A GPU that is none: shared memory and threads, for tests of whoever uses aiomm without a GPU.

Chosen by `AIOMM_GPU_RUNTIME=fake`. Memory of its devices is shared memory, so that handles lead
from one process into another; each stream is a queue that a thread works off. It is stricter than
CUDA: what CUDA leaves undefined (freeing what another process has open, using what was closed,
opening twice, handles of the inside of an allocation, any use after a fork) is an error here, and
stands in :attr:`FakeRuntime.violations`.

::

    runtime = FakeRuntime(faults=FakeFaults(stall_at=2))
    ...
    await asyncio.to_thread(runtime.faults.stalled.wait)     # the second copy has begun
    runtime.faults.release()                                 # let it go on
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import mmap
import os
import secrets
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from .runtime import HANDLE_NBYTES, UUID_NBYTES, Copy, Device, GpuError, GpuRuntime

__all__ = ["FakeArray", "FakeFaults", "FakeRuntime"]

DEVICES_VARIABLE = "AIOMM_FAKE_GPUS"
"""How many devices there are, or which, in the order in which this process sees them: `1,0`."""
TOTAL_NBYTES = 8 << 30
INVALID_VALUE, OUT_OF_MEMORY, NOT_INITIALIZED = 1, 2, 3
INVALID_CONTEXT, ALREADY_MAPPED, ILLEGAL_ADDRESS = 201, 208, 700
INVALID_HANDLE, ALREADY_PINNED, NOT_PINNED = 400, 712, 713

_HANDLE = struct.Struct(f"8siiq{UUID_NBYTES}s16s8x")
_MAGIC = b"fakegpu\x01"
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_MAP_FAILED = ctypes.c_void_p(-1).value
_MAP_FIXED, _MAP_NORESERVE, _PROT_NONE = 0x10, 0x4000, 0


@dataclass
class FakeFaults:
    """What goes wrong with which call of :meth:`FakeRuntime.copy`; they are counted from 1."""

    delay: float = 0.0
    """Seconds that every one takes longer."""
    stall_at: int | None = None
    """The one that waits for :meth:`release`."""
    refuse_at: int | None = None
    """The one that raises an error at once."""
    fail_at: int | None = None
    """The one that fails on the device, which is lost from then on."""
    short_at: int | None = None
    """The one that copies half of its bytes, and says nothing."""
    num_copies: int = 0
    """Calls so far."""
    stalled: threading.Event = field(default_factory=threading.Event)
    """Set when the one named by `stall_at` has begun to wait."""
    _released: threading.Event = field(default_factory=threading.Event, repr=False)

    def release(self) -> None:
        """Let the stalled copy go on."""
        self._released.set()

    def hold(self, number: int) -> None:
        """Keep copy `number` waiting for as long as it shall; on its stream's thread."""
        if number == self.stall_at:
            self.stalled.set()
            self._released.wait()
        if self.delay:
            time.sleep(self.delay)


class _Memory:
    """One mapped allocation, of this process or of another one's."""

    def __init__(
        self, device: int, uuid: bytes, fd: int, nbytes: int, nonce: bytes, *, is_own: bool
    ) -> None:
        self.device = device
        self.uuid = uuid
        """Of the device that it lies on; with another process's, not the one that reaches it."""
        self.fd = fd
        self.nbytes = nbytes
        self.nonce = nonce
        self.is_own = is_own
        address = _libc.mmap(None, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
        if address == _MAP_FAILED:
            os.close(fd)
            raise GpuError("cuMemAlloc", OUT_OF_MEMORY, "out of memory: it cannot be mapped")
        self.address: int = address

    def holds(self, address: int) -> bool:
        return self.address <= address < self.address + self.nbytes

    def end(self) -> None:
        """Unmap, and keep the addresses, so that nobody else's memory is found there."""
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        flags = private | _MAP_FIXED | _MAP_NORESERVE
        _libc.mmap(self.address, self.nbytes, _PROT_NONE, flags, -1, 0)
        os.close(self.fd)


class _Event:
    """How often it was recorded, and which of the records are over."""

    def __init__(self) -> None:
        self.issued = 0
        self.done = 0
        self.changed = threading.Condition()

    def issue(self) -> int:
        with self.changed:
            self.issued += 1
            return self.issued

    def finish(self, ticket: int) -> None:
        with self.changed:
            self.done = max(self.done, ticket)
            self.changed.notify_all()

    def wait(self, ticket: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.done >= ticket)


class _Stream:
    """A queue of work, and a thread for as long as there is some."""

    def __init__(self) -> None:
        self._work: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()
        self._is_running = False
        self._thread: threading.Thread | None = None

    def give(self, work: Callable[[], None]) -> None:
        with self._lock:
            self._work.append(work)
            if not self._is_running:
                self._is_running = True
                self._thread = threading.Thread(
                    target=self._run, name="fake-gpu-stream", daemon=True
                )
                self._thread.start()

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._work:
                    self._is_running = False
                    return
                work = self._work.popleft()
            work()


class FakeArray:
    """An array in a fake device's memory, as cupy's are seen from outside.

    Args:
        runtime: whose memory; it must be memory of the host in truth, as the fake's is.
        device: on which device.
        content: what it holds.
        dtype: the torch name of the dtype.
        shape: the dtype and shape must make as many bytes.
        stream: on which its content will be ready, for whoever asks the array.
    """

    def __init__(
        self,
        runtime: GpuRuntime,
        device: int,
        content: bytes,
        dtype: str,
        shape: tuple[int, ...],
        stream: int | None = None,
    ) -> None:
        self.dtype = dtype
        self.shape = shape
        self.address = runtime.allocate(device, max(1, len(content)))
        self.nbytes = len(content)
        self.stream = stream
        self._runtime = runtime
        self._device = device
        self.fill(content)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "version": 3,
            "shape": self.shape,
            "typestr": f"|V{self.nbytes // max(1, _count(self.shape))}",
            "data": (self.address, False),
            "strides": None,
            "stream": self.stream,
        }

    def fill(self, content: bytes) -> None:
        """Change the content now, whatever streams are about to do."""
        ctypes.memmove(self.address, content, len(content))

    def __del__(self) -> None:
        if hasattr(self, "_runtime"):
            self._runtime.free(self._device, self.address)


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
        self._memory: dict[int, _Memory] = {}
        self._gone: list[_Range] = []
        self._streams: dict[int, _Stream] = {}
        self._events: dict[int, _Event] = {}
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
            fd = os.memfd_create(_memory_name(nonce), os.MFD_CLOEXEC)
        except OSError as exc:
            raise GpuError("cuMemAlloc", OUT_OF_MEMORY, f"out of memory: {exc}") from exc
        os.ftruncate(fd, nbytes)
        return self._keep(_Memory(device, uuid, fd, nbytes, nonce, is_own=True))

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
        return _HANDLE.pack(
            _MAGIC, os.getpid(), memory.fd, memory.nbytes, memory.uuid, memory.nonce
        )

    def open(self, device: int, handle: bytes) -> int:
        """Map another process's allocation."""
        call = "cuIpcOpenMemHandle"
        self._check(call, device)
        if len(handle) != HANDLE_NBYTES or not handle.startswith(_MAGIC):
            raise GpuError(call, INVALID_VALUE, "not a handle")
        _, process, number, nbytes, uuid, nonce = _HANDLE.unpack(handle)
        if self._is_own(process):
            raise GpuError(call, INVALID_CONTEXT, "the handle is of this very process")
        opened = (memory for memory in self._memory.values() if not memory.is_own)
        if any((memory.nonce, memory.device) == (nonce, device) for memory in opened):
            self._violated("a handle was opened twice")
            raise GpuError(call, ALREADY_MAPPED, "already mapped")
        fd = _open_memory(process, number, nonce)
        return self._keep(_Memory(device, uuid, fd, nbytes, nonce, is_own=False))

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
        self._streams[stream] = _Stream()
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
        self._events[event] = _Event()
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
            raise GpuError(call, 101, f"there is no device {device}")
        if device in self._lost and sticky:
            raise GpuError(call, ILLEGAL_ADDRESS, self._lost[device], is_sticky=True)

    def _violated(self, how: str) -> None:
        self.violations.append(how)

    def _number(self) -> int:
        with self._lock:
            self._next += 1
            return self._next

    def _stream(self, stream: int) -> _Stream:
        with self._lock:
            if not stream:
                return self._streams.setdefault(stream, _Stream())
            if stream in self._streams:
                return self._streams[stream]
        self._violated("a stream was used that is destroyed")
        raise GpuError("cuStream", INVALID_HANDLE, "no such stream")

    def _event(self, event: int) -> _Event:
        with self._lock:
            if event in self._events:
                return self._events[event]
        self._violated("an event was used that is destroyed")
        raise GpuError("cuEvent", INVALID_HANDLE, "no such event")

    def _keep(self, memory: _Memory) -> int:
        with self._lock:
            self._memory[memory.address] = memory
        return memory.address

    def _drop(self, memory: _Memory) -> None:
        with self._lock:
            del self._memory[memory.address]
            self._gone.append(_Range(memory.address, memory.address + memory.nbytes))
        memory.end()

    def _own(self, call: str, address: int) -> _Memory:
        memory = self._memory.get(address)
        if memory is None or not memory.is_own:
            self._violated(f"{call} of what is no allocation of this process")
            raise GpuError(call, INVALID_VALUE, "not an allocation of this process")
        return memory

    def _at(self, address: int) -> _Memory | None:
        with self._lock:
            return next((each for each in self._memory.values() if each.holds(address)), None)


def _numbers() -> list[int]:
    told = os.environ.get(DEVICES_VARIABLE, "1")
    return [int(number) for number in told.split(",")] if "," in told else list(range(int(told)))


def _uuid(number: int) -> bytes:
    return hashlib.md5(f"fake GPU {number}".encode(), usedforsecurity=False).digest()


def _memory_name(nonce: bytes) -> str:
    return f"fake-gpu-{nonce.hex()}"


def _open_memory(process: int, number: int, nonce: bytes) -> int:
    """Return a descriptor of another process's memory, which is marked as open until it closes."""
    path = f"/proc/{process}/fd/{number}"
    try:
        if _memory_name(nonce) not in os.readlink(path):
            raise FileNotFoundError("another file has its number")
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        text = f"the exporting process is gone, or has freed it: {exc}"
        raise GpuError("cuIpcOpenMemHandle", INVALID_VALUE, text) from exc
    fcntl.flock(fd, fcntl.LOCK_SH)
    return fd


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count
