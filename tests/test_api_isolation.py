"""Odd senders, closing receivers and tight limits: what they cost, and that it is no more."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import aiomm
from aiomm import sender as sender_module
from aiomm.planes.memory import Faults, MemoryPlane

SCHEMA = aiomm.Schema(x=aiomm.Field("int32", 16))


def tensors(num_tokens: int) -> dict[str, torch.Tensor]:
    """Return counted rows."""
    return {"x": torch.arange(num_tokens * 16, dtype=torch.int32).view(num_tokens, 16)}


async def test_metadata_with_keys_that_are_no_strings_is_refused_where_it_is_given() -> None:
    """The sender learns it, not the receiver."""
    async with aiomm.Sender(SCHEMA) as sender:
        with pytest.raises(aiomm.Rejected, match="keys of metadata must be strings"):
            await sender.send("r", tensors(1), metadata={1: "x"})  # type: ignore[dict-item]


async def test_one_sender_s_malformed_metadata_does_not_end_the_iteration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Garbage from one sender costs that arrival; the next one is yielded, no block is lost."""
    failed = []
    async with (
        aiomm.Receiver(
            SCHEMA, bind="tcp://127.0.0.1:*", on_failure=lambda *failure: failed.append(failure)
        ) as receiver,
        aiomm.Sender(SCHEMA) as sender,
    ):
        arrivals = aiter(receiver)
        with monkeypatch.context() as patch:
            patch.setattr(sender_module, "_encode_metadata", lambda _: b"\xc1")
            await sender.send("bad", tensors(1), to=receiver.address)
        await sender.send("good", tensors(2), to=receiver.address)
        with await anext(arrivals) as lease:
            assert lease.request_id == "good"
        assert receiver.metrics()["blocks_free"] == 64
    [(request_id, error)] = failed
    assert request_id == "bad"
    assert "malformed" in str(error)


async def test_a_bug_with_a_packet_costs_none_of_those_it_came_with(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Before and behind all good packets comes one that raises what nobody expects."""
    async with (
        aiomm.Receiver(SCHEMA, bind="tcp://127.0.0.1:*") as receiver,
        aiomm.Sender(SCHEMA) as sender,
    ):
        for endpoint in (receiver, sender):
            take_packet = endpoint._driver.endpoint.packet_received
            take_packets = endpoint._driver.packets_received

            def packet_received(
                path: Any, packet: bytes, now: float, take: Any = take_packet
            ) -> None:
                if packet == b"bug":
                    raise LookupError(packet)
                take(path, packet, now)

            def packets_received(
                channel: Any, peer: Any, packets: Sequence[bytes], take: Any = take_packets
            ) -> None:
                take(channel, peer, [b"bug", *packets, b"bug"])

            monkeypatch.setattr(endpoint._driver.endpoint, "packet_received", packet_received)
            monkeypatch.setattr(endpoint._driver, "packets_received", packets_received)
        for number in range(3):
            await sender.send(receiver.expect(f"r{number}"), tensors(1))
            with await receiver.receive(f"r{number}") as lease:
                assert lease.num_tokens == 1
    assert "could not take a packet" in caplog.text


async def test_a_closing_receiver_takes_no_new_transfer() -> None:
    """While it drains, a claim is turned away with PoolClosed, and never accepted and lost."""
    faults = Faults(stall_at=1)
    plane = MemoryPlane(faults=faults)
    receiver = aiomm.Receiver(SCHEMA, bind="tcp://127.0.0.1:*", planes=[plane])
    async with aiomm.Sender(SCHEMA, planes=[plane]) as sender:
        await receiver.start()
        stalled = asyncio.ensure_future(sender.send("a", tensors(1), to=receiver.address))
        await faults.stalled.wait()
        closing = asyncio.ensure_future(receiver.aclose())
        with pytest.raises(aiomm.PoolClosed):
            await stalled
        with pytest.raises(aiomm.PoolClosed):
            await sender.send("b", tensors(1), to=receiver.address)
        faults.release()
        await closing


async def test_a_cancelled_close_still_ends_the_iteration() -> None:
    """Who iterates over arrivals is told, whoever stopped waiting for the close."""
    receiver = aiomm.Receiver(SCHEMA, bind="tcp://127.0.0.1:*")
    await receiver.start()

    async def count() -> int:
        return len([lease async for lease in receiver])

    counting = asyncio.ensure_future(count())
    await asyncio.sleep(0)
    closing = asyncio.ensure_future(receiver.aclose())
    await asyncio.sleep(0)
    closing.cancel()
    assert await counting == 0
    await receiver.aclose()


@pytest.mark.parametrize("announced", [True, False])
async def test_a_transfer_through_a_small_pool_is_counted_once(announced: bool) -> None:
    """Exactly its own bytes are enough: `max_buffered_bytes` is no multiple of it."""
    num_tokens = 320
    async with (
        aiomm.Receiver(
            SCHEMA,
            bind="tcp://127.0.0.1:*",
            blocks=8,
            block_size=16,
            default_blocks=8,
            max_buffered_bytes=num_tokens * SCHEMA.token_nbytes,
        ) as receiver,
        aiomm.Sender(SCHEMA) as sender,
    ):
        transfer = sender.claim(receiver.expect("r"), num_tokens=num_tokens if announced else None)
        transfer.send(tensors(num_tokens))
        async with receiver.receive("r") as lease:
            assert torch.equal(torch.as_tensor(lease["x"]), tensors(num_tokens)["x"])
        await transfer
        assert receiver.metrics()["bytes_buffered"] == 0


async def test_what_a_long_result_leaves_is_kept_for_the_next() -> None:
    """It belongs to whoever holds a tensor of it, and to the receiver only afterwards."""
    schema, nbytes = aiomm.Schema(rows=aiomm.Field("uint8", 1 << 16)), 6 << 20
    async with (
        aiomm.Receiver(schema, bind="tcp://127.0.0.1:*", blocks=8, block_size=4) as receiver,
        aiomm.Sender(schema) as sender,
    ):
        for number in range(3):
            sent = torch.full((96, 1 << 16), number, dtype=torch.uint8)
            transfer = sender.claim(receiver.expect(f"r{number}")).send({"rows": sent})
            async with receiver.receive(f"r{number}") as lease:
                part = torch.as_tensor(lease["rows"])[90:]
            del lease
            await transfer
            assert receiver.metrics()["bytes_spare"] == 0
            assert torch.equal(part, sent[90:])
            del part
            assert receiver.metrics()["bytes_spare"] == nbytes
    assert receiver.metrics()["bytes_spare"] == 0
