"""The sender's endpoint: which transfer goes to which receiver, and which offers stand.

A transfer is opened towards a path (an address), a life (a ticket's epoch), or nobody yet: then
it waits for a receiver that asks for it by its request id, or for one that takes anything.
"""

from __future__ import annotations

import hmac
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

from ..errors import Failure, Reason, Rejected
from ..types import Schema, TransferId
from . import events, frames
from .commands import Command, ProbeResult, SendFrame, Serve, Tell, Write
from .endpoint import Contacting, Endpoint
from .frames import Frame, Hello, Redeem
from .send_transfer import SendTransfer
from .session import Path, Session, Timing
from .states import IllegalTransition
from .transfer import ProtocolViolation
from .wanted import Wanted, WantedRequests

__all__ = ["SendEndpoint"]


@dataclass(slots=True)
class _Opened:
    """A transfer and where it goes."""

    transfer: SendTransfer
    timeout: float
    deadline: float
    path: Path | None = None
    """The first contact it waits for."""
    life: int = 0
    """The epoch that the ticket names; 0 for any."""
    key: bytes = b""
    peer: int = 0
    """Epoch of the receiver it was offered to; 0 while it waits for one."""
    is_served: bool = False
    """It is of an offer that a receiver has redeemed."""
    said: int = 0
    """Sequence of the last frame that was sent for it."""

    @property
    def is_unaddressed(self) -> bool:
        return self.path is None and not self.life


@dataclass(frozen=True, slots=True)
class _Offered:
    """Tensors that receivers may redeem until they are withdrawn."""

    key: bytes
    total: int
    metadata: bytes
    timeout: float


class SendEndpoint(Endpoint):
    """Sender's protocol state; see :class:`Endpoint` for how it is driven.

    Args:
        schema: what the tensors look like; compared with each receiver's.
        hello: the Hello to every receiver.
        max_waiting: bound on transfers that wait for a receiver, and on receivers that wait.
    """

    _feeding: ClassVar[tuple[type[Command], ...]] = (Write,)  # it may be finished at once

    def __init__(
        self,
        epoch: int,
        schema: Schema,
        hello: Hello,
        *,
        timing: Timing | None = None,
        max_peers: int = 1024,
        max_waiting: int = 4096,
    ) -> None:
        super().__init__(
            epoch, timing=timing or Timing(), max_peers=max_peers, max_requests=max_waiting
        )
        self._schema = schema
        self.hello = hello
        """This side's Hello; what changes here is said to peers that come later."""
        self._max_waiting = max_waiting
        self._generation = 0
        self._opened: dict[int, _Opened] = {}
        self._waiting: dict[int, _Opened] = {}
        """Those that no receiver was offered yet, oldest first."""
        self._unaddressed: defaultdict[str, dict[int, _Opened]] = defaultdict(dict)
        """Of these, by request id, those that wait for a receiver to ask."""
        self._regrets: dict[int, _Opened] = {}
        """Given up before the first contact; the receiver waits, and is told when it is there."""
        self._offers: dict[str, _Offered] = {}
        self._wanted = WantedRequests()

    # What the user asks for.

    def open(
        self,
        request_id: str,
        *,
        timeout: float,
        now: float,
        path: Path | None = None,
        life: int = 0,
        key: bytes = b"",
        ready: events.TokensReady | None = None,
    ) -> SendTransfer:
        """Open a transfer towards `path`, or `life`, or whoever asks for it.

        Args:
            request_id: what the scheduler knows.
            timeout: seconds until it is given up.
            now: the time.
            path: a first contact; the transfer waits for its Hello.
            life: the only epoch it may go to; 0 for any.
            key: the ticket's.
            ready: what is known of the tokens by now.

        Raises:
            Rejected: too many transfers wait for a receiver (retryable).
            ValueError: the request id, the timeout or the metadata is out of bounds.
        """
        frames.check_request(request_id, timeout, b"" if ready is None else ready.metadata)
        if len(self._waiting) >= self._max_waiting:
            message = f"{self._max_waiting} transfers wait for a receiver: max_waiting"
            raise Rejected(message, retryable=True)
        opened = self._new(request_id, timeout, now)
        opened.path, opened.life, opened.key = path, life, key
        if ready is not None:
            self._apply(opened, opened.transfer.handle(ready, now))
        self._waiting[opened.transfer.id.generation] = opened
        if self.has_ended(life):
            void = self.why_void(life, "receiver")
            self._feed(opened.transfer.id.generation, events.Failed(void), now)
        elif opened.is_unaddressed:
            self._find_receiver(opened, now)
        else:
            session = self.sessions.get(life) if path is None else self._session_at(path, life)
            if session is not None:
                self._offer_to(opened, session, 0, now)
            elif path is not None:
                self.contact(path, now, opened.deadline, life)
        return opened.transfer

    def tokens_ready(self, generation: int, ready: events.TokensReady, now: float) -> None:
        """More of the transfer is known, or can be read.

        Raises:
            ValueError: the metadata is too long.
        """
        frames.check_metadata(ready.metadata)
        self._feed(generation, ready, now)

    def fail(self, generation: int, failure: Failure, now: float) -> None:
        """Give the transfer up."""
        opened = self._waiting.get(generation)
        self._feed(generation, events.Failed(failure), now)
        if opened is not None and not opened.is_unaddressed:
            self._regrets[generation] = opened
            if len(self._regrets) > self._max_waiting:  # that receiver learns it by its deadline
                del self._regrets[next(iter(self._regrets))]

    def offer(
        self, request_id: str, key: bytes, total: int, metadata: bytes, timeout: float
    ) -> None:
        """Let receivers redeem `request_id` until it is withdrawn.

        Raises:
            Rejected: the request id is offered already.
            ValueError: the request id, the timeout or the metadata is out of bounds.
        """
        frames.check_request(request_id, timeout, metadata)
        if request_id in self._offers:
            raise Rejected(f"request {request_id!r} is offered already")
        self._offers[request_id] = _Offered(key, total, metadata, timeout)

    def withdraw(self, request_id: str) -> None:
        """End an offer. Transfers that it has begun go on."""
        self._offers.pop(request_id, None)

    # What the driver reports.

    def note(self, generation: int, checksum: bytes = b"", plane: str = "") -> bytes:
        """Return what tells the receiver of the running write, for a plane to carry behind it.

        When that has landed, so has the note, and no frame will tell of it. Empty if the transfer
        has failed: then its tensors may have changed, and nobody must take them for good.
        """
        opened = self._opened.get(generation)
        if opened is None or opened.transfer.state.is_terminal:
            return b""
        written = opened.transfer.note(checksum, plane)
        return self.sessions[opened.peer].note(written, opened.said)

    def write_finished(
        self, generation: int, now: float, checksum: bytes = b"", plane: str = ""
    ) -> None:
        """The running write has landed over `plane`; with a checksum, the receiver verifies it."""
        self._feed(generation, events.WriteFinished(checksum, plane), now)

    def write_failed(self, generation: int, failure: Failure, now: float) -> None:
        """The running write has failed; it may still land."""
        self._feed(generation, events.WriteFailed(failure), now)

    def drained(self, generation: int, now: float) -> None:
        """The failed write cannot land any more."""
        self._feed(generation, events.Drained(), now)

    def probe(self, peer: int, plane: str, nonce: bytes) -> None:
        """Ask the receiver whether `nonce` has arrived through `plane`; ends in ProbeResult."""
        if peer in self.sessions:
            self.sessions[peer].send(frames.Probe(plane, nonce))

    @property
    def num_live(self) -> int:
        """Transfers that are not settled: running, or with a write that is not yet drained."""
        return len(self._opened)

    @property
    def num_waiting(self) -> int:
        """Transfers that no receiver was offered yet."""
        return len(self._waiting)

    def has(self, generation: int) -> bool:
        """Whether the transfer is not settled yet."""
        return generation in self._opened

    def peer_of(self, generation: int) -> int:
        """Return the epoch of the receiver that the transfer was offered to; 0 if to none."""
        opened = self._opened.get(generation)
        return 0 if opened is None else opened.peer

    # What the endpoint asks of its kind.

    def _hello(self, peer: int) -> Hello:
        return self.hello

    def _is_knock(self, hello: Hello) -> bool:
        return hello.role == "receiver" and not hello.link

    def _greeted(self, session: Session, path: Path, now: float) -> None:
        for generation, opened in [*self._waiting.items(), *self._regrets.items()]:
            if (
                opened.path == path
                or (opened.path is None and opened.life == session.peer_epoch)
                or (opened.is_unaddressed and session.peer_hello.takes_any)
            ):
                if self._regrets.pop(generation, None) is None:
                    self._offer_to(opened, session, 0, now)
                elif self._obstacle(opened, session) is None:
                    self._regret(opened, session)

    def _regret(self, opened: _Opened, session: Session) -> None:
        """Claim what was given up and abort it, so that whoever waits for it waits no longer."""
        transfer = opened.transfer
        assert transfer.failure is not None
        reason, message = transfer.failure
        session.send(
            frames.Offer(
                transfer.id, opened.key, 0, transfer.total, transfer.metadata, opened.timeout
            )
        )
        session.send(frames.Abort(transfer.id, reason, frames.clipped(message), True))

    def _contacting(self) -> Iterable[Contacting]:
        return chain(self._waiting.values(), self._regrets.values())

    def _contact_failed(self, path: Path, failure: Failure, now: float) -> None:
        self._regrets = {n: each for n, each in self._regrets.items() if each.path != path}
        for opened in list(self._waiting.values()):
            if opened.path == path:
                self._feed(opened.transfer.id.generation, events.Failed(failure), now)

    def _peer_lost(self, session: Session, failure: Failure, proven: bool, now: float) -> None:
        for generation in list(self._of_peer.get(session.peer_epoch, ())):
            self._feed(generation, events.Failed(failure), now)
        for wanted in self._wanted.take_all_of(session.peer_epoch):
            # If that receiver comes back, it must not wait in vain.
            _decline(session, wanted.redemption, *failure)

    def _is_open(self, number: int) -> bool:
        return number in self._opened or number in self._regrets

    def _expired(self, number: int, now: float) -> None:
        self._regrets.pop(number, None)
        opened = self._opened.get(number)
        if opened is None or opened.transfer.state.is_terminal:
            return
        if opened.peer:
            where = f"in {opened.transfer.state}"
        elif opened.is_unaddressed:
            where = "no receiver has asked for it, and it was sent to no address"
        else:
            where = "no receiver was reached"
        message = f"{opened.transfer.id} was not done within {opened.timeout:g} s: {where}"
        self._feed(number, events.Failed(Failure(Reason.TIMEOUT, message)), now)

    def _frame_received(self, session: Session, frame: Frame, now: float) -> None:
        match frame:
            case frames.Resume(_, sequence, start, _, extents):
                self._frame_event(session, frame, events.Resumed(start, sequence, extents), now)
            case frames.Grant(_, sequence, start, _, extents):
                self._frame_event(session, frame, events.Granted(start, sequence, extents), now)
            case frames.Accepted():
                self._frame_event(session, frame, events.Accepted(), now)
            case frames.Abort():
                event = events.Aborted(frame.failure, frame.drained)
                if not self._frame_event(session, frame, event, now):
                    session.answer(frames.AbortAck(frame.transfer))  # settled: nothing can land
            case frames.ProbeAnswer(plane, matched):
                self._do([ProbeResult(session.peer_epoch, plane, matched)])
            case Redeem():
                self._redeemed(session, frame, now)
            case frames.Refuse(redemption):
                self._wanted.remove(session.peer_epoch, redemption)
            case _:
                self.counters["unexpected"] += 1

    # Transfers.

    def _new(self, request_id: str, timeout: float, now: float) -> _Opened:
        self._generation += 1
        transfer_id = TransferId(request_id, self._generation)
        transfer = SendTransfer(transfer_id, now)
        opened = _Opened(transfer, timeout, now + timeout)
        self._opened[self._generation] = opened
        self._set_deadline(opened.deadline, self._generation)
        return opened

    def _end_waiting(self, transfer: TransferId) -> None:
        self._waiting.pop(transfer.generation, None)
        if transfer.request_id in self._unaddressed:
            same_id = self._unaddressed[transfer.request_id]
            same_id.pop(transfer.generation, None)
            if not same_id:
                del self._unaddressed[transfer.request_id]

    def _find_receiver(self, opened: _Opened, now: float) -> None:
        """Serve the receiver that has waited longest for this id, else one that takes anything."""
        first = self._wanted.take(opened.transfer.id.request_id, now)
        if first is not None:
            self._offer_to(opened, self.sessions[first.peer], first.redemption, now)
            return
        takers = [
            session
            for session in self.sessions.values()
            if session.peer_hello.takes_any and not session.is_lost
        ]
        if takers:
            idlest = min(takers, key=lambda session: len(self._of_peer.get(session.peer_epoch, ())))
            self._offer_to(opened, idlest, 0, now)
        else:
            request_id, generation = opened.transfer.id
            self._unaddressed[request_id][generation] = opened

    def _offer_to(self, opened: _Opened, session: Session, redemption: int, now: float) -> None:
        generation = opened.transfer.id.generation
        self._end_waiting(opened.transfer.id)
        obstacle = self._obstacle(opened, session)
        if obstacle is not None:
            self._feed(generation, events.Failed(obstacle), now)
            return
        opened.peer = session.peer_epoch
        self._tie(generation, session, now)
        left = max(0.0, opened.deadline - now)
        self._apply(opened, opened.transfer.offer(opened.key, redemption, left))
        difference = self._difference(session)
        if difference:  # only now, so that the receiver, too, learns at once that it failed
            message = f"receiver {session.peer_hello.name!r} has another schema: {difference}"
            self._feed(generation, events.Failed(Failure(Reason.SCHEMA, message)), now)

    def _obstacle(self, opened: _Opened, session: Session) -> Failure | None:
        """Say why this transfer cannot go to that peer."""
        name = session.peer_hello.name
        if not session.paths:
            return Failure(Reason.PEER_LOST, f"receiver {name!r} cannot be reached any more")
        if opened.life and opened.life != session.peer_epoch:
            return Failure(
                Reason.PEER_LOST, "the ticket is void: its receiver has been restarted since"
            )
        if session.peer_hello.role != "receiver":
            return Failure(Reason.REJECTED, f"the peer {name!r} is no receiver")
        return None

    def _compare(self, theirs: Schema) -> str:
        return theirs.difference(self._schema)

    def _frame_event(
        self,
        session: Session,
        frame: frames.Grant | frames.Accepted | frames.Abort,
        event: events.SendEvent,
        now: float,
    ) -> bool:
        """Feed what a frame means to its transfer; False if there is none."""
        opened = self._opened.get(frame.transfer.generation)
        if opened is None or opened.peer != session.peer_epoch:
            self.counters["of_no_transfer"] += 1
            return False
        self._feed(frame.transfer.generation, event, now)
        return True

    def _feed(self, generation: int, event: events.SendEvent, now: float) -> None:
        opened = self._opened.get(generation)
        if opened is None:
            return
        transfer = opened.transfer
        before = len(transfer.history)
        try:
            commands = transfer.handle(event, now)
        except (ProtocolViolation, IllegalTransition) as exc:
            self.counters["violations"] += 1
            failure = Failure(Reason.PROTOCOL, f"the receiver broke the protocol: {exc}")
            commands = transfer.handle(events.Failed(failure), now)
        if len(transfer.history) > before:
            self._commands.append(Tell(transfer.id))
        self._apply(opened, commands)

    def _apply(self, opened: _Opened, commands: Iterable[Command]) -> None:
        session = self.sessions.get(opened.peer)
        for command in commands:
            if not isinstance(command, SendFrame):
                self._commands.append(command)
            elif session is not None:
                send = session.answer if opened.is_served else session.send
                opened.said = send(command.frame) or opened.said
        if opened.transfer.is_settled:
            generation = opened.transfer.id.generation
            self._opened.pop(generation, None)
            self._end_waiting(opened.transfer.id)
            self._untie(generation, opened.peer)

    # Offers and what receivers ask for.

    def _redeemed(self, session: Session, frame: Redeem, now: float) -> None:
        if frame.key:
            self._redeem_offer(session, frame, now)
            return
        waiting = self._unaddressed.get(frame.request_id)
        if waiting:
            oldest = next(iter(waiting.values()))
            self._offer_to(oldest, session, frame.redemption, now)
            return
        self._wanted.expire(now)
        if len(self._wanted) >= self._max_waiting:
            _decline(session, frame.redemption, Reason.BUSY, "too many receivers wait")
            return
        deadline = now + frame.timeout
        wanted = Wanted(session.peer_epoch, frame.redemption, frame.request_id, deadline)
        self._wanted.add(wanted)

    def _redeem_offer(self, session: Session, frame: Redeem, now: float) -> None:
        offered = self._offers.get(frame.request_id)
        if offered is None or not hmac.compare_digest(offered.key, frame.key):
            message = f"request {frame.request_id!r} is not on offer: withdrawn, expired or unknown"
            _decline(session, frame.redemption, Reason.REJECTED, message)
            return
        if len(self._of_peer.get(session.peer_epoch, ())) >= self._max_waiting:
            _decline(session, frame.redemption, Reason.BUSY, "too many transfers run")
            return
        opened = self._new(frame.request_id, min(frame.timeout, offered.timeout), now)
        opened.is_served = True
        self._do([Serve(opened.transfer.id)])
        ready = events.TokensReady(offered.total, offered.total, offered.metadata)
        self._apply(opened, opened.transfer.handle(ready, now))
        self._offer_to(opened, session, frame.redemption, now)


def _decline(session: Session, redemption: int, reason: Reason, message: str) -> None:
    """Tell a receiver that it will not get what it has asked for."""
    session.answer(frames.Refuse(redemption, reason, frames.clipped(message)))
