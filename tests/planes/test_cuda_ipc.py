"""The plane of GPUs passes the contract over a fake GPU, from the host and from either device."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch

from aiomm.buffers.arena import Arena, HostArena
from aiomm.buffers.cuda import CudaArena
from aiomm.buffers.device_rows import Producers
from aiomm.buffers.layout import ByteRange
from aiomm.buffers.tensors import TokenRows
from aiomm.errors import PlaneUnavailable
from aiomm.gpu.choice import use_runtime
from aiomm.gpu.fake import FakeArray, FakeRuntime
from aiomm.planes import cuda_ipc
from aiomm.planes.base import Plane, Run
from aiomm.planes.cuda_ipc import CudaIpcPlane
from aiomm.planes.memory import MemoryPlane
from aiomm.planes.mooncake import MooncakePlane
from aiomm.planes.shm import ShmPlane
from aiomm.planes.tcp import TcpPlane
from aiomm.types import Field

from ..conftest import resources
from . import contract
from .contract import (
    ARENA_NBYTES,
    GRANT,
    LINK,
    Link,
    PlaneContract,
    bytes_of,
    expected_content,
    random_rows,
    whole,
)


@pytest.fixture
def fake(no_leaks: None) -> Iterator[FakeRuntime]:
    """Two devices; none may be abused."""
    yield from fake_of(FakeRuntime([0, 1]))


def fake_of(runtime: FakeRuntime) -> Iterator[FakeRuntime]:
    """Use a runtime until the test is over."""
    use_runtime(runtime)
    yield runtime
    runtime.faults.release()
    runtime.join()
    use_runtime(None)
    assert runtime.violations == []


def on_device(runtime: FakeRuntime, device: int, tensor: torch.Tensor) -> TokenRows:
    """Return the rows of `tensor` in the memory of a device."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    array = FakeArray(runtime, device, bytes_of(tensor), dtype, tuple(tensor.shape))
    return TokenRows.of("rows", Field(dtype, *tensor.shape[1:]), array)


@pytest.mark.usefixtures("fake")
class CudaIpcContract(PlaneContract):
    @pytest.fixture(autouse=True)
    def joined(self, fake: FakeRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
        """Look for what is left behind when the threads of the fake's streams are through."""

        def resources_then() -> dict[str, set[str]]:
            fake.join()
            return resources()

        monkeypatch.setattr(contract, "resources", resources_then)

    def make_plane(self) -> Plane:
        return CudaIpcPlane()

    def make_arena(self, nbytes: int) -> Arena:
        return CudaArena(nbytes, "cuda:0")

    def fill(self, arena: Arena, content: bytes) -> None:
        assert isinstance(arena, CudaArena)
        source = HostArena(arena.nbytes)
        source.view(0, arena.nbytes)[:] = content
        arena.upload(source, [ByteRange(0, arena.nbytes)])


class TestFromTheHost(CudaIpcContract):
    """Rows of the host, dense and strided, into a pool on a GPU."""


class AsElsewhere(FakeRuntime):
    """Opens handles of its own process as if another one had made them."""

    def _is_own(self, process: int) -> bool:
        return False


class TestThroughAHandle(CudaIpcContract):
    """As from another process: what is exported is handed over and opened, and closed again."""

    @pytest.fixture
    def fake(self, no_leaks: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRuntime]:
        monkeypatch.setattr(cuda_ipc, "exported_here", lambda offer: None)
        yield from fake_of(AsElsewhere([0, 1]))

    @pytest.mark.parametrize(("current", "device"), [(None, 0), (0, 0), (1, 1)])
    async def test_tensors_of_the_host_go_by_the_device_that_is_used(
        self, fake: FakeRuntime, current: int | None, device: int
    ) -> None:
        """Another one would cost the process a context; if none is used, by the pool's own."""
        if current is not None:
            fake.use_device(current)
        link = await self.open_link()
        assert [each.device for each in fake._memory.values() if not each.is_own] == [device]
        await link.write([whole(random_rows(4, 16), 0)])
        await link.aclose()

    async def test_it_is_opened_once_for_each_device(self, link: Link, fake: FakeRuntime) -> None:
        """All senders of a process share what is open; the last one closes it."""
        second = await link.plane.attach(link.export.offer(LINK))
        num_open = len(fake._memory)
        rows = on_device(fake, 1, random_rows(4, 16))
        await link.write([Run(rows, 0, 4, 0)])
        assert len(fake._memory) == num_open + 2  # the rows, and the pool as the other one sees it
        await link.remote.aclose()
        await second.write(GRANT, [whole(random_rows(4, 16), 64)])
        await second.aclose()
        assert len(fake._memory) == num_open  # the pool and the rows


class TestFromTheSameDevice(CudaIpcContract):
    """Rows of the GPU that has the pool."""

    device: ClassVar[int] = 0

    @pytest.fixture(autouse=True)
    def rows_on_device(self, fake: FakeRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
        def rows_of(tensor: torch.Tensor) -> TokenRows:
            return on_device(fake, self.device, tensor)

        monkeypatch.setattr(contract, "rows_of", rows_of)

    async def test_nothing_goes_over_the_host(self, link: Link, fake: FakeRuntime) -> None:
        fake.copied.clear()
        tensor = random_rows(100, 48)
        await link.write([whole(tensor, 4096)])
        way = "DtoD" if self.device == 0 else "PtoP"
        assert fake.copied == {way: tensor.nbytes}


class TestFromAnotherDevice(TestFromTheSameDevice):
    """Rows of another GPU of the sender's."""

    device: ClassVar[int] = 1


@pytest.fixture
async def link(fake: FakeRuntime) -> Link:
    return await TestFromTheHost().open_link()


async def test_a_write_waits_for_whoever_makes_the_tensor(link: Link, fake: FakeRuntime) -> None:
    """The content is there only when the producer's stream is so far."""
    tensor = random_rows(10, 64)
    array = FakeArray(fake, 0, bytes(640), "uint8", (10, 64))
    producer, made = fake.make_stream(0), asyncio.Event()
    may_finish = threading.Event()
    fake.run(producer, lambda: assert_set(may_finish))
    fake.run(producer, lambda: array.fill(bytes_of(tensor)))
    rows = TokenRows.of("rows", Field("uint8", 64), array, producers=Producers(producer))
    write = asyncio.ensure_future(link.write([Run(rows, 0, 10, 0)]))
    write.add_done_callback(lambda _: made.set())
    other = random_rows(4, 16)
    await link.write([Run(on_device(fake, 0, other), 0, 4, 4096)])  # nobody else waits for it
    assert not write.done()
    may_finish.set()
    await write
    assert link.content() == expected_content(ARENA_NBYTES, (0, tensor), (4096, other))
    await link.aclose()


def assert_set(event: threading.Event) -> None:
    assert event.wait(10)


async def test_a_copy_that_is_refused_fails_its_write_only(link: Link, fake: FakeRuntime) -> None:
    fake.faults.refuse_at = fake.faults.num_copies + 1
    rows = on_device(fake, 0, random_rows(4, 16))
    with pytest.raises(PlaneUnavailable, match="cuda:0: cuMemcpyAsync: refused on demand"):
        await link.write([Run(rows, 0, 4, 0)])
    await link.write([Run(rows, 0, 4, 0)])
    await link.aclose()


async def test_a_device_that_is_lost_says_so_every_time(link: Link, fake: FakeRuntime) -> None:
    fake.faults.fail_at = fake.faults.num_copies + 1
    rows = on_device(fake, 0, random_rows(4, 16))
    for _ in range(2):
        with pytest.raises(PlaneUnavailable, match="the device is lost to this process"):
            await link.write([Run(rows, 0, 4, 0)])
    await link.aclose()


async def test_the_plane_needs_a_pool_on_a_gpu(fake: FakeRuntime) -> None:
    with pytest.raises(PlaneUnavailable, match="writes into a GPU's memory, not cpu"):
        await CudaIpcPlane().export(HostArena(4096))
    assert not CudaIpcPlane().writes_into("cpu")


@pytest.mark.parametrize("plane", [MemoryPlane(), ShmPlane(), TcpPlane(), MooncakePlane()])
async def test_planes_of_the_host_need_a_pool_there(plane: Plane, fake: FakeRuntime) -> None:
    arena = CudaArena(4096, "cuda:0")
    assert not plane.writes_into(arena.device)
    with pytest.raises(PlaneUnavailable):
        await plane.export(arena)
    arena.close()


def test_a_process_that_does_not_use_cuda_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AIOMM_GPU_RUNTIME", raising=False)
    use_runtime(None)
    assert CudaIpcPlane(by_name=False).unusable() == "CUDA is not in use in this process"
