"""Children on the fake CUDA driver: `python -m tests.gpu.driver_children ROLE SETTINGS`.

Everything but the arrays is what runs on a real one: aiomm calls cuda-bindings, which calls it.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy

from aiomm.gpu.bindings import BindingsRuntime
from aiomm.gpu.choice import gpu_runtime, use_runtime
from aiomm.gpu.fake import FakeArray
from tests import children
from tests.children import ReceiverActor, SenderActor
from tests.processes import Child, pattern

__all__ = ["driver_child"]


@asynccontextmanager
async def driver_child(role: str, **settings: object) -> AsyncIterator[Child]:
    """Run one child until the block ends; it has started its endpoint before."""
    process = Child(["-m", "tests.gpu.driver_children", role, json.dumps(settings)])
    try:
        await process.hear("ready")
        yield process
    finally:
        await process.close()


class ReadableBindings(BindingsRuntime):
    """Whose devices' memory numpy can read, since it is the host's."""

    def flat_array(self, device: int, address: int, nbytes: int, owner: object) -> object:
        """Return an array over it."""
        memory: Any = (ctypes.c_ubyte * nbytes).from_address(address)
        memory.owner = owner
        return numpy.frombuffer(memory, numpy.uint8)


class DriverSender(SenderActor):
    """A sender of tensors that lie on a device."""

    def do_put(self, ticket: str, seed: int, num_tokens: int, device: int) -> None:
        """Send tensors of a device."""
        gpu, content = gpu_runtime(), pattern(seed, num_tokens)
        arrays = {
            "embeddings": FakeArray(
                gpu, device, content["embeddings"], "uint8", (num_tokens, 1024)
            ),
            "ids": FakeArray(gpu, device, content["ids"], "int32", (num_tokens,)),
        }
        self.background(json.loads(ticket)["request_id"], self.endpoint.send(ticket, arrays))


async def main(role: str, settings: dict[str, Any]) -> None:
    """Play one role."""
    use_runtime(ReadableBindings())
    await children.obey(DriverSender(settings) if role == "sender" else ReceiverActor(settings))


if __name__ == "__main__":
    role, settings = sys.argv[1:]
    asyncio.run(main(role, json.loads(settings)))
