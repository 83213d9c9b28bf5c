"""One transfer, seen from either side: events in, commands out.

:class:`SendTransfer` and :class:`ReceiveTransfer` share the table of :mod:`.states` and know
neither the link nor the other transfers. `handle` raises :class:`ProtocolViolation` when an
event that stands for a peer's frame is impossible; the endpoint turns that into an abort.
"""

from __future__ import annotations

from collections import deque
from typing import TypeAlias, assert_never

from ..errors import Failure
from ..types import Allocation, Extent, TransferId
from . import frames
from .commands import (
    Deliver,
    Fail,
    Finish,
    Join,
    MoveOut,
    Permit,
    Quarantine,
    Quiesce,
    Release,
    Reserve,
    ReserveRest,
    SendFrame,
    TransferCommand,
    Unreserve,
    Write,
)
from .events import (
    Aborted,
    Accepted,
    Announced,
    Claimed,
    Drained,
    Failed,
    Granted,
    GrantFilled,
    Joined,
    MovedOut,
    ReceiveEvent,
    Refused,
    Reserved,
    Resumed,
    SendEvent,
    TokensReady,
    WriteFailed,
    WriteFinished,
    Written,
)
from .states import Edge, State, next_state

__all__ = ["ProtocolViolation", "ReceiveTransfer", "SendTransfer", "Transfer", "one_run"]

Commands: TypeAlias = list[TransferCommand]


class ProtocolViolation(Exception):
    """The peer did what the protocol does not allow."""


def one_run(extents: tuple[Extent, ...]) -> tuple[Extent, ...]:
    """Return `extents` with neighbours merged that follow each other in this order."""
    merged: list[Extent] = []
    for extent in extents:
        if merged and merged[-1].stop == extent.start:
            merged[-1] = Extent(merged[-1].start, extent.stop)
        elif extent.num_tokens:
            merged.append(extent)
    return tuple(merged)


def _first(extents: tuple[Extent, ...], skip: int, count: int) -> tuple[Extent, ...]:
    """Return the part of `extents` that holds `count` tokens behind the first `skip`."""
    chosen: list[Extent] = []
    for start, stop in extents:
        begin, end = start + skip, min(stop, start + skip + count)
        if begin < end:
            chosen.append(Extent(begin, end))
            count -= end - begin
        skip = max(0, skip - (stop - start))
    return tuple(chosen)


def _check_extents(extents: tuple[Extent, ...]) -> None:
    """Refuse extents that are empty, overlap or do not ascend: writes must follow them blindly."""
    end = 0
    for start, stop in extents:
        if not end <= start < stop:
            raise ProtocolViolation(f"extents are not ascending runs: {extents[:8]}")
        end = stop


class Transfer:
    """What both sides have: an id, a state with its history, a length."""

    id: TransferId | None

    def __init__(self, now: float) -> None:
        self.state = State.ALLOC
        self.history: list[tuple[State, float]] = [(State.ALLOC, now)]
        """Every state entered, with the time; the first entry is the beginning."""
        self.total: int | None = None
        self.transferred_tokens = 0
        """Tokens that have landed; only grows."""
        self.granted_tokens = 0
        """Tokens granted so far, over all grants."""
        self.chunks: list[int] = []
        """Tokens that landed under each grant: the `buffered_chunks`."""
        self.failure: Failure | None = None

    @property
    def resumes(self) -> int:
        """How often the transfer was resumed."""
        return max(0, sum(state is State.SENDING for state, _ in self.history) - 1)

    def story(self) -> tuple[str, ...]:
        """Tell the states passed so far with the seconds since the beginning."""
        began = self.history[0][1]
        return tuple(f"{state} at {at - began:.3f}s" for state, at in self.history)

    def _move(self, edge: Edge, now: float) -> None:
        self.state = next_state(self.state, edge)
        self.history.append((self.state, now))

    def _count(self, sequence: int, count: int) -> None:
        if count:
            self.chunks += [0] * (sequence + 1 - len(self.chunks))
            self.chunks[sequence] += count
            self.transferred_tokens += count


class SendTransfer(Transfer):
    """The sender's half. One write runs at a time, and a running write is never abandoned."""

    id: TransferId

    def __init__(self, transfer: TransferId, now: float) -> None:
        super().__init__(now)
        self.id = transfer
        self.available_tokens = 0
        self.metadata = b""
        self._grants: deque[Granted | Resumed] = deque()
        """The grant being filled, and those that came early."""
        self._next_sequence = 0
        self._offered = False
        self._told: tuple[int | None, bytes] = (None, b"")
        """What the receiver has been told of length and metadata."""
        self._sealed = False
        """A `Written` has told the receiver that nothing follows."""
        self._writing = 0
        """Tokens of the running write; it stays until the write is known to be drained."""
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

    def handle(self, event: SendEvent, now: float) -> Commands:
        """Take one event; return what to do, in order."""
        match event:
            case TokensReady():
                return self._tokens_ready(event)
            case Granted() | Resumed():
                return self._granted(event, now)
            case WriteFinished():
                return self._write_finished(now)
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
        _check_extents(event.extents)
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
        extents = _first(grant.extents, done, self.available_tokens - self.transferred_tokens)
        self._writing = sum(extent.num_tokens for extent in extents)
        if not self._writing:
            return []
        return [Write(self.id, grant.sequence, self.transferred_tokens, extents)]

    def _seal(self) -> Commands:
        self._sealed = True
        sequence = self._next_sequence - 1
        return [SendFrame(self._written(sequence, self.transferred_tokens, 0))]

    def _written(self, sequence: int, start: int, count: int) -> frames.Written:
        return frames.Written(self.id, sequence, start, count, self.total)

    def _write_finished(self, now: float) -> Commands:
        count, self._writing = self._writing, 0
        if self.state.is_terminal:
            return self._acknowledge_abort()
        sequence, start = self._grants[0].sequence, self.transferred_tokens
        self._count(sequence, count)
        commands: Commands = [SendFrame(self._written(sequence, start, count))]
        if self.transferred_tokens == self.total:
            self._sealed = True
        elif self._grant_is_full():
            self._grants.popleft()
            self._move(GrantFilled, now)
            if self._grants:
                self._move(Resumed, now)
        return commands + self._write_next()

    def _grant_is_full(self) -> bool:
        grant = self._grants[0]
        room = sum(extent.num_tokens for extent in grant.extents)
        return self.transferred_tokens == grant.start + room

    def _accepted(self, now: float) -> Commands:
        if self.state.is_terminal:
            return []
        if not self._sealed:
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


class ReceiveTransfer(Transfer):
    """The receiver's half. It owns its allocations until they are released or delivered.

    Invariants: `_allocations` hold, in order, the tokens from `_moved_tokens` on; every grant
    but the last is full; while `_is_copying`, our own thread reads the blocks.
    """

    id: TransferId | None = None

    def __init__(self, number: int, default_tokens: int, now: float) -> None:
        super().__init__(now)
        self.number = number
        self.metadata = b""
        self.grants: list[tuple[tuple[int, ...], tuple[Extent, ...]]] = []
        """Block indices and extents of every grant."""
        self.reservation: Reserve | ReserveRest | None = None
        """The last one asked for, until it is answered or given up; earlier ones are void."""
        self._default_tokens = default_tokens
        self._borders: list[int] = []
        """Token at which each grant ends."""
        self._allocations: list[Allocation] = []
        self._moved_tokens = 0
        self._is_copying = False
        self._is_sealed = False
        self._is_quarantined = False

    @property
    def is_claimed(self) -> bool:
        """A sender has asked for the grant."""
        return self.id is not None

    @property
    def is_settled(self) -> bool:
        """Terminal, and no block of the pool is its own any more."""
        return self.state.is_terminal and not self._allocations

    def expect(self) -> Commands:
        """Reserve the default allocation before any sender has asked."""
        return self._reserve(self._default_tokens, claimed=False)

    def handle(self, event: ReceiveEvent, now: float) -> Commands:
        """Take one event; return what to do, in order."""
        match event:
            case Claimed():
                return self._claimed(event)
            case Announced(total, metadata):
                return self._announced(total, metadata)
            case Reserved(allocation, extends):
                return self._reserved(allocation, extends, now)
            case Refused():
                return self._refused()
            case Written():
                return self._written(event, now)
            case MovedOut():
                return self._moved_out()
            case Joined():
                return self._joined(now)
            case Failed(failure):
                return self._fail(failure, now, self._may_be_written())
            case Aborted(failure, drained):
                may_be_written = self._may_be_written() and not drained
                commands = self._fail(failure, now, may_be_written, is_told=True)
                return commands or (self._drained() if drained else [])
            case Drained():
                return self._drained()
            case _:
                assert_never(event)

    def _claimed(self, event: Claimed) -> Commands:
        self.id, self.total, self.metadata = event.transfer, event.total, event.metadata
        want = self._default_tokens if event.total is None else event.total
        return self._reserve(want, claimed=True)

    def _reserve(self, num_tokens: int, *, claimed: bool) -> Commands:
        self.reservation = Reserve(self.number, num_tokens, claimed)
        return [self.reservation]

    def _reserve_rest(self) -> Commands:
        behind = self._allocations[-1] if self._allocations else None
        self.reservation = ReserveRest(self.number, self._rest(), behind)
        return [self.reservation]

    def _unreserve(self) -> Commands:
        reservation, self.reservation = self.reservation, None
        return [Unreserve(self.number)] if isinstance(reservation, Reserve) else []

    def _announced(self, total: int, metadata: bytes) -> Commands:
        if self.state.is_terminal:
            return []
        self._learn_total(total)
        self.metadata = metadata
        if self._is_copying or self._rest() <= 0:
            return []
        if self.state is State.SENDING or isinstance(self.reservation, ReserveRest):
            return self._reserve_rest()
        return self._reserve(self._rest(), claimed=True)

    def _learn_total(self, total: int | None) -> None:
        if total is None:
            return
        if total != (total if self.total is None else self.total):
            raise ProtocolViolation(f"total was {self.total} tokens, now {total}")
        if total < self.transferred_tokens:
            raise ProtocolViolation(f"total {total} after {self.transferred_tokens} tokens")
        self.total = total

    def _rest(self) -> int:
        """Tokens to reserve next: all that is left, or a default's worth of a stream."""
        return self._default_tokens if self.total is None else self.total - self.granted_tokens

    def _reserved(self, allocation: Allocation, extends: bool, now: float) -> Commands:
        self.reservation = None
        if self.state.is_terminal or self._is_sealed:  # granted in turn just when it ended
            return [Release(self.number, (allocation,))]
        blocks, extents = allocation.block_indices, allocation.extents
        if extends:
            last = self._allocations.pop()
            blocks = tuple(block for block in blocks if block not in last.block_indices)
            extents = allocation.tail(last.num_tokens)
        self._allocations.append(allocation)
        return self._grant(blocks, extents, now)

    def _grant(self, blocks: tuple[int, ...], extents: tuple[Extent, ...], now: float) -> Commands:
        assert self.id is not None
        sequence, start = len(self.grants), self.granted_tokens
        self.grants.append((blocks, extents))
        self.granted_tokens += sum(extent.num_tokens for extent in extents)
        self._borders.append(self.granted_tokens)
        if self.state is State.ALLOC:
            self._move(Granted, now)
        elif self.state is State.AWAITING_RESUME:
            self._move(Resumed, now)
        frame = frames.Resume if sequence else frames.Grant
        return [
            Permit(self.number, self.id, sequence, extents),
            SendFrame(frame(self.id, sequence, start, blocks, extents)),
        ]

    def _refused(self) -> Commands:
        self.reservation = None
        if self.state is not State.AWAITING_RESUME:
            return []  # only an attempt to be early; it is asked for again when the grant is full
        self._is_copying = True
        return [MoveOut(self.number, self._landed(), self.total)]

    def _landed(self) -> tuple[Extent, ...]:
        """The extents that hold the tokens that are still in the pool, in their order."""
        granted = tuple(extent for each in self._allocations for extent in each.extents)
        return one_run(_first(granted, 0, self.transferred_tokens - self._moved_tokens))

    def _written(self, event: Written, now: float) -> Commands:
        if self.state.is_terminal:
            return []
        self._check_written(event)
        self._learn_total(event.total)
        self._count(event.sequence, event.count)
        if self.transferred_tokens == self.total:
            return self._complete(now)
        if self.transferred_tokens < self._borders[event.sequence] or not event.count:
            return []
        self._move(GrantFilled, now)
        if self.granted_tokens > self.transferred_tokens:
            self._move(Resumed, now)
            return []
        return self._reserve_rest()

    def _check_written(self, event: Written) -> None:
        if self.state is State.ALLOC or event.sequence >= len(self._borders) or self._is_sealed:
            raise ProtocolViolation(f"tokens written that nobody granted, in {self.state}")
        begin = self._borders[event.sequence - 1] if event.sequence else 0
        stop = event.start + event.count
        if event.start != self.transferred_tokens or not (
            begin <= event.start and stop <= self._borders[event.sequence]
        ):
            raise ProtocolViolation(
                f"tokens {event.start} to {stop} written in grant {event.sequence}, expected "
                f"from {self.transferred_tokens} on, up to {self._borders[event.sequence]}"
            )

    def _complete(self, now: float) -> Commands:
        self._is_sealed = True
        if self._is_copying:
            return []  # a stream ended while its chunks are on their way out; joined afterwards
        commands = self._unreserve()
        extents = self._landed()
        if self._moved_tokens == 0 and len(extents) <= 1:
            return commands + self._deliver(extents, now)
        assert self.total is not None
        self._is_copying = True
        return [*commands, Join(self.number, extents, self.total)]

    def _deliver(self, extents: tuple[Extent, ...], now: float) -> Commands:
        assert self.id is not None
        self._move(Accepted, now)
        allocations, self._allocations = tuple(self._allocations), []
        return [
            Deliver(self.number, allocations, extents),
            SendFrame(frames.Accepted(self.id)),
        ]

    def _moved_out(self) -> Commands:
        self._is_copying = False
        if self.state.is_terminal:
            return self._release()
        self._moved_tokens = self.transferred_tokens
        released = self._release()
        if self._is_sealed:
            assert self.total is not None
            self._is_copying = True
            return [*released, Join(self.number, (), self.total)]
        if self._rest() <= 0:
            return released  # a stream has ended at the border of a grant; it will say so
        return [*released, *self._reserve(self._rest(), claimed=True)]

    def _joined(self, now: float) -> Commands:
        self._is_copying = False
        if self.state.is_terminal:
            return self._release()
        return [*self._release(), *self._deliver((), now)]

    def _may_be_written(self) -> bool:
        return self.granted_tokens > self.transferred_tokens and not self._is_sealed

    def _fail(
        self, failure: Failure, now: float, may_be_written: bool, *, is_told: bool = False
    ) -> Commands:
        if self.state.is_terminal:
            return []
        self._move(Failed, now)
        self.failure = failure
        commands = self._unreserve()
        self._is_quarantined = may_be_written
        if may_be_written:
            commands.append(Quarantine(self.number, tuple(self._allocations)))
        else:
            commands += self._release()
        if self.id is not None and not is_told:
            message = frames.clipped(failure.message)
            commands.append(SendFrame(frames.Abort(self.id, failure.reason, message, False)))
        return [*commands, Fail(self.number, failure, self.story())]

    def _drained(self) -> Commands:
        self._is_quarantined = False
        return self._release() if self.state.is_terminal else []

    def _release(self) -> Commands:
        if self._is_copying or self._is_quarantined or not self._allocations:
            return []
        allocations, self._allocations = tuple(self._allocations), []
        return [Release(self.number, allocations)]
