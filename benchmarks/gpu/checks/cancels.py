"""Transfers are given up at every moment; nothing is read or written after its time."""

from __future__ import annotations

import asyncio

from benchmarks.gpu.bench import Bench, require, until
from benchmarks.gpu.peers import Peer

__all__ = ["cancels"]

BLOCKS = 2
NUM_TOKENS = 64
NBYTES = NUM_TOKENS << 16
MOMENTS = (
    "before",
    "once",
    "await",
    *(f"turns {count}" for count in (1, 3, 8, 21)),
    *(f"sending {count}" for count in (0, 1, 2, 3, 5, 20)),
    *(f"seconds {seconds}" for seconds in (0.0005, 0.002, 0.005, 0.05)),
)
LONG_AFTER = ("sending 20", "seconds 0.05")
"""Those at which the copy waits in its lane for sure; a little earlier nobody can tell."""
DELAY = 0.4
"""Of a tensor that is made late, much longer than all of those."""


async def cancels(bench: Bench) -> str:
    """Cancel a transfer at every moment, of tensors that are there and of late ones."""
    sender, receiver = await bench.pair(blocks=BLOCKS, block_size=NUM_TOKENS, default_blocks=1)
    moments = (*MOMENTS[: -1 : bench.number(1, 2, 3)], *LONG_AFTER)
    ends: dict[str, int] = {}
    number = 0
    for moment in moments:
        for delay in (0.0, DELAY) if moment != "before" else (0.0,):
            number += 1
            end = await _cancelled(sender, receiver, number, moment, delay)
            ends[end] = ends.get(end, 0) + 1
    await _receiver_cancels(sender, receiver)
    bench.findings["ends"] = ends
    told = ", ".join(f"{count} {end}" for end, count in ends.items())
    return f"{number} transfers ({told}): blocks came back, sources were kept, the next was right"


async def _cancelled(sender: Peer, receiver: Peer, number: int, moment: str, delay: float) -> str:
    """Cancel one, and move the next; return how the cancelled one has ended."""
    name = f"{moment}, {'late' if delay else 'there'}"
    before = await sender.call("allocated")
    ticket = await receiver.call("expect", request_id=f"{number}")
    failing = receiver.begin("fail", request_id=f"{number}")
    told: dict[str, str] = await sender.call(
        "send_and_cancel",
        ticket=ticket,
        seed=number,
        num_tokens=NUM_TOKENS,
        moment=moment,
        delay=delay,
    )
    end, state = told["end"], told["state"]
    require(end in ("Cancelled", "Done"), f"{name}: it ended with {end}")
    require(end == "Cancelled" or not delay, f"{name}: a tensor was sent before it was made")
    failed = await failing
    require(failed["kind"] in ("", "Cancelled"), f"{name}: the receiver got {failed['kind']}")
    if delay:
        kept = await sender.call("allocated") - before
        require(
            state == "SENDING" or moment not in LONG_AFTER, f"{name}: it was {state} at that time"
        )
        require(
            kept >= NBYTES or moment not in LONG_AFTER,
            f"{name}: in {state} the source was freed under a copy ({kept} bytes)",
        )
        await sender.call("ready")
    await until(lambda: _is_free(receiver), 10, f"{name}: the blocks never came back")
    await _move(sender, receiver, f"after {number}", 1000 + number)

    async def is_let_go() -> bool:
        return bool(await sender.call("allocated") <= before)

    await until(is_let_go, 10, f"{name}: the source is kept for ever")
    return f"{end} in {state}"


async def _receiver_cancels(sender: Peer, receiver: Peer) -> None:
    """The same by the receiver, while the sender waits for a late tensor."""
    ticket = await receiver.call("expect", request_id="theirs")
    failing = receiver.begin("fail", request_id="theirs")
    sending = sender.begin(
        "send_late", ticket=ticket, seed=1, num_tokens=NUM_TOKENS, delay=DELAY, by="argument"
    )
    await asyncio.sleep(DELAY / 4)
    await receiver.call("cancel", request_id="theirs")
    require((await failing)["kind"] == "Cancelled", "the receiver's own cancel was not heard")
    await asyncio.wait([sending])
    error = sending.exception()
    require("Cancelled" in str(error), f"the sender of what the receiver cancels got {error}")
    await until(lambda: _is_free(receiver), 10, "the blocks never came back after its cancel")
    await _move(sender, receiver, "after theirs", 2)


async def _move(sender: Peer, receiver: Peer, request_id: str, seed: int) -> None:
    ticket = await receiver.call("expect", request_id=request_id)
    received = receiver.begin("receive", request_id=request_id, seed=seed)
    await sender.call("send", ticket=ticket, seed=seed, num_tokens=NUM_TOKENS)
    result = await received
    require(not result["wrong"], f"{request_id}: {result['wrong']}")


async def _is_free(receiver: Peer) -> bool:
    metrics = await receiver.call("metrics")
    return bool(metrics["blocks_free"] == BLOCKS)
