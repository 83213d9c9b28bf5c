"""What the driver has to do: commands, in the imperative.

A command that has to be awaited ends in exactly one event, named in its docstring.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

import msgspec

from ..errors import Failure
from ..types import Allocation, Extent, TransferId
from .frames import Frame, Hello
from .session import Path

__all__ = [
    "Command",
    "CompareProbe",
    "Deliver",
    "Fail",
    "Finish",
    "Greet",
    "Join",
    "Leave",
    "MoveOut",
    "Part",
    "Permit",
    "ProbeResult",
    "Quarantine",
    "Quiesce",
    "Release",
    "Reserve",
    "ReserveRest",
    "SendFrame",
    "Serve",
    "Tell",
    "TransferCommand",
    "Transmit",
    "Unreserve",
    "Verify",
    "Write",
]


class SendFrame(msgspec.Struct, frozen=True):
    """Queue a frame on the link of the transfer. The endpoint does it; no driver sees this."""

    frame: Frame


class Write(msgspec.Struct, frozen=True):
    """Sender: write tokens from `start` on into `extents`. Ends in WriteFinished or WriteFailed."""

    transfer: TransferId
    sequence: int
    start: int
    extents: tuple[Extent, ...]


class Quiesce(msgspec.Struct, frozen=True):
    """Sender: wait until nothing of the failed write can land. Ends in Drained."""

    transfer: TransferId


class Tell(msgspec.Struct, frozen=True):
    """Sender: tell the user that the transfer has entered another state."""

    transfer: TransferId


class Finish(msgspec.Struct, frozen=True):
    """Sender: tell the user that the transfer is done."""

    transfer: TransferId


class Reserve(msgspec.Struct, frozen=True):
    """Receiver: reserve blocks, waiting for them in turn. Ends in Reserved (or Unreserve).

    `claimed`: a sender waits; only then is it answered, until then it is a soft hold. The same
    number again changes what is asked for.
    """

    number: int
    num_tokens: int
    claimed: bool


class ReserveRest(msgspec.Struct, frozen=True):
    """Receiver: reserve all of this now or nothing. Ends in Reserved or Refused, at once."""

    number: int
    num_tokens: int
    behind: Allocation | None
    """The allocation to extend, if the blocks behind it are free."""


class Unreserve(msgspec.Struct, frozen=True):
    """Receiver: give up what Reserve asked for."""

    number: int


class Permit(msgspec.Struct, frozen=True):
    """Receiver: let the sender of `transfer` write these extents under this grant."""

    number: int
    transfer: TransferId
    sequence: int
    extents: tuple[Extent, ...]


class Quarantine(msgspec.Struct, frozen=True):
    """Receiver: a write may still land here. Drained follows, whoever can prove it."""

    number: int
    allocations: tuple[Allocation, ...]


class Release(msgspec.Struct, frozen=True):
    """Receiver: no write can land here any more and nobody reads it: the blocks are free.

    `before`: the request goes on, and only its grants before this sequence number are over.
    """

    number: int
    allocations: tuple[Allocation, ...]
    before: int | None = None


class Verify(msgspec.Struct, frozen=True):
    """Receiver: see that the tokens in `extents` are in their place, and right.

    Copy them there if the plane has put them elsewhere, and compare their checksum if there is
    one. Ends in Verified.
    """

    number: int
    extents: tuple[Extent, ...]
    checksum: bytes
    plane: str


class MoveOut(msgspec.Struct, frozen=True):
    """Receiver: copy the tokens in `extents` out of the pool (rule 3). Ends in MovedOut."""

    number: int
    extents: tuple[Extent, ...]
    total: int | None


class Join(msgspec.Struct, frozen=True):
    """Receiver: copy the last tokens, in `extents`, behind those moved out. Ends in Joined."""

    number: int
    extents: tuple[Extent, ...]
    total: int


class Deliver(msgspec.Struct, frozen=True):
    """Receiver: hand the finished transfer to the user, who owns `allocations` from now on.

    `extents` is one run, or empty where the tensors stand outside the pool.
    """

    number: int
    allocations: tuple[Allocation, ...]
    extents: tuple[Extent, ...]


@dataclass(frozen=True, slots=True)
class Fail:
    """Either side: tell the user of a failure. `number`: of the request; a sender's generation."""

    number: int
    failure: Failure
    story: tuple[str, ...] = field(default=(), compare=False)
    """The states that the transfer passed, with seconds."""
    request_id: str = field(default="", compare=False)
    """At the receiver: which one it was. The request itself may be forgotten by now."""


class Serve(msgspec.Struct, frozen=True):
    """Sender: a receiver redeems an offer, whose tensors `transfer` carries."""

    transfer: TransferId


class Transmit(msgspec.Struct, frozen=True):
    """Hand a packet to the control channel, to the peer at `path`."""

    path: Path
    packet: bytes


class Greet(msgspec.Struct, frozen=True):
    """A link stands: its peer's Hello has arrived. Upgrade the path; senders attach a plane."""

    peer: int
    hello: Hello


class Part(msgspec.Struct, frozen=True):
    """A peer cannot be reached. `proven`: it has died or drained, for good; else it may return."""

    peer: int
    failure: Failure
    proven: bool


class Leave(msgspec.Struct, frozen=True):
    """Nobody has answered at `path` for as long as anybody waited: give it up."""

    path: Path


class CompareProbe(msgspec.Struct, frozen=True):
    """Receiver: does the probe slot of this link hold the nonce? Answer with `probed`."""

    peer: int
    link: int
    plane: str
    nonce: bytes


class ProbeResult(msgspec.Struct, frozen=True):
    """Sender: the receiver has compared the nonce."""

    peer: int
    plane: str
    matched: bool


TransferCommand: TypeAlias = (
    SendFrame
    | Write
    | Quiesce
    | Finish
    | Reserve
    | ReserveRest
    | Unreserve
    | Permit
    | Quarantine
    | Release
    | Verify
    | MoveOut
    | Join
    | Deliver
    | Fail
)
Command: TypeAlias = (
    TransferCommand | Serve | Tell | Transmit | Greet | Part | Leave | CompareProbe | ProbeResult
)
