"""Whether every byte arrives where it belongs, and nothing else changes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from aiomm.planes.mooncake.library import is_cuda_build
from benchmarks.gpu.bench import Bench, require
from benchmarks.gpu.content import TWO_FIELDS
from benchmarks.gpu.peers import Peer

__all__ = ["extents", "ways"]

Extents = Sequence[tuple[int, int]]
"""Offset and length of each."""

ARENA_NBYTES = (8 << 20) + 4097
LARGE_NBYTES = (256 << 20) + 4097


async def extents(bench: Bench) -> str:
    """Write patterns through odd extents into a poisoned pool, from the GPU and from the host."""
    nbytes = bench.number(LARGE_NBYTES, ARENA_NBYTES, 1 << 20)
    owner, writer = await asyncio.gather(bench.peer("arena"), bench.peer("arena"))
    await writer.call("attach", offer=await owner.call("offer", nbytes=nbytes))
    cases = _cases(nbytes)
    for number, (name, where) in enumerate(cases.items()):
        for source in ("cuda", "cpu"):
            seed = 2 * number + (source == "cpu")
            await owner.call("poison")
            await writer.call("write", extents=where, seed=seed, source=source)
            wrong = await owner.call("compare", extents=where, seed=seed)
            require(not wrong, f"{name} from {source}: {wrong}")
    return f"{', '.join(cases)}; from the GPU and the host; {nbytes} bytes of pool compared"


def _cases(nbytes: int) -> dict[str, Extents]:
    """Return extents by name."""
    chance = random.Random(7)
    odd = [(1, 1), (3, 5), (4095, 2), (8191, 4099), (65537, 1), (nbytes - 1, 1)]
    room = nbytes // 1000
    many = [(n * room + chance.randrange(8), chance.randrange(1, room - 8)) for n in range(1000)]
    chance.shuffle(many)
    return {
        "1 byte": [(12345, 1)],
        "odd places": odd,
        "whole pool": [(0, nbytes)],
        "1000 extents": many,
        "1000 neighbours": [(n * 11, 11) for n in range(1000)],
    }


class Way(NamedTuple):
    """One path from a tensor into a pool."""

    pool: str
    source: str
    planes: str
    plane: str
    """The one that must be taken."""
    device: int = 0
    num_tokens: int = 1000


WAYS = (
    Way("cuda:0", "cuda", "auto", "cuda_ipc"),
    Way("cuda:0", "cuda", "auto", "cuda_ipc", num_tokens=1),
    Way("cuda:0", "cuda", "auto", "cuda_ipc", num_tokens=1500),
    Way("cuda:0", "cuda", "auto", "cuda_ipc", num_tokens=9001),
    Way("cuda:0", "strided", "auto", "cuda_ipc"),
    Way("cuda:0", "cupy", "auto", "cuda_ipc"),
    Way("cuda:0", "cpu", "auto", "cuda_ipc"),
    Way("cuda:0", "cuda", "auto", "cuda_ipc", device=1),
    Way("cuda:0", "cuda", "shm", "shm"),
    Way("cuda:0", "cpu", "shm", "shm"),
    Way("cuda:0", "cuda", "tcp", "tcp"),
    Way("cuda:0", "cpu", "tcp", "tcp"),
    Way("cpu", "cuda", "auto", "shm"),
    Way("cpu", "strided", "auto", "shm"),
    Way("cpu", "cuda", "tcp", "tcp"),
    Way("cuda:0", "registered", "mooncake", "mooncake"),
    Way("cuda:0", "registered", "mooncake", "mooncake", num_tokens=9001),
    Way("cuda:0", "cuda", "mooncake", "mooncake"),
    Way("cuda:0", "strided", "mooncake", "mooncake"),
    Way("cuda:0", "cpu", "mooncake", "mooncake", num_tokens=1500),
    Way("cpu", "registered", "mooncake", "mooncake"),
    Way("cpu", "cuda", "mooncake", "mooncake"),
)
"""1500 tokens are two chunks, 9001 more than the pool has room for."""
POOL: Mapping[str, Any] = {"blocks": 32, "block_size": 128, "default_blocks": 8, "max_peers": 8}


async def ways(bench: Bench) -> str:
    """Send over every plane, from every kind of source, and compare tensors."""
    done, left_out = 0, set()
    for pool, planes in dict.fromkeys((way.pool, way.planes) for way in WAYS):
        sender, receiver = await bench.pair(
            TWO_FIELDS, {"planes": planes}, pool=pool, planes=planes, **POOL
        )
        for way in [way for way in WAYS if (way.pool, way.planes) == (pool, planes)]:
            missing = _missing(bench, way)
            if missing:
                left_out.add(missing)
                continue
            done += 1
            await _move(bench, way, done, sender, receiver)
        await asyncio.gather(sender.close(), receiver.close())
    bench.findings["left out"] = sorted(left_out)
    without = f"; without {', '.join(sorted(left_out))}" if left_out else ""
    return f"{done} ways, every byte right{without}"


def _missing(bench: Bench, way: Way) -> str:
    if way.device >= bench.num_devices:
        return "a second GPU"
    if bench.is_dry and way.source in ("strided", "cupy"):
        return f"{way.source} sources (dry run)"
    if way.source == "cupy" and not bench.has("cupy"):
        return "cupy"
    if way.planes == "mooncake" and not bench.has("mooncake"):
        return "mooncake"
    if way.source == "registered" and not is_cuda_build():
        return "registered tensors (they need Mooncake's CUDA build)"
    return ""


async def _move(bench: Bench, way: Way, seed: int, sender: Peer, receiver: Peer) -> None:
    request_id = f"{seed}: {way}"
    ticket = await receiver.call("expect", request_id=request_id)
    received = receiver.begin("receive", request_id=request_id, seed=seed)
    sent = await sender.call(
        "send",
        ticket=ticket,
        seed=seed,
        num_tokens=way.num_tokens,
        source=way.source,
        device=way.device,
    )
    result = await received
    require(not result["wrong"], f"{way}: {result['wrong']}")
    require(sent["plane"] == way.plane, f"{way}: over {sent['plane']}, {sent['refused']}")
    if not bench.is_dry:
        device = "cpu" if way.pool == "cpu" else way.pool
        places = set(result["places"].values())
        require(result["kind"] == "torch", f"{way}: arrived as {result['kind']}")
        require(places == {device}, f"{way}: arrived on {places}")
