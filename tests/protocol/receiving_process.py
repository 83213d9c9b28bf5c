"""A receiver in virtual time: a real pool and queue, over memory that knows who wrote what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from aiomm.buffers.pool import BlockPool, BlockState
from aiomm.buffers.queue import QueueFull, ReservationQueue
from aiomm.errors import Failure, Reason
from aiomm.protocol import commands as do
from aiomm.protocol.frames import Hello, specs_of
from aiomm.protocol.receiving import ReceiveEndpoint
from aiomm.protocol.states import State
from aiomm.types import Allocation, Extent, TransferId

from .world import (
    BLOCK_SIZE,
    DEFAULT_TOKENS,
    SCHEMA,
    TIMING,
    Process,
    Token,
    Violation,
    World,
    Writer,
    checksum_of,
)


@dataclass
class Lease:
    """Blocks that the user reads."""

    number: int
    allocations: tuple[Allocation, ...]
    extents: tuple[Extent, ...]
    content: list[Token | None]


@dataclass
class Delivered:
    """What the user of a receiver was given."""

    writer: Writer
    content: list[Token | None]


class Receiving(Process):
    """A receiver with a real pool and queue, over memory that remembers who wrote what."""

    endpoint: ReceiveEndpoint

    def __init__(
        self,
        world: World,
        address: str,
        *,
        blocks: int,
        max_waiting: int = 1000,
        max_peers: int = 64,
        max_requests: int = 4096,
        revokes: bool = False,
        holds_leases_for: float = 0.0,
        is_forgetful: bool = False,
        takes_any: bool = False,
    ) -> None:
        super().__init__(world, address)
        self.pool = BlockPool(blocks, BLOCK_SIZE)
        self.queue = ReservationQueue(self.pool, max_waiting=max_waiting)
        self.cells: list[Token | None] = [None] * (blocks * BLOCK_SIZE)
        self.revokes = revokes
        self.holds_leases_for = holds_leases_for
        self.is_forgetful = is_forgetful
        self.delivered: dict[int, Delivered] = {}
        self.kept: dict[int, Lease | None] = {}
        """Results that nobody has asked for so far."""
        self.owner: dict[int, int] = {}
        """Block -> number of the request that owns it; soft holds have no owner."""
        self.writable: dict[int, Writer] = {}
        """Block -> the one transfer that may write it, or may still have a write running."""
        self.revoked: set[Writer] = set()
        self._writers: dict[int, Writer] = {}
        self._being_read: dict[int, int] = {}
        """Block -> the request whose copy out of the pool is running."""
        self._copies: dict[int, list[Token | None]] = {}
        self.endpoint = ReceiveEndpoint(
            self.epoch,
            SCHEMA,
            Hello("receiver", address, specs_of(SCHEMA), takes_any=takes_any),
            default_tokens=DEFAULT_TOKENS,
            default_timeout=60.0,
            timing=TIMING,
            max_peers=max_peers,
            max_requests=max_requests,
            max_tokens=1000,
        )

    def land(self, position: int, token: Token) -> None:
        """A written token arrives in memory; it must be allowed to, however late."""
        if token.writer in self.revoked:
            return  # the plane has shut the door
        if self.is_alive and self.writable.get(position // BLOCK_SIZE) != token.writer:
            raise Violation(f"{token.writer} wrote token {position}, which is not its own")
        self.cells[position] = token

    def noted(self, writer: Writer, note: bytes) -> bool:
        """A note comes behind the last token of a write; False if its grant was withdrawn.

        It is empty where the sender has given up.
        """
        session = self.endpoint.sessions.get(writer.epoch)
        if writer in self.revoked or session is None:
            return False
        if note:
            self.endpoint.note_received(session.hello.link, note, self.world.now)
        return True

    # Commands.

    def execute(self, command: do.Command) -> None:
        match command:
            case do.Reserve(number, num_tokens, claimed):
                self._reserve(number, num_tokens, claimed)
            case do.ReserveRest(number, num_tokens, behind):
                self._reserve_rest(number, num_tokens, behind)
            case do.Unreserve(number):
                self.queue.cancel(number)
                self._pump_queue()
            case do.Permit(number, transfer, _, extents):
                self._permit(number, transfer, extents)
            case do.Quarantine(number, allocations):
                self._quarantine(number, allocations)
            case do.Release(number, allocations):
                self._give_back(number, allocations)
            case do.Verify(number, extents, checksum):
                self._verify(number, extents, checksum)
            case do.MoveOut(number, extents, _):
                self._copy(number, extents, self.endpoint.moved_out)
            case do.Join(number, extents, _):
                self._copy(number, extents, self.endpoint.joined)
            case do.Deliver(number, allocations, extents):
                self._deliver(number, allocations, extents)
            case do.Fail(number, failure):
                self._failed(number, failure)
            case do.CompareProbe(peer, _, plane, _):
                self.endpoint.probed(peer, plane, matched=True)
            case _:
                raise Violation(f"not a receiver's command: {command}")

    def _verify(self, number: int, extents: tuple[Extent, ...], checksum: bytes) -> None:
        """Compare later, with what lies there by then."""

        def compare() -> None:
            matches = checksum_of(self._read(extents)) == checksum
            self.endpoint.verified(number, matches, self.world.now)

        self.later(self.world.random.random() * 0.2, compare)

    def _reserve(self, number: int, num_tokens: int, claimed: bool) -> None:
        try:
            allocation = self.queue.request(number, num_tokens, claimed=claimed)
        except QueueFull as exc:
            failure = Failure(Reason.BUSY, exc.message)
            self.endpoint.fail(number, failure, self.world.now)
            return
        if claimed and allocation is not None:
            self._grant(number, allocation)
        self._pump_queue()

    def _reserve_rest(self, number: int, num_tokens: int, behind: Allocation | None) -> None:
        allocation = self.queue.request_whole(num_tokens, behind)
        if allocation is None:
            self.endpoint.refused(number, self.world.now)
            return
        extends = (
            behind is not None
            and bool(behind.extents)
            and allocation.start_offset == behind.start_offset
        )
        self._grant(number, allocation, extends=extends)

    def _pump_queue(self) -> None:
        for number, allocation in self.queue.pump():
            self._grant(number, allocation)

    def _grant(self, number: int, allocation: Allocation, *, extends: bool = False) -> None:
        for block in allocation.block_indices:
            owner = self.owner.setdefault(block, number)
            if owner != number or (block in self.writable and not extends):
                raise Violation(f"block {block} of {owner} was granted to {number}")
        self.endpoint.reserved(number, allocation, extends, self.world.now)

    def _permit(self, number: int, transfer: TransferId, extents: tuple[Extent, ...]) -> None:
        writer = self._writers[number] = Writer(self._peer_of(number), transfer)
        for extent in extents:
            for position in range(*extent):
                self.writable[position // BLOCK_SIZE] = writer

    def _peer_of(self, number: int) -> int:
        link = self.endpoint.link_of(number)
        sessions = self.endpoint.sessions.values()
        return next(each.peer_epoch for each in sessions if each.hello.link == link)

    def _quarantine(self, number: int, allocations: tuple[Allocation, ...]) -> None:
        for allocation in allocations:
            self.pool.quarantine(allocation)
        if self.revokes:
            self.revoked.add(self._writers[number])
            self.endpoint.drained(number, self.world.now)

    def _give_back(self, number: int, allocations: tuple[Allocation, ...]) -> None:
        for allocation in allocations:
            self._disown(number, allocation.block_indices)
            self.pool.free(allocation)
        self._pump_queue()

    def _disown(self, number: int, blocks: tuple[int, ...]) -> None:
        for block in blocks:
            if block in self._being_read:
                raise Violation(f"block {block} is free while {number} is copied out of it")
            if self.owner.pop(block, None) != number:
                raise Violation(f"{number} gave back block {block}, which is not its own")
            self.writable.pop(block, None)

    def _copy(
        self, number: int, extents: tuple[Extent, ...], done: Callable[[int, float], None]
    ) -> None:
        blocks = {p // BLOCK_SIZE for extent in extents for p in range(*extent)}
        self._being_read.update(dict.fromkeys(blocks, number))

        def finish() -> None:  # read as late as possible: nobody may have touched the blocks
            for block in blocks:
                del self._being_read[block]
            self._copies[number] = self._copies.get(number, []) + self._read(extents)
            done(number, self.world.now)

        self.later(self.world.random.random() * 0.2, finish)

    def _read(self, extents: tuple[Extent, ...]) -> list[Token | None]:
        return [self.cells[position] for extent in extents for position in range(*extent)]

    def _deliver(
        self, number: int, allocations: tuple[Allocation, ...], extents: tuple[Extent, ...]
    ) -> None:
        core = self.endpoint.transfer(number)
        is_copied = number in self._copies
        content = self._copies.pop(number) if is_copied else self._read(extents)
        kept = self._trim(number, allocations, 0 if is_copied else core.transferred_tokens)
        self.delivered[number] = Delivered(self._writers[number], content)
        self.end(number, None)
        self._take(number, Lease(number, kept, extents, content))
        self._pump_queue()

    def _failed(self, number: int, failure: Failure) -> None:
        if number not in self.kept:
            self.end(number, failure)
            self._take(number, None)
            return
        lease = self.kept.pop(number)
        if lease is not None:
            self._end_lease(lease)

    def _take(self, number: int, lease: Lease | None) -> None:
        """Let the user have the result, unless she has forgotten that she asked for it."""
        if self.is_forgetful and self.world.random.random() < 0.1:
            self.kept[number] = lease
            return
        self.endpoint.taken(number)
        if lease is not None:
            hold = self.world.random.random() * self.holds_leases_for
            self.later(hold, lambda: self._end_lease(lease))

    def _trim(
        self, number: int, allocations: tuple[Allocation, ...], num_tokens: int
    ) -> tuple[Allocation, ...]:
        kept = []
        for allocation in allocations:
            used = min(num_tokens, allocation.num_tokens)
            num_tokens -= used
            smaller = self.pool.trim(allocation, used)
            freed = set(allocation.block_indices) - set(smaller.block_indices)
            self._disown(number, tuple(freed))
            for block in smaller.block_indices:
                self.writable.pop(block, None)
            self.pool.fill(smaller)
            self.pool.lease(smaller)
            kept.append(smaller)
        return tuple(kept)

    def _end_lease(self, lease: Lease) -> None:
        if lease.extents and self._read(lease.extents) != lease.content:
            raise Violation(f"the lease of {lease.number} was overwritten")
        self._give_back(lease.number, lease.allocations)

    def abandon(self, failure: Failure) -> None:
        for number in self.endpoint.numbers():
            self.endpoint.fail(number, failure, self.world.now)

    def is_settled(self) -> bool:
        numbers = self.endpoint.numbers()
        return all(self.endpoint.transfer(number).is_settled for number in numbers)

    def check(self) -> None:
        """Check that every block has one owner, and that all are accounted for."""
        super().check()
        requests = self.endpoint._requests.items()
        unasked = {n for n, each in requests if each.redeem_key is not None and not each.peer}
        if self.endpoint._unasked.keys() != unasked:
            raise Violation(f"{unasked} are not asked for, not {self.endpoint._unasked.keys()}")
        counts = self.pool.counts()
        if sum(counts.values()) != self.pool.capacity:
            raise Violation(f"blocks are lost: {counts}")
        if len(self.owner) > self.pool.capacity - counts[BlockState.FREE]:
            raise Violation("a free block has an owner")
        for number in self.endpoint.numbers():
            core = self.endpoint.transfer(number)
            self.check_progress(number, core.transferred_tokens)
            if core.state is State.SENDING and core.granted_tokens < core.transferred_tokens:
                raise Violation(f"{number} has more tokens than were granted")
