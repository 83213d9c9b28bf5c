"""The receiver's driver: owns the pool and its memory, and hands finished transfers out.

The one place where blocks change hands: each command names an allocation and what becomes of
it, and the queue is pumped whenever blocks may have become free.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, ClassVar

import msgspec

from ..buffers.checksum import digests_of_extents
from ..buffers.layout import Layout
from ..buffers.pool import BlockPool
from ..buffers.queue import QueueFull, ReservationQueue
from ..config import ReceiverSettings
from ..errors import (
    Failure,
    PlaneUnavailable,
    ProtocolError,
    Reason,
    Rejected,
    error_from,
)
from ..gpu.lanes import Mark, finished
from ..gpu.runtime import GpuError
from ..planes.base import GrantKey, Plane
from ..planes.copying import MAX_THREADS, Copies, CopyThreads, LoopCopies, num_processors
from ..protocol.commands import (
    Command,
    CompareProbe,
    Deliver,
    Fail,
    Greet,
    Join,
    MoveOut,
    Part,
    Permit,
    Quarantine,
    Release,
    Reserve,
    ReserveRest,
    Unreserve,
    Verify,
)
from ..protocol.frames import Hello, specs_of
from ..protocol.receiving import ReceiveEndpoint
from ..protocol.session import Timing
from ..types import MAX_GRANT_BLOCKS, Allocation, Extent, Schema
from .base import Driver, new_epoch
from .checksums import AT_ONCE_NBYTES, Checksums, Chunk
from .exports import Exports
from .memory import Joined, Memory
from .results import Delivery, OnFailure, Results

__all__ = ["ReceiveDriver"]

logger = logging.getLogger("aiomm.receiver")


class ReceiveDriver(Driver[ReceiveEndpoint]):
    """Runs one :class:`ReceiveEndpoint`.

    Args:
        schema: of the pool.
        device: where the pool lies: `"cpu"`, or a GPU such as `"cuda:0"`.
        planes: in order of preference.
        takes_any: tell senders that this side takes what has no other destination.
        on_failure: told of what fails while nobody awaits it.
    """

    listens: ClassVar[bool] = True
    settings: ReceiverSettings

    def __init__(
        self,
        schema: Schema,
        settings: ReceiverSettings,
        bind: str | None,
        planes: Sequence[Plane],
        name: str,
        *,
        device: str,
        takes_any: bool,
        on_failure: OnFailure | None,
    ) -> None:
        super().__init__(settings, bind, name)
        self.schema = schema
        self.planes = planes
        self.pool = BlockPool(settings.blocks, settings.block_size)
        self.queue = _queue_over(self.pool, settings.max_waiting, len(schema))
        self.layout = Layout(schema, settings.blocks * settings.block_size, settings.max_peers)
        self.memory = Memory(self.layout, device, name, settings.max_spare_bytes)
        self._exports = Exports(self.layout, self._notes_received)
        self.endpoint = ReceiveEndpoint(
            new_epoch(),
            schema,
            _hello(name, self.layout, device, takes_any=takes_any),
            plane_offers=self._exports.offers,
            default_tokens=settings.default_blocks * settings.block_size,
            default_timeout=settings.timeout,
            timing=Timing.for_timeout(settings.peer_timeout),
            max_peers=settings.max_peers,
            max_requests=settings.max_waiting,
            max_tokens=settings.max_tokens,
            always_verifies=device != "cpu",
        )
        self.results = Results(
            self.endpoint, lambda: self.loop, self.discard, on_failure, settings.max_waiting
        )
        self._links: dict[int, int] = {}
        """The link to each peer that has said Hello."""
        self._joined: dict[int, Joined] = {}
        self.buffered_bytes = 0
        """Bytes outside the pool of transfers that are unfinished or not taken yet."""
        self._buffered: dict[int, int] = {}
        """Bytes of each unfinished transfer that are outside the pool, or will be."""
        self._making_room: asyncio.Task[None] | None = None
        self._joins, self._copies = _copies_for(device)
        self._checksums = Checksums()

    # Beginning and end.

    async def set_up(self) -> None:
        """Make the arena, fault it in, and open it over every plane that can be used."""
        if self.stream is not None:
            stream = self.stream.address or ""
            self.endpoint.hello = msgspec.structs.replace(self.endpoint.hello, stream=stream)
        memory = self.memory
        await memory.open(self._copies, self.planes)
        strict = self.settings.strict
        await self._exports.open(memory.arena, memory.staging, self.planes, strict=strict)

    async def tear_down(self) -> None:
        """Close the exports and the arena. Leases that are still held stay readable."""
        await self._exports.aclose()
        await self._checksums.aclose()
        await asyncio.gather(self._joins.aclose(), self._copies.drain())
        await self.memory.aclose(self._copies)
        await self._copies.aclose()

    def unfinished(self) -> list[int]:
        """Return all requests, and take no new one."""
        self.endpoint.is_closing = True
        return self.endpoint.numbers()

    def give_up(self, number: int, failure: Failure) -> None:
        """Fail one request, also if nobody has taken what has come."""
        self.endpoint.give_up(number, failure, self.now())

    async def drain(self) -> None:
        """Return when no sender can write into the pool any more."""
        while any(not self.endpoint.transfer(n).is_settled for n in self.endpoint.numbers()):
            await self.next_pump()

    def has_drained(self) -> bool:
        """A receiver writes into nobody's memory."""
        return True

    # Commands.

    def execute(self, command: Command) -> None:
        """Carry out one command of the receiver's."""
        match command:
            case Reserve():
                self._reserve(command)
            case Permit():
                self._permit(command)
            case Deliver():
                self._deliver(command)
            case ReserveRest():
                self._reserve_rest(command)
            case Unreserve(number):
                self.queue.cancel(number)
                self._pump_queue()
            case Quarantine(number, allocations):
                self._quarantine(number, allocations)
            case Release(number, allocations, before):
                self._release(number, allocations, before)
            case Verify(number):
                if not self._verify_at_once(command):
                    self.spawn(self._verify(command), f"verify {number}")
            case MoveOut() | Join():
                self._copy_out(command)
            case Fail(number, failure, story, request_id):
                logger.info("x request %d failed: %s: %s", number, *failure)
                self._take_joined(number)
                error = error_from(failure, story=story, is_closing=self.is_closing)
                self.results.failed(number, request_id, error)
            case CompareProbe():
                arrived = self._exports.has_arrived(command.link, command.plane, command.nonce)
                self.endpoint.probed(command.peer, command.plane, arrived)
            case Greet(peer):
                self._links[peer] = self.endpoint.sessions[peer].hello.link
            case _:
                raise AssertionError(f"not a receiver's command: {command}")

    def parted(self, command: Part) -> None:
        """Forget a sender that is gone for good."""
        link = self._links.pop(command.peer, 0)
        self._exports.forget(link)
        self._complained.discard(link)

    def _notes_received(self, link: int, notes: Sequence[bytes]) -> None:
        """Take what a plane has carried behind the bytes that it speaks of."""
        for note in notes:
            try:
                self.endpoint.note_received(link, note, self.now())
            except ProtocolError as exc:
                self.complain(link, f"a note over link {link}", exc)
            except Exception:  # a bug with one note must not cost the others
                logger.exception("! %s could not take a note over link %d", self.name, link)
        self.pump()

    # The pool.

    def _reserve(self, command: Reserve) -> None:
        number = command.number
        try:
            allocation = self.queue.request(number, command.num_tokens, claimed=command.claimed)
        except QueueFull as exc:
            self.endpoint.fail(number, Failure(Reason.BUSY, exc.message), self.now())
            return
        if command.claimed and allocation is not None:
            self.endpoint.reserved(number, allocation, False, self.now())
        self._pump_queue()

    def _reserve_rest(self, command: ReserveRest) -> None:
        behind = command.behind
        allocation = self.queue.request_whole(command.num_tokens, behind)
        if allocation is None:
            self.endpoint.refused(command.number, self.now())
            return
        extends = (
            behind is not None
            and bool(behind.extents)
            and allocation.start_offset == behind.start_offset
        )
        self.endpoint.reserved(command.number, allocation, extends, self.now())

    def _permit(self, command: Permit) -> None:
        link = self.endpoint.link_of(command.number)
        grant = GrantKey(link, command.transfer.generation, command.sequence)
        self._exports.permit(command.number, grant, command.extents)
        if logger.isEnabledFor(logging.INFO):
            blocks, extents = self.endpoint.transfer(command.number).grants[-1]
            logger.info(
                "> %s %s: block_indices=%s start_offset=%s tokens=%d",
                "resume" if command.sequence else "grant",
                command.transfer,
                list(blocks),
                extents[0].start if extents else 0,
                sum(extent.num_tokens for extent in extents),
            )

    def _quarantine(self, number: int, allocations: tuple[Allocation, ...]) -> None:
        for allocation in allocations:
            self.pool.quarantine(allocation)
        proven = self._exports.revoke(number)
        landing = self._exports.landing(number)
        blocks = [block for each in allocations for block in each.block_indices]
        logger.info("x request %d: block_indices=%s in quarantine: %s", number, blocks, not proven)
        if proven and not landing:
            self.endpoint.drained(number, self.now())
        elif proven:
            self.spawn(self._drained(number, landing), f"drain {number}")

    async def _drained(self, number: int, landing: Collection[asyncio.Future[Any]]) -> None:
        """Wait until this side's own reads into the blocks of a request have ended."""
        await asyncio.wait(landing)
        self.endpoint.drained(number, self.now())
        self.pump()

    def _release(
        self, number: int, allocations: tuple[Allocation, ...], before: int | None
    ) -> None:
        self._exports.revoke(number, before=before)
        landing = self._exports.landing(number)
        if landing:
            self.spawn(self._release_landed(landing, allocations), f"release {number}")
        else:
            self.free(allocations)

    async def _release_landed(
        self, landing: Collection[asyncio.Future[Any]], allocations: tuple[Allocation, ...]
    ) -> None:
        """Free blocks when nothing lands there any more, though the sender is done or dead."""
        await asyncio.wait(landing)
        self.free(allocations)
        self.pump()

    def free(self, allocations: tuple[Allocation, ...]) -> None:
        """Give blocks back that nobody reads and no write can reach, and serve who waits."""
        for allocation in allocations:
            self.pool.free(allocation)
        self._pump_queue()

    def take(self, delivery: Delivery) -> None:
        """Give a delivery to the user, who releases its blocks later."""
        delivery.is_taken = True
        self._count_buffered(delivery.transfer.number, 0)
        for allocation in delivery.allocations:
            self.pool.lease(allocation)

    def discard(self, delivery: Delivery) -> None:
        """Take a delivery back that nobody wants."""
        delivery.is_taken = True
        self._count_buffered(delivery.transfer.number, 0)
        self.release(delivery.allocations)

    def release(self, allocations: tuple[Allocation, ...], readers: Sequence[Mark] = ()) -> None:
        """Take blocks back from the user, as soon as all streams of `readers` are that far."""
        if readers:
            self.spawn(self._release_read(allocations, readers), "release")
        else:
            self.free(allocations)
            self.pump()

    async def _release_read(
        self, allocations: tuple[Allocation, ...], readers: Sequence[Mark]
    ) -> None:
        """Free blocks when no stream reads them any more. If CUDA fails nobody knows: never."""
        try:
            for mark in readers:
                await finished(mark)
        except GpuError as exc:
            logger.error("! blocks stay leased: %s", exc)
            return
        self.free(allocations)
        self.pump()

    def _count_buffered(self, number: int, num_tokens: int) -> None:
        if not num_tokens and number not in self._buffered:
            return
        nbytes = num_tokens * self.schema.token_nbytes
        self.buffered_bytes += nbytes - self._buffered.pop(number, 0)
        if nbytes:
            self._buffered[number] = nbytes

    def _pump_queue(self) -> None:
        if not self.queue.num_waiting:
            return
        for number, allocation in self.queue.pump():
            self.endpoint.reserved(number, allocation, False, self.now())
        self.make_room()

    # Results that nobody takes must not keep the one that somebody waits for from arriving.

    def make_room(self) -> None:
        """Move the oldest untaken result out of the pool if an awaited request needs blocks.

        Otherwise they stay: a pool full of results is how a slow reader slows senders down.
        """
        if self._making_room is not None or self.is_closing or not self.queue.num_waiting:
            return
        if not any(map(self.queue.is_waiting, self.results.awaited())):
            return
        delivery = next(filter(self._can_move, self.results.untaken()), None)
        if delivery is not None:
            number = delivery.transfer.number
            self._count_buffered(number, delivery.extent.num_tokens)
            self._making_room = self.spawn(self._move_untaken(delivery), f"move out {number}")

    def _can_move(self, delivery: Delivery) -> bool:
        nbytes = delivery.extent.num_tokens * self.schema.token_nbytes
        room = self.settings.max_buffered_bytes - self.buffered_bytes
        return bool(delivery.allocations) and nbytes <= room

    async def _move_untaken(self, delivery: Delivery) -> None:
        number = delivery.transfer.number
        joined = self.memory.joined(delivery.extent.num_tokens)
        try:
            await self._append(joined, (delivery.extent,), self._copies)
        except (Rejected, PlaneUnavailable) as exc:  # it stays, until blocks are short again
            logger.warning("! request %d stays in the pool: %s", number, exc)
            self._count_buffered(number, 0)
            self._making_room = None
            return
        self._making_room = None
        if not delivery.is_taken:
            logger.info("= request %d made room for others: nobody has taken it", number)
            allocations, delivery.allocations = delivery.allocations, ()
            delivery.joined = joined
            self.free(allocations)
        self._pump_queue()
        self.pump()

    def _verify_at_once(self, command: Verify) -> bool:
        """Compare a short chunk now, if it is in its place; False if a task has to do it."""
        number, extents, checksum = command.number, command.extents, command.checksum
        arena = self.memory.arena
        if self._exports.arena_of(command.plane) is not arena:
            return False
        matches = True
        if checksum:
            chunk = self._chunk_in(extents)
            is_short = chunk.nbytes <= AT_ONCE_NBYTES and arena.device == "cpu"
            if not is_short or not self._checksums.time.is_left():
                return False
            try:
                matches = checksum == self._checksums.at_once(chunk)
            except Exception:  # the task will meet it again, and knows what to do
                return False
        self.endpoint.verified(number, matches, self.now())
        return True

    async def _verify(self, command: Verify) -> None:
        """Bring a chunk to its place and compare it; meanwhile the request may have ended.

        What this reads of blocks that were given up does no harm; what it writes there is one of
        :meth:`Exports.landing`, so that they are nobody's before.
        """
        number, extents, checksum = command.number, command.extents, command.checksum
        try:
            await self._upload(number, extents, command.plane)
            matches = not checksum or checksum == await self._checksums.by_threads(
                self._chunk_in(extents)
            )
        except Exception as exc:  # no xxhash here, CUDA has failed, or the pool is closing
            failure = Failure(Reason.REJECTED, f"the chunk cannot be verified: {exc}")
            self.endpoint.fail(number, failure, self.now())
        else:
            self.endpoint.verified(number, matches, self.now())
        self.pump()

    def _chunk_in(self, extents: tuple[Extent, ...]) -> Chunk:
        count = sum(extent.num_tokens for extent in extents)
        digests_of = partial(digests_of_extents, self.layout, self.memory.arena, extents)
        return Chunk(self.schema, count, digests_of)

    async def _upload(self, number: int, extents: tuple[Extent, ...], plane: str) -> None:
        """Copy a chunk into the pool, if it is on a GPU and the plane does not write there."""
        source = self._exports.arena_of(plane)
        is_there = self.memory.device == "cpu" or source is self.memory.arena
        if is_there or not self.endpoint.is_live(number):
            return
        upload = partial(self.memory.upload, source, extents)
        uploading = self._copies.start([upload])
        self._exports.note_landing(number, uploading)
        await asyncio.shield(uploading)  # it is over when its thread says so

    # Copies out of the pool.

    def _copy_out(self, command: MoveOut | Join) -> None:
        number, extents, total = command.number, command.extents, command.total
        joined = self._joined.get(number)
        moved = 0 if joined is None else joined.num_tokens
        moved += sum(extent.num_tokens for extent in extents)
        self._count_buffered(number, max(moved, total or 0))
        if self.buffered_bytes > self.settings.max_buffered_bytes:
            limit = self.settings.max_buffered_bytes
            alone = self._buffered.get(number, 0) > limit
            self._cannot_buffer(command, f"over max_buffered_bytes={limit}", for_ever=alone)
            return
        if joined is None:
            joined = self._joined[number] = self.memory.joined(total)
        self.spawn(self._copy_by_threads(joined, command), f"move out {number}")

    async def _copy_by_threads(self, joined: Joined, command: MoveOut | Join) -> None:
        copies = self._joins if isinstance(command, Join) else self._copies
        try:
            await self._append(joined, command.extents, copies)
        except Exception as exc:  # whatever it is fails this request and no other
            self._cannot_buffer(command, str(exc))
        else:
            self._copied_out(command)
        self.pump()

    async def _append(self, joined: Joined, extents: tuple[Extent, ...], copies: Copies) -> None:
        """Copy tokens out of the pool, by threads that share them, or on the loop's."""
        arena = self.memory.arena
        chunk = joined.appending(self.layout, arena, extents)
        if chunk is None:
            await copies.run(partial(joined.append, self.layout, arena, extents))
        else:
            await copies.share(chunk, probes=False)

    def _cannot_buffer(self, command: MoveOut | Join, why: str, *, for_ever: bool = False) -> None:
        reason = Reason.REJECTED if for_ever else Reason.BUSY
        failure = Failure(reason, f"cannot be buffered outside the pool: {why}")
        self.endpoint.fail(command.number, failure, self.now())
        self._copied_out(command)

    def _copied_out(self, command: MoveOut | Join) -> None:
        is_last = isinstance(command, Join)
        tell = self.endpoint.joined if is_last else self.endpoint.moved_out
        tell(command.number, self.now())

    def _take_joined(self, number: int) -> Joined | None:
        self._count_buffered(number, 0)
        return self._joined.pop(number, None)

    # Results.

    def _deliver(self, command: Deliver) -> None:
        number = command.number
        transfer = self.endpoint.transfer(number)
        self._exports.revoke(number)
        kept = self._trim(command.allocations, transfer.transferred_tokens)
        joined = self._joined.pop(number, None)  # it stays counted until it is taken
        if joined is None:
            self._count_buffered(number, 0)
        delivery = Delivery(transfer, kept, command.extents, joined)
        self._pump_queue()
        self.results.ended(number, delivery)
        self.outbox.user_answered()
        self.make_room()

    def _trim(self, allocations: tuple[Allocation, ...], num_tokens: int) -> tuple[Allocation, ...]:
        """Give back the blocks behind the last token; return what is left, filled."""
        kept = []
        for allocation in allocations:
            used = min(num_tokens, allocation.num_tokens)
            num_tokens -= used
            if used < allocation.num_tokens:
                allocation = self.pool.trim(allocation, used)
            self.pool.fill(allocation)
            kept.append(allocation)
        return tuple(kept)


def _hello(name: str, layout: Layout, device: str, *, takes_any: bool) -> Hello:
    return Hello(
        "receiver",
        name,
        specs_of(layout.schema),
        pool_tokens=layout.num_tokens,
        pool_device=device,
        num_probes=layout.num_probes,
        takes_any=takes_any,
    )


def _queue_over(pool: BlockPool, max_waiting: int, num_fields: int) -> ReservationQueue:
    """The runs of a grant are listed on the loops of both sides: 1 us per field and block."""
    most = max(1, MAX_GRANT_BLOCKS // num_fields)
    return ReservationQueue(pool, max_waiting=max_waiting, max_grant_blocks=most)


def _copies_for(device: str) -> tuple[Copies, Copies]:
    """Return who joins chunks, and who does all else: meanwhile a sender may fill the pool."""
    max_threads = MAX_THREADS if device == "cpu" else 1  # a GPU needs no help
    num_threads = {"join": max_threads, "copy": max(1, min(max_threads, num_processors() // 2))}
    on_loop = LoopCopies()
    joins, others = (Copies(CopyThreads(*each), on_loop) for each in num_threads.items())
    return joins, others
