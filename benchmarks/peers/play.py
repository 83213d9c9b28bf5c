"""One process of a pair: orders come as JSON lines, what was measured goes back as such.

Before every transfer the far side tells the near side over a socket that it is ready (with a
ticket, if the adapter has such), and after it that it has the tensor: one transfer at a time,
without the driver between them. CPU time of a transfer contains this talk (about 10 us, 30 us on
an event loop), and in both sides all from the preparation on, so also who spins in a pause.
No adapter has other processes do its work: those of the resource tracker only wait.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, TextIO

import torch

from benchmarks.latency import run

from .base import PAGE_NBYTES, Far, Near, Setting, content, stamp, stamps
from .paths import PATHS

CLOSING_SECONDS = 5
DONE = "done"


class Orders:
    """What the driver says; its end ends this process, soon or at once."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    async def next(self) -> dict[str, Any] | None:
        """Return the next order, None after the last."""
        return await self._queue.get()

    def _read(self) -> None:
        for line in sys.stdin:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, json.loads(line))
        self._loop.call_soon_threadsafe(self._queue.put_nowait, None)
        time.sleep(CLOSING_SECONDS)
        os._exit(1)


class Talk:
    """The near end of the socket, and a pause: both block the process."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(address)
        self._lines = self._socket.makefile("r")

    async def hear(self) -> str:
        """Return what the far side says next."""
        return str(json.loads(self._lines.readline()))

    async def pause(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)  # noqa: ASYNC251


class LoopTalk(Talk):
    """The same, while the event loop goes on."""

    _reader: asyncio.StreamReader | None = None

    async def hear(self) -> str:
        """Return what the far side says next."""
        if self._reader is None:
            self._reader, self._writer = await asyncio.open_unix_connection(sock=self._socket)
        return str(json.loads(await self._reader.readline()))

    async def pause(self, seconds: float) -> None:
        """Wait."""
        await asyncio.sleep(seconds)


async def play_far(far: Far, setting: Setting, orders: Orders, answers: TextIO) -> None:
    """Receive as often as one is told."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(talk_address(setting))
    server.listen()
    say(answers, {"where": await far.open()})
    await far.connect()
    talk, _ = server.accept()
    say(answers, {"ready": True})
    compared: set[int] = set()
    while (order := await orders.next()) is not None:
        numbers = range(order["number"], order["number"] + order["count"])
        measured = [
            await receive_one(far, talk, order["nbytes"], number, compared) for number in numbers
        ]
        say(answers, {"received": measured})
    await far.close()


async def receive_one(
    far: Far, talk: socket.socket, nbytes: int, number: int, compared: set[int]
) -> dict[str, int]:
    """Receive one tensor and look whether it is what was sent, off the clock."""
    cpu = time.process_time_ns()
    ticket = await far.prepare(nbytes)
    talk.sendall(json.dumps(ticket).encode() + b"\n")
    rows = await far.receive(nbytes)
    ended = time.monotonic_ns()
    talk.sendall(json.dumps(DONE).encode() + b"\n")
    spent = time.process_time_ns() - cpu
    began = time.monotonic_ns()
    rows.view(-1)[::PAGE_NBYTES].sum()
    first_read = time.monotonic_ns() - began
    compare(rows, nbytes, number, compared)
    del rows
    cpu = time.process_time_ns()
    await far.finish()
    return {"ended": ended, "cpu": spent + time.process_time_ns() - cpu, "first_read": first_read}


def compare(rows: torch.Tensor, nbytes: int, number: int, compared: set[int]) -> None:
    """Look at every byte of the first tensor of a size, at the stamps of the others.

    Raises:
        ValueError: it is not what was sent.
    """
    if rows.nbytes != nbytes or rows.dtype != torch.uint8:
        raise ValueError(f"{nbytes} bytes were sent, {rows.nbytes} of {rows.dtype} came")
    if nbytes not in compared:
        compared.add(nbytes)
        sent = content(nbytes)
        stamp(sent, number)
        if not torch.equal(rows, sent):
            raise ValueError(f"what came is not what was sent, of {nbytes} bytes")
    elif stamps(rows) != [number, number]:
        raise ValueError(f"transfer {number} came with the stamps {stamps(rows)}")


async def play_near(
    near: Near, setting: Setting, where: str, orders: Orders, answers: TextIO
) -> None:
    """Send as often as one is told."""
    kind = LoopTalk if near.runs_on_the_loop else Talk
    await near.open(where)
    talk = kind(talk_address(setting))
    say(answers, {"ready": True})
    while (order := await orders.next()) is not None:
        numbers = range(order["number"], order["number"] + order["count"])
        measured = [
            await send_one(near, talk, order["nbytes"], number, order["pause"])
            for number in numbers
        ]
        say(answers, {"sent": measured})
    await near.close()


async def send_one(
    near: Near, talk: Talk, nbytes: int, number: int, pause: float
) -> dict[str, int | None]:
    """Send one tensor when the far side is ready and the pause is over."""
    ticket = await talk.hear()
    rows = near.fresh(near.sources[nbytes])
    stamp(rows, number)
    cpu = time.process_time_ns()
    await near.prepare(ticket, nbytes)
    if pause:
        await talk.pause(pause)
    began = time.monotonic_ns()
    ended = await near.send(rows)
    if await talk.hear() != DONE:
        raise ValueError("the far side is out of step")
    return {"began": began, "ended": ended, "cpu": time.process_time_ns() - cpu}


def talk_address(setting: Setting) -> str:
    """Return where both talk."""
    return str(Path(setting.scratch, "talk"))


def say(answers: TextIO, what: dict[str, Any]) -> None:
    """Tell the driver."""
    answers.write(json.dumps(what) + "\n")
    answers.flush()


async def play(role: str, setting: Setting, where: str, answers: TextIO) -> None:
    """Be the far or the near side, until the driver has no more orders."""
    orders = Orders()
    adapter = PATHS[setting.path]
    try:
        if role == "far":
            await play_far(adapter.far(setting), setting, orders, answers)
        else:
            sources = {nbytes: content(nbytes) for nbytes in setting.sizes}
            near = adapter.near(setting, sources)
            await play_near(near, setting, where, orders, answers)
    except Exception as exc:
        say(answers, {"failed": f"{role} side: {type(exc).__name__}: {exc}"})
        raise


def main() -> None:
    """Keep standard output for answers alone; what libraries print there goes to the errors."""
    role, setting, where = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    path, scratch, sizes = json.loads(setting)
    run(play(role, Setting(path, scratch, tuple(sizes)), where, answers))


if __name__ == "__main__":
    main()
