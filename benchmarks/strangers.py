"""What strangers cost: a good sender's latency and the receiver's memory while they knock.

Two hosts (network namespaces, so it needs root) with keys. The good sender moves 64 KiB again
and again, 5 ms after the last, over `tcp`; in interleaved rounds nobody, or one kind of stranger
(see `tests/strangers.py`; about a hundred attempts per second), knocks at the receiver's control
address. Figures are over all transfers of all rounds, from the claim to the receiver's consent.

    python -m benchmarks.strangers [--rounds 5] [--save FILE.json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from pathlib import Path
from typing import Any

import psutil

import aiomm
from aiomm.control.keys import write_key_pair
from benchmarks.latency import machine, options_given, run
from tests.hosts import Host, two_hosts
from tests.strangers import KINDS, command_of

NOBODY = "nobody"
PORT = 7001
PAUSE = 0.005
TRANSFERS = 400
"""In each turn."""
SCHEMA = aiomm.Schema(rows=aiomm.Field("uint8", 65536))


async def receiver(address: str, key_file: str) -> None:
    """Take whatever comes, until standard input ends."""
    pool = aiomm.Receiver(
        SCHEMA, bind=address, planes="tcp", key_file=key_file, block_size=1, default_blocks=1
    )
    async with pool:
        print("ready", flush=True)
        taking = asyncio.ensure_future(_take(pool))
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
        taking.cancel()


async def _take(pool: aiomm.Receiver) -> None:
    async for lease in pool:
        lease.release()


async def sender(address: str, key_file: str) -> None:
    """For every line of standard input, make one turn's transfers and print their seconds."""
    rows, number = {"rows": bytes(65536)}, 0
    async with aiomm.Sender(SCHEMA, planes="tcp", key_file=key_file) as good:
        while await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline):
            seconds = []
            for _ in range(TRANSFERS):
                number += 1
                began = time.perf_counter()
                await good.send(f"r{number}", rows, to=address)
                seconds.append(time.perf_counter() - began)
                await asyncio.sleep(PAUSE)
            print(json.dumps(seconds), flush=True)


async def measure(rounds: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Return the seconds of transfers, and the most bytes of memory, by who knocked."""
    seconds: dict[str, list[float]] = {kind: [] for kind in (NOBODY, *KINDS)}
    memory = dict.fromkeys(seconds, 0)
    with two_hosts() as hosts, tempfile.TemporaryDirectory() as folder:
        key_file = str(write_key_pair(Path(folder) / "shared")[0])
        address = f"tcp://{hosts.far.ipv4}:{PORT}"
        pool = await _start(hosts.far, "--receiver", address, key_file)
        await _line(pool)
        good = await _start(hosts.near, "--sender", address, key_file)
        await _turn(good)  # warm-up
        for _ in range(rounds):
            for kind, collected in seconds.items():
                stranger = None
                if kind != NOBODY:
                    stranger = await asyncio.create_subprocess_exec(
                        *hosts.near.command(*command_of(kind, address)), stdout=PIPE
                    )
                    await _line(stranger)
                collected += await _turn(good)
                memory[kind] = max(memory[kind], psutil.Process(pool.pid).memory_info().rss)
                if stranger is not None:
                    stranger.kill()
                    await stranger.wait()
        for process in (good, pool):
            assert process.stdin is not None
            process.stdin.close()
            await process.wait()
    return seconds, memory


async def _start(host: Host, *arguments: str) -> Process:
    command = host.command(sys.executable, "-m", "benchmarks.strangers", *arguments)
    return await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, limit=1 << 20)


async def _line(process: Process) -> bytes:
    assert process.stdout is not None
    return await process.stdout.readline()


async def _turn(good: Process) -> list[float]:
    assert good.stdin is not None
    good.stdin.write(b"\n")
    seconds: list[float] = json.loads(await _line(good))
    return seconds


def summary(seconds: dict[str, list[float]], memory: dict[str, int]) -> list[dict[str, Any]]:
    """Return one row for each kind: median, p99, both against nobody's, memory."""
    rows = []
    quiet = statistics.quantiles(seconds[NOBODY], n=100)
    for kind, collected in seconds.items():
        quantiles = statistics.quantiles(collected, n=100)
        rows.append(
            {
                "stranger": kind,
                "median_us": round(quantiles[49] * 1e6, 1),
                "p99_us": round(quantiles[98] * 1e6, 1),
                "times_median": round(quantiles[49] / quiet[49], 2),
                "times_p99": round(quantiles[98] / quiet[98], 2),
                "receiver_rss_mb": round(memory[kind] / 1e6, 1),
            }
        )
    return rows


def main() -> None:
    """Measure, print a table, and save the figures if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", type=Path, help="write machine, rows and raw seconds as JSON")
    parser.add_argument("--receiver", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--sender", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.receiver or options.sender:
        run(receiver(*options.receiver) if options.receiver else sender(*options.sender))
        return
    seconds, memory = asyncio.run(measure(options.rounds))
    rows = summary(seconds, memory)
    for row in rows:
        print(
            f"{row['stranger']:>18}  median {row['median_us']:>8,} us (x {row['times_median']})  "
            f"p99 {row['p99_us']:>8,} us (x {row['times_p99']})  {row['receiver_rss_mb']:>6} MB"
        )
    if options.save is not None:
        saved = {"command": options_given(), "machine": machine(), "rows": rows}
        options.save.write_text(json.dumps({**saved, "seconds": seconds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
