"""Every error that aiomm raises on purpose; the README draws the tree.

Each class says what has happened, and its `retryable` whether to try again.
Across the wire an error is a :class:`Failure`: a :class:`Reason` and a sentence.
:func:`error_from` is the one place where it becomes an exception again.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar, NamedTuple

__all__ = [
    "AiommError",
    "Cancelled",
    "Failure",
    "IncompatibleSchema",
    "PeerLost",
    "PlaneUnavailable",
    "PoolClosed",
    "ProtocolError",
    "Reason",
    "Rejected",
    "TransferTimeout",
    "error_from",
]


class Reason(StrEnum):
    """Why a transfer failed, as it travels in control frames."""

    CANCELLED = "cancelled"
    TIMEOUT = "timeout"
    PEER_LOST = "peer_lost"
    SCHEMA = "schema"
    REJECTED = "rejected"
    BUSY = "busy"
    PLANE = "plane"
    PROTOCOL = "protocol"
    CLOSED = "closed"


class Failure(NamedTuple):
    """A failure as data: what the protocol core carries instead of an exception."""

    reason: Reason
    message: str


class AiommError(Exception):
    """Root of everything aiomm raises on purpose.

    Args:
        message: what happened, in lower case, with the values that matter.
        story: the last things that happened to the transfer, oldest first.
    """

    reason: ClassVar[Reason] = Reason.PROTOCOL
    retryable: bool = False
    """Whether it may succeed when it is tried again: with a new ticket, where there was one."""

    def __init__(self, message: str, *, story: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.story = story

    def __str__(self) -> str:
        if not self.story:
            return self.message
        return f"{self.message} (story: {'; '.join(self.story)})"


class PeerLost(AiommError):
    """The other process died, was restarted, or stopped answering in the middle of a transfer."""

    reason = Reason.PEER_LOST
    retryable = True


class TransferTimeout(AiommError, TimeoutError):
    """The deadline of a request passed before it was done."""

    reason = Reason.TIMEOUT
    retryable = True


class Cancelled(AiommError):
    """The request was given up: by this side, by the peer, or by an exception in the encoder."""

    reason = Reason.CANCELLED


class IncompatibleSchema(AiommError, ValueError):
    """Schemas differ between the sides, or tensors do not match the schema."""

    reason = Reason.SCHEMA


class Rejected(AiommError):
    """A request was refused: unknown, duplicate, oversize, or (retryable) over a limit."""

    reason = Reason.REJECTED

    def __init__(
        self, message: str, *, retryable: bool = False, story: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message, story=story)
        self.retryable = retryable


class PlaneUnavailable(AiommError):
    """A data plane cannot be used here, or failed while it was writing."""

    reason = Reason.PLANE


class ProtocolError(AiommError):
    """A peer has broken the protocol, or what was given as a ticket is none."""

    reason = Reason.PROTOCOL


class PoolClosed(AiommError):
    """The endpoint was closed: this one, or (retryable) the peer's, which may come back."""

    reason = Reason.CLOSED

    def __init__(
        self, message: str, *, retryable: bool = False, story: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message, story=story)
        self.retryable = retryable


_BY_REASON: dict[Reason, type[AiommError]] = {
    cls.reason: cls
    for cls in (
        PeerLost,
        TransferTimeout,
        Cancelled,
        IncompatibleSchema,
        Rejected,
        PlaneUnavailable,
        ProtocolError,
        PoolClosed,
    )
}


def error_from(
    failure: Failure, *, story: tuple[str, ...] = (), is_closing: bool = True
) -> AiommError:
    """Return the exception that stands for `failure`.

    Args:
        failure: what has happened.
        story: the states that the transfer has passed.
        is_closing: this endpoint is, so that a failure of that kind is its own.
    """
    if failure.reason is Reason.BUSY:
        return Rejected(failure.message, retryable=True, story=story)
    if failure.reason is Reason.CLOSED:
        return PoolClosed(failure.message, retryable=not is_closing, story=story)
    return _BY_REASON[failure.reason](failure.message, story=story)
