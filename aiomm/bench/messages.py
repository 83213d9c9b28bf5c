"""What the benchmark's processes tell the command, as lines of JSON over stdout.

All times are of `time.monotonic_ns`, which is one clock for all processes of a host. What is
measured is told only after a round of it, so that nobody wakes up in between.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TypeAlias

import msgspec

from .plan import Process

__all__ = ["Arrived", "Beats", "Broke", "Copied", "Held", "Left", "Message", "decode", "tell"]


class Copied(msgspec.Struct, frozen=True, tag=True):
    """A floor was measured, by the encoder process."""

    step: int
    nanoseconds: int


class Left(msgspec.Struct, frozen=True, tag=True):
    """The encoder process gave the tensors of a step; of many at a time, it claimed the first."""

    step: int
    at: int
    plane: str


class Arrived(msgspec.Struct, frozen=True, tag=True):
    """The language process has the tensors of a step; of many, the last."""

    step: int
    at: int
    resumes: int
    """Of one transfer; the most of any of them."""


class Held(msgspec.Struct):
    """For how long a loop was held, many times."""

    counts: list[int]
    """Times within each of the bounds of `heartbeat`, and above the last."""
    longest: int = 0
    """Nanoseconds."""


class Beats(msgspec.Struct, frozen=True, tag=True):
    """What a process has noted of its loop up to now, during transfers on one path."""

    process: Process
    path: str
    processor: Held
    """What the thread of the loop has computed between two beats."""
    wall: Held
    """What has passed between two beats."""


class Broke(msgspec.Struct, frozen=True, tag=True):
    """The process ends because of this."""

    error: str


Message: TypeAlias = Copied | Left | Arrived | Beats | Broke

_decoder: msgspec.json.Decoder[Message] = msgspec.json.Decoder(Message)


def decode(line: bytes) -> Message:
    """Read one line.

    Raises:
        msgspec.MsgspecError: it is not a message.
    """
    return _decoder.decode(line)


def tell(messages: Sequence[Message]) -> None:
    """Write the messages to stdout, whole. The command reads them at once."""
    lines = memoryview(b"".join(msgspec.json.encode(message) + b"\n" for message in messages))
    while lines:
        lines = lines[os.write(sys.stdout.fileno(), lines) :]
