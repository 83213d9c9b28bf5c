"""Starts the benchmark's two processes and gathers what they measure."""

from __future__ import annotations

import asyncio
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import msgspec

from ..errors import PeerLost
from .messages import Arrived, Beats, Broke, Copied, Left, Message, decode
from .plan import Plan
from .results import Results

__all__ = ["BenchBroke", "run_bench"]

Listener = Callable[[Message], None]


class BenchBroke(Exception):
    """A process could not go on, and said why."""


async def run_bench(plan: Plan, listener: Listener | None = None) -> Results:
    """Measure what the plan says.

    Args:
        plan: what to do.
        listener: called with every message of either process, as it comes.

    Raises:
        BenchBroke: a process could not go on.
        PeerLost: a process ended before its work was done; its stderr says why.
    """
    results = Results(plan)
    listener = listener or (lambda message: None)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        async with (
            _process("language", plan, ours) as language,
            _process("encoder", plan, theirs) as encoder,
        ):
            ours.close()  # so that each notices the end of the other
            theirs.close()
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(_follow(language, results, listener))
                    group.create_task(_follow_to_the_end(encoder, language, results, listener))
            except* (BenchBroke, PeerLost) as errors:
                raise errors.exceptions[0] from None
    return results


async def _follow_to_the_end(
    encoder: Process, language: Process, results: Results, listener: Listener
) -> None:
    await _follow(encoder, results, listener)
    assert language.stdin is not None
    language.stdin.close()  # it has nobody left to receive from


async def _follow(process: Process, results: Results, listener: Listener) -> None:
    assert process.stdout is not None
    while line := await process.stdout.readline():
        message = decode(line)
        match message:
            case Copied() | Left() | Arrived() | Beats():
                results.add(message)
            case Broke(error=error):
                raise BenchBroke(error)
        listener(message)
    status = await process.wait()
    if status:
        raise PeerLost(f"the process {process.pid} ended with status {status} before its work")


@asynccontextmanager
async def _process(name: str, plan: Plan, link: socket.socket) -> AsyncIterator[Process]:
    descriptor = link.fileno()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "aiomm.bench", name),
        *(str(descriptor), msgspec.json.encode(plan).decode()),
        stdin=PIPE,
        stdout=PIPE,
        pass_fds=[descriptor],
        start_new_session=True,  # so that the terminal's Ctrl-C reaches the command alone
    )
    try:
        yield process
        await process.wait()
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
