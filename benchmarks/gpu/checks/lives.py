"""Senders come and go: nothing of them stays."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.gpu.bench import Bench, require, until
from benchmarks.gpu.content import ONE_FIELD
from benchmarks.gpu.peers import Peer

__all__ = ["reconnects"]

WARM_UPS = 5
SPARE_NBYTES = 8 << 20
"""What a driver may keep for itself."""
NUM_TOKENS = 16


async def reconnects(bench: Bench) -> str:
    """Connect, send and disconnect again and again; then with a process for each sender."""
    sender, receiver = await bench.pair(blocks=16, block_size=16, default_blocks=1)
    for number in range(WARM_UPS):
        await _visit(sender, receiver, f"warm up {number}")
    before = {child.role: await child.call("resources") for child in (sender, receiver)}
    count = bench.number(200, 20, 10)
    for number in range(count):
        await _visit(sender, receiver, f"visit {number}")
    for child in (sender, receiver):
        after = await child.call("resources")
        bench.findings[child.role] = {"before": before[child.role], "after": after}
        _compare(child.role, before[child.role], after)
    processes = bench.number(4, 2, 1)
    free = (await receiver.call("resources"))["free_nbytes"]
    for number in range(processes):
        other = await bench.peer("sender", fields=ONE_FIELD)
        await _visit(other, receiver, f"process {number}")
        await other.close()

    async def is_back() -> bool:
        return bool(free - (await receiver.call("resources"))["free_nbytes"] <= SPARE_NBYTES)

    await until(is_back, 5, f"memory of the GPU is gone after {processes} processes have come")
    return (
        f"{count} connections and {processes} processes: memory of the GPU, descriptors, threads "
        "and /dev/shm as before"
    )


async def _visit(sender: Peer, receiver: Peer, request_id: str) -> None:
    ticket = await receiver.call("expect", request_id=request_id)
    received = receiver.begin("receive", request_id=request_id, seed=1)
    await sender.call("send_anew", ticket=ticket, seed=1, num_tokens=NUM_TOKENS)
    result = await received
    require(not result["wrong"], f"{request_id}: {result['wrong']}")


def _compare(role: str, before: Mapping[str, int], after: Mapping[str, int]) -> None:
    lost = before["free_nbytes"] - after["free_nbytes"]
    require(lost <= SPARE_NBYTES, f"{role}: {lost} bytes of the GPU are gone")
    for name in ("descriptors", "threads", "shared_memory_files"):
        more = after[name] - before[name]
        require(more <= 2, f"{role}: {more} more {name} than before")
