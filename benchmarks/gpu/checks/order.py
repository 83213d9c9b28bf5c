"""Order: nothing is read before it is made, and no block is given away that is still read."""

from __future__ import annotations

import asyncio
from typing import Any

from benchmarks.gpu.bench import Bench, require, until
from benchmarks.gpu.peers import Peer

__all__ = ["late_tensors", "slow_reader"]

NUM_TOKENS = 64
"""Of 64 KiB each."""
EARLY_SECONDS = 0.001
"""What the clocks of host and GPU may differ by, over the delay."""


async def late_tensors(bench: Bench) -> str:
    """Send tensors that a busy stream has still to make; others overtake them."""
    sender, receiver = await bench.pair(blocks=4, block_size=64, default_blocks=1)
    await _move(sender, receiver, "first", seed=1)
    delays = []
    for number in range(bench.number(8, 4, 2)):
        by = ("argument", "current")[number % 2]
        delay = (0.3, 0.02)[number // 2 % 2]
        ticket = await receiver.call("expect", request_id=f"late {number}")
        late = receiver.begin("receive", request_id=f"late {number}", seed=100 + number)
        sending = sender.begin(
            "send_late", ticket=ticket, seed=100 + number, num_tokens=NUM_TOKENS, delay=delay, by=by
        )
        between = await _move(sender, receiver, f"between {number}", seed=200 + number)
        sent, result = await sending, await late
        require(not result["wrong"], f"late by {by}: {result['wrong']}")
        took = (result["arrived"] - sent["began"]) / 1e9
        early = sent["delay"] - took
        require(early < EARLY_SECONDS, f"late by {by}: it arrived {early:.4f} s too early")
        overtook = between["arrived"] < result["arrived"]
        require(overtook or delay < 0.1, "another transfer has waited for the late one")
        delays.append({"delay": sent["delay"], "took": took})
    bench.findings["seconds"] = delays
    return f"{len(delays)} late tensors: whole, none too early, and others overtook them"


async def slow_reader(bench: Bench) -> str:
    """Release what a busy stream has still to read: its blocks are nobody's until then."""
    delay = 0.3
    sender, receiver = await bench.pair(blocks=1, block_size=NUM_TOKENS, default_blocks=1)
    for number in range(bench.number(6, 3, 2)):
        seed = 2 * number
        ticket = await receiver.call("expect", request_id=f"slow {number}")
        reading = receiver.begin("read_slowly", request_id=f"slow {number}", delay=delay)
        await sender.call("send", ticket=ticket, seed=seed, num_tokens=NUM_TOKENS)
        released = await reading
        require(not released["is_over"], "the stream was not slow enough to see anything")
        require(released["leased"], "the block was free while a stream still read it")
        await _overwrite(sender, receiver, f"next {number}", seed + 1)
        wrong = await receiver.call("slow_difference", seed=seed, num_tokens=NUM_TOKENS)
        require(not wrong, f"what was read slowly was overwritten: {wrong}")
        await until(lambda: _is_free(receiver), 5, "the block was never free again")
    return "blocks stayed leased until their streams had read them; nothing was overwritten"


async def _overwrite(sender: Peer, receiver: Peer, request_id: str, seed: int) -> None:
    """Send the next request into the only block."""
    ticket = await receiver.call("expect", request_id=request_id)
    received = receiver.begin("receive", request_id=request_id, seed=seed)
    sending = sender.begin("send", ticket=ticket, seed=seed, num_tokens=NUM_TOKENS)
    while not received.done():
        is_over = await receiver.call("slow_is_over")
        metrics = await receiver.call("metrics")
        if metrics["blocks_leased"] == 0 and not is_over:
            over_now = await receiver.call("slow_is_over")
            require(over_now, "the block was given away while a stream still read it")
        await asyncio.sleep(0.005)
    await sending
    result = await received
    require(not result["wrong"], f"the request after it: {result['wrong']}")


async def _move(sender: Peer, receiver: Peer, request_id: str, seed: int) -> dict[str, Any]:
    ticket = await receiver.call("expect", request_id=request_id)
    received = receiver.begin("receive", request_id=request_id, seed=seed)
    await sender.call("send", ticket=ticket, seed=seed, num_tokens=NUM_TOKENS)
    result: dict[str, Any] = await received
    require(not result["wrong"], f"{request_id}: {result['wrong']}")
    return result


async def _is_free(receiver: Peer) -> bool:
    metrics = await receiver.call("metrics")
    return bool(metrics["blocks_free"] == 1)
