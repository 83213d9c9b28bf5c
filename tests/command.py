"""Run the `aiomm` command as a person does: a process of its own, with pipes and signals."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import NamedTuple

from tests.hosts import Host

__all__ = ["Command", "Outcome", "command", "outcome_of"]

DEADLINE = 60.0
"""Seconds after which a command has failed; generous, since machines are busy."""


class Outcome(NamedTuple):
    """What is left of a command."""

    code: int
    output: str
    errors: str


class Command:
    """One running command."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._errors = ""

    @property
    def pid(self) -> int:
        """Its process number."""
        return self._process.pid

    async def says(self, text: str) -> str:
        """Return the first line on stderr that contains `text`."""
        assert self._process.stderr is not None
        async with asyncio.timeout(DEADLINE):
            while line := (await self._process.stderr.readline()).decode():
                self._errors += line
                if text in line:
                    return line.strip()
        raise AssertionError(f"{text!r} was never said, but: {self._errors}")

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        self._process.send_signal(signal.SIGINT)

    async def end(self) -> Outcome:
        """Return what it leaves behind, once it has ended."""
        async with asyncio.timeout(DEADLINE):
            output, errors = await self._process.communicate()
        assert self._process.returncode is not None
        return Outcome(self._process.returncode, output.decode(), self._errors + errors.decode())


@asynccontextmanager
async def command(*arguments: str, on: Host | None = None) -> AsyncIterator[Command]:
    """Run `aiomm` with warnings as errors, here or on another host; it is gone on exit."""
    program = [sys.executable, "-W", "error", "-m", "aiomm", *arguments]
    process = await asyncio.create_subprocess_exec(
        *(program if on is None else on.command(*program)),
        stdin=PIPE,
        stdout=PIPE,
        stderr=PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"},
        limit=2**26,
        # Where the tests run in the background of a shell, Ctrl-C is ignored.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        yield Command(process)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def outcome_of(*arguments: str, on: Host | None = None) -> Outcome:
    """Run `aiomm` to its end."""
    async with command(*arguments, on=on) as running:
        return await running.end()
