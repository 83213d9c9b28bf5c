"""What the driver has to do: commands, in the imperative.

A command that has to be awaited ends in exactly one event, named in its docstring.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from ..errors import Failure
from ..types import Allocation, Extent, TransferId
from .frames import Frame, Hello

__all__ = [
    "Command",
    "CompareProbe",
    "Deliver",
    "Fail",
    "Finish",
    "Greet",
    "Join",
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


@dataclass(frozen=True, slots=True)
class SendFrame:
    """Queue a frame on the link of the transfer. The endpoint does it; no driver sees this."""

    frame: Frame


@dataclass(frozen=True, slots=True)
class Write:
    """Sender: write tokens from `start` on into `extents`. Ends in WriteFinished or WriteFailed."""

    transfer: TransferId
    sequence: int
    start: int
    extents: tuple[Extent, ...]


@dataclass(frozen=True, slots=True)
class Quiesce:
    """Sender: wait until nothing of the failed write can land. Ends in Drained."""

    transfer: TransferId


@dataclass(frozen=True, slots=True)
class Tell:
    """Sender: tell the user that the transfer has entered another state."""

    transfer: TransferId


@dataclass(frozen=True, slots=True)
class Finish:
    """Sender: tell the user that the transfer is done."""

    transfer: TransferId


@dataclass(frozen=True, slots=True)
class Reserve:
    """Receiver: reserve blocks, waiting for them in turn. Ends in Reserved (or Unreserve).

    `claimed`: a sender waits; only then is it answered, until then it is a soft hold. The same
    number again changes what is asked for.
    """

    number: int
    num_tokens: int
    claimed: bool


@dataclass(frozen=True, slots=True)
class ReserveRest:
    """Receiver: reserve all of this now or nothing. Ends in Reserved or Refused, at once."""

    number: int
    num_tokens: int
    behind: Allocation | None
    """The allocation to extend, if the blocks behind it are free."""


@dataclass(frozen=True, slots=True)
class Unreserve:
    """Receiver: give up what Reserve asked for."""

    number: int


@dataclass(frozen=True, slots=True)
class Permit:
    """Receiver: let the sender of `transfer` write these extents under this grant."""

    number: int
    transfer: TransferId
    sequence: int
    extents: tuple[Extent, ...]


@dataclass(frozen=True, slots=True)
class Quarantine:
    """Receiver: a write may still land here. Drained follows, whoever can prove it."""

    number: int
    allocations: tuple[Allocation, ...]


@dataclass(frozen=True, slots=True)
class Release:
    """Receiver: no write can land here any more and nobody reads it: the blocks are free."""

    number: int
    allocations: tuple[Allocation, ...]


@dataclass(frozen=True, slots=True)
class Verify:
    """Receiver: see that the tokens in `extents` are in their place, and right.

    Copy them there if the plane has put them elsewhere, and compare their checksum if there is
    one. Ends in Verified.
    """

    number: int
    extents: tuple[Extent, ...]
    checksum: bytes
    plane: str


@dataclass(frozen=True, slots=True)
class MoveOut:
    """Receiver: copy the tokens in `extents` out of the pool (rule 3). Ends in MovedOut."""

    number: int
    extents: tuple[Extent, ...]
    total: int | None


@dataclass(frozen=True, slots=True)
class Join:
    """Receiver: copy the last tokens, in `extents`, behind those moved out. Ends in Joined."""

    number: int
    extents: tuple[Extent, ...]
    total: int


@dataclass(frozen=True, slots=True)
class Deliver:
    """Receiver: hand the finished transfer to the user, who owns `allocations` from now on.

    `extents` is one run, or empty where the tensors stand outside the pool.
    """

    number: int
    allocations: tuple[Allocation, ...]
    extents: tuple[Extent, ...]


@dataclass(frozen=True, slots=True)
class Fail:
    """Either side: tell the user that the transfer failed. `number`: the sender's generation."""

    number: int
    failure: Failure
    story: tuple[str, ...] = field(default=(), compare=False)
    """The states that the transfer passed, with seconds."""


@dataclass(frozen=True, slots=True)
class Serve:
    """Sender: a receiver redeems the offer `request_id`: its tensors are this transfer's too."""

    transfer: TransferId


@dataclass(frozen=True, slots=True)
class Transmit:
    """Hand a packet to the control channel, to the peer at `path`."""

    path: object
    packet: bytes


@dataclass(frozen=True, slots=True)
class Greet:
    """A link stands: its peer's Hello has arrived. Upgrade the path; senders attach a plane."""

    peer: int
    hello: Hello


@dataclass(frozen=True, slots=True)
class Part:
    """A link is over. `proven`: the peer is dead or has drained, and can write nothing."""

    peer: int
    failure: Failure
    proven: bool


@dataclass(frozen=True, slots=True)
class CompareProbe:
    """Receiver: does the probe slot of this link hold the nonce? Answer with `probed`."""

    peer: int
    link: int
    plane: str
    nonce: bytes


@dataclass(frozen=True, slots=True)
class ProbeResult:
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
    TransferCommand | Serve | Tell | Transmit | Greet | Part | CompareProbe | ProbeResult
)
