"""A world in virtual time: processes with endpoints, memory that can be overwritten, and faults.

It plays the driver, the planes and the users. One thread, no real clock: every action stands in
one queue, and a seed tells the whole story. A process can crash (nothing of it happens any more)
or pause (everything of it happens later, its writes too). The rules that must always hold are
checked where memory and blocks change hands, and after every action.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from aiomm.buffers.pool import BlockPool, BlockState
from aiomm.buffers.queue import QueueFull, ReservationQueue
from aiomm.errors import Failure, Reason
from aiomm.protocol import commands as do
from aiomm.protocol.endpoint import Endpoint
from aiomm.protocol.frames import Hello, specs_of
from aiomm.protocol.receiving import ReceiveEndpoint
from aiomm.protocol.sending import SendEndpoint
from aiomm.protocol.session import Path, Timing
from aiomm.protocol.states import State
from aiomm.protocol.transfer import SendTransfer
from aiomm.types import Allocation, Extent, Field, Schema, TransferId

SCHEMA = Schema(embeddings=Field("bfloat16", 8))
OTHER_SCHEMA = Schema(embeddings=Field("float32", 8))
BLOCK_SIZE = 4
DEFAULT_TOKENS = 2 * BLOCK_SIZE
TIMING = Timing(peer_timeout=4.0)

Action = Callable[[], None]


class Writer(NamedTuple):
    """Who writes: a transfer of one life of a sender."""

    epoch: int
    transfer: TransferId


class Violation(AssertionError):
    """A rule of the protocol was broken."""


class Token(NamedTuple):
    """What one token of a sender's tensors looks like in memory."""

    writer: Writer
    index: int


@dataclass
class Faults:
    """What goes wrong while the faults last."""

    loss: float = 0.0
    duplication: float = 0.0
    longest_delay: float = 0.005
    write_failure: float = 0.0


class World:
    """The clock, the network, and everybody in it."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.faults = Faults()
        self.at_address: dict[str, Process] = {}
        self.processes: list[Process] = []
        self.check_after_each_action: Action = lambda: None
        self.actions = 0
        self._queue: list[tuple[float, int, Process | None, Action]] = []
        self._order = 0
        self._epoch = 0

    def new_epoch(self) -> int:
        """Return the number of a new life."""
        self._epoch += 1
        return self._epoch

    def after(self, delay: float, action: Action, process: Process | None = None) -> None:
        """Let `action` happen after `delay`; as one of `process`, only if it lives and runs."""
        self._order += 1
        heapq.heappush(self._queue, (self.now + delay, self._order, process, action))

    def run(self, until: float = float("inf"), *, most_actions: int = 100_000) -> None:
        """Let everything happen that is due; raise Violation if it never ends."""
        while self._queue and self._queue[0][0] <= until:
            at, _, process, action = heapq.heappop(self._queue)
            self.now = max(self.now, at)
            if process is not None and not process.is_alive:
                continue
            if process is not None and self.now < process.paused_until:
                self.after(process.paused_until - self.now, action, process)
                continue
            action()
            self.check_after_each_action()
            self.actions += 1
            if self.actions > most_actions:
                raise Violation(f"no end after {most_actions} actions, at {self.now:.1f} s")
        if until < float("inf"):
            self.now = max(self.now, until)

    def send(self, source: str, target: str, packet: bytes) -> None:
        """Carry a packet, perhaps; perhaps twice, and late."""
        copies = 1 + (self.random.random() < self.faults.duplication)
        for _ in range(copies):
            if self.random.random() >= self.faults.loss:
                delay = self.random.random() ** 3 * self.faults.longest_delay
                self.after(delay, lambda: self._arrive(source, target, packet))

    def _arrive(self, source: str, target: str, packet: bytes) -> None:
        process = self.at_address.get(target)
        if process is not None:
            self.after(0.0, lambda: process.packet_received(source, packet), process)


class Process:
    """One life of one side at an address: drives its endpoint as the real driver does."""

    endpoint: Endpoint

    def __init__(self, world: World, address: str) -> None:
        self.world = world
        self.address = address
        self.epoch = world.new_epoch()
        self.is_alive = True
        self.paused_until = 0.0
        self.was_paused = False
        self.outcomes: dict[int, Failure | None] = {}
        """By number or generation: None is success. One outcome each."""
        self.ended_at: dict[int, float] = {}
        self._timer_at: float | None = None
        self._progress: dict[int, int] = {}
        world.at_address[address] = self
        world.processes.append(self)

    def path_to(self, address: str) -> Path:
        """Return this side's name for the way to `address`."""
        return Path(0, "network", address)

    def packet_received(self, source: str, packet: bytes) -> None:
        """Take a packet from the network."""
        self.endpoint.packet_received(self.path_to(source), packet, self.world.now)
        self.pump()

    def crash(self) -> None:
        """End this life without a word."""
        self.is_alive = False
        if self.world.at_address.get(self.address) is self:
            del self.world.at_address[self.address]

    def pause(self, seconds: float) -> None:
        """Stop everything of this process, its running writes too, for a while."""
        self.paused_until = self.world.now + seconds
        self.was_paused = True

    def later(self, delay: float, action: Action) -> None:
        """Let `action` of this process happen, then drain the endpoint."""

        def act_and_pump() -> None:
            action()
            self.pump()

        self.world.after(delay, act_and_pump, self)

    def pump(self) -> None:
        """Execute what the endpoint wants, and arm the timer."""
        while batch := self.endpoint.commands(self.world.now):
            for command in batch:
                self._carry_out(command)
        at = self.endpoint.next_deadline()
        if at is not None and (self._timer_at is None or at < self._timer_at):
            self._timer_at = at
            self.world.after(max(0.0, at - self.world.now), lambda: self._timer(at), self)

    def _timer(self, at: float) -> None:
        if self._timer_at == at:
            self._timer_at = None
            self.endpoint.timer(self.world.now)
            self.pump()

    def _carry_out(self, command: do.Command) -> None:
        match command:
            case do.Transmit(Path(_, _, str() as address), packet):
                self.world.send(self.address, address, packet)
            case do.Greet() | do.Part():
                pass
            case _:
                self.execute(command)

    def execute(self, command: do.Command) -> None:
        """Carry out one command of this kind of process."""
        raise NotImplementedError

    def check(self) -> None:
        """What holds for this kind of process after every action."""

    def end(self, number: int, failure: Failure | None) -> None:
        """Note the one outcome of a request."""
        if number in self.outcomes:
            raise Violation(f"{self.address}: two outcomes of {number}: {self.outcomes[number]}")
        self.outcomes[number] = failure
        self.ended_at[number] = self.world.now

    def check_progress(self, number: int, transferred: int) -> None:
        """`transferred_tokens` only grows."""
        if transferred < self._progress.get(number, 0):
            raise Violation(f"{self.address}: {number} went back to {transferred} tokens")
        self._progress[number] = transferred


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
        revokes: bool = False,
        holds_leases_for: float = 0.0,
        takes_any: bool = False,
    ) -> None:
        super().__init__(world, address)
        self.pool = BlockPool(blocks, BLOCK_SIZE)
        self.queue = ReservationQueue(self.pool, max_waiting=max_waiting)
        self.cells: list[Token | None] = [None] * (blocks * BLOCK_SIZE)
        self.revokes = revokes
        self.holds_leases_for = holds_leases_for
        self.delivered: dict[int, Delivered] = {}
        self.owner: dict[int, int] = {}
        """Block -> number of the request that owns it; soft holds have no owner."""
        self.writable: dict[int, Writer] = {}
        """Block -> the one transfer that may write it, or may still have a write running."""
        self.revoked: set[Writer] = set()
        self._writers: dict[int, Writer] = {}
        self._copies: dict[int, list[Token | None]] = {}
        self.endpoint = ReceiveEndpoint(
            self.epoch,
            SCHEMA,
            Hello("receiver", address, specs_of(SCHEMA), takes_any=takes_any),
            default_tokens=DEFAULT_TOKENS,
            default_timeout=10.0,
            timing=TIMING,
            max_peers=max_peers,
            max_tokens=1000,
        )

    def land(self, position: int, token: Token) -> None:
        """A written token arrives in memory; it must be allowed to, however late."""
        if token.writer in self.revoked:
            return  # the plane has shut the door
        if self.is_alive and self.writable.get(position // BLOCK_SIZE) != token.writer:
            raise Violation(f"{token.writer} wrote token {position}, which is not its own")
        self.cells[position] = token

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
            case do.MoveOut(number, extents, _):
                self._copy(number, extents, self.endpoint.moved_out)
            case do.Join(number, extents, _):
                self._copy(number, extents, self.endpoint.joined)
            case do.Deliver(number, allocations, extents):
                self._deliver(number, allocations, extents)
            case do.Fail(number, failure):
                self.end(number, failure)
                self.endpoint.taken(number)
            case do.CompareProbe(peer, _, plane, _):
                self.endpoint.probed(peer, plane, matched=True)
            case _:
                raise Violation(f"not a receiver's command: {command}")

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
            if self.owner.pop(block, None) != number:
                raise Violation(f"{number} gave back block {block}, which is not its own")
            self.writable.pop(block, None)

    def _copy(
        self, number: int, extents: tuple[Extent, ...], done: Callable[[int, float], None]
    ) -> None:
        def finish() -> None:  # read as late as possible: nobody may have touched the blocks
            self._copies[number] = self._copies.get(number, []) + self._read(extents)
            done(number, self.world.now)

        self.later(self.world.random.random() * 0.01, finish)

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
        self.endpoint.taken(number)
        lease = Lease(number, kept, extents, content)
        hold = self.world.random.random() * self.holds_leases_for
        self.later(hold, lambda: self._end_lease(lease))
        self._pump_queue()

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

    def check(self) -> None:
        """Every block has one owner, and all are accounted for."""
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


class Sending(Process):
    """A sender whose writes land token by token, some time later."""

    endpoint: SendEndpoint

    def __init__(self, world: World, address: str, *, schema: Schema = SCHEMA) -> None:
        super().__init__(world, address)
        self.opened: dict[int, SendTransfer] = {}
        self.totals: dict[int, int] = {}
        """Tokens of each transfer, by generation."""
        self.offered: dict[str, int] = {}
        """Tokens of each offer."""
        self._writing: set[int] = set()
        """Generations with a running write. Never two at once."""
        self.endpoint = SendEndpoint(
            self.epoch, schema, Hello("sender", address, specs_of(schema)), timing=TIMING
        )

    def execute(self, command: do.Command) -> None:
        match command:
            case do.Write(transfer, _, start, extents):
                self._write(transfer, start, extents)
            case do.Quiesce(transfer):
                generation = transfer.generation
                delay = 0.06 + self.world.random.random() * 0.1
                self.later(delay, lambda: self.endpoint.drained(generation, self.world.now))
            case do.Finish(transfer):
                self.end(transfer.generation, None)
            case do.Fail(generation, failure):
                self.end(generation, failure)
            case do.Serve(transfer):
                self.totals[transfer.generation] = self.offered[transfer.request_id]
            case do.ProbeResult() | do.Tell():
                pass
            case _:
                raise Violation(f"not a sender's command: {command}")

    def _write(self, transfer: TransferId, start: int, extents: tuple[Extent, ...]) -> None:
        generation, chance = transfer.generation, self.world.random
        if generation in self._writing:
            raise Violation(f"{transfer} has two writes at once")
        self._writing.add(generation)
        positions = [position for extent in extents for position in range(*extent)]
        target = self._memory_of(generation)
        seconds = chance.choice([0.0, 0.001, 0.05])
        for index, position in enumerate(positions):
            token = Token(Writer(self.epoch, transfer), start + index)
            delay = seconds * (index + 1) / len(positions)
            self._land_after(delay, target, position, token)
        if chance.random() < self.world.faults.write_failure:
            failure = Failure(Reason.PLANE, "the plane broke")
            self.later(
                seconds * chance.random(),
                lambda: self._written(generation, failure),
            )
        else:
            self.later(seconds, lambda: self._written(generation, None))

    def _memory_of(self, generation: int) -> Receiving | None:
        peer = self.endpoint.peer_of(generation)
        for process in self.world.processes:
            if process.epoch == peer and isinstance(process, Receiving):
                return process
        return None

    def _land_after(
        self, delay: float, target: Receiving | None, position: int, token: Token
    ) -> None:
        if target is not None:
            self.world.after(delay, lambda: target.land(position, token), self)

    def check(self) -> None:
        """What has been transferred only grows."""
        for generation, core in self.opened.items():
            self.check_progress(generation, core.transferred_tokens)

    def _written(self, generation: int, failure: Failure | None) -> None:
        self._writing.discard(generation)
        if failure is None:
            self.endpoint.write_finished(generation, self.world.now)
        else:
            self.endpoint.write_failed(generation, failure, self.world.now)
