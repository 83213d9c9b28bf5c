"""Run a sender or a receiver in a process of its own, which the test can kill, stop and continue.

The child is :mod:`tests.children`: commands go in and reports come out, one JSON object per line.
Nothing here waits by sleeping: reports and the child's end come as events of the test's loop.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import aiomm
from aiomm.buffers.arrays import load_array_library
from tests.conftest import open_descriptors, resources

__all__ = [
    "DEADLINE",
    "SCHEMA",
    "Child",
    "bytes_of",
    "child",
    "failed",
    "nothing_new",
    "num_blocks",
    "pattern",
    "received",
    "receiving",
    "until",
]

DEADLINE = 15.0
"""Seconds after which a wait of these tests has failed; generous, since machines are busy."""

SCHEMA = aiomm.Schema(embeddings=aiomm.Field("uint8", 1024), ids=aiomm.Field("int32"))
"""What all children send: 1028 bytes per token."""

Report = dict[str, Any]


def pattern(seed: int, num_tokens: int) -> dict[str, bytes]:
    """Return the tensors of a request as bytes that no other seed has at any place."""
    token = bytes((seed * 37 + place) % 251 for place in range(1024))
    numbers = b"".join((seed * 1_000_000 + n).to_bytes(4, "little") for n in range(num_tokens))
    return {"embeddings": token * num_tokens, "ids": numbers}


class Child:
    """One child process: Python with `arguments`, behind the command `prefix` if there is one."""

    def __init__(self, arguments: list[str], prefix: Sequence[str] = ()) -> None:
        self._loop = asyncio.get_running_loop()
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-X", "faulthandler", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # Where the tests run under nohup, a child would not notice that it is hung up.
            preexec_fn=partial(signal.signal, signal.SIGHUP, signal.SIG_DFL),
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._unread = b""
        self._reports: list[Report] = []
        self._changed = asyncio.Event()
        self.stderr = b""
        self.is_dead = False
        self._watched: set[int] = set()
        self._watch(self._process.stdout.fileno(), self._heard)
        self._watch(self._process.stderr.fileno(), self._complained)
        self._pidfd = os.pidfd_open(self._process.pid)
        self._watch(self._pidfd, self._died)

    @property
    def pid(self) -> int:
        """Its process number."""
        return self._process.pid

    def tell(self, do: str, **arguments: object) -> None:
        """Give it one command."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
        self._process.stdin.flush()

    async def ask(self, do: str, report: str, **arguments: object) -> Report:
        """Give it one command and return the report that answers it."""
        self.tell(do, **arguments)
        return await self.hear(report)

    async def hear(self, report: str, **wanted: object) -> Report:
        """Return the next report of that name with these values; others stay for later."""
        async with asyncio.timeout(DEADLINE):
            while True:
                for each in self._reports:
                    if each["report"] == report and wanted.items() <= each.items():
                        self._reports.remove(each)
                        return each
                assert not self.is_dead, f"it died before {report!r}: {self.stderr.decode()}"
                self._changed.clear()
                await self._changed.wait()

    def kill(self) -> float:
        """End it at once, as the kernel does when memory is short; return when."""
        at = time.monotonic()
        self._process.kill()
        return at

    @staticmethod
    def kill_orphan(pid: int) -> None:
        """End a child of a child."""
        os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        """Stop it in the middle of whatever it does, and return once it stands still."""
        self._process.send_signal(signal.SIGSTOP)
        self.wait_stopped()

    def wait_stopped(self) -> None:
        """Return once it stands still."""
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)

    def resume(self) -> None:
        """Let it go on."""
        self._process.send_signal(signal.SIGCONT)

    async def wait(self) -> int:
        """Return its exit status once it has ended and everything it said is read."""
        async with asyncio.timeout(DEADLINE):
            while self._watched:
                self._changed.clear()
                await self._changed.wait()
        return self._process.wait()

    async def close(self) -> None:
        """End it if it still runs, and let go of everything. Idempotent."""
        if self._pidfd < 0:
            return
        if not self.is_dead:
            self._process.kill()
        self._process.wait()
        for descriptor in tuple(self._watched):
            self._leave(descriptor)
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:
                    continue
        os.close(self._pidfd)
        self._pidfd = -1

    def _watch(self, descriptor: int, action: Callable[[], None]) -> None:
        self._watched.add(descriptor)
        self._loop.add_reader(descriptor, action)

    def _leave(self, descriptor: int) -> None:
        self._loop.remove_reader(descriptor)
        self._watched.discard(descriptor)
        self._changed.set()

    def _read(self, descriptor: int) -> bytes:
        octets = os.read(descriptor, 65536)
        if not octets:
            self._leave(descriptor)
        return octets

    def _heard(self) -> None:
        assert self._process.stdout is not None
        *lines, self._unread = (self._unread + self._read(self._process.stdout.fileno())).split(
            b"\n"
        )
        self._reports += map(json.loads, lines)
        self._changed.set()

    def _complained(self) -> None:
        assert self._process.stderr is not None
        self.stderr += self._read(self._process.stderr.fileno())

    def _died(self) -> None:
        self.is_dead = True
        self._leave(self._pidfd)


@asynccontextmanager
async def child(
    role: str, *, uvloop: bool = False, options: tuple[str, ...] = (), **settings: object
) -> AsyncIterator[Child]:
    """Run one child until the block ends; it has started its endpoint when the block begins.

    Args:
        role: "sender" or "receiver".
        uvloop: run it on uvloop.
        options: of its interpreter.
        settings: of its endpoint.
    """
    loop = "uvloop" if uvloop else "asyncio"
    process = Child([*options, "-m", "tests.children", role, loop, json.dumps(settings)])
    try:
        await process.hear("ready")
        yield process
    finally:
        await process.close()


@asynccontextmanager
async def receiving(**settings: Any) -> AsyncIterator[aiomm.Receiver]:
    """Run a receiver in this process, with a pool of 16 blocks of 128 tokens unless told else."""
    defaults: dict[str, Any] = {
        "blocks": 16,
        "block_size": 128,
        "default_blocks": 2,
        "timeout": 20.0,
    }
    defaults["bind"] = "tcp://127.0.0.1:*"
    load_array_library()  # now: it leaves threads behind
    async with aiomm.Receiver(SCHEMA, **{**defaults, **settings}) as receiver:
        yield receiver


async def received(receiver: aiomm.Receiver, request_id: str) -> dict[str, bytes]:
    """Receive a request and return its bytes."""
    async with receiver.receive(request_id) as lease:
        return bytes_of(lease)


def bytes_of(lease: aiomm.Lease) -> dict[str, bytes]:
    """Return what the lease's tensors hold now."""
    return {name: lease[name].numpy().tobytes() for name in lease}  # type: ignore[union-attr]


async def failed(receiver: aiomm.Receiver, request_id: str) -> tuple[aiomm.AiommError, float]:
    """Return the error that receiving ends in, and when it came."""
    try:
        lease = await receiver.receive(request_id)
    except aiomm.AiommError as exc:
        return exc, time.monotonic()
    lease.release()
    raise AssertionError(f"{request_id} was received")


def num_blocks(receiver: aiomm.Receiver, state: str) -> int:
    """Return how many blocks are in that state."""
    return receiver.metrics()[f"blocks_{state}"]


def nothing_new(before: dict[str, set[str]]) -> Callable[[], bool]:
    """Return a condition: no descriptor, thread or file that was not there `before`."""

    def holds() -> bool:
        now = {f"{number} -> {target}" for number, target in open_descriptors().items()}
        if now - before["descriptors"]:
            return False
        after = resources()  # slow: it collects garbage
        # The loop's own threads go with the loop, which may start a second while one rests.
        after["threads"] = {each for each in after["threads"] if not each.startswith("asyncio_")}
        return not any(after[name] - before[name] for name in after)

    gc.collect()
    return holds


async def until(condition: Callable[[], bool], what: str) -> None:
    """Return once `condition` holds, looking at it once per turn of the loop."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, f"not within {DEADLINE:g} s: {what}"
        await asyncio.sleep(0.002)
