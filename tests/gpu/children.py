"""Children with a fake GPU: `python -m tests.gpu.children ROLE SETTINGS`, told what to do as usual.

They are those of :mod:`tests.children`. What a sender sends may lie on a device, and be made late;
a receiver may read slowly.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiomm
from aiomm.gpu.choice import gpu_runtime
from aiomm.gpu.fake import FakeArray, FakeRuntime
from tests import children
from tests.children import Actor, ReceiverActor, SenderActor, report
from tests.processes import SCHEMA, Child, pattern

__all__ = ["gpu_child"]


@asynccontextmanager
async def gpu_child(role: str, **settings: object) -> AsyncIterator[Child]:
    """Run one child until the block ends; it has started its endpoint before."""
    process = Child(["-m", "tests.gpu.children", role, json.dumps(settings)])
    try:
        await process.hear("ready")
        yield process
    finally:
        await process.close()


class Gpu(Actor):
    """What both kinds of child can be told of their runtime."""

    def do_measure(self) -> None:
        """Report the bytes copied, by way, and whatever CUDA would not have forgiven."""
        gpu = runtime()
        report("measured", copied=gpu.copied, violations=gpu.violations)

    def do_faults(self, **faults: Any) -> None:
        """Have a later copy go wrong: the numbers count from the next one."""
        for name, value in faults.items():
            number = value + runtime().faults.num_copies if name.endswith("_at") else value
            setattr(runtime().faults, name, number)
        threading.Thread(target=self._tell_of_the_stall, daemon=True).start()

    def _tell_of_the_stall(self) -> None:
        runtime().faults.stalled.wait()
        report("stalled")

    def do_leftovers(self) -> None:
        """Report how much of what a process can leak there is."""
        descriptors = len(os.listdir("/proc/self/fd"))
        report("leftovers", descriptors=descriptors, threads=threading.active_count())

    def do_release_copy(self) -> None:
        """Let the stalled copy go on."""
        runtime().faults.release()


class GpuSender(Gpu, SenderActor):
    """A sender."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.made = threading.Event()

    def do_put(
        self, ticket: str, seed: int, num_tokens: int, device: int, is_late: bool = False
    ) -> None:
        """Send tensors of a device; late ones are made when the child is told to."""
        arrays = device_pattern(seed, num_tokens, device)
        stream = None
        if is_late:
            gpu, stream = runtime(), runtime().make_stream(device)
            contents = {name: bytes(pattern(seed, num_tokens)[name]) for name in arrays}
            for array in arrays.values():
                array.fill(bytes(array.nbytes))

            def make() -> None:
                self.made.wait()
                for name, array in arrays.items():
                    array.fill(contents[name])

            gpu.run(stream, make)
        request_id = json.loads(ticket)["request_id"]
        self.background(request_id, self.endpoint.send(ticket, arrays, stream=stream, timeout=60))

    def do_make(self) -> None:
        """Make the late tensors."""
        self.made.set()

    def do_send_once(self, ticket: str) -> None:
        """Send out of a sender that is made for it, and closed again."""
        self.background("", self._send_once(ticket))

    async def _send_once(self, ticket: str) -> aiomm.TransferStats:
        async with aiomm.Sender(SCHEMA) as sender:
            return await sender.send(ticket, device_pattern(1, 10, 0))


class GpuReceiver(Gpu, ReceiverActor):
    """A receiver."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.read = threading.Event()

    def do_blocks(self) -> None:
        """Report how many blocks are in which state."""
        report("blocks", **self.endpoint.metrics())

    def do_expect_slowly(self, request_id: str) -> None:
        """Expect a request, and release its result while a stream still reads it."""
        report("ticket", ticket=self.endpoint.expect(request_id).to_json())
        self.background(request_id, self._read_slowly(request_id))

    async def _read_slowly(self, request_id: str) -> aiomm.Lease:
        lease = await self.endpoint.receive(request_id)
        stream = runtime().make_stream(0)
        runtime().run(stream, self._finish_reading)
        lease.wait_stream(stream)
        lease.release()
        report("released")
        return lease

    def _finish_reading(self) -> None:
        self.read.wait()

    def do_cancel(self, request_id: str) -> None:
        """Give a request up."""
        self.endpoint.cancel(request_id, "told to")

    def do_finish_reading(self) -> None:
        """Let the stream end."""
        self.read.set()

    def result(self, request_id: str, result: Any) -> dict[str, Any]:
        """Return what has arrived, unless it is released."""
        if result._is_released:
            return {"error": None}
        kind = {"is_view": result.is_view, "plane": result.stats.plane}
        return {**super().result(request_id, result), **kind}


def runtime() -> FakeRuntime:
    """Return this process's."""
    gpu = gpu_runtime()
    assert isinstance(gpu, FakeRuntime)
    return gpu


def device_pattern(seed: int, num_tokens: int, device: int) -> dict[str, FakeArray]:
    """Return the tensors of a request in the memory of a device."""
    content = pattern(seed, num_tokens)
    return {
        "embeddings": FakeArray(
            runtime(), device, content["embeddings"], "uint8", (num_tokens, 1024)
        ),
        "ids": FakeArray(runtime(), device, content["ids"], "int32", (num_tokens,)),
    }


async def close_and_tell(actor: Gpu) -> None:
    """Obey, and tell at last what CUDA would not have forgiven; the pool is freed by then."""
    await children.obey(actor)  # type: ignore[arg-type]
    gc.collect()
    report("gone", violations=runtime().violations, num_pinned=len(runtime().pinned))


async def main(role: str, settings: dict[str, Any]) -> None:
    """Play one role."""
    await close_and_tell(GpuSender(settings) if role == "sender" else GpuReceiver(settings))


if __name__ == "__main__":
    role, settings = sys.argv[1:]
    asyncio.run(main(role, json.loads(settings)))
