"""Starts the demo's two processes, passes tickets between them, and gathers what they say."""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from ..errors import PeerLost
from .messages import (
    MAX_LINE_NBYTES,
    Begin,
    Finished,
    Go,
    Job,
    Message,
    Options,
    Ready,
    Received,
    Sent,
    decode,
    encode,
)
from .report import Report

__all__ = ["run_demo"]

Listener = Callable[[Message], None]


async def run_demo(options: Options, listener: Listener | None = None) -> Report:
    """Move the requests; return what both processes know of every transfer.

    Args:
        options: what to do.
        listener: called with every message of either process, as it comes.

    Raises:
        PeerLost: a process ended before its work was done; its stderr says why.
    """
    async with _process("language") as language, _process("encoder") as encoder:
        demo = _Demo(options, language, encoder, listener or (lambda message: None))
        return await demo.run()


class _Demo:
    def __init__(
        self, options: Options, language: Process, encoder: Process, listener: Listener
    ) -> None:
        self._options = options
        self._language = language
        self._encoder = encoder
        self._listener = listener
        self._sent: dict[int, Sent] = {}
        self._received: dict[int, Received] = {}
        self._finished: Finished | None = None
        self._address = ""

    async def run(self) -> Report:
        first, second = self._language, self._encoder
        if self._options.bind == "sender":
            first, second = second, first
        self._address = await self._greet(first, None)
        await self._greet(second, self._address)
        _tell(self._language, Go())
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._follow_language())
                group.create_task(self._follow_encoder())
        except* PeerLost as group_error:
            raise group_error.exceptions[0] from None
        assert self._finished is not None
        return Report(self._options, self._address, self._sent, self._received, self._finished)

    async def _greet(self, process: Process, address: str | None) -> str:
        _tell(process, Begin(self._options, address))
        async for message in self._messages(process):
            assert isinstance(message, Ready), message
            return message.address or ""
        raise await _lost(process)

    async def _follow_language(self) -> None:
        async for message in self._messages(self._language):
            match message:
                case Job():
                    _tell(self._encoder, message)
                case Received(number=number):
                    self._received[number] = message
                case Finished():
                    self._finished = message
                    _end(self._encoder)
                case _:
                    raise AssertionError(message)
        if self._finished is None:
            raise await _lost(self._language)

    async def _follow_encoder(self) -> None:
        async for message in self._messages(self._encoder):
            assert isinstance(message, Sent), message
            self._sent[message.number] = message
        if await self._encoder.wait() or self._finished is None:
            raise await _lost(self._encoder)

    async def _messages(self, process: Process) -> AsyncIterator[Message]:
        assert process.stdout is not None
        while line := await process.stdout.readline():
            message = decode(line)
            self._listener(message)
            yield message


@asynccontextmanager
async def _process(name: str) -> AsyncIterator[Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "aiomm.demo", name),
        stdin=PIPE,
        stdout=PIPE,
        limit=MAX_LINE_NBYTES,
        start_new_session=True,  # so that the terminal's Ctrl-C reaches the command alone
    )
    try:
        yield process
        await process.wait()
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _tell(process: Process, message: Message) -> None:
    """Tell a process something. If it has ended, who reads its stdout will notice."""
    assert process.stdin is not None
    if not process.stdin.is_closing():
        process.stdin.write(encode(message))


def _end(process: Process) -> None:
    assert process.stdin is not None
    process.stdin.close()


async def _lost(process: Process) -> PeerLost:
    status = await process.wait()
    return PeerLost(f"the process {process.pid} ended with status {status} before its work")
