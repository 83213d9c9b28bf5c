"""How long things take. Goals that are missed are told, and fail nothing."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence

from aiomm.planes.mooncake.library import is_cuda_build
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.peers import Peer

__all__ = ["busy_receiver", "copies", "opening", "planes", "transfers", "waking", "writes"]

KIB, MIB = 1 << 10, 1 << 20
ROW_NBYTES = 64 * KIB
SIZES = (MIB, 8 * MIB, 64 * MIB, 256 * MIB)
DRY_SIZES = (MIB, 8 * MIB)
RATE_GOAL, RATE_SIZE = 0.85, 64 * MIB
"""Of the rate of a plain copy."""
LATENCY_GOAL, LATENCY_SIZE = 150e-6, 8 * MIB
COPIES = (4 * KIB, 64 * KIB, MIB, 8 * MIB, 64 * MIB, 256 * MIB)
EXTENTS = (1, 16, 256)
ENGINE_RATE = 250e9
"""Bytes per second within one GPU: copy engines stay below, processors are far above."""


async def busy_receiver(bench: Bench) -> str:
    """Time transfers of 1 MiB while the receiver multiplies matrices, and while it does not."""
    sender, receiver = await bench.pair(blocks=16, block_size=16, default_blocks=1)
    rounds = bench.number(200, 50, 10)
    told = []
    for name, is_busy in (("idle", False), ("busy", True)):
        await receiver.call("busy", on=is_busy)
        pairs = [await _timed(sender, receiver, f"{name} {n}", 16) for n in range(rounds + 3)]
        seconds = [took for took, _ in pairs[3:]]
        bench.time(f"1 MiB, receiver {name}", seconds, MIB)
        last = statistics.quantiles(seconds, n=100, method="inclusive")[98]
        told.append(f"{name}: p50 {_us(statistics.median(seconds))}, p99 {_us(last)}")
    await receiver.call("busy", on=False)
    return "; ".join(told)


async def transfers(bench: Bench) -> str:
    """Time whole transfers, from `send()` to the receiver's `await`, and plain copies between."""
    sizes = DRY_SIZES if bench.is_dry else SIZES
    blocks = 2 * max(sizes) // MIB
    sender, receiver = await bench.pair(blocks=blocks, block_size=16, default_blocks=1)
    rounds, medians = bench.number(40, 10, 3), {}
    for nbytes in sizes:
        tokens = nbytes // ROW_NBYTES
        pairs = [await _timed(sender, receiver, f"{nbytes} {n}", tokens) for n in range(rounds + 3)]
        seconds, plain = ([pair[side] for pair in pairs[3:]] for side in (0, 1))
        bench.time("transfer", seconds, nbytes)
        bench.time("plain copy", plain, nbytes)
        medians[nbytes] = (statistics.median(seconds), statistics.median(plain))
    return _goals(bench, medians)


async def planes(bench: Bench) -> str:
    """Time 64 MiB from GPU to GPU over each plane that there is, and plain copies in between."""
    nbytes = DRY_SIZES[-1] if bench.is_dry else 64 * MIB
    told = []
    for plane in ("cuda_ipc", "shm", "tcp", *(["mooncake"] if bench.has("mooncake") else [])):
        sender, receiver = await bench.pair(
            sender={"planes": plane, "registers": plane == "mooncake" and is_cuda_build()},
            planes=plane,
            blocks=2 * nbytes // MIB,
            block_size=16,
            default_blocks=1,
        )
        tokens, rounds = nbytes // ROW_NBYTES, bench.number(20, 10, 3)
        pairs = [await _timed(sender, receiver, f"{plane} {n}", tokens) for n in range(rounds + 3)]
        seconds, plain = ([pair[side] for pair in pairs[3:]] for side in (0, 1))
        bench.time(f"transfer over {plane}", seconds, nbytes)
        bench.time(f"plain copy beside {plane}", plain, nbytes)
        rate = nbytes / statistics.median(seconds) / 1e9
        told.append(f"{plane} {_us(statistics.median(seconds))} ({rate:.1f} GB/s)")
        await asyncio.gather(sender.close(), receiver.close())
    return f"{nbytes // MIB} MiB: {'; '.join(told)}"


async def writes(bench: Bench) -> str:
    """Time the plane alone, from `write()` to its end, and plain copies in between."""
    sizes = DRY_SIZES if bench.is_dry else SIZES
    owner, writer = await asyncio.gather(bench.peer("arena"), bench.peer("arena"))
    await writer.call("attach", offer=await owner.call("offer", nbytes=max(sizes)))
    told = []
    for nbytes in sizes:
        rounds = bench.number(40, 10, 3)
        seconds = await writer.call("write_costs", nbytes=nbytes, rounds=rounds)
        bench.time("write", seconds["write"], nbytes)
        bench.time("plain copy", seconds["plain"], nbytes)
        write, plain = (statistics.median(seconds[name]) for name in ("write", "plain"))
        told.append(f"{nbytes // MIB} MiB {_us(write)} ({plain / write:.2f} x the plain rate)")
    return "; ".join(told)


async def copies(bench: Bench) -> str:
    """Time copies within one GPU by size and extents, given one by one and as a batch."""
    child = await bench.peer("bare")
    rounds = bench.number(20, 8, 2)
    has_batches = await child.call("has_batches")
    ways = ("loop", "batch") if has_batches else ("loop",)
    medians: dict[tuple[int, int, str], float] = {}
    for nbytes in COPIES[: bench.number(6, 6, 3)]:
        for num_extents in EXTENTS:
            for how in ways:
                seconds = await child.call(
                    "copy_costs", nbytes=nbytes, num_extents=num_extents, how=how, rounds=rounds
                )
                name = f"{num_extents} extents, {how}"
                bench.time(name, seconds["done"], nbytes)
                bench.time(f"{name}, given", seconds["given"], nbytes, has_rate=False)
                medians[nbytes, num_extents, how] = statistics.median(seconds["done"])
    largest = max(nbytes for nbytes, _, _ in medians)
    rate = largest / medians[largest, 1, "loop"]
    engine = "the multiprocessors" if rate > ENGINE_RATE else "a copy engine"
    bench.answers["b"] = f"{engine}, by its rate: {rate / 1e9:.0f} GB/s at {largest // MIB} MiB"
    if has_batches and not await child.call("has_batches"):
        bench.answers["e"] = "never: this driver has no batches"
    elif has_batches:
        bench.answers["e"] = await _crossover(bench, child)
    else:
        bench.answers["e"] = "never: this runtime has no batches"
    return f"{rate / 1e9:.1f} GB/s at {largest // MIB} MiB; batches: {bench.answers['e']}"


async def opening(bench: Bench) -> str:
    """Time the opening and closing of a pool of another process, its export, and pinning."""
    owner, other = await asyncio.gather(bench.peer("bare"), bench.peer("bare"))
    rounds = bench.number(20, 5, 3)
    told = []
    for nbytes in (8 * MIB, bench.number(4096, 1024, 64) * MIB):
        await owner.call("allocate", key="pool", nbytes=nbytes)
        handle = await owner.call("export", key="pool")
        seconds = await other.call("open_and_close", handle=handle, rounds=rounds)
        seconds["export"] = await owner.call("export_costs", key="pool", rounds=rounds)
        for name, each in seconds.items():
            bench.time(name, each, nbytes, has_rate=False)
        medians = {name: _us(statistics.median(each)) for name, each in seconds.items()}
        told.append(f"{nbytes // MIB} MiB: {medians}".replace("'", ""))
        await owner.call("free", key="pool")
    nbytes = bench.number(256, 64, 16) * MIB
    for name, each in (await other.call("pin_costs", nbytes=nbytes, rounds=rounds)).items():
        bench.time(name, each, nbytes, has_rate=False)
    return "; ".join(told)


async def waking(bench: Bench) -> str:
    """Time how much later than by asking one knows of a copy's end by other ways."""
    child = await bench.peer("bare")
    told = []
    for nbytes in (MIB, bench.number(256, 256, 8) * MIB):
        rounds = bench.number(200, 50, 5)
        seconds = await child.call("waking", nbytes=nbytes, rounds=rounds)
        for way, each in seconds.items():
            bench.time(way, each, nbytes, has_rate=False)
        asked = statistics.median(seconds.pop("query"))
        later = {way: _us(statistics.median(each) - asked) for way, each in seconds.items()}
        told.append(f"{nbytes // MIB} MiB ({_us(asked)} by asking): {later}".replace("'", ""))
    bench.answers["d"] = "; ".join(told)
    return bench.answers["d"]


async def _timed(
    sender: Peer, receiver: Peer, request_id: str, num_tokens: int
) -> tuple[float, float]:
    """Return the seconds of one transfer, and of a plain copy just before."""
    ticket = await receiver.call("expect", request_id=request_id)
    received = receiver.begin("receive_timed", request_id=request_id)
    plain = await sender.call("send_timed", ticket=ticket, num_tokens=num_tokens)
    return await received, plain


def _goals(bench: Bench, medians: dict[int, tuple[float, float]]) -> str:
    """Say which goals are met."""
    told = [f"{nbytes // MIB} MiB {_us(took)}" for nbytes, (took, _) in medians.items()]
    if RATE_SIZE in medians:
        took, plain = medians[RATE_SIZE]
        met = "met" if plain / took >= RATE_GOAL else "missed"
        told.append(f"64 MiB at {plain / took:.2f} of the plain rate, {RATE_GOAL} is {met}")
        bench.findings["rate goal"] = met
    if LATENCY_SIZE in medians:
        met = "met" if medians[LATENCY_SIZE][0] <= LATENCY_GOAL else "missed"
        told.append(f"8 MiB under {_us(LATENCY_GOAL)} is {met}")
        bench.findings["latency goal"] = met
    return "; ".join(told)


async def _crossover(bench: Bench, child: Peer) -> str:
    """Find out from how many extents on a batch is faster, for two sizes of extents."""
    told = []
    for piece in (4 * KIB, 256 * KIB):
        for num_extents in (2, 4, 8, 12, 16, 24, 32, 64, 128):
            both = [
                statistics.median(await _done(bench, child, piece * num_extents, num_extents, how))
                for how in ("loop", "batch")
            ]
            if both[1] < both[0]:
                told.append(f"from {num_extents} extents of {piece // KIB} KiB on")
                break
        else:
            told.append(f"not up to 128 extents of {piece // KIB} KiB")
    return ", ".join(told)


async def _done(
    bench: Bench, child: Peer, nbytes: int, num_extents: int, how: str
) -> Sequence[float]:
    seconds = await child.call(
        "copy_costs", nbytes=nbytes, num_extents=num_extents, how=how, rounds=15
    )
    done: Sequence[float] = seconds["done"]
    bench.time(f"{num_extents} extents of {nbytes // num_extents >> 10} KiB, {how}", done, nbytes)
    return done


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us" if seconds < 0.01 else f"{seconds * 1e3:.1f} ms"
