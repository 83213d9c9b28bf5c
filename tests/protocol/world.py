"""A world in virtual time: processes with endpoints, memory that can be overwritten, and faults.

It plays the driver, the planes and the users. One thread, no real clock: every action stands in
one queue, and a seed tells the whole story. A process can crash (nothing of it happens any more)
or pause (everything of it happens later, its writes too). The rules that must always hold are
checked where memory and blocks change hands, and after every action.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from aiomm.errors import Failure, Reason
from aiomm.protocol import commands as do
from aiomm.protocol.endpoint import Endpoint
from aiomm.protocol.session import NEVER, Path, Timing
from aiomm.types import Field, Schema, TransferId

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
    position: int


def checksum_of(tokens: Sequence[Token | None]) -> bytes:
    """Return a checksum that tells every wrong, missing or misplaced token."""
    first = tokens[0]
    if first is None or any(
        token != first._replace(position=first.position + index)
        for index, token in enumerate(tokens)
    ):
        return b"wrong"
    return f"{first.position}+{len(tokens)}".encode()


@dataclass
class Faults:
    """What goes wrong while the faults last."""

    loss: float = 0.0
    duplication: float = 0.0
    longest_delay: float = 0.005
    longest_unread: float = 0.0
    """Until a side reads what has come, all of it together."""
    write_failure: float = 0.0


class World:
    """The clock, the network, and everybody in it."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.faults = Faults()
        self.at_address: dict[str, Process] = {}
        self.processes: list[Process] = []
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
            process.packet_arrived(source, packet)


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
        self.is_closing = False
        self.when_closed: Action = lambda: None
        self.outcomes: dict[int, Failure | None] = {}
        """By number or generation: None is success. One outcome each."""
        self.greeted: list[int] = []
        self.parted: list[do.Part] = []
        self.left: list[Path] = []
        self.ended_at: dict[int, float] = {}
        self._unread: dict[str, list[bytes]] = {}
        self._timer_at: float | None = None
        self._progress: dict[int, int] = {}
        world.at_address[address] = self
        world.processes.append(self)

    def path_to(self, address: str) -> Path:
        """Return this side's name for the way to `address`."""
        return Path(0, "network", address)

    def packet_arrived(self, source: str, packet: bytes) -> None:
        """Keep a packet until this side looks, which takes all from there that have come."""
        unread = self._unread.setdefault(source, [])
        unread.append(packet)
        if len(unread) == 1:
            longest = self.world.faults.longest_unread
            delay = self.world.random.uniform(0.0, longest) if longest else 0.0
            self.world.after(
                delay, lambda: self.packets_received(source, *self._unread.pop(source)), self
            )

    def packets_received(self, source: str, *packets: bytes) -> None:
        """Take packets that have come together, as the real driver does."""
        for packet in packets:
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

    def close(self) -> None:
        """Give everything up; say goodbye when no write can land any more, and only then."""
        failure = Failure(Reason.CLOSED, f"{self.address} was closed")
        self.is_closing = True
        self.abandon(failure)
        self.pump()

    def _close_if_settled(self) -> None:
        if self.is_closing and self.is_alive and self.is_settled():
            self.endpoint.say_goodbye(Failure(Reason.CLOSED, f"{self.address} was closed"))
            for command in self.endpoint.commands(self.world.now):
                self._carry_out(command)
            self.crash()
            self.when_closed()

    def abandon(self, failure: Failure) -> None:
        """Fail everything that is not done."""
        raise NotImplementedError

    def is_settled(self) -> bool:
        """Tell whether no write runs or can land any more."""
        raise NotImplementedError

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
        self.check()
        at = self.endpoint.next_deadline()
        if at < NEVER and (self._timer_at is None or at < self._timer_at):
            self._timer_at = at
            self.world.after(max(0.0, at - self.world.now), lambda: self._timer(at), self)
        self._close_if_settled()

    def _timer(self, at: float) -> None:
        if self._timer_at == at:
            self._timer_at = None
            self.endpoint.timer(self.world.now)
            self.pump()

    def _carry_out(self, command: do.Command) -> None:
        match command:
            case do.Transmit(Path(_, _, str() as address), packet):
                self.world.send(self.address, address, packet)
            case do.Greet(peer, _):
                self.greeted.append(peer)
            case do.Part():
                self.parted.append(command)
            case do.Leave(path):
                self.left.append(path)
            case _:
                self.execute(command)

    def execute(self, command: do.Command) -> None:
        """Carry out one command of this kind of process."""
        raise NotImplementedError

    def check(self) -> None:
        """Check what holds for this kind of process after every action."""
        endpoint = self.endpoint
        found = {(path, each) for path, at in endpoint._at_path.items() for each in at}
        real = {(path, each) for each in endpoint.sessions.values() for path in each.paths}
        if found != real:
            raise Violation(f"{self.address}: the sessions at each path are {real}, not {found}")

    def check_abandoned(self, peer: int) -> None:
        """Check that nothing goes on with a peer that is known to be dead."""

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
