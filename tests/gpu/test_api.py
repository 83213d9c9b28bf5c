"""The public API with a pool on a GPU, in one process and on a fake one."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

import aiomm
from aiomm.gpu.choice import use_runtime
from aiomm.gpu.fake import FakeArray, FakeRuntime
from tests.processes import until

SCHEMA = aiomm.Schema(rows=aiomm.Field("bfloat16", 32), ids=aiomm.Field("int32"))
BIND = "tcp://127.0.0.1:*"
pytestmark = [pytest.mark.both_loops]


def tensors_of(gpu: FakeRuntime, num_tokens: int, value: int = 7) -> dict[str, FakeArray]:
    """Return tensors on the first device whose bytes are all `value`."""
    rows, ids = bytes([value]) * (64 * num_tokens), bytes([value]) * (4 * num_tokens)
    return {
        "rows": FakeArray(gpu, 0, rows, "bfloat16", (num_tokens, 32)),
        "ids": FakeArray(gpu, 0, ids, "int32", (num_tokens,)),
    }


def receiver_with(**settings: Any) -> aiomm.Receiver:
    """Return a receiver with eight blocks of 16 tokens on the first device."""
    sizes = {"blocks": 8, "block_size": 16, "default_blocks": 2}
    return aiomm.Receiver(SCHEMA, bind=BIND, device="cuda", **{**sizes, **settings})


def is_all(lease: Any, value: int = 7) -> bool:
    """Whether every byte of a lease, or of tensors, is `value`."""
    repeated = int.from_bytes(bytes([value]) * 4, "little")
    return bool((lease["ids"] == repeated).all())


async def test_a_closed_receiver_frees_its_pool(fake: FakeRuntime) -> None:
    """Though it is still referred to; a lease that is held keeps what it holds."""
    receiver, sender = receiver_with(), aiomm.Sender(SCHEMA)
    async with receiver, sender:
        await sender.send(receiver.expect("r"), tensors_of(fake, 20))
        lease = await receiver.receive("r")
    held = len(fake._memory)
    assert is_all(lease)
    lease.release()
    del lease
    gc.collect()
    assert (held, len(fake._memory)) == (1, 0)
    assert repr(receiver)


async def test_detached_tensors_outlive_lease_and_pool(fake: FakeRuntime) -> None:
    async with receiver_with() as receiver, aiomm.Sender(SCHEMA) as sender:
        await sender.send(receiver.expect("r"), tensors_of(fake, 20))
        detached = (await receiver.receive("r")).detach()
    assert is_all(detached)


async def test_results_that_nobody_takes_make_room_on_the_device(fake: FakeRuntime) -> None:
    """They are moved into memory of the GPU, not of the host."""
    async with receiver_with() as receiver, aiomm.Sender(SCHEMA) as sender:
        for name in ("one", "two"):
            await sender.send(receiver.expect(name), tensors_of(fake, 64))
        fake.copied.clear()
        awaited = asyncio.ensure_future(
            sender.send("three", tensors_of(fake, 64), to=receiver.address)
        )
        async with receiver.receive("three") as lease:
            assert is_all(lease)
        await awaited
        async with receiver.receive("one") as lease:
            assert (lease.is_view, is_all(lease)) == (False, True)
        assert set(fake.copied) == {"DtoD"}


class OfTorch:
    """A stream as torch has them."""

    def __init__(self, handle: int) -> None:
        self.cuda_stream = handle


async def test_streams_of_others_are_taken(fake: FakeRuntime) -> None:
    """To send on, and to read on: by the handle, or by an object that has it."""
    async with receiver_with() as receiver, aiomm.Sender(SCHEMA) as sender:
        stream = fake.make_stream(0)
        await sender.send(receiver.expect("r"), tensors_of(fake, 20), stream=OfTorch(stream))
        lease = await receiver.receive("r")
        lease.wait_stream(stream)
        lease.release(OfTorch(stream))
        await until(lambda: receiver.metrics()["blocks_free"] == 8, "its blocks are free")
        with pytest.raises(TypeError, match="not a CUDA stream: str"):
            sender.claim(receiver.expect("s")).send(tensors_of(fake, 20), stream="main")


async def test_a_device_that_is_lost_fails_transfers_and_not_the_process(
    fake: FakeRuntime,
) -> None:
    async with (
        receiver_with(close_timeout=0.2) as receiver,
        aiomm.Sender(SCHEMA, close_timeout=0.2) as sender,
    ):
        await sender.send(receiver.expect("well"), tensors_of(fake, 20))
        lease = await receiver.receive("well")
        tensors = tensors_of(fake, 20)
        fake.faults.fail_at = fake.faults.num_copies + 1
        for name in ("first", "second"):
            with pytest.raises(aiomm.PlaneUnavailable, match="the device is lost to this process"):
                await sender.send(receiver.expect(name), tensors)
        lease.release()  # who still reads cannot be known: the blocks stay leased
        assert receiver.metrics()["blocks_leased"] == 2


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:-1", "cuda:x", "CPU", ""])
def test_a_device_that_is_none_is_refused_at_once(device: str) -> None:
    with pytest.raises(ValueError, match="expected 'cpu', 'cuda' or 'cuda:0'"):
        aiomm.Receiver(SCHEMA, device=device)


async def test_a_device_that_is_not_there_is_refused_at_the_start(fake: FakeRuntime) -> None:
    receiver = aiomm.Receiver(SCHEMA, bind=BIND, device="cuda:7")
    with pytest.raises(aiomm.PlaneUnavailable, match="cuda:7: there are 2 GPUs here"):
        await receiver.start()


async def test_a_runtime_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIOMM_GPU_RUNTIME", "bindings,cupy")
    use_runtime(None)
    with pytest.raises(aiomm.PlaneUnavailable, match="known are auto, bindings, cupy, fake"):
        await aiomm.Receiver(SCHEMA, bind=BIND, device="cuda").start()
