"""A sender and a receiver in a world without faults, for tests that tell one short story."""

from __future__ import annotations

from aiomm.errors import Failure, Reason
from aiomm.protocol.events import TokensReady
from aiomm.protocol.frames import Frame, Packet, encode
from aiomm.protocol.states import State
from aiomm.types import Schema

from .receiving_process import Receiving
from .sending_process import Sending
from .world import SCHEMA, Process, World

KEY = b"k" * 16
GIVEN_UP = Failure(Reason.CANCELLED, "given up")


class Pair:
    """One sender, one receiver, and what a test does with them. It steps from call to call."""

    def __init__(
        self, *, blocks: int = 8, schema: Schema = SCHEMA, takes_any: bool = False, seed: int = 0
    ) -> None:
        self.world = World(seed)
        self.sender = Sending(self.world, "sender", schema=schema)
        self.receiver = Receiving(self.world, "receiver", blocks=blocks, takes_any=takes_any)

    @property
    def now(self) -> float:
        """The time."""
        return self.world.now

    def wait(self, seconds: float = 0.5) -> None:
        """Let everything happen that happens in so many seconds."""
        self.world.run(self.now + seconds)

    def meet(self) -> None:
        """Let the sender contact the receiver, and wait until the link stands."""
        self.sender.endpoint.contact(self.sender.path_to("receiver"), self.now)
        self.sender.pump()
        self.wait()

    def expect(self, name: str = "request", *, timeout: float = 30.0) -> int:
        """Let the receiver expect a request with a ticket."""
        number = self.receiver.endpoint.expect(name, KEY, timeout, self.now)
        self.receiver.pump()
        return number

    def receive(self, name: str = "request", *, timeout: float = 30.0) -> int:
        """Let the receiver wait for a request by its bare id."""
        number = self.receiver.endpoint.receive(name, timeout, self.now)
        self.receiver.pump()
        return number

    def redeem(
        self, name: str = "request", key: bytes = KEY, *, life: int = 0, timeout: float = 30.0
    ) -> int:
        """Let the receiver ask the sender for a request."""
        path = self.receiver.path_to("sender")
        number = self.receiver.endpoint.redeem(
            name, key, path=path, life=life, timeout=timeout, now=self.now
        )
        self.receiver.pump()
        return number

    def open(
        self,
        name: str = "request",
        *,
        tokens: int | None = 10,
        key: bytes = b"",
        life: int = 0,
        timeout: float = 30.0,
        to: str | None = "receiver",
    ) -> int:
        """Let the sender open a transfer; None tokens: they are not ready yet."""
        sender = self.sender
        core = sender.endpoint.open(
            name,
            timeout=timeout,
            now=self.now,
            path=None if to is None else sender.path_to(to),
            life=life,
            key=key,
            ready=None if tokens is None else TokensReady(tokens, tokens, b"meta"),
        )
        generation = core.id.generation
        sender.opened[generation] = core
        sender.totals[generation] = tokens or 0
        sender.pump()
        return generation

    def claim(
        self, name: str = "request", *, tokens: int | None = 10, timeout: float = 30.0
    ) -> int:
        """Let the sender claim a ticket of the receiver's."""
        life = self.receiver.epoch
        return self.open(name, tokens=tokens, key=KEY, life=life, timeout=timeout)

    def ready(self, generation: int, available: int, total: int | None) -> None:
        """Let tokens become ready."""
        event = TokensReady(available, total)
        self.sender.endpoint.tokens_ready(generation, event, self.now)
        self.sender.pump()

    def offer(self, name: str = "request", *, tokens: int = 10, timeout: float = 30.0) -> None:
        """Let the sender offer a request."""
        self.sender.endpoint.offer(name, KEY, tokens, b"meta", timeout)
        self.sender.offered[name] = tokens

    def give_up(self, process: Process, number: int) -> None:
        """Let one side give up a transfer or a request."""
        assert isinstance(process, Sending | Receiving)
        process.endpoint.fail(number, GIVEN_UP, self.now)
        process.pump()

    def inject(self, source: Process, frame: Frame, *, to: Process, sequence: int = 0) -> None:
        """Let a packet arrive as if `source` had sent it, at once."""
        self.inject_packet(Packet(1, source.epoch, to.epoch, sequence, 0, frame), source, to)

    def inject_packet(self, packet: Packet, source: Process, to: Process) -> None:
        """Let any packet arrive at once."""
        to.packets_received(source.address, encode(packet))

    def state(self, generation: int) -> State:
        """Return the state of a transfer at the sender."""
        return self.sender.opened[generation].state

    def check_settled(self) -> None:
        """Check that nothing is left on either side."""
        self.world.run()
        for process in self.world.at_address.values():
            if isinstance(process, Receiving):
                assert process.endpoint.numbers() == []
                assert process.pool.num_free == process.pool.capacity
                assert process.queue.num_waiting == process.queue.num_held == 0
            elif isinstance(process, Sending):
                assert process.endpoint.num_live == 0


def reason(process: Process, number: int) -> Reason | None:
    """Return how a request ended: None is success."""
    failure = process.outcomes[number]
    return None if failure is None else failure.reason


def message(process: Process, number: int) -> str:
    """Return what a user reads of a failure."""
    failure = process.outcomes[number]
    assert failure is not None
    return failure.message
