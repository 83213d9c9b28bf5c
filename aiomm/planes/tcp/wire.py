"""What stands on a data connection besides the bytes themselves.

::

    sender                                     receiver
      | -- preamble: version, epoch, key ---------> |   else the connection is closed
      | <- greeting: version, bytes of the arena -- |
      | -- header: grant, runs -------------------> |
      | -- the bytes of all runs -----------------> |   straight into the arena, or thrown away
      | <- status: landed, or why not ------------- |   one per header, in their order

Headers follow each other without waiting for the statuses.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from ...errors import PlaneUnavailable, ProtocolError
from ..base import GrantKey, Run

__all__ = [
    "GREETING",
    "KEY_NBYTES",
    "MAX_HEADER_NBYTES",
    "MAX_RUNS",
    "PREAMBLE",
    "STATUS",
    "Header",
    "Offer",
    "Piece",
    "Status",
    "decode_offer",
    "encode_header",
    "encode_preamble",
    "parse_greeting",
    "parse_header",
    "parse_preamble",
]

MAGIC = b"aiommT01"
"""The last two digits are the version."""
KEY_NBYTES = 16
MAX_RUNS = 1024
MAX_INTEGER = 2**63 - 1

PREAMBLE = struct.Struct(f"!8sQ{KEY_NBYTES}s")
GREETING = struct.Struct("!8sQ")
HEADER_MAGIC = 0xA103C0DE
HEADER = struct.Struct("!IIQQ")
PIECE = struct.Struct("!QQ")
STATUS = struct.Struct("!B")
MAX_HEADER_NBYTES = HEADER.size + MAX_RUNS * PIECE.size


class Status(IntEnum):
    """What became of one header and its bytes."""

    LANDED = 0
    NOT_PERMITTED = 1
    REVOKED = 2


class Piece(NamedTuple):
    """`nbytes` bytes for the arena's bytes from `offset` on."""

    offset: int
    nbytes: int


class Header(NamedTuple):
    """Announces the bytes of `pieces`, in that order; `generation`, `sequence` name the grant."""

    generation: int
    sequence: int
    pieces: tuple[Piece, ...]
    nbytes: int
    """Of the header itself."""


class Offer(msgspec.Struct, frozen=True, array_like=True, tag="tcp"):
    """Where the receiver listens for one sender, and what that sender must show."""

    host: Annotated[str, Meta(min_length=1, max_length=255)]
    port: Annotated[int, Meta(ge=1, le=65535)]
    peer: Annotated[int, Meta(ge=0, le=MAX_INTEGER)]
    key: Annotated[bytes, Meta(min_length=KEY_NBYTES, max_length=KEY_NBYTES)]


def decode_offer(encoded: bytes) -> Offer:
    """Read an offer.

    Raises:
        PlaneUnavailable: it is none of ours.
    """
    try:
        return msgspec.msgpack.decode(encoded, type=Offer)
    except (msgspec.MsgspecError, RecursionError) as exc:
        raise PlaneUnavailable(f"tcp: not an offer: {exc}") from exc


def encode_preamble(offer: Offer) -> bytes:
    """Return what a sender says first."""
    return PREAMBLE.pack(MAGIC, offer.peer, offer.key)


def parse_preamble(received: memoryview) -> tuple[int, bytes] | None:
    """Return the epoch and key that a sender shows, or None while they are not complete.

    Raises:
        ProtocolError: this is something else, or another version; known from the first byte.
    """
    if not MAGIC.startswith(bytes(received[: len(MAGIC)])):
        raise ProtocolError(f"foreign traffic, beginning with {bytes(received[:16])!r}")
    if len(received) < PREAMBLE.size:
        return None
    _, peer, key = PREAMBLE.unpack_from(received)
    return peer, key


def parse_greeting(received: bytes) -> int:
    """Return the bytes of the receiver's arena.

    Raises:
        PlaneUnavailable: whoever answered is no receiver of ours.
    """
    magic, nbytes = GREETING.unpack(received)
    if magic != MAGIC:
        raise PlaneUnavailable("tcp: whoever listens there is no receiver of this version")
    return int(nbytes)


def encode_header(grant: GrantKey, runs: Sequence[Run]) -> bytes:
    """Return the header of a write of at most :data:`MAX_RUNS` runs."""
    numbers = [number for run in runs for number in (run.offset, run.nbytes)]
    header = HEADER.pack(HEADER_MAGIC, len(runs), grant.generation, grant.sequence)
    return header + struct.pack(f"!{len(numbers)}Q", *numbers)


def parse_header(received: memoryview, arena_nbytes: int) -> Header | None:
    """Return the header that `received` begins with, or None while it is not complete.

    Raises:
        ProtocolError: it is none, or announces more bytes than the arena has.
    """
    if len(received) < HEADER.size:
        return None
    magic, num_runs, generation, sequence = HEADER.unpack_from(received)
    if magic != HEADER_MAGIC or not 1 <= num_runs <= MAX_RUNS:
        raise ProtocolError(f"not a header: {bytes(received[: HEADER.size])!r}")
    nbytes = HEADER.size + num_runs * PIECE.size
    if len(received) < nbytes:
        return None
    pieces = tuple(Piece._make(one) for one in PIECE.iter_unpack(received[HEADER.size : nbytes]))
    announced = sum(piece.nbytes for piece in pieces)
    if announced > arena_nbytes:
        raise ProtocolError(f"{announced} bytes announced for an arena of {arena_nbytes}")
    return Header(generation, sequence, pieces, nbytes)
