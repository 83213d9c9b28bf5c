"""Checksums from the sender's tensor to the receiver's pool."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import aiomm
from aiomm.planes.memory import Faults, MemoryPlane

SCHEMA = aiomm.Schema(embeddings=aiomm.Field("bfloat16", 64), ids=aiomm.Field("int32"))


def tensors(num_tokens: int) -> dict[str, torch.Tensor]:
    """Return random embeddings and counted ids."""
    return {
        "embeddings": torch.randn(num_tokens, 64).bfloat16(),
        "ids": torch.arange(num_tokens, dtype=torch.int32),
    }


@pytest.mark.both_loops
@pytest.mark.parametrize("plane", ["shm", "tcp"])
async def test_verified_transfers_arrive(plane: str) -> None:
    """A short one, one that resumes, and one that is longer than the pool, all verified."""
    async with (
        aiomm.Receiver(SCHEMA, bind="tcp://127.0.0.1:*", blocks=16, planes=plane) as receiver,
        aiomm.Sender(SCHEMA, planes=plane, checksum=True) as sender,
    ):
        for num_tokens in (0, 1, 500, 2000, 10_000):
            sent = tensors(num_tokens)
            transfer = sender.claim(receiver.expect(f"req-{num_tokens}"))
            transfer.send(sent)
            async with receiver.receive(f"req-{num_tokens}") as lease:
                for name, tensor in sent.items():
                    assert torch.equal(torch.as_tensor(lease[name]), tensor)
            await transfer


@pytest.mark.both_loops
async def test_a_long_chunk_waits_for_no_thread_of_the_loops() -> None:
    """All threads of the loop's executor may be busy with what waits for this very transfer."""
    schema = aiomm.Schema(rows=aiomm.Field("uint8", 1 << 16), ids=aiomm.Field("int32"))
    done = threading.Event()
    async with (
        aiomm.Receiver(schema, bind="tcp://127.0.0.1:*", blocks=2, block_size=100) as receiver,
        aiomm.Sender(schema, checksum=True) as sender,
    ):
        with ThreadPoolExecutor(1) as executor:
            asyncio.get_running_loop().set_default_executor(executor)
            waiting = asyncio.create_task(asyncio.to_thread(done.wait, 10))
            rows = torch.randint(0, 256, (150, 1 << 16), dtype=torch.uint8)
            sent = {"rows": rows, "ids": torch.arange(150, dtype=torch.int32)}
            sending = asyncio.create_task(sender.send("long", sent, to=receiver.address))
            async with receiver.receive("long") as lease:
                for name, tensor in sent.items():
                    assert torch.equal(torch.as_tensor(lease[name]), tensor)
            await sending
            assert not waiting.done()
            done.set()
            await waiting
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor())


@pytest.mark.parametrize("num_tokens", [100, 10_000])
async def test_a_changed_byte_fails_that_transfer_on_both_sides(num_tokens: int) -> None:
    """One bit flipped on the way: typed on both sides, the blocks come back, the next is fine."""
    plane = MemoryPlane(faults=Faults(corrupt_at=1))
    async with (
        aiomm.Receiver(SCHEMA, bind="tcp://127.0.0.1:*", planes=[plane]) as receiver,
        aiomm.Sender(SCHEMA, planes=[plane], checksum=True) as sender,
    ):
        transfer = sender.claim(receiver.expect("changed"))
        transfer.send(tensors(100))
        with pytest.raises(aiomm.PlaneUnavailable, match="tokens 0 to 100 arrived changed"):
            await receiver.receive("changed")
        with pytest.raises(aiomm.PlaneUnavailable, match="arrived changed"):
            await transfer
        sending = asyncio.create_task(sender.send("next", tensors(7), to=receiver.address))
        async with receiver.receive("next") as lease:
            assert lease.num_tokens == 7
        await sending
        assert receiver.metrics()["blocks_free"] == 64


async def test_without_checksums_nobody_notices() -> None:
    """The fault above is real: this is what the checksum is for."""
    plane = MemoryPlane(faults=Faults(corrupt_at=1))
    async with (
        aiomm.Receiver(SCHEMA, bind="tcp://127.0.0.1:*", planes=[plane]) as receiver,
        aiomm.Sender(SCHEMA, planes=[plane]) as sender,
    ):
        sent = tensors(100)
        sending = asyncio.create_task(sender.send("quiet", sent, to=receiver.address))
        async with receiver.receive("quiet") as lease:
            assert not torch.equal(torch.as_tensor(lease["embeddings"]), sent["embeddings"])
        await sending
