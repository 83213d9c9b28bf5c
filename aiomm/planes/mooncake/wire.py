"""What sender and receiver say to each other beside the engine, over a TCP connection.

::

    sender                                        receiver
      | -- preamble: version, link, key, session --> |   else the connection is closed
      | <- greeting: version, is it reached, arena - |   the receiver's engine has tried
      | -- parcel: number, grant, pieces, note ----> |   which the receiver reads, if permitted
      | <- answer: number, landed, or why not ------ |   in any order

Each link has a key of its own, which travels in the Hello: the engine itself lets anybody in.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from ...errors import PlaneUnavailable, ProtocolError
from ..base import MAX_NOTE_NBYTES, GrantKey
from ..door import SECRET_NBYTES

__all__ = [
    "ANSWER",
    "GREETING",
    "KEY_NBYTES",
    "MAGIC",
    "MAX_PIECES",
    "Greeting",
    "MooncakeOffer",
    "Parcel",
    "Piece",
    "Preamble",
    "Status",
    "decode_offer",
    "encode_parcel",
    "encode_preamble",
    "keep_watch",
    "parse_greeting",
    "parse_parcel",
    "parse_preamble",
]

MAGIC = b"aiommM02"
"""The last two digits are the version."""
KEY_NBYTES = SECRET_NBYTES
MAX_PIECES = 256
MAX_SESSION_NBYTES = 300
MAX_INTEGER = 2**63 - 1

PREAMBLE = struct.Struct(f"!8sQ{KEY_NBYTES}sH")
GREETING = struct.Struct("!8s?Q")
PARCEL = struct.Struct("!IQQHH")
PIECE = struct.Struct("!QQQ")
ANSWER = struct.Struct("!IB")


class Status(IntEnum):
    """What became of one parcel."""

    LANDED = 0
    NOT_PERMITTED = 1
    REVOKED = 2
    FAILED = 3


class MooncakeOffer(msgspec.Struct, frozen=True, array_like=True, tag="mooncake"):
    """Where the receiver listens for one sender, and what that sender must show."""

    host: Annotated[str, Meta(min_length=1, max_length=255)]
    port: Annotated[int, Meta(ge=1, le=65535)]
    link: Annotated[int, Meta(ge=0, le=MAX_INTEGER)]
    key: Annotated[bytes, Meta(min_length=KEY_NBYTES, max_length=KEY_NBYTES)]


class Preamble(NamedTuple):
    """Who comes, and where its engine is."""

    link: int
    """The receiver's number for the link, out of its offer."""
    key: bytes
    session: str
    nbytes: int
    """Of the preamble itself."""


class Greeting(NamedTuple):
    """Whether the receiver's engine reaches the sender's, and the bytes of the arena."""

    is_reached: bool
    arena_nbytes: int


class Piece(NamedTuple):
    """`nbytes` bytes at the sender's address `source`, for the arena's from `offset` on."""

    source: int
    offset: int
    nbytes: int


class Parcel(NamedTuple):
    """Pieces that are read and answered together; `generation`, `sequence` name the grant."""

    number: int
    generation: int
    sequence: int
    pieces: tuple[Piece, ...]
    """None, where all that the note speaks of has landed."""
    note: bytes
    """For the receiver, once all of them have landed; empty if there is none."""
    nbytes: int
    """Of the message itself."""


def keep_watch(transport: asyncio.BaseTransport) -> None:
    """Have the kernel notice within 3 s that the other host is cut off, also in silence."""
    connection = transport.get_extra_info("socket")
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_USER_TIMEOUT", 2000),
        ("TCP_KEEPIDLE", 1),
        ("TCP_KEEPINTVL", 1),
    ):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def decode_offer(encoded: bytes) -> MooncakeOffer:
    """Read an offer.

    Raises:
        PlaneUnavailable: it is none of ours.
    """
    try:
        return msgspec.msgpack.decode(encoded, type=MooncakeOffer)
    except (msgspec.MsgspecError, RecursionError) as exc:
        raise PlaneUnavailable(f"mooncake: not an offer: {exc}") from exc


def encode_preamble(offer: MooncakeOffer, session: str) -> bytes:
    """Return what a sender says first."""
    name = session.encode()
    return PREAMBLE.pack(MAGIC, offer.link, offer.key, len(name)) + name


def parse_preamble(received: memoryview) -> Preamble | None:
    """Return who comes, or None while that is not complete.

    Raises:
        ProtocolError: this is something else, or another version; known from the first byte.
    """
    if not MAGIC.startswith(bytes(received[: len(MAGIC)])):
        raise ProtocolError(f"foreign traffic, beginning with {bytes(received[:16])!r}")
    if len(received) < PREAMBLE.size:
        return None
    _, link, key, name_nbytes = PREAMBLE.unpack_from(received)
    nbytes = PREAMBLE.size + name_nbytes
    if not 1 <= name_nbytes <= MAX_SESSION_NBYTES:
        raise ProtocolError(f"a session's name of {name_nbytes} bytes")
    if len(received) < nbytes:
        return None
    try:
        session = str(received[PREAMBLE.size : nbytes], "ascii")
    except UnicodeDecodeError as exc:
        raise ProtocolError("a session's name that is no text") from exc
    return Preamble(link, key, session, nbytes)


def parse_greeting(received: memoryview) -> Greeting | None:
    """Return the receiver's greeting, or None while it is not complete.

    Raises:
        ProtocolError: whoever answered is no receiver of ours.
    """
    if len(received) < GREETING.size:
        return None
    magic, is_reached, arena_nbytes = GREETING.unpack_from(received)
    if magic != MAGIC:
        raise ProtocolError("whoever listens there is no receiver of this version")
    return Greeting(is_reached, arena_nbytes)


def encode_parcel(
    number: int, grant: GrantKey, pieces: Sequence[Piece], note: bytes = b""
) -> bytes:
    """Return the message for at most :data:`MAX_PIECES` pieces."""
    header = PARCEL.pack(number, grant.generation, grant.sequence, len(pieces), len(note))
    return header + b"".join(PIECE.pack(*piece) for piece in pieces) + note


def parse_parcel(received: memoryview, arena_nbytes: int) -> Parcel | None:
    """Return the parcel that `received` begins with, or None while it is not complete.

    Raises:
        ProtocolError: it is none, or leaves the arena.
    """
    if len(received) < PARCEL.size:
        return None
    number, generation, sequence, num_pieces, note_nbytes = PARCEL.unpack_from(received)
    if num_pieces > MAX_PIECES or note_nbytes > MAX_NOTE_NBYTES or not num_pieces + note_nbytes:
        raise ProtocolError(f"a parcel of {num_pieces} pieces and a note of {note_nbytes} bytes")
    stop = PARCEL.size + num_pieces * PIECE.size
    nbytes = stop + note_nbytes
    if len(received) < nbytes:
        return None
    pieces = tuple(map(Piece._make, PIECE.iter_unpack(received[PARCEL.size : stop])))
    note = bytes(received[stop:nbytes])
    if any(not 1 <= piece.nbytes <= arena_nbytes - piece.offset for piece in pieces):
        raise ProtocolError(f"a piece that is not in an arena of {arena_nbytes} bytes")
    return Parcel(number, generation, sequence, pieces, note, nbytes)
