"""What the demo's processes tell each other, as lines of JSON over stdin and stdout.

::

    command  --Begin-->  language, encoder
             <--Ready--                        where it listens
             --Go-->     language              both are up
             <--Job--    language              a ticket, passed on to the encoder
             <--Sent--   encoder               one per request
             <--Received-- language            one per request
             <--Finished-- language
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from typing import Literal, TypeAlias, TypeVar

import msgspec

__all__ = [
    "MAX_LINE_NBYTES",
    "Begin",
    "Finished",
    "Go",
    "Job",
    "Message",
    "Options",
    "Ready",
    "Received",
    "Sent",
    "decode",
    "encode",
    "first_of",
    "messages_from_stdin",
    "tell",
]

MAX_LINE_NBYTES = 64 * 2**20
"""A transfer of many chunks names every block of each."""

_Message = TypeVar("_Message")


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What the demo is asked to do."""

    tokens: int = 2000
    hidden: int = 3584
    requests: int = 1
    concurrency: int = 8
    block_size: int = 128
    default_blocks: int = 8
    pool_blocks: int = 64
    plane: Literal["auto", "cuda_ipc", "shm", "mooncake", "tcp"] = "auto"
    device: str = "cpu"
    """Where the encoder's tensors and the language side's pool lie."""
    control: Literal["auto", "zmq", "aiozmq"] = "auto"
    bind: Literal["receiver", "sender"] = "receiver"
    announce: bool = False
    image: str | None = None
    timeout: float = 120.0
    """Seconds for one request."""


class Begin(msgspec.Struct, frozen=True, tag=True):
    """Go ahead; `address` is where the other side listens, if it is this side that connects."""

    options: Options
    address: str | None = None


class Ready(msgspec.Struct, frozen=True, tag=True):
    """This side is up."""

    address: str | None


class Go(msgspec.Struct, frozen=True, tag=True):
    """Both sides are up: let the requests come."""


class Job(msgspec.Struct, frozen=True, tag=True):
    """Encode request `number` and send it with this ticket."""

    number: int
    ticket: str


class Sent(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """What the encoder process knows of one transfer that is over."""

    number: int
    error: str | None = None
    sending_seconds: float = 0.0
    """From `send()` until the receiver had everything."""
    states: tuple[tuple[str, float], ...] = ()
    plane: str = ""
    refused_planes: tuple[str, ...] = ()
    note: str = ""
    """What was encoded, where that is worth telling."""


class Received(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """What the language process knows of one transfer that is over."""

    number: int
    request_id: str
    error: str | None = None
    difference: str | None = None
    """The first tensor that is not as it was sent; None if every byte is."""
    total_tokens: int = 0
    nbytes: int = 0
    buffered_chunks: tuple[int, ...] = ()
    resumes: int = 0
    block_indices: tuple[tuple[int, ...], ...] = ()
    start_offset: tuple[int, ...] = ()
    states: tuple[tuple[str, float], ...] = ()
    seconds: float = 0.0
    view: bool = False
    """The tensors were views of the pool."""
    next_tokens: tuple[int, ...] = ()
    """What the language model said, if there was one."""


class Finished(msgspec.Struct, frozen=True, tag=True):
    """The language process is through with all requests."""

    seconds: float
    """From the first ticket to the last release."""
    baseline_rss_mb: float
    """Resident memory before there was a pool, with torch loaded."""
    peak_rss_mb: float
    """The most resident memory there ever was."""


Message: TypeAlias = Begin | Ready | Go | Job | Sent | Received | Finished

_decoder: msgspec.json.Decoder[Message] = msgspec.json.Decoder(Message)


def encode(message: Message) -> bytes:
    """Return the message as one line."""
    return msgspec.json.encode(message) + b"\n"


def decode(line: bytes) -> Message:
    """Read one line.

    Raises:
        msgspec.MsgspecError: it is not a message.
    """
    return _decoder.decode(line)


def tell(message: Message) -> None:
    """Write the message to stdout, whole. The command reads it at once."""
    line = memoryview(encode(message))
    while line:
        line = line[os.write(sys.stdout.fileno(), line) :]


async def messages_from_stdin() -> AsyncGenerator[Message, None]:
    """Yield what the command says, until it closes the pipe or is gone."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=MAX_LINE_NBYTES)
    transport, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(os.dup(0), "rb", buffering=0)
    )
    try:
        while line := await reader.readline():
            yield decode(line)
    finally:
        transport.close()


async def first_of(messages: AsyncIterator[Message], kind: type[_Message]) -> _Message:
    """Return the first message, which must be of that kind.

    Raises:
        EOFError: none has come.
    """
    with suppress(StopAsyncIteration):
        message = await anext(messages)
        assert isinstance(message, kind), f"expected {kind.__name__}, got {message}"
        return message
    raise EOFError("the other side is gone")
