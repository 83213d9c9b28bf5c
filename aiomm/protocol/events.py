"""What happens to a transfer: events, in the past tense. Edges, never levels.

The first five move a transfer from state to state (see :mod:`.states`); the others change
what it knows.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from ..errors import Failure
from ..types import Allocation, Extent, TransferId

__all__ = [
    "Aborted",
    "Accepted",
    "Announced",
    "Claimed",
    "Drained",
    "Event",
    "Failed",
    "GrantFilled",
    "Granted",
    "Joined",
    "MovedOut",
    "ReceiveEvent",
    "Refused",
    "Reserved",
    "Resumed",
    "SendEvent",
    "TokensReady",
    "Verified",
    "WriteFailed",
    "WriteFinished",
    "Written",
]


class Granted(msgspec.Struct, frozen=True):
    """Sender: the first extents are granted. Receiver: the first blocks are free."""

    start: int
    sequence: int
    extents: tuple[Extent, ...]


class GrantFilled(msgspec.Struct, frozen=True):
    """Every granted token is written and tokens are left."""


class Resumed(msgspec.Struct, frozen=True):
    """The same as :class:`Granted`, for the rest."""

    start: int
    sequence: int
    extents: tuple[Extent, ...]


class Accepted(msgspec.Struct, frozen=True):
    """Everything has arrived and is where the user will find it."""


class Failed(msgspec.Struct, frozen=True):
    """This side gives up: cancelled, timed out, peer lost, closing."""

    failure: Failure


class Aborted(msgspec.Struct, frozen=True):
    """The peer gives up. `drained`: it has no write running that could still land."""

    failure: Failure
    drained: bool


class Drained(msgspec.Struct, frozen=True):
    """No write of this transfer can land any more: acknowledged, revoked, or the peer is dead."""


class TokensReady(msgspec.Struct, frozen=True):
    """Sender: the first `available` tokens can be read; `total` is None while more may come."""

    available: int
    total: int | None
    metadata: bytes = b""


class WriteFinished(msgspec.Struct, frozen=True):
    """Sender: the write that runs has landed whole."""

    checksum: bytes = b""
    """Over the tokens written, if they are to be verified on arrival."""
    plane: str = ""


class WriteFailed(msgspec.Struct, frozen=True):
    """Sender: the write that runs has failed; bytes of it may land until :class:`Drained`."""

    failure: Failure


class Claimed(msgspec.Struct, frozen=True):
    """Receiver: a sender asks for the grant."""

    transfer: TransferId
    total: int | None
    metadata: bytes


class Announced(msgspec.Struct, frozen=True):
    """Receiver: the sender knows the length now."""

    total: int
    metadata: bytes


class Reserved(msgspec.Struct, frozen=True):
    """Receiver: the pool gave these blocks; `extends` if they replace the last allocation."""

    allocation: Allocation
    extends: bool = False


class Refused(msgspec.Struct, frozen=True):
    """Receiver: the pool cannot give the whole rest now."""


class Written(msgspec.Struct, frozen=True):
    """Receiver: a chunk has landed *and* its frame has arrived (rule 6)."""

    sequence: int
    start: int
    count: int
    total: int | None
    checksum: bytes = b""
    """To be verified before the chunk counts; empty if it need not be."""
    plane: str = ""


class Verified(msgspec.Struct, frozen=True):
    """Receiver: the oldest chunk that does not count yet is in its place, and was compared."""

    matches: bool


class MovedOut(msgspec.Struct, frozen=True):
    """Receiver: the buffered chunks are out of the pool."""


class Joined(msgspec.Struct, frozen=True):
    """Receiver: all chunks stand in one tensor outside the pool."""


SendEvent: TypeAlias = (
    Granted
    | Resumed
    | Accepted
    | Failed
    | Aborted
    | Drained
    | TokensReady
    | WriteFinished
    | WriteFailed
)
ReceiveEvent: TypeAlias = (
    Claimed
    | Announced
    | Reserved
    | Refused
    | Written
    | Verified
    | MovedOut
    | Joined
    | Failed
    | Aborted
    | Drained
)
Event: TypeAlias = SendEvent | ReceiveEvent | GrantFilled
