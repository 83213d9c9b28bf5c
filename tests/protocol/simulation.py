"""One seeded story: senders, receivers and users in trouble, then peace, then the accounts.

For `FAULTS_END` seconds the network loses, repeats, delays and reorders, processes crash, pause and
begin new lives, users change their minds. Then all of that stops and everything has to settle.
In a calm story only the network repeats and delays; there every single wish has to come true.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from aiomm.errors import Failure, Reason, Rejected
from aiomm.protocol.events import TokensReady

from .receiving_process import Receiving
from .sending_process import Sending
from .world import Faults, Process, Token, Violation, World

FAULTS_END = 6.0
DETECTION = 0.05
"""Within so many seconds everybody knows that a process has died."""
SLACK = 0.5
"""A request that has a living process behind it ends this long after its deadline."""
KEY = b"k" * 16


@dataclass
class Wish:
    """What a user asked one process for."""

    process: Process
    number: int
    deadline: float


@dataclass
class Simulation:
    """Runs the story of one seed.

    Raises:
        Violation: a rule was broken; `str` names the seed.
    """

    seed: int
    wishes: list[Wish] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.world = World(self.seed)
        self.chance = self.world.random
        self.sender_addresses = [f"sender{n}" for n in range(self.chance.randint(1, 3))]
        self.receiver_addresses = [f"receiver{n}" for n in range(self.chance.choice([1, 1, 2]))]
        self.is_calm = self.chance.random() < 0.3
        self.blocks = self.chance.choice([1, 2, 3, 5, 8, 20])
        self.revokes = self.chance.random() < 0.15
        self.holds_leases_for = self.chance.choice([0.0, 0.2, 2.0])
        self.max_waiting = 1000 if self.is_calm else self.chance.choice([1, 3, 1000, 1000])
        self.world.faults = Faults(
            loss=0.0 if self.is_calm else self.chance.choice([0.0, 0.05, 0.3]),
            duplication=self.chance.choice([0.0, 0.1, 0.3]),
            longest_delay=self.chance.choice([0.002, 0.1, 1.0, 1.0 if self.is_calm else 6.0]),
            longest_unread=self.chance.choice([0.0, 0.002, 0.1]),
            write_failure=0.0 if self.is_calm else self.chance.choice([0.0, 0.0, 0.1]),
        )
        self.names = 0

    def run(self) -> int:
        """Run it all; return how many actions happened."""
        try:
            self._run()
        except Violation as exc:
            raise Violation(f"seed {self.seed}: {exc}") from exc
        return self.world.actions

    def _run(self) -> None:
        for address in self.receiver_addresses:
            self.new_receiver(address)
        for address in self.sender_addresses:
            self.new_sender(address)
        rush = self.chance.choice([0.1, FAULTS_END])
        for _ in range(self.chance.randint(1, 6)):
            self.world.after(self.chance.random() * rush, self.wish)
        if not self.is_calm and self.chance.random() < 0.9:
            for _ in range(self.chance.randint(1, 4)):
                self.world.after(self.chance.random() * FAULTS_END, self.trouble)
        self.world.run(FAULTS_END)
        self.make_peace()
        self.world.run()
        self.check_settled()

    # Who there is.

    def new_receiver(self, address: str) -> Receiving:
        """Begin a life of a receiver."""
        return Receiving(
            self.world,
            address,
            blocks=self.blocks,
            max_waiting=self.max_waiting,
            max_peers=64 if self.is_calm else self.chance.choice([1, 2, 64, 64]),
            revokes=self.revokes,
            holds_leases_for=self.holds_leases_for,
            is_forgetful=not self.is_calm,
            takes_any=not self.is_calm and self.chance.random() < 0.3,
        )

    def new_sender(self, address: str) -> Sending:
        """Begin a life of a sender."""
        return Sending(self.world, address)

    def receiver(self) -> Receiving | None:
        """Return a receiver that lives now."""
        process = self.world.at_address.get(self.chance.choice(self.receiver_addresses))
        is_open = isinstance(process, Receiving) and not process.is_closing
        return process if isinstance(process, Receiving) and is_open else None

    def sender(self) -> Sending | None:
        """Return a sender that lives now."""
        process = self.world.at_address.get(self.chance.choice(self.sender_addresses))
        return process if isinstance(process, Sending) else None

    # What users do.

    def wish(self) -> None:
        """Let users ask for one transfer, in one of the ways there are."""
        sender, receiver = self.sender(), self.receiver()
        if sender is None or receiver is None:
            return
        self.names += 1
        is_unique = self.is_calm or self.chance.random() < 0.8
        name = f"request{self.names}" if is_unique else "same"
        ways = [self.by_ticket, self.unasked, self.by_offer, self.asked_by_name]
        if not self.is_calm:  # the result could be taken before it is asked for
            ways.append(self.by_name)
        self.chance.choice(ways)(name, sender, receiver)

    def by_ticket(self, name: str, sender: Sending, receiver: Receiving) -> None:
        """The receiver expects it, and the ticket reaches a sender."""
        timeout = self.timeout()
        self.ask(receiver, timeout, lambda: receiver.endpoint.expect(name, KEY, timeout, self.now))
        for _ in range(self.chance.choice([1, 1, 1, 1 if self.is_calm else 2])):
            self.open(name, sender, receiver, life=receiver.epoch, key=KEY)

    def unasked(self, name: str, sender: Sending, receiver: Receiving) -> None:
        """The sender knows where the receiver is, and the receiver takes what comes."""
        self.open(name, sender, receiver)

    def by_name(self, name: str, sender: Sending, receiver: Receiving) -> None:
        """Both sides know the request id; the sender also where to."""
        timeout = self.timeout()
        self.ask(receiver, timeout, lambda: receiver.endpoint.receive(name, timeout, self.now))
        self.open(name, sender, receiver)

    def by_offer(self, name: str, sender: Sending, receiver: Receiving) -> None:
        """The sender offers it, and receivers redeem the ticket, some more than once."""
        total = self.tokens()

        def offer() -> None:
            sender.endpoint.withdraw(name)
            sender.endpoint.offer(name, KEY, total, b"meta", self.timeout())
            sender.offered[name] = total

        sender.later(0.0, offer)
        for _ in range(self.chance.choice([1, 1, 3])):
            self.redeem(name, receiver, sender, KEY, life=sender.epoch)
        if self.is_fickle(0.2):
            sender.later(self.chance.random(), lambda: sender.endpoint.withdraw(name))

    def asked_by_name(self, name: str, sender: Sending, receiver: Receiving) -> None:
        """The receiver asks the sender for it by its bare id; either may be first."""
        self.redeem(name, receiver, sender, b"", life=0)
        self.open(name, sender, None)

    def redeem(
        self, name: str, receiver: Receiving, sender: Sending, key: bytes, *, life: int
    ) -> None:
        """Let a receiver ask a sender for a request."""
        timeout = self.timeout()
        path = receiver.path_to(sender.address)
        self.ask(
            receiver,
            timeout,
            lambda: receiver.endpoint.redeem(
                name, key, path=path, life=life, timeout=timeout, now=self.now
            ),
        )

    def ask(self, receiver: Receiving, timeout: float, request: Callable[[], int]) -> None:
        """Make a request at a receiver some time soon, and perhaps give it up later."""

        def act() -> None:
            known = receiver.endpoint.numbers()
            try:
                number = request()
            except Rejected:
                return
            if number not in known:  # who asks for what exists waits for its deadline
                self.wishes.append(Wish(receiver, number, self.now + timeout))
            if self.is_fickle(0.15):
                failure = Failure(Reason.CANCELLED, "the receiver's user changed her mind")
                receiver.later(
                    self.chance.random() * 0.5,
                    lambda: receiver.endpoint.fail(number, failure, self.now),
                )

        receiver.later(0.0 if self.is_calm else self.chance.random() * 0.2, act)

    def open(
        self,
        name: str,
        sender: Sending,
        receiver: Receiving | None,
        *,
        life: int = 0,
        key: bytes = b"",
    ) -> None:
        """Open a transfer at a sender some time soon, and perhaps give it up later."""
        timeout, total = self.timeout(), self.tokens()
        path = None if receiver is None else sender.path_to(receiver.address)
        is_known = self.chance.random() < 0.3

        def act() -> None:
            ready = TokensReady(total, total, b"meta") if is_known else None
            core = sender.endpoint.open(
                name, timeout=timeout, now=self.now, path=path, life=life, key=key, ready=ready
            )
            generation = core.id.generation
            sender.opened[generation], sender.totals[generation] = core, total
            self.wishes.append(Wish(sender, generation, self.now + timeout))
            if not is_known:
                self.encode(sender, generation, total)
            if self.is_fickle(0.15):
                failure = Failure(Reason.CANCELLED, "the encoder raised")
                sender.later(
                    self.chance.random() * 0.5,
                    lambda: sender.endpoint.fail(generation, failure, self.now),
                )

        sender.later(self.chance.random() * 0.2, act)

    def encode(self, sender: Sending, generation: int, total: int) -> None:
        """Let tokens become ready: all at once, or as a stream that learns its length last."""
        at = self.chance.random() * 0.2
        if self.chance.random() < 0.4:
            for available in sorted(self.chance.randint(0, total) for _ in range(3)):
                self.ready(sender, generation, at, TokensReady(available, None))
                at += self.chance.random() * 0.2
            if self.chance.random() < 0.5:
                self.ready(sender, generation, at, TokensReady(total, None))
                at += self.chance.random() * 0.2
        self.ready(sender, generation, at, TokensReady(total, total, b"meta"))

    def ready(self, sender: Sending, generation: int, at: float, event: TokensReady) -> None:
        """Let tokens become ready after `at`."""
        sender.later(at, lambda: sender.endpoint.tokens_ready(generation, event, self.now))

    @property
    def now(self) -> float:
        return self.world.now

    def tokens(self) -> int:
        """Choose a length; borders of blocks, grants and pools more often than by chance."""
        return self.chance.choice([0, 1, 4, 7, 8, 9, 16, 20, 33, 60])

    def is_fickle(self, probability: float) -> bool:
        """Choose whether a user changes her mind."""
        return not self.is_calm and self.chance.random() < probability

    def timeout(self) -> float:
        """Choose how long somebody waits."""
        return 60.0 if self.is_calm else self.chance.choice([0.3, 3.0, 20.0, 20.0])

    # What goes wrong.

    def trouble(self) -> None:
        """Let one bad thing happen."""
        addresses = self.sender_addresses + self.receiver_addresses
        process = self.world.at_address.get(self.chance.choice(addresses))
        if process is None:
            return
        happenings = [self.restart, self.restart, self.stop, self.stop, self.cut, self.close]
        self.chance.choice(happenings)(process)

    def restart(self, process: Process) -> None:
        """Kill a process; soon after, another life begins at its address."""
        process.crash()
        self.mourn(process)

    def close(self, process: Process) -> None:
        """Close a process in good order, as far as it gets; another life begins soon after."""
        process.when_closed = lambda: self.mourn(process)
        process.later(0.0, process.close)

    def mourn(self, process: Process) -> None:
        """Let another life begin at the address of a dead process, and everybody learn of it."""
        self.world.after(self.chance.random(), lambda: self.begin_again(process))
        for other in self.world.processes:
            self.notice(other, process)

    def begin_again(self, process: Process) -> None:
        """Begin another life at the address of a dead process."""
        if isinstance(process, Sending):
            self.new_sender(process.address)
        else:
            self.new_receiver(process.address)

    def notice(self, other: Process, dead: Process) -> None:
        """Let a process learn that another is dead for certain."""
        delay = self.chance.random() * DETECTION
        other.later(delay, lambda: other.endpoint.peer_died(dead.epoch, self.now))
        other.later(delay, lambda: other.check_abandoned(dead.epoch))

    def stop(self, process: Process) -> None:
        """SIGSTOP, and SIGCONT some time later."""
        process.pause(self.chance.choice([0.1, 1.0, 10.0]))

    def cut(self, process: Process) -> None:
        """Let one side believe that its way to another is broken."""
        other = self.chance.choice(self.sender_addresses + self.receiver_addresses)
        process.later(
            0.0,
            lambda: process.endpoint.path_lost(process.path_to(other), "cut", self.now),
        )

    def make_peace(self) -> None:
        """End all faults. Everybody lives and can be reached, or is known to be dead."""
        self.world.faults = Faults()
        for process in list(self.world.at_address.values()):
            if isinstance(process, Sending):
                for address in self.receiver_addresses:
                    self.reach(process, address)

    def reach(self, sender: Sending, address: str) -> None:
        """Let a sender say Hello (again) to whoever is at `address`."""
        sender.later(0.0, lambda: sender.endpoint.contact(sender.path_to(address), self.now))

    # The accounts.

    def check_settled(self) -> None:
        """What holds when nothing happens any more."""
        for wish in self.wishes:
            self.check_outcome(wish)
        for process in self.world.processes:
            if isinstance(process, Receiving):
                self.check_delivered(process)
                if process.is_alive:
                    self.check_receiver_settled(process)
            elif isinstance(process, Sending):
                self.check_finished(process)
                if process.is_alive and process.endpoint.num_live:
                    raise Violation(f"{process.address} has transfers that are not settled")

    def check_receiver_settled(self, receiver: Receiving) -> None:
        """Every block is free, nobody waits, and no request is left."""
        if receiver.pool.num_free != receiver.pool.capacity or receiver.owner or receiver.writable:
            raise Violation(f"{receiver.address} keeps blocks: {receiver.pool} {receiver.owner}")
        if receiver.queue.num_waiting or receiver.queue.num_held:
            raise Violation(f"{receiver.address}: somebody waits still: {receiver.queue}")
        if receiver.endpoint.numbers():
            raise Violation(f"{receiver.address} has open requests: {receiver.endpoint.numbers()}")

    def check_delivered(self, receiver: Receiving) -> None:
        """What was delivered is what was sent, token by token, and once."""
        writers = [each.writer for each in receiver.delivered.values()]
        if len(set(writers)) < len(writers):
            raise Violation(f"delivered twice: {writers}")
        for writer, content in (
            (each.writer, each.content) for each in receiver.delivered.values()
        ):
            sender = self.life(writer.epoch)
            assert isinstance(sender, Sending)
            total = sender.totals[writer.transfer.generation]
            if content != [Token(writer, index) for index in range(total)]:
                raise Violation(f"{writer} of {total} tokens was delivered as {content}")

    def check_finished(self, sender: Sending) -> None:
        """What the sender's user believes to have arrived was delivered."""
        delivered = {
            each.writer
            for process in self.world.processes
            if isinstance(process, Receiving)
            for each in process.delivered.values()
        }
        for generation, failure in sender.outcomes.items():
            arrived = any(
                w.epoch == sender.epoch and w.transfer.generation == generation for w in delivered
            )
            if failure is None and not arrived:
                raise Violation(f"{sender.address}: {generation} is done, but nobody received it")

    def life(self, epoch: int) -> Process:
        """Return the process with that epoch, alive or not."""
        return next(each for each in self.world.processes if each.epoch == epoch)

    def check_outcome(self, wish: Wish) -> None:
        """Every wish of a living process has come to an end, and in time."""
        process = wish.process
        if not process.is_alive:
            return
        if wish.number not in process.outcomes:
            raise Violation(f"{process.address}: {wish.number} has no outcome")
        failure = process.outcomes[wish.number]
        if self.is_calm and failure is not None:
            raise Violation(f"{process.address}: {wish.number} failed without need: {failure}")
        late = process.ended_at[wish.number] - wish.deadline
        if late > SLACK and not process.was_paused:
            raise Violation(f"{process.address}: {wish.number} ended {late:.1f} s too late")
