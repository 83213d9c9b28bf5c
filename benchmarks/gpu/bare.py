"""A child that uses the runtime alone: handles, and what copies, wake-ups and pins cost."""

from __future__ import annotations

import asyncio
import mmap
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from aiomm.buffers.memcpy import address_of
from aiomm.gpu import bindings
from aiomm.gpu.lanes import Mark, finished, lanes_of
from aiomm.gpu.memory import DeviceMemory
from aiomm.gpu.runtime import Copy, GpuError
from benchmarks.gpu.actor import Actor
from benchmarks.gpu.content import pattern
from benchmarks.gpu.facts import gpus, machine_facts

__all__ = ["Bare"]

GAP_NBYTES = 512
"""Between two extents, so that they are not merged."""
BATCH_BOUND = "MAX_LOOP_COPIES"


class Bare(Actor):
    """Does single calls."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.own: dict[str, int] = {}
        self.foreign: dict[str, int] = {}

    def do_gpus(self) -> dict[str, Any]:
        """Return what there is."""
        return gpus()

    def do_facts(self) -> dict[str, Any]:
        """Return what the operating system tells."""
        return machine_facts()

    # Handles.

    def do_allocate(self, key: str, nbytes: int) -> None:
        """Allocate memory, and remember it as `key`."""
        self.own[key] = self.runtime.allocate(self.device, nbytes)

    def do_free(self, key: str) -> None:
        """Free it."""
        self.runtime.free(self.device, self.own.pop(key))

    def do_export(self, key: str, offset: int = 0) -> str:
        """Return its handle."""
        return self.runtime.export(self.device, self.own[key] + offset).hex()

    def do_export_costs(self, key: str, rounds: int) -> list[float]:
        """Return the seconds that it takes."""
        return [timed(lambda: self.do_export(key)) for _ in range(rounds)]

    def do_open(self, key: str, handle: str) -> int:
        """Open another process's memory, and remember it as `key`."""
        self.foreign[key] = self.runtime.open(self.device, bytes.fromhex(handle))
        return self.foreign[key]

    def do_close(self, key: str) -> None:
        """Close it; what it was is still remembered."""
        self.runtime.close(self.device, self.foreign[key])

    def do_open_and_close(self, handle: str, rounds: int) -> dict[str, list[float]]:
        """Return the seconds that both take."""
        seconds: dict[str, list[float]] = {"open": [], "close": []}
        for _ in range(rounds):
            seconds["open"].append(timed(lambda: self.do_open("timed", handle)))
            seconds["close"].append(timed(lambda: self.do_close("timed")))
        return seconds

    def do_write(self, key: str, seed: int, nbytes: int) -> None:
        """Write a pattern."""
        content = bytearray(pattern(seed, nbytes))
        copy = Copy(self._at(key), address_of(memoryview(content)), nbytes)
        lanes_of(self.runtime, self.device).copy_now([copy])

    def do_has(self, key: str, seed: int, nbytes: int) -> bool:
        """Whether the pattern is there."""
        found = bytearray(nbytes)
        lanes_of(self.runtime, self.device).copy_to_host(found, self._at(key))
        return found == pattern(seed, nbytes)

    def do_works(self) -> None:
        """See that memory can be allocated, written and read."""
        self.do_allocate("works", 4096)
        self.do_write("works", 1, 4096)
        if not self.do_has("works", 1, 4096):
            raise ValueError("memory does not hold what was written")
        self.do_free("works")

    def _at(self, key: str) -> int:
        return self.own[key] if key in self.own else self.foreign[key]

    # Costs.

    def do_pin_costs(self, nbytes: int, rounds: int) -> dict[str, list[float]]:
        """Return the seconds that it takes to pin memory of the host, and to take it back."""
        memory = mmap.mmap(-1, nbytes)
        memory[:] = bytes(nbytes)
        view = memoryview(memory)
        address = address_of(view)
        seconds: dict[str, list[float]] = {"pin": [], "unpin": []}
        for _ in range(rounds):
            pin = timed(lambda: self.runtime.pin(self.device, address, nbytes))
            unpin = timed(lambda: self.runtime.unpin(self.device, address))
            seconds["pin"].append(pin)
            seconds["unpin"].append(unpin)
        return seconds

    def do_copy_costs(
        self, nbytes: int, num_extents: int, how: str, rounds: int
    ) -> dict[str, list[float]]:
        """Return the seconds until copies are given to the GPU, and until it has done them.

        Args:
            nbytes: of all extents.
            num_extents: with gaps between them.
            how: `loop` or `batch`.
            rounds: how often; two more are done before.
        """
        piece = max(1, nbytes // num_extents)
        step = piece + (GAP_NBYTES if num_extents > 1 else 0)
        room = step * num_extents
        ends = [DeviceMemory(self.runtime, self.device, room) for _ in range(2)]
        copies = [
            Copy(ends[0].address + n * step, ends[1].address + n * step, piece)
            for n in range(num_extents)
        ]
        before = getattr(bindings, BATCH_BOUND)
        setattr(bindings, BATCH_BOUND, 0 if how == "batch" else 1 << 40)
        try:
            return self._timed_copies(copies, rounds)
        finally:
            setattr(bindings, BATCH_BOUND, before)

    def do_has_batches(self) -> bool:
        """Whether the runtime gives many copies at once, as far as it knows by now."""
        return bool(getattr(self.runtime, "_has_batches", False))

    def _timed_copies(self, copies: Sequence[Copy], rounds: int) -> dict[str, list[float]]:
        stream = self.runtime.make_stream(self.device)
        seconds: dict[str, list[float]] = {"given": [], "done": []}
        for number in range(rounds + 2):
            began = time.perf_counter()
            self.runtime.copy(self.device, stream, copies)
            given = time.perf_counter() - began
            spin(Mark(self.runtime, self.device, stream))
            if number >= 2:
                seconds["given"].append(given)
                seconds["done"].append(time.perf_counter() - began)
        self.runtime.destroy_stream(self.device, stream)
        return seconds

    async def do_waking(self, nbytes: int, rounds: int) -> dict[str, list[float]]:
        """Return the seconds from a copy's beginning until its end is known, by ways to wait.

        `query` asks without a pause; the others come on top of what it takes: `synchronize`
        sleeps on this thread, `thread` on another one, which wakes the loop, and `lanes` is what
        aiomm does.
        """
        ends = [DeviceMemory(self.runtime, self.device, nbytes) for _ in range(2)]
        copy = Copy(ends[0].address, ends[1].address, nbytes)
        stream = self.runtime.make_stream(self.device)
        ways: dict[str, Callable[[Mark], Awaitable[None]]] = {
            "query": queried,
            "synchronize": synchronized,
            "thread": synchronized_on_thread,
            "lanes": finished,
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(rounds + 2):
            for way, wait in ways.items():
                began = time.perf_counter()
                self.runtime.copy(self.device, stream, [copy])
                await wait(Mark(self.runtime, self.device, stream))
                if number >= 2:
                    seconds[way].append(time.perf_counter() - began)
        return seconds

    # What must be refused.

    def do_export_tensor(self, nbytes: int) -> str:
        """Try to export a tensor of torch's allocator; return what is said against it.

        Raises:
            ValueError: nothing is.
        """
        zeros = bytes(nbytes)
        tensor = self.tensors.make("cuda", self.device, zeros, "uint8", (nbytes,))
        try:
            self.runtime.export(self.device, tensor.data_ptr())
        except GpuError as exc:
            return str(exc)
        raise ValueError("memory that other processes cannot open was exported")


def timed(action: Callable[[], object]) -> float:
    """Return how long it takes."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def spin(mark: Mark) -> None:
    """Return when it is over, as soon as anybody can know."""
    while not mark.is_over():
        pass


async def queried(mark: Mark) -> None:
    """Ask without a pause."""
    spin(mark)


async def synchronized(mark: Mark) -> None:
    """Sleep on this thread."""
    mark.synchronize()


async def synchronized_on_thread(mark: Mark) -> None:
    """Sleep on another thread."""
    await asyncio.to_thread(mark.synchronize)
