"""The mooncake plane with memory of GPUs, as its CUDA build has it: fake engine and fake GPU."""

from __future__ import annotations

import asyncio
import threading

import pytest

import aiomm
from aiomm.buffers.arena import Arena, HostArena
from aiomm.buffers.cuda import CudaArena
from aiomm.buffers.layout import ByteRange
from aiomm.buffers.tensors import TokenRows, memory_of
from aiomm.errors import PlaneUnavailable
from aiomm.gpu.fake import FakeArray, FakeRuntime
from aiomm.planes.base import Plane, Run
from aiomm.planes.mooncake import MooncakePlane
from aiomm.planes.mooncake.sending import MooncakeArena
from aiomm.types import Field

from .contract import NotesContract, bytes_of, expected_content, random_rows
from .fake_mooncake import FakeNetwork
from .test_cuda_ipc import assert_set, fake
from .test_mooncake import network

__all__ = ["fake", "network"]

pytestmark = pytest.mark.usefixtures("fake", "network")


@pytest.fixture
def cuda_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the engine's build with CUDA."""
    monkeypatch.setattr("aiomm.planes.mooncake.is_cuda_build", lambda: True)


@pytest.mark.usefixtures("cuda_build")
class TestIntoAGpu(NotesContract):
    """The engine puts bytes straight into a pool on a GPU."""

    def make_plane(self) -> Plane:
        return MooncakePlane()

    def make_arena(self, nbytes: int) -> Arena:
        return CudaArena(nbytes, "cuda:0")

    def fill(self, arena: Arena, content: bytes) -> None:
        assert isinstance(arena, CudaArena)
        source = HostArena(arena.nbytes)
        source.view(0, arena.nbytes)[:] = content
        arena.upload(source, [ByteRange(0, arena.nbytes)])


@pytest.mark.usefixtures("cuda_build")
async def test_registered_memory_of_a_gpu_is_read_when_it_is_made(
    network: FakeNetwork, fake: FakeRuntime
) -> None:
    """From where it is, without staging, and not before its producer's stream is so far."""
    link = await TestIntoAGpu().open_link()
    assert isinstance(link.remote, MooncakeArena)
    tensor, may_make = random_rows(10, 64), threading.Event()
    array = FakeArray(fake, 0, bytes(640), "uint8", (10, 64))
    memory = memory_of(array)
    assert (memory.address, memory.nbytes, memory.device) == (array.address, 640, "cuda:0")
    await link.plane.register(memory)
    fake.run(0, lambda: assert_set(may_make))
    fake.run(0, lambda: array.fill(bytes_of(tensor)))
    rows = TokenRows.of("rows", Field("uint8", 64), array)
    write = asyncio.ensure_future(link.write([Run(rows, 2, 8, 1024)]))
    await asyncio.wait([write], timeout=0.1)
    assert not write.done()
    may_make.set()
    await write
    assert link.content() == expected_content(link.arena.nbytes, (1024, tensor[2:]))
    assert link.remote._outlet.staging.num_slots == 0
    await link.plane.unregister(memory)
    await link.write([Run(rows, 0, 2, 0)])
    assert link.remote._outlet.staging.num_slots == 1
    await link.aclose()


async def test_the_build_without_cuda_refuses_memory_of_a_gpu(fake: FakeRuntime) -> None:
    plane, array = MooncakePlane(), FakeArray(fake, 0, bytes(64), "uint8", (1, 64))
    assert (plane.writes_into("cpu"), plane.writes_into("cuda:0")) == (True, False)
    with pytest.raises(PlaneUnavailable, match="memory of the host only, so not that of cuda:0"):
        await plane.register(memory_of(array))
    with pytest.raises(PlaneUnavailable, match="memory of the host only"):
        await plane.export(CudaArena(4096, "cuda:0"))


@pytest.mark.usefixtures("cuda_build")
async def test_a_pool_that_cannot_be_registered_is_reached_by_way_of_the_host(
    network: FakeNetwork, fake: FakeRuntime
) -> None:
    """As on a machine whose network card does not reach its GPU."""
    schema = aiomm.Schema(rows=aiomm.Field("uint8", 64))
    planes = ["mooncake", "tcp"]
    network.register_code = -1
    receiver = aiomm.Receiver(schema, bind="tcp://127.0.0.1:*", device="cuda:0", planes=planes)
    async with receiver, aiomm.Sender(schema, planes="mooncake") as sender:
        network.register_code = 0
        sent = await sender.send(receiver.expect("r"), {"rows": random_rows(100, 64)})
        async with receiver.receive("r") as lease:
            assert (sent.plane, lease.num_tokens) == ("mooncake", 100)
