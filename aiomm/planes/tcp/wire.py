"""What stands on a data connection besides the bytes themselves.

::

    sender                                      receiver
      | -- preamble: version, link, key, --------> |   a wrong key is refused
      |    attachment, oldest open write           |
      | <- greeting: version, arena's bytes, ----- |   an older connection of the same
      |    an answer for each open write           |   attachment is cut off before
      | -- header: number, landed, grant, runs --> |
      | -- the runs' bytes that have not landed -> |   straight into the arena, or thrown away
      | -- note, if the header says so ----------> |   for whoever owns the arena
      | <- answer: number, status, landed -------- |   one per header, in their order

Headers follow each other without waiting for answers. A sender numbers the writes of one
attachment. When the connection breaks it makes a new one and says which of its writes is the
oldest without an answer; the receiver tells how those from there on have ended, and of how many
bytes of the others have landed. The sender goes on with these behind the last landed byte, in any
order, each with its header again. A write that the receiver does not mention begins anew.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from ...errors import PlaneUnavailable, ProtocolError
from ..base import MAX_NOTE_NBYTES, GrantKey, Run
from ..door import SECRET_NBYTES

__all__ = [
    "ANSWER",
    "GREETING",
    "KEY_NBYTES",
    "MAX_ANSWERS",
    "MAX_HEADER_NBYTES",
    "MAX_RUNS",
    "NOTE",
    "PREAMBLE",
    "REFUSAL",
    "Answer",
    "Greeting",
    "Header",
    "Piece",
    "Preamble",
    "Status",
    "TcpOffer",
    "decode_offer",
    "encode_answer",
    "encode_greeting",
    "encode_header",
    "encode_note",
    "encode_preamble",
    "parse_answers",
    "parse_greeting",
    "parse_header",
    "parse_note",
    "parse_preamble",
]

MAGIC = b"aiommT03"
"""The last two digits are the version."""
KEY_NBYTES = SECRET_NBYTES
MAX_RUNS = 1024
MAX_ANSWERS = 1024
"""In a greeting."""
MAX_INTEGER = 2**63 - 1

PREAMBLE = struct.Struct(f"!8sQ{KEY_NBYTES}sQQ")
GREETING = struct.Struct("!8s?QI")
HEADER_MAGIC = 0xA103C0DE
HEADER = struct.Struct("!IH?xQQQQ")
PIECE = struct.Struct("!QQ")
ANSWER = struct.Struct("!QBQ")
NOTE = struct.Struct("!H")
MAX_HEADER_NBYTES = HEADER.size + MAX_RUNS * PIECE.size
REFUSAL = GREETING.pack(MAGIC, False, 0, 0)
"""Instead of a greeting, for whoever shows a wrong key."""


class Status(IntEnum):
    """What has become of one write."""

    LANDED = 0
    NOT_PERMITTED = 1
    REVOKED = 2
    UNFINISHED = 3
    """Its connection broke; only a greeting says this."""


class Preamble(NamedTuple):
    """Who connects, and what for."""

    link: int
    """The receiver's number for the link, out of its offer."""
    key: bytes
    attachment: int
    """Chosen by the sender, the same for the connections that follow each other."""
    oldest: int
    """The number of the first write that the sender has no answer for."""


class Greeting(NamedTuple):
    """What a sender that is let in learns first; that many answers come behind it."""

    arena_nbytes: int
    num_answers: int


class Answer(NamedTuple):
    """How write `number` stands: `landed` of its bytes have been taken."""

    number: int
    status: Status
    landed: int


class Piece(NamedTuple):
    """`nbytes` bytes for the arena's bytes from `offset` on."""

    offset: int
    nbytes: int


class Header(NamedTuple):
    """Announces the bytes of `pieces`, in that order, but for the first `landed` of them."""

    number: int
    landed: int
    generation: int
    sequence: int
    pieces: tuple[Piece, ...]
    has_note: bool
    """A note comes behind the bytes."""
    nbytes: int
    """Of the header itself."""


class TcpOffer(msgspec.Struct, frozen=True, array_like=True, tag="tcp"):
    """Where the receiver listens for one sender, and what that sender must show."""

    host: Annotated[str, Meta(min_length=1, max_length=255)]
    port: Annotated[int, Meta(ge=1, le=65535)]
    link: Annotated[int, Meta(ge=0, le=MAX_INTEGER)]
    key: Annotated[bytes, Meta(min_length=KEY_NBYTES, max_length=KEY_NBYTES)]


def decode_offer(encoded: bytes) -> TcpOffer:
    """Read an offer.

    Raises:
        PlaneUnavailable: it is none of ours.
    """
    try:
        return msgspec.msgpack.decode(encoded, type=TcpOffer)
    except (msgspec.MsgspecError, RecursionError) as exc:
        raise PlaneUnavailable(f"tcp: not an offer: {exc}") from exc


def encode_preamble(offer: TcpOffer, attachment: int = 0, oldest: int = 0) -> bytes:
    """Return what a sender says first."""
    return PREAMBLE.pack(MAGIC, offer.link, offer.key, attachment, oldest)


def parse_preamble(received: memoryview) -> Preamble | None:
    """Return what a sender has said first, or None while it is not complete.

    Raises:
        ProtocolError: this is something else, or another version; known from the first byte.
    """
    if not MAGIC.startswith(bytes(received[: len(MAGIC)])):
        raise ProtocolError(f"foreign traffic, beginning with {bytes(received[:16])!r}")
    if len(received) < PREAMBLE.size:
        return None
    _, link, key, attachment, oldest = PREAMBLE.unpack_from(received)
    return Preamble(link, key, attachment, oldest)


def encode_greeting(arena_nbytes: int, answers: Sequence[Answer]) -> bytes:
    """Return what a sender with the right key hears, at most :data:`MAX_ANSWERS` answers."""
    greeting = GREETING.pack(MAGIC, True, arena_nbytes, len(answers))
    return greeting + b"".join(map(encode_answer, answers))


def parse_greeting(received: bytes) -> Greeting:
    """Return what a receiver has said first.

    Raises:
        PlaneUnavailable: it is no receiver of ours, or refuses the key.
    """
    magic, is_admitted, nbytes, num_answers = GREETING.unpack(received)
    if magic != MAGIC or num_answers > MAX_ANSWERS:
        raise PlaneUnavailable("tcp: whoever listens there is no receiver of this version")
    if not is_admitted:
        raise PlaneUnavailable("tcp: the receiver refuses this process's key")
    return Greeting(nbytes, num_answers)


def encode_answer(answer: Answer) -> bytes:
    """Return an answer as it goes over the wire."""
    return ANSWER.pack(*answer)


def parse_answers(received: bytes) -> list[Answer]:
    """Return the answers that `received` consists of.

    Raises:
        PlaneUnavailable: there is no such status.
    """
    try:
        return [
            Answer(number, Status(status), landed)
            for number, status, landed in ANSWER.iter_unpack(received)
        ]
    except ValueError as exc:
        raise PlaneUnavailable(f"tcp: the receiver answers nonsense: {exc}") from exc


def encode_header(
    grant: GrantKey,
    runs: Sequence[Run],
    number: int = 0,
    landed: int = 0,
    *,
    has_note: bool = False,
) -> bytes:
    """Return the header of a write of at most :data:`MAX_RUNS` runs."""
    pieces = [each for run in runs for each in (run.offset, run.nbytes)]
    _, generation, sequence = grant
    names = (number, landed, generation, sequence)
    head = HEADER.pack(HEADER_MAGIC, len(runs), has_note, *names)
    return head + struct.pack(f"!{len(pieces)}Q", *pieces)


def parse_header(received: memoryview, arena_nbytes: int) -> Header | None:
    """Return the header that `received` begins with, or None while it is not complete.

    Raises:
        ProtocolError: it is none, or announces more bytes than the arena has.
    """
    if len(received) < HEADER.size:
        return None
    magic, num_runs, has_note, *names = HEADER.unpack_from(received)
    if magic != HEADER_MAGIC or not 1 <= num_runs <= MAX_RUNS:
        raise ProtocolError(f"not a header: {bytes(received[: HEADER.size])!r}")
    nbytes = HEADER.size + num_runs * PIECE.size
    if len(received) < nbytes:
        return None
    pieces = tuple(Piece._make(one) for one in PIECE.iter_unpack(received[HEADER.size : nbytes]))
    announced = sum(piece.nbytes for piece in pieces)
    if announced > arena_nbytes:
        raise ProtocolError(f"{announced} bytes announced for an arena of {arena_nbytes}")
    number, landed, generation, sequence = names
    return Header(number, landed, generation, sequence, pieces, has_note, nbytes)


def encode_note(note: bytes) -> bytes:
    """Return a note as it stands behind the bytes; an empty one says that there is none."""
    return NOTE.pack(len(note)) + note


def parse_note(received: memoryview) -> bytes | None:
    """Return the note that `received` begins with, or None while it is not complete.

    Raises:
        ProtocolError: it is longer than a note may be.
    """
    if len(received) < NOTE.size:
        return None
    (nbytes,) = NOTE.unpack_from(received)
    if nbytes > MAX_NOTE_NBYTES:
        raise ProtocolError(f"a note of {nbytes} bytes")
    stop = NOTE.size + nbytes
    return bytes(received[NOTE.size : stop]) if len(received) >= stop else None
