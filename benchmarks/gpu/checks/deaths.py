"""Either process is killed in the middle of a long queue of copies."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from benchmarks.gpu.bench import Bench, Failed, require, until
from benchmarks.gpu.content import ONE_FIELD
from benchmarks.gpu.peers import Died, Peer, Told
from benchmarks.gpu.repeating import WRITING

__all__ = ["receiver_killed", "sender_killed"]

BLOCKS = 4
LOST_SECONDS = 1.0
SETTLED_SECONDS = 0.5
MIDDLE_SECONDS = 0.1
"""From the beginning of the copies to the kill; they take several times as long."""


async def sender_killed(bench: Bench) -> str:
    """Kill a sender; the receiver learns it soon, stays healthy, and serves the next sender."""
    sender, receiver = await _pair(bench)
    nbytes, tokens = _sizes(bench)
    await _move(sender, receiver, "first", 1, tokens)
    failing = await _begin_long(bench, sender, receiver, tokens)
    at = sender.kill()
    failed = await failing
    require(failed["kind"], "the queue of copies was over before the sender was killed")
    seconds = (failed["at"] - at) / 1e9
    bench.findings |= {"error": failed, "seconds": seconds, "queued": f"{nbytes} bytes each"}
    require(failed["kind"] == "PeerLost", f"{failed['kind']} and not PeerLost")
    freed = await until(lambda: _is_free(receiver), 20, "the blocks never came back")
    await receiver.call("health")
    await receiver.call("poison")
    await asyncio.sleep(SETTLED_SECONDS)
    changed = await receiver.call("poisoned")
    require(not changed, f"something landed after the blocks were free: {changed}")
    following = await bench.peer("sender", fields=ONE_FIELD)
    await _move(following, receiver, "next", 2, tokens)
    require(seconds <= LOST_SECONDS, f"PeerLost came only after {seconds:.2f} s")
    return (
        f"PeerLost after {seconds * 1000:.0f} ms, blocks free after {freed * 1000:.0f} ms more, "
        "nothing landed later; the receiver's GPU works, and so does the next sender"
    )


async def receiver_killed(bench: Bench) -> str:
    """Kill a receiver; the sender learns it, says what CUDA has done, and serves the next one."""
    sender, receiver = await _pair(bench)
    _, tokens = _sizes(bench)
    await _move(sender, receiver, "first", 1, tokens)
    ticket = await receiver.call("expect", request_id="broken")
    sending = _begin_sending(bench, sender, ticket, tokens)
    await sender.announced(WRITING)
    await asyncio.sleep(MIDDLE_SECONDS)
    at = receiver.kill()
    kind, message, seconds = await _error(sending, at)
    health = await _health(sender)
    bench.findings |= {"error": message, "seconds": seconds, "the sender's GPU": health}
    bench.answers["c"] = f"{message}; afterwards the writer's GPU: {health}"
    require(kind == "PeerLost", f"{message}, and not PeerLost; the sender's GPU: {health}")
    following = await bench.peer("receiver", fields=ONE_FIELD, blocks=BLOCKS)
    try:
        await _move(sender, following, "next", 2, tokens)
    except Told as exc:
        raise Failed(f"the sender serves nobody any more ({exc}); its GPU: {health}") from None
    return (
        f"PeerLost after {seconds * 1000:.0f} ms; the sender's GPU: {health}; "
        "the next receiver was served"
    )


async def _pair(bench: Bench) -> tuple[Peer, Peer]:
    return await bench.pair(
        sender={"repeats": True}, blocks=BLOCKS, block_size=1024, default_blocks=BLOCKS
    )


def _sizes(bench: Bench) -> tuple[int, int]:
    """Return the bytes of one request, and its tokens."""
    tokens = bench.number(4096, 1024, 64)
    return tokens << 16, tokens


def _begin_sending(
    bench: Bench, sender: Peer, ticket: str, tokens: int
) -> asyncio.Future[dict[str, Any]]:
    """Begin to send about 1 TB in all, which takes a GPU some 0.5 s; each byte many times."""
    repeats = bench.number(4000, 16000, 2000)
    return sender.begin(
        "send_repeatedly", ticket=ticket, seed=3, num_tokens=tokens, repeats=repeats
    )


async def _begin_long(
    bench: Bench, sender: Peer, receiver: Peer, tokens: int
) -> asyncio.Future[dict[str, Any]]:
    """Return how a request ends whose copies are in full swing."""
    ticket = await receiver.call("expect", request_id="broken")
    failing = receiver.begin("fail", request_id="broken")
    _begin_sending(bench, sender, ticket, tokens)
    await sender.announced(WRITING)
    await asyncio.sleep(MIDDLE_SECONDS)
    return failing


async def _error(sending: asyncio.Future[Any], at: int) -> tuple[str, str, float]:
    """Return what a sender raises, and how long after `at`."""
    try:
        await sending
    except Told as exc:
        return exc.kind, str(exc), (time.monotonic_ns() - at) / 1e9
    except Died as exc:
        raise Failed(f"the sender has died, too: {exc}") from None
    return "", "the copies were over before the receiver was killed", 0.0


async def _health(child: Peer) -> str:
    try:
        await child.call("health")
    except Told as exc:
        return f"lost ({exc})"
    return "works"


async def _move(sender: Peer, receiver: Peer, request_id: str, seed: int, num_tokens: int) -> None:
    ticket = await receiver.call("expect", request_id=request_id)
    received = receiver.begin("receive", request_id=request_id, seed=seed)
    await sender.call("send", ticket=ticket, seed=seed, num_tokens=num_tokens)
    result = await received
    require(not result["wrong"], f"{request_id}: {result['wrong']}")


async def _is_free(receiver: Peer) -> bool:
    metrics = await receiver.call("metrics")
    return bool(metrics["blocks_free"] == BLOCKS)
