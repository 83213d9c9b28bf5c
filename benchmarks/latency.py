"""How long one granted transfer takes, against one memcpy of the same bytes in the same run.

Two processes. For every size and plane, in interleaved rounds: the language side expects, the
encoder claims and waits for its grant; then the clock runs from `send()` in one process to the
return of the `await` in the other (CLOCK_MONOTONIC is one clock on one host). In the same
round the encoder copies the same bytes once between two warm mappings. What is printed are
medians over the rounds, the quartiles, and the ratio of medians to that memcpy.

    python -m benchmarks.latency [--rounds 25] [--save FILE.json]
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import os
import platform
import statistics
import sys
import time
from asyncio.subprocess import PIPE
from pathlib import Path
from typing import Any

import aiomm
from aiomm.buffers.memcpy import is_streaming

ROW_NBYTES = 64 * 1024
BLOCK_SIZE = 16
SIZES = {"64 KiB": 1, "1 MiB": 16, "8 MiB": 128, "64 MiB": 1024}
"""Tokens of one row each."""
PLANES = ("shm", "tcp")
WRITTEN = ("--save", "--plots")
"""Options of benchmarks that are followed by a file or a folder."""
SCHEMA = aiomm.Schema(rows=aiomm.Field("uint8", ROW_NBYTES))


def run(main: Any) -> None:
    """Run a coroutine on uvloop where it is installed."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(main)
    else:
        uvloop.run(main)


def memcpy_seconds(source: Any, target: Any, nbytes: int) -> float:
    """Time one memcpy that runs without the GIL."""
    began = time.perf_counter()
    ctypes.memmove(target, source, nbytes)
    return time.perf_counter() - began


async def encoder() -> None:
    """Serve one line of standard input after the other: a plane, a length, a ticket."""
    import torch

    source = torch.randint(0, 256, (max(SIZES.values()), ROW_NBYTES), dtype=torch.uint8)
    target = torch.zeros_like(source)
    loop = asyncio.get_running_loop()
    senders = {plane: aiomm.Sender(SCHEMA, planes=plane) for plane in PLANES}
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        order = json.loads(line)
        tokens = order["tokens"]
        copied = memcpy_seconds(source.data_ptr(), target.data_ptr(), tokens * ROW_NBYTES)
        ticket = json.dumps(order["ticket"])
        transfer = senders[order["plane"]].claim(ticket, num_tokens=tokens)
        async for state in transfer.events():
            if state is not aiomm.State.ALLOC:
                break
        rows = source[:tokens]
        began = time.monotonic_ns()
        transfer.send({"rows": rows}, metadata={"began": began, "memcpy": copied})
        await transfer
    for sender in senders.values():
        await sender.aclose()


async def measure(rounds: int) -> dict[str, dict[str, list[float]]]:
    """Run the language side and return seconds by size, then by plane (and memcpy)."""
    blocks = 2 * max(SIZES.values()) // BLOCK_SIZE
    receivers = {
        plane: aiomm.Receiver(
            SCHEMA, bind="tcp://127.0.0.1:*", planes=plane, blocks=blocks, block_size=BLOCK_SIZE
        )
        for plane in PLANES
    }
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.latency", "--encoder", stdin=PIPE
    )
    assert child.stdin is not None
    figures: dict[str, dict[str, list[float]]] = {
        size: {name: [] for name in (*PLANES, "memcpy")} for size in SIZES
    }
    for receiver in receivers.values():
        await receiver.start()
    for number in range(rounds + 2):
        for size, tokens in SIZES.items():
            for plane, receiver in receivers.items():
                request_id = f"{number}-{size}-{plane}"
                ticket = receiver.expect(request_id)
                order = {"plane": plane, "tokens": tokens, "ticket": json.loads(ticket.to_json())}
                child.stdin.write(json.dumps(order).encode() + b"\n")
                async with receiver.receive(request_id) as lease:
                    seconds = (time.monotonic_ns() - lease.metadata["began"]) / 1e9
                    assert lease.stats.plane == plane
                    assert lease.is_view
                if number >= 2:  # the first rounds are warm-up
                    figures[size][plane].append(seconds)
                    figures[size]["memcpy"].append(lease.metadata["memcpy"])
    child.stdin.close()
    await child.wait()
    for receiver in receivers.values():
        await receiver.aclose()
    return figures


def summary(figures: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """Return one row per size and path: median, quartiles, and the ratio to memcpy."""
    rows = []
    for size, by_path in figures.items():
        floor = statistics.median(by_path["memcpy"])
        for path in ("memcpy", *PLANES):
            low, median, high = statistics.quantiles(by_path[path], n=4)
            rows.append(
                {
                    "size": size,
                    "path": path,
                    "median_us": round(median * 1e6, 1),
                    "quartiles_us": [round(low * 1e6, 1), round(high * 1e6, 1)],
                    "times_memcpy": round(median / floor, 2),
                }
            )
    return rows


def machine() -> dict[str, str]:
    """Say where this was measured."""
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "cpu": f"{os.cpu_count()} x {model}",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "copies": "streaming" if is_streaming else "libc",
        "date": time.strftime("%Y-%m-%d"),
    }


def options_given() -> str:
    """Return the options of this run, without the files that it writes."""
    words = sys.argv[1:]
    return " ".join(
        word
        for before, word in zip(["", *words], words, strict=False)
        if word.partition("=")[0] not in WRITTEN and before not in WRITTEN
    )


def main() -> None:
    """Measure, print a table, and save the figures if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--save", type=Path, help="write machine, rows and raw seconds as JSON")
    parser.add_argument("--encoder", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.encoder:
        run(encoder())
        return
    collected: dict[str, dict[str, list[float]]] = {}

    async def language() -> None:
        collected.update(await measure(options.rounds))

    run(language())
    rows = summary(collected)
    print(f"{'size':>8} {'path':>8} {'median us':>12} {'quartiles us':>24} {'x memcpy':>9}")
    for row in rows:
        low, high = row["quartiles_us"]
        print(
            f"{row['size']:>8} {row['path']:>8} {row['median_us']:>12,} "
            f"{f'{low:,} to {high:,}':>24} {row['times_memcpy']:>9}"
        )
    if options.save is not None:
        saved = {"command": options_given(), "machine": machine(), "rows": rows}
        options.save.write_text(json.dumps({**saved, "seconds": collected}, indent=1) + "\n")


if __name__ == "__main__":
    main()
