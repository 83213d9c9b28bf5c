"""The sender's half of a transfer: grants in, writes out, one at a time."""

from __future__ import annotations

from typing import assert_never

from ..errors import Failure
from ..types import TransferId, part_of
from . import frames
from .commands import (
    Fail,
    Finish,
    Quiesce,
    SendFrame,
    Write,
)
from .events import (
    Aborted,
    Accepted,
    Drained,
    Failed,
    Granted,
    GrantFilled,
    Resumed,
    SendEvent,
    TokensReady,
    WriteFailed,
    WriteFinished,
)
from .states import State
from .transfer import Commands, ProtocolViolation, Transfer, check_extents

__all__ = ["SendTransfer"]

MAX_EARLY_GRANTS = 8
"""Behind the one that is being written. A receiver of ours is one ahead."""


class SendTransfer(Transfer):
    """The sender's half. One write runs at a time, and a running write is never abandoned.

    Args:
        transfer: its id.
        now: the time.
    """

    id: TransferId

    def __init__(self, transfer: TransferId, now: float) -> None:
        super().__init__(now)
        self.id = transfer
        self.available_tokens = 0
        self.metadata = b""
        self._grants: list[Granted | Resumed] = []
        """The grant being filled, and those that came early."""
        self._next_sequence = 0
        self._offered = False
        self._told: tuple[int | None, bytes] = (None, b"")
        """What the receiver has been told of length and metadata."""
        self._sealed = False
        """A `Written` has told the receiver that nothing follows."""
        self._writing = 0
        """Tokens of the running write; it stays until the write is known to be drained."""
        self._noted: frames.Written | None = None
        """What the plane carries behind the bytes of the running write, if it does."""
        self._owes_ack = False

    @property
    def is_settled(self) -> bool:
        """Terminal, and nothing of it can land any more."""
        return self.state.is_terminal and not self._writing

    def offer(self, key: bytes, redemption: int, timeout: float) -> Commands:
        """Ask for the grant, with the length if it is known by now."""
        self._offered = True
        self._told = (self.total, self.metadata)
        frame = frames.Offer(self.id, key, redemption, self.total, self.metadata, timeout)
        return [SendFrame(frame)]

    def note(self, checksum: bytes, plane: str) -> frames.Written:
        """Return what tells of the running write, for the plane to carry behind its bytes."""
        self._noted = self._written(checksum, plane)
        return self._noted

    def handle(self, event: SendEvent, now: float) -> Commands:
        """Take one event; return what to do, in order."""
        match event:
            case TokensReady():
                return self._tokens_ready(event)
            case Granted() | Resumed():
                return self._granted(event, now)
            case WriteFinished():
                return self._write_finished(event, now)
            case WriteFailed(failure):
                return [*self._fail(failure, now), Quiesce(self.id)]
            case Drained():
                self._writing = 0
                return self._acknowledge_abort()
            case Accepted():
                return self._accepted(now)
            case Aborted(failure):
                return self._aborted(failure, now)
            case Failed(failure):
                return self._fail(failure, now)
            case _:
                assert_never(event)

    def _tokens_ready(self, event: TokensReady) -> Commands:
        if self.state.is_terminal:
            return []
        self.available_tokens, self.total = event.available, event.total
        self.metadata = event.metadata or self.metadata
        commands: Commands = []
        news = (self.total, self.metadata)
        if self._offered and self.total is not None and news != self._told:
            self._told = news
            commands.append(SendFrame(frames.Announce(self.id, self.total, self.metadata)))
        return commands + self._write_next()

    def _granted(self, event: Granted | Resumed, now: float) -> Commands:
        if self.state.is_terminal:
            return []
        if event.sequence != self._next_sequence or event.start != self.granted_tokens:
            raise ProtocolViolation(
                f"grant {event.sequence} from token {event.start}, expected "
                f"{self._next_sequence} from {self.granted_tokens}"
            )
        if (self.state is State.ALLOC) != isinstance(event, Granted):
            raise ProtocolViolation(f"{type(event).__name__} is not possible in {self.state}")
        if len(self._grants) > MAX_EARLY_GRANTS:
            raise ProtocolViolation(f"grant {event.sequence}, {len(self._grants)} before its turn")
        check_extents(event.extents)
        if not event.extents and self.total != 0:
            raise ProtocolViolation(f"grant {event.sequence} is of no tokens at all")
        self._next_sequence += 1
        self.granted_tokens += sum(extent.num_tokens for extent in event.extents)
        self._grants.append(event)
        if self.state is not State.SENDING:
            self._move(type(event), now)
        return self._write_next()

    def _write_next(self) -> Commands:
        if self._writing or self._sealed or self.state is State.ALLOC:
            return []
        if self.transferred_tokens == self.total:
            return self._seal()
        if not self._grants:
            return []
        grant = self._grants[0]
        done = self.transferred_tokens - grant.start
        extents = part_of(grant.extents, done, self.available_tokens - self.transferred_tokens)
        self._writing = sum(extent.num_tokens for extent in extents)
        if not self._writing:
            return []
        return [Write(self.id, grant.sequence, self.transferred_tokens, extents)]

    def _seal(self) -> Commands:
        self._sealed = True
        sequence = self._next_sequence - 1
        return [
            SendFrame(frames.Written(self.id, sequence, self.transferred_tokens, 0, self.total))
        ]

    def _write_finished(self, event: WriteFinished, now: float) -> Commands:
        said, self._noted = self._noted, None
        if self.state.is_terminal:
            self._writing = 0
            return self._acknowledge_abort()
        commands: Commands = []
        if said is None:
            said = self._written(event.checksum, event.plane)
            commands.append(SendFrame(said))
        self._count(said.sequence, said.count)
        self._writing = 0
        if self.transferred_tokens == said.total:
            self._sealed = True
        elif self._grant_is_full():
            self._grants.pop(0)
            self._move(GrantFilled, now)
            if self._grants:
                self._move(Resumed, now)
        return commands + self._write_next()

    def _written(self, checksum: bytes, plane: str) -> frames.Written:
        start, sequence = self.transferred_tokens, self._grants[0].sequence
        return frames.Written(self.id, sequence, start, self._writing, self.total, checksum, plane)

    def _grant_is_full(self) -> bool:
        grant = self._grants[0]
        room = sum(extent.num_tokens for extent in grant.extents)
        return self.transferred_tokens == grant.start + room

    def _accepted(self, now: float) -> Commands:
        if self.state.is_terminal:
            return []
        if self._noted is not None and self.transferred_tokens + self._writing == self.total:
            # The note of the last write has arrived: what the plane says of it matters no more.
            self._count(self._noted.sequence, self._writing)
            self._writing = 0
        elif not self._sealed:
            raise ProtocolViolation(
                f"accepted after {self.transferred_tokens} of {self.total} tokens"
            )
        self._move(Accepted, now)
        return [Finish(self.id)]

    def _aborted(self, failure: Failure, now: float) -> Commands:
        commands: Commands = []
        if not self.state.is_terminal:
            self._end(failure, now)
            commands.append(Fail(self.id.generation, failure, self.story()))
        self._owes_ack = True
        return commands + self._acknowledge_abort()

    def _acknowledge_abort(self) -> Commands:
        if not self._owes_ack or self._writing:
            return []
        self._owes_ack = False
        return [SendFrame(frames.AbortAck(self.id))]

    def _fail(self, failure: Failure, now: float) -> Commands:
        if self.state.is_terminal:
            return []
        self._end(failure, now)
        drained = not self._writing
        self._owes_ack = not drained
        abort = frames.Abort(self.id, failure.reason, frames.clipped(failure.message), drained)
        return [SendFrame(abort), Fail(self.id.generation, failure, self.story())]

    def _end(self, failure: Failure, now: float) -> None:
        self._move(Failed, now)
        self.failure = failure
