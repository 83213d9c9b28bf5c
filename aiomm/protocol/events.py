"""What happens to a transfer: events, in the past tense. Edges, never levels.

The first five move a transfer from state to state (see :mod:`.states`); the others change
what it knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

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


@dataclass(frozen=True, slots=True)
class Granted:
    """Sender: the first extents are granted. Receiver: the first blocks are free."""

    start: int
    sequence: int
    extents: tuple[Extent, ...]


@dataclass(frozen=True, slots=True)
class GrantFilled:
    """Every granted token is written and tokens are left."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """The same as :class:`Granted`, for the rest."""

    start: int
    sequence: int
    extents: tuple[Extent, ...]


@dataclass(frozen=True, slots=True)
class Accepted:
    """Everything has arrived and is where the user will find it."""


@dataclass(frozen=True, slots=True)
class Failed:
    """This side gives up: cancelled, timed out, peer lost, closing."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class Aborted:
    """The peer gives up. `drained`: it has no write running that could still land."""

    failure: Failure
    drained: bool


@dataclass(frozen=True, slots=True)
class Drained:
    """No write of this transfer can land any more: acknowledged, revoked, or the peer is dead."""


@dataclass(frozen=True, slots=True)
class TokensReady:
    """Sender: the first `available` tokens can be read; `total` is None while more may come."""

    available: int
    total: int | None
    metadata: bytes = b""


@dataclass(frozen=True, slots=True)
class WriteFinished:
    """Sender: the write that runs has landed whole."""

    checksum: bytes = b""
    """Over the tokens written, if they are to be verified on arrival."""
    plane: str = ""


@dataclass(frozen=True, slots=True)
class WriteFailed:
    """Sender: the write that runs has failed; bytes of it may land until :class:`Drained`."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class Claimed:
    """Receiver: a sender asks for the grant."""

    transfer: TransferId
    total: int | None
    metadata: bytes


@dataclass(frozen=True, slots=True)
class Announced:
    """Receiver: the sender knows the length now."""

    total: int
    metadata: bytes


@dataclass(frozen=True, slots=True)
class Reserved:
    """Receiver: the pool gave these blocks; `extends` if they replace the last allocation."""

    allocation: Allocation
    extends: bool = False


@dataclass(frozen=True, slots=True)
class Refused:
    """Receiver: the pool cannot give the whole rest now."""


@dataclass(frozen=True, slots=True)
class Written:
    """Receiver: a chunk has landed *and* its frame has arrived (rule 6)."""

    sequence: int
    start: int
    count: int
    total: int | None
    checksum: bytes = b""
    """To be verified before the chunk counts; empty if it need not be."""
    plane: str = ""


@dataclass(frozen=True, slots=True)
class Verified:
    """Receiver: the oldest chunk that does not count yet is in its place, and was compared."""

    matches: bool


@dataclass(frozen=True, slots=True)
class MovedOut:
    """Receiver: the buffered chunks are out of the pool."""


@dataclass(frozen=True, slots=True)
class Joined:
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
