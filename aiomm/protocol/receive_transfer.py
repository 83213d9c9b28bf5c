"""The receiver's half of a transfer: what it reserves, grants, buffers, joins and gives back."""

from __future__ import annotations

from typing import assert_never

from ..errors import Failure, Reason
from ..types import Allocation, Extent, TransferId, part_of
from . import frames
from .commands import (
    Deliver,
    Fail,
    Join,
    MoveOut,
    Permit,
    Quarantine,
    Release,
    Reserve,
    ReserveRest,
    SendFrame,
    Unreserve,
    Verify,
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
    Verified,
    Written,
)
from .states import State
from .transfer import Commands, ProtocolViolation, Transfer, merged

__all__ = ["ReceiveTransfer"]


class ReceiveTransfer(Transfer):
    """The receiver's half. It owns its allocations until they are released or delivered.

    Invariants: `_allocations` hold, in order, the tokens from `_moved_tokens` on; every grant
    but the last is full; while `_is_copying`, our own thread reads the blocks of the first
    `_leaving_allocations` of them, to move them out, or of all, to join them.
    """

    id: TransferId | None = None

    def __init__(
        self, number: int, default_tokens: int, now: float, *, always_verifies: bool = False
    ) -> None:
        super().__init__(now)
        self.number = number
        self.plane = ""
        """The plane over which the last chunk came."""
        self.metadata = b""
        self.grants: list[tuple[tuple[int, ...], tuple[Extent, ...]]] = []
        """Block indices and extents of every grant."""
        self.reservation: Reserve | ReserveRest | None = None
        """The last one asked for, until it is answered or given up; earlier ones are void."""
        self._default_tokens = default_tokens
        self._always_verifies = always_verifies
        self._borders: list[int] = []
        """Token at which each grant ends."""
        self._allocations: list[Allocation] = []
        self._moved_tokens = 0
        self._leaving_allocations = self._leaving_tokens = self._leaving_grants = 0
        """Allocations that are being moved out, and the tokens and grants in them."""
        self._is_copying = False
        self._is_sealed = False
        self._is_quarantined = False
        self._uncounted: list[Written] = []
        """Chunks that are being verified, or wait behind such a one."""

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
            case Verified(matches):
                return self._verified(matches, now)
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
        staying = self._allocations[self._leaving_allocations if self._is_copying else 0 :]
        behind = staying[-1] if staying else None
        self.reservation = ReserveRest(self.number, self._rest(), behind)
        return [self.reservation]

    def _unreserve(self) -> Commands:
        reservation, self.reservation = self.reservation, None
        return [Unreserve(self.number)] if isinstance(reservation, Reserve) else []

    def _announced(self, total: int, metadata: bytes) -> Commands:
        if self.state.is_terminal:
            return []
        self._learn_total(total, self._arrived())
        self.metadata = metadata
        if self._rest() <= 0:
            return []
        if self.state is State.SENDING or isinstance(self.reservation, ReserveRest):
            return self._reserve_rest()
        return self._reserve(self._rest(), claimed=True)

    def _learn_total(self, total: int | None, arrived: int) -> None:
        if total is None:
            total = self.total
        elif self.total is not None and total != self.total:
            raise ProtocolViolation(f"total was {self.total} tokens, now {total}")
        if total is not None and total < arrived:
            raise ProtocolViolation(f"total {total} after {arrived} tokens")
        self.total = total

    def _arrived(self) -> int:
        """Tokens that were written, counted or not."""
        return self.transferred_tokens + sum(each.count for each in self._uncounted)

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
            held = set(last.block_indices)
            blocks = tuple(block for block in blocks if block not in held)
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
        return [] if self._is_copying else self._move_out()

    def _move_out(self) -> Commands:
        """Move out what is here, all of it landed. What is free meanwhile is granted meanwhile."""
        self._is_copying = True
        self._leaving_allocations, self._leaving_grants = len(self._allocations), len(self.grants)
        self._leaving_tokens = self.transferred_tokens - self._moved_tokens
        moving: Commands = [MoveOut(self.number, self._landed(), self.total)]
        if self._rest() <= 0:
            return moving  # a stream has ended at the border of a grant; it will say so
        return [*moving, *self._reserve(self._rest(), claimed=True)]

    def _landed(self) -> tuple[Extent, ...]:
        """The extents that hold the tokens that are still in the pool, in their order."""
        return merged(part_of(self._held(), 0, self.transferred_tokens - self._moved_tokens))

    def _extents_of(self, event: Written) -> tuple[Extent, ...]:
        return part_of(self._held(), event.start - self._moved_tokens, event.count)

    def _held(self) -> tuple[Extent, ...]:
        return tuple(extent for each in self._allocations for extent in each.extents)

    def _written(self, event: Written, now: float) -> Commands:
        if self.state.is_terminal:
            return []
        if self._is_sealed and not event.count and event.start == event.total == self.total:
            return []  # it says that nothing follows, which the announced length has said before
        self._check_written(event)
        self._learn_total(event.total, event.start + event.count)
        self._uncounted.append(event)
        return self._count_chunks(now) if len(self._uncounted) == 1 else []

    def _count_chunks(self, now: float) -> Commands:
        """Count what has landed, in order, up to a chunk that is to be verified first."""
        commands: Commands = []
        while self._uncounted and not self._is_sealed:
            event = self._uncounted[0]
            if event.checksum or (self._always_verifies and event.count):
                extents = self._extents_of(event)
                return [*commands, Verify(self.number, extents, event.checksum, event.plane)]
            commands += self._count_chunk(self._uncounted.pop(0), now)
        return commands

    def _verified(self, matches: bool, now: float) -> Commands:
        if self.state.is_terminal:
            return []
        event = self._uncounted.pop(0)
        if not matches:
            stop = event.start + event.count
            message = f"tokens {event.start} to {stop} arrived changed: their checksum is another"
            return self._fail(Failure(Reason.PLANE, message), now, self._may_be_written())
        commands = self._count_chunk(event, now)
        return commands + self._count_chunks(now)

    def _count_chunk(self, event: Written, now: float) -> Commands:
        self._count(event.sequence, event.count)
        self.plane = event.plane or self.plane
        if self.transferred_tokens == self.total:
            return self._complete(now)
        if self.transferred_tokens < self._borders[event.sequence] or not event.count:
            return []
        self._move(GrantFilled, now)
        if self.granted_tokens > self.transferred_tokens:
            self._move(Resumed, now)
            return []
        if self._moved_tokens and not self._is_copying:
            return self._move_out()  # it has to leave too, and now there is time
        return self._reserve_rest()

    def _check_written(self, event: Written) -> None:
        if event.sequence >= len(self._borders) or self._is_sealed:
            raise ProtocolViolation(f"tokens written that nobody granted, in {self.state}")
        begin = self._borders[event.sequence - 1] if event.sequence else 0
        stop = event.start + event.count
        if not event.count and event.total is None:
            raise ProtocolViolation("no tokens written, and nothing said of their number")
        arrived = self._arrived()
        if event.start != arrived or not (
            begin <= event.start and stop <= self._borders[event.sequence]
        ):
            raise ProtocolViolation(
                f"tokens {event.start} to {stop} written in grant {event.sequence}, expected "
                f"from {arrived} on, up to {self._borders[event.sequence]}"
            )

    def _complete(self, now: float) -> Commands:
        self._is_sealed = True
        commands = self._unreserve()
        if self._is_copying:
            return commands  # it ended while chunks are on their way out; joined afterwards
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
        gone = tuple(self._allocations[: self._leaving_allocations])
        del self._allocations[: self._leaving_allocations]
        self._moved_tokens += self._leaving_tokens
        commands: Commands = [Release(self.number, gone, self._leaving_grants)]
        landed = self._landed()
        if self._is_sealed:
            assert self.total is not None
            self._is_copying = True
            commands.append(Join(self.number, landed, self.total))
        elif landed and self.state is State.AWAITING_RESUME:
            commands += self._move_out()  # whoever waits for blocks holds none (rule 3)
        return commands

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
