"""A sender in virtual time: its writes land token by token, some time later, or fail."""

from __future__ import annotations

from aiomm.errors import Failure, Reason
from aiomm.protocol import commands as do
from aiomm.protocol.frames import Hello, specs_of
from aiomm.protocol.send_transfer import SendTransfer
from aiomm.protocol.sending import SendEndpoint
from aiomm.types import Extent, Schema, TransferId

from .receiving_process import Receiving
from .world import SCHEMA, TIMING, Process, Token, Violation, World, Writer


class Sending(Process):
    """A sender whose writes land token by token, some time later."""

    endpoint: SendEndpoint

    def __init__(
        self,
        world: World,
        address: str,
        *,
        schema: Schema = SCHEMA,
        max_peers: int = 64,
        max_waiting: int = 1000,
    ) -> None:
        super().__init__(world, address)
        self.opened: dict[int, SendTransfer] = {}
        self.totals: dict[int, int] = {}
        """Tokens of each transfer, by generation."""
        self.offered: dict[str, int] = {}
        """Tokens of each offer."""
        self._writing: set[int] = set()
        """Generations with a running write. Never two at once."""
        self.notes = 0.5
        """How often the plane carries a note."""
        self.probed: list[do.ProbeResult] = []
        self.endpoint = SendEndpoint(
            self.epoch,
            schema,
            Hello("sender", address, specs_of(schema)),
            timing=TIMING,
            max_peers=max_peers,
            max_waiting=max_waiting,
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
            case do.ProbeResult():
                self.probed.append(command)
            case do.Tell():
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
            delay = min(seconds, seconds * (index + 1) / len(positions))
            self._land_after(delay, target, position, token)
        if chance.random() < self.notes:
            self._write_with_note(transfer, target, seconds, positions, start)
        elif chance.random() < self.world.faults.write_failure:
            failure = Failure(Reason.PLANE, "the plane broke")
            self.later(
                seconds * chance.random(),
                lambda: self._written(generation, failure),
            )
        else:
            checksum = f"{start}+{len(positions)}".encode() if chance.random() < 0.3 else b""
            self.later(seconds, lambda: self._written(generation, None, checksum))

    def _write_with_note(
        self,
        transfer: TransferId,
        target: Receiving | None,
        seconds: float,
        positions: list[int],
        start: int,
    ) -> None:
        """The plane carries a note behind the last token, and answers later, or breaks."""
        generation, chance = transfer.generation, self.world.random
        checksum = f"{start}+{len(positions)}".encode() if chance.random() < 0.3 else b""
        refused = Failure(Reason.PLANE, "the grant was withdrawn")
        broken = Failure(Reason.PLANE, "the plane broke before it answered")
        is_breaking = chance.random() < self.world.faults.write_failure
        delay = chance.choice([0.0, 0.001, 0.05])
        is_answered = False

        def hear(target: Receiving, note: bytes) -> None:
            nonlocal is_answered
            is_answered = True
            is_noted = target.noted(Writer(self.epoch, transfer), note)
            failure = broken if is_breaking else None if is_noted else refused
            self.later(delay, lambda: self._written(generation, failure))

        def watch() -> None:
            if target is None or not target.is_alive:
                self._written(generation, broken)
            elif not is_answered:
                self.later(0.5, watch)

        def landed() -> None:
            note = self.endpoint.note(generation, checksum)
            if target is not None:
                target.later(chance.choice([0.0, 0.003]), lambda: hear(target, note))
            self.later(0.5, watch)

        self.world.after(seconds, landed, self)

    def _memory_of(self, generation: int) -> Receiving | None:
        peer = self.endpoint.peer_of(generation)
        for process in self.world.processes:
            if process.epoch == peer and isinstance(process, Receiving):
                return process
        return None

    def _land_after(
        self, delay: float, target: Receiving | None, position: int, token: Token
    ) -> None:
        """Once the transfer is over for its user, the tensors may hold something else."""

        def land(target: Receiving) -> None:
            is_over = token.writer.transfer.generation in self.outcomes
            target.land(position, token._replace(position=-1) if is_over else token)

        if target is not None:
            self.world.after(delay, lambda: land(target), self)

    def abandon(self, failure: Failure) -> None:
        for generation in self.totals:
            self.endpoint.fail(generation, failure, self.world.now)

    def is_settled(self) -> bool:
        return not self.endpoint.num_live

    def check(self) -> None:
        """Check that what has been transferred only grows."""
        super().check()
        unaddressed = [n for n, each in self.endpoint._waiting.items() if each.is_unaddressed]
        by_id = self.endpoint._unaddressed
        if (
            not all(by_id.values())
            or sorted(n for each in by_id.values() for n in each) != unaddressed
        ):
            raise Violation(f"{unaddressed} have no address, but {by_id} are found")
        for generation, core in self.opened.items():
            self.check_progress(generation, core.transferred_tokens)

    def check_abandoned(self, peer: int) -> None:
        """Check that no transfer to a dead receiver is kept alive."""
        for generation, core in self.opened.items():
            if self.endpoint.peer_of(generation) == peer and not core.state.is_terminal:
                raise Violation(f"{self.address}: {generation} goes on, but its receiver is dead")

    def _written(self, generation: int, failure: Failure | None, checksum: bytes = b"") -> None:
        self._writing.discard(generation)
        if failure is None:
            self.endpoint.write_finished(generation, self.world.now, checksum)
        else:
            self.endpoint.write_failed(generation, failure, self.world.now)
