"""How fast bytes get from one host into the memory of another: planes against bare sockets.

Two network namespaces with a virtual cable stand for two hosts, on one machine and its cores. A
process on the near host sends, one on the far host has the memory. In interleaved rounds, each
in another order, every contender moves every size, one transfer at a time; the clock of the near
process runs from the call until it knows that every byte is in place. All processes are started
anew several times, since one start may be a quarter faster than the next for as long as it lives:

* `tcp`, `mooncake`: our planes, `RemoteArena.write`; `mooncake registered`: out of memory that
  was given to `Plane.register`, so that nothing is copied into staging
* `raw`: what an event loop can do: `transport.write` on one side, a `BufferedProtocol` that
  receives into one buffer on the other, one byte back. Nothing else: no header, no check
* `mooncake sync`: Mooncake's own `transfer_sync_write`, which blocks its thread, out of registered
  memory; `mooncake sync copied`: the same after a copy into it, for tensors that are elsewhere
* `iperf3`: its mean rate in a run of that size, without an answer; the limit of the cable

All on uvloop. It needs the rights to make network namespaces.

    python -m benchmarks.two_hosts [--starts 5] [--rounds 5] [--only tcp,raw] [--save FILE.json]
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, cast

import aiomm
from aiomm.buffers.arena import HostArena
from aiomm.buffers.layout import ByteRange
from aiomm.buffers.memcpy import copy_bytes
from aiomm.buffers.tensors import TokenRows, memory_of
from aiomm.planes.base import GrantKey, Place, Plane, Run
from aiomm.planes.registry import make_planes
from benchmarks.latency import machine, options_given, run
from tests.hosts import Hosts, two_hosts, unusable

SIZES = {
    "64 KiB": 1 << 16,
    "1 MiB": 1 << 20,
    "8 MiB": 1 << 23,
    "64 MiB": 1 << 26,
    "256 MiB": 1 << 28,
}
LARGEST = max(SIZES.values())
ROW = aiomm.Field("uint8", 1 << 16)
GRANT = GrantKey(1, 1, 1)
FLOOR = "raw"

Move = Callable[[int], Awaitable[float | None]]
"""Moves so many bytes and returns the seconds, or None where that cannot be measured."""


def source() -> bytearray:
    """Return what is sent: bytes that no page of zeros stands for."""
    return bytearray(random.randbytes(1 << 20) * (LARGEST >> 20))


# The far side: makes the memory, says where it is, and waits.


async def far_plane(name: str, host: str) -> str:
    """Export an arena over a plane; return the offer."""
    plane = plane_at(name, host)
    arena = HostArena(LARGEST)
    export = await plane.export(arena)
    export.permit(GRANT, [ByteRange(0, LARGEST)])
    KEPT.append(export)
    return export.offer(GRANT.link).hex()


class Sink(asyncio.BufferedProtocol):
    """Receives eight bytes of length, then so many bytes, then the next."""

    def __init__(self) -> None:
        self.memory = HostArena(LARGEST).view(0, LARGEST)
        self.length = memoryview(bytearray(8))
        self.nbytes = 0
        self.taken = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Know whom to answer."""
        self.transport = cast("asyncio.Transport", transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return the memory for the next bytes."""
        return self.memory[self.taken : self.nbytes] if self.nbytes else self.length[self.taken :]

    def buffer_updated(self, nbytes: int) -> None:
        """Answer when everything is there."""
        self.taken += nbytes
        if not self.nbytes and self.taken == len(self.length):
            self.nbytes, self.taken = int.from_bytes(self.length, "big"), 0
        elif self.nbytes and self.taken == self.nbytes:
            self.transport.write(b"\0")
            self.nbytes = self.taken = 0


async def far_raw(name: str, host: str) -> str:
    """Listen; return the port."""
    server = await asyncio.get_running_loop().create_server(Sink, host)
    KEPT.append(server)
    return str(server.sockets[0].getsockname()[1])


async def far_mooncake(name: str, host: str) -> str:
    """Register memory; return the engine's name and the address."""
    memory = bytearray(LARGEST)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    engine = mooncake_engine(host)
    assert engine.register_memory(address, LARGEST) == 0
    KEPT.extend([memory, engine])
    return f"{host}:{engine.get_rpc_port()} {address}"


async def far_iperf3(name: str, host: str) -> str:
    """Listen."""
    server = await asyncio.create_subprocess_exec(
        "iperf3", "--server", "--bind", host, "--forceflush", stdout=subprocess.PIPE
    )
    KEPT.append(server)
    assert server.stdout is not None
    while b"listening" not in await server.stdout.readline():
        pass
    return host


# The near side: connects once, then moves as many bytes as it is told.


async def near_plane(name: str, host: str, where: str) -> Move:
    """Attach to the offer, with the source registered if the name says so."""
    plane, content = plane_at(name, host), source()
    if name.endswith(REGISTERED):
        await plane.register(memory_of(content))
    remote = await plane.attach(bytes.fromhex(where))
    KEPT.append(remote)
    rows = TokenRows.of("rows", ROW, content)

    async def move(nbytes: int) -> float:
        runs = [Run(rows, 0, nbytes // ROW.row_nbytes, 0)]
        began = time.perf_counter()
        await remote.write(GRANT, runs)
        return time.perf_counter() - began

    return move


class Answers(asyncio.Protocol):
    """Tells when the byte has come back."""

    def __init__(self) -> None:
        self.came = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        """Tell it."""
        self.came.set()


async def near_raw(name: str, host: str, where: str) -> Move:
    """Connect to the port."""
    loop = asyncio.get_running_loop()
    transport, answers = await loop.create_connection(Answers, FAR_HOST, int(where))
    content = memoryview(source())

    async def move(nbytes: int) -> float:
        answers.came.clear()
        began = time.perf_counter()
        transport.write(nbytes.to_bytes(8, "big"))
        transport.write(content[:nbytes])
        await answers.came.wait()
        return time.perf_counter() - began

    return move


async def near_mooncake(name: str, host: str, where: str) -> Move:
    """Start an engine and register the source, as it has to be for RDMA, or copy it there first."""
    peer, _, target = where.partition(" ")
    content = source()
    tensor = memoryview(source() if name.endswith(COPIED) else content)
    address = ctypes.addressof(ctypes.c_char.from_buffer(content))
    engine = mooncake_engine(host)
    assert engine.register_memory(address, LARGEST) == 0
    KEPT.extend([content, engine])

    async def move(nbytes: int) -> float:
        began = time.perf_counter()
        if name.endswith(COPIED):
            copy_bytes(memoryview(content)[:nbytes], tensor[:nbytes])
        assert engine.transfer_sync_write(peer, address, int(target), nbytes) == 0
        return time.perf_counter() - began

    return move


async def near_iperf3(name: str, host: str, where: str) -> Move:
    """Nothing stays connected."""

    async def move(nbytes: int) -> float | None:
        if nbytes < 1 << 26:  # its start and its end would be most of it
            return None
        options = ["--client", where, "--bytes", str(nbytes), "--json"]
        client = await asyncio.create_subprocess_exec("iperf3", *options, stdout=subprocess.PIPE)
        printed, _ = await client.communicate()
        return nbytes * 8 / float(json.loads(printed)["end"]["sum_received"]["bits_per_second"])

    return move


class Contender(NamedTuple):
    """A way to move bytes between two hosts."""

    far: Callable[[str, str], Awaitable[str]]
    near: Callable[[str, str, str], Awaitable[Move]]
    missing: str = ""
    """Why it cannot take part."""


MOONCAKE_MISSING = "" if find_spec("mooncake") else "Mooncake is not installed"
IPERF3_MISSING = "" if shutil.which("iperf3") else "iperf3 is not installed"
CONTENDERS: Mapping[str, Contender] = {
    "raw": Contender(far_raw, near_raw),
    "tcp": Contender(far_plane, near_plane),
    "mooncake": Contender(far_plane, near_plane, MOONCAKE_MISSING),
    "mooncake registered": Contender(far_plane, near_plane, MOONCAKE_MISSING),
    "mooncake sync": Contender(far_mooncake, near_mooncake, MOONCAKE_MISSING),
    "mooncake sync copied": Contender(far_mooncake, near_mooncake, MOONCAKE_MISSING),
    "iperf3": Contender(far_iperf3, near_iperf3, IPERF3_MISSING),
}
REGISTERED = " registered"
COPIED = " copied"
FAR_HOST = "10.77.0.2"
KEPT: list[object] = []
"""What must live as long as its process."""


def plane_at(name: str, host: str) -> Plane:
    """Return a plane that is used by name on this host."""
    (plane,) = make_planes(name.removesuffix(REGISTERED), Place(host, host))
    return plane


def mooncake_engine(host: str) -> Any:
    """Return an engine of Mooncake's own, told what ours is told."""
    from aiomm.planes.mooncake.library import load

    engine = load(host).TransferEngine()
    assert engine.initialize(host, "P2PHANDSHAKE", "tcp", "") == 0
    return engine


async def play(role: str, name: str, host: str, where: str) -> None:
    """Be the far or the near side of one contender, until standard input ends."""
    loop = asyncio.get_running_loop()
    if role == "far":
        print(await CONTENDERS[name].far(name, host), flush=True)
        await loop.run_in_executor(None, sys.stdin.read)
    else:
        move = await CONTENDERS[name].near(name, host, where)
        print("ready", flush=True)
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            print(json.dumps(await move(int(line))), flush=True)
    for each in KEPT:
        if isinstance(each, asyncio.subprocess.Process):
            each.terminate()


class Pair:
    """Both processes of one contender."""

    def __init__(self, name: str, hosts: Hosts) -> None:
        self.far = self._start(hosts.far.command(), "far", name, hosts.far.ipv4, "")
        where = self._hear(self.far)
        self.near = self._start(hosts.near.command(), "near", name, hosts.near.ipv4, where)
        assert self._hear(self.near) == "ready"

    def move(self, nbytes: int) -> float | None:
        """Move so many bytes and return the seconds."""
        assert self.near.stdin is not None
        self.near.stdin.write(f"{nbytes}\n")
        self.near.stdin.flush()
        return cast("float | None", json.loads(self._hear(self.near)))

    def close(self) -> None:
        """End both."""
        for process in (self.near, self.far):
            assert process.stdin is not None
            process.stdin.close()
            process.wait(10)

    def _start(self, prefix: list[str], *role: str) -> subprocess.Popen[str]:
        command = [*prefix, sys.executable, "-m", "benchmarks.two_hosts", "--play", *role]
        return subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def _hear(self, process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        return process.stdout.readline().strip()


def measure(starts: int, rounds: int, names: list[str]) -> dict[str, dict[str, list[float]]]:
    """Return seconds by size, then by contender."""
    figures: dict[str, dict[str, list[float]]] = {
        size: {name: [] for name in names} for size in SIZES
    }
    for _ in range(starts):
        with two_hosts() as hosts:
            pairs = {name: Pair(name, hosts) for name in random.sample(names, len(names))}
            for number in range(rounds + 2):
                for size, nbytes in SIZES.items():
                    for name in random.sample(names, len(names)):
                        seconds = pairs[name].move(nbytes)
                        if number >= 2 and seconds is not None:  # the first two are warm-up
                            figures[size][name].append(seconds)
            for pair in pairs.values():
                pair.close()
    return figures


def summary(figures: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """Return one row per size and contender: median, quartiles, rate, and that by the floor's."""
    rows = []
    for size, by_name in figures.items():
        for name, seconds in by_name.items():
            if not seconds:
                continue
            low, median, high = statistics.quantiles(seconds, n=4)
            row: dict[str, Any] = {
                "size": size,
                "path": name,
                "median_us": round(median * 1e6, 1),
                "quartiles_us": [round(low * 1e6, 1), round(high * 1e6, 1)],
                "gb_per_second": round(SIZES[size] / median / 1e9, 3),
            }
            if by_name.get(FLOOR):
                row["rate_of_raw"] = round(statistics.median(by_name[FLOOR]) / median, 2)
            rows.append(row)
    return rows


def main() -> None:
    """Measure, print a table, and save the figures if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5, help="of each start")
    parser.add_argument("--only", help="contenders, with commas between them")
    parser.add_argument("--save", type=Path, help="write machine, rows and raw seconds as JSON")
    parser.add_argument("--play", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.play:
        run(play(*options.play))
        return
    if unusable():
        raise SystemExit(f"not measured: {unusable()}")
    wanted = options.only.split(",") if options.only else list(CONTENDERS)
    missing = {name: CONTENDERS[name].missing for name in wanted if CONTENDERS[name].missing}
    for name, reason in missing.items():
        print(f"without {name}: {reason}")
    load_before = os.getloadavg()[0]
    figures = measure(
        options.starts, options.rounds, [name for name in wanted if name not in missing]
    )
    rows = summary(figures)
    print(
        f"{'size':>8} {'path':>20} {'median us':>12} {'quartiles us':>24} {'GB/s':>7} {'x raw':>6}"
    )
    for row in rows:
        low, high = row["quartiles_us"]
        ratio = row.get("rate_of_raw", "")
        print(
            f"{row['size']:>8} {row['path']:>20} {row['median_us']:>12,} "
            f"{f'{low:,} to {high:,}':>24} {row['gb_per_second']:>7} {ratio:>6}"
        )
    if options.save is not None:
        load = f"{load_before:.1f} before, {os.getloadavg()[0]:.1f} after"
        where = {**machine(), "load": load}
        saved = {"command": options_given(), "machine": where, "missing": missing}
        figures_saved = {**saved, "rows": rows, "seconds": figures}
        options.save.write_text(json.dumps(figures_saved, indent=1) + "\n")


if __name__ == "__main__":
    main()
