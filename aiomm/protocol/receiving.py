"""The receiver's endpoint: which claim meets which request, and what becomes of each.

A request exists from `expect`, `receive` or `redeem` on, or from the moment a sender offers
it unasked; it ends when the user has taken its result, or by its deadline.
"""

from __future__ import annotations

import hmac
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import msgspec

from ..errors import Failure, ProtocolError, Reason, Rejected
from ..types import Allocation, Schema, TransferId
from . import events, frames
from .commands import (
    Command,
    CompareProbe,
    Deliver,
    Fail,
    Join,
    MoveOut,
    Quarantine,
    Release,
    Reserve,
    ReserveRest,
    SendFrame,
    Unreserve,
    Verify,
)
from .endpoint import Contacting, Endpoint
from .frames import Frame, Hello, PlaneOffer, decode
from .receive_transfer import ReceiveTransfer
from .session import Path, Session, Timing
from .states import IllegalTransition
from .transfer import ProtocolViolation

__all__ = ["ReceiveEndpoint"]


@dataclass(slots=True)
class _Request:
    """One request and its one transfer."""

    request_id: str
    transfer: ReceiveTransfer
    timeout: float
    deadline: float
    key: bytes = b""
    """The key of the ticket this side has issued; empty for a bare request id."""
    path: Path | None = None
    """Redeemed: the first contact it waits for."""
    life: int = 0
    """Redeemed: the epoch that the ticket names; 0 for any."""
    redeem_key: bytes | None = None
    """Redeemed: the key of the sender's ticket; None if this side waits to be asked."""
    peer: int = 0
    """Epoch of the sender it is tied to."""
    is_open: bool = True
    """Somebody may still ask for the result."""
    is_unasked: bool = False
    """A sender has offered it, and nobody here had spoken of it."""

    @property
    def unclaimed(self) -> str:
        """Say why nobody has claimed it."""
        if self.redeem_key is None:
            return "no sender has claimed it"
        return "the sender has had nothing of that id" if self.peer else "no sender was reached"


class ReceiveEndpoint(Endpoint):
    """Receiver's protocol state; see :class:`Endpoint` for how it is driven.

    Args:
        schema: what the pool holds.
        hello: the Hello to every sender, without link number and plane offers.
        plane_offers: returns the plane offers of the link with that number.
        default_tokens: what is reserved for a request of unknown length.
        default_timeout: seconds a request lives that a sender has offered unasked.
        max_requests: bound on requests that are not taken yet.
        max_tokens: longest request that is accepted.
        always_verifies: have every chunk verified before it counts, also without a checksum:
            it may not be in its place yet.
    """

    _feeding: ClassVar[tuple[type[Command], ...]] = (
        *(Reserve, ReserveRest, Unreserve, Quarantine, Release),
        *(Verify, MoveOut, Join, Deliver, Fail),
    )  # blocks become free, or the user does something next

    def __init__(
        self,
        epoch: int,
        schema: Schema,
        hello: Hello,
        *,
        plane_offers: Callable[[int], tuple[PlaneOffer, ...]] = lambda _: (),
        default_tokens: int = 1024,
        default_timeout: float = 30.0,
        timing: Timing | None = None,
        max_peers: int = 1024,
        max_requests: int = 4096,
        max_tokens: int = 2**24,
        always_verifies: bool = False,
    ) -> None:
        super().__init__(
            epoch, timing=timing or Timing(), max_peers=max_peers, max_requests=max_requests
        )
        self._schema = schema
        self.hello = hello
        """This side's Hello; what changes here is said to peers that come later."""
        self._plane_offers = plane_offers
        self._default_tokens = default_tokens
        self._default_timeout = default_timeout
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._always_verifies = always_verifies
        self.is_closing = False
        """Claims are turned away; what runs may end."""
        self._links = 0
        self._number = 0
        self._requests: dict[int, _Request] = {}
        self._unasked: dict[int, _Request] = {}
        """Redeemed, and the sender was not reached yet."""
        self._by_request_id: dict[str, int] = {}
        """The open request of each id, but for those that are redeemed."""
        self._redeemed: defaultdict[str, set[int]] = defaultdict(set)
        """Those, by request id: there may be several, of several senders."""
        self._by_transfer: dict[tuple[int, TransferId], int] = {}

    # What the user asks for.

    def expect(self, request_id: str, key: bytes, timeout: float, now: float) -> int:
        """Reserve for a request whose ticket, with `key`, somebody will claim; return its number.

        Raises:
            Rejected: the request id is in use, or (retryable) there are too many requests.
            ValueError: the request id or the timeout is out of bounds.
        """
        if request_id in self._by_request_id:
            raise Rejected(
                f"the request id {request_id!r} is in use: take its result, or cancel it"
            )
        return self._add(request_id, timeout, now, key=key, reserve=True).transfer.number

    def receive(self, request_id: str, timeout: float, now: float) -> int:
        """Return the number of the request, whether it was expected, has come, or will come.

        Raises:
            Rejected: there are too many requests (retryable).
            ValueError: the request id or the timeout is out of bounds.
        """
        number = self._by_request_id.get(request_id)
        if number is not None:
            return number
        return self._add(request_id, timeout, now, reserve=True).transfer.number

    def redeem(
        self,
        request_id: str,
        key: bytes,
        *,
        path: Path | None,
        life: int,
        timeout: float,
        now: float,
    ) -> int:
        """Ask the sender at `path`, or with epoch `life`, for a request; return its number.

        Raises:
            Rejected: there are too many requests (retryable).
            ValueError: the request id or the timeout is out of bounds.
        """
        session = self.sessions.get(life) if path is None else self._session_at(path, life)
        if session is not None and not key:
            number = self._by_request_id.get(request_id, 0)
            if self.is_unasked(number) and self._requests[number].peer == session.peer_epoch:
                return number  # it has come already, since this side takes anything
        request = self._add(request_id, timeout, now, named=False)
        request.path, request.life, request.redeem_key = path, life, key
        self._redeemed[request_id].add(request.transfer.number)
        self._unasked[request.transfer.number] = request
        if self.has_ended(life):
            void = self.why_void(life, "sender")
            self._feed(request.transfer.number, events.Failed(void), now)
        elif session is not None:
            self._ask(request, session, now)
        elif path is not None:
            self.contact(path, now, request.deadline, life)
        return request.transfer.number

    def fail(self, number: int, failure: Failure, now: float) -> None:
        """Give the request up."""
        request = self._requests.get(number)
        if request is None:
            return
        if request.redeem_key is not None and not request.transfer.is_claimed:
            session = self.sessions.get(request.peer)
            if session is not None:
                session.send(frames.Refuse(number, failure.reason, frames.clipped(failure.message)))
        self._feed(number, events.Failed(failure), now)

    def give_up(self, number: int, failure: Failure, now: float) -> None:
        """Fail the request, also if it is done and nobody has taken it, and end it."""
        request = self._requests.get(number)
        if request is None or not request.is_open:
            return
        if request.transfer.state.is_terminal:
            self._do([Fail(number, failure, request_id=request.request_id)])
        else:
            self.fail(number, failure, now)
        self._close(request)

    def taken(self, number: int) -> None:
        """The user has the result, or has been told of the failure: the request is over."""
        request = self._requests.get(number)
        if request is not None:
            self._close(request)

    # What the driver reports.

    def reserved(self, number: int, allocation: Allocation, extends: bool, now: float) -> None:
        """The pool gave blocks. If the request is over by now, they go back."""
        if number in self._requests:
            self._feed(number, events.Reserved(allocation, extends), now)
        else:
            self._do([Release(number, (allocation,))])

    def note_received(self, link: int, encoded: bytes, now: float) -> None:
        """Take what a plane has carried over `link`, behind the bytes that it speaks of.

        Raises:
            ProtocolError: it is no note of the sender on that link.
        """
        packet = decode(encoded)
        session = self.sessions.get(packet.source_epoch)
        if session is None or session.hello.link != link or packet.target_epoch != self.epoch:
            raise ProtocolError("a note of another link")
        if not isinstance(packet.frame, frames.Written):
            raise ProtocolError(f"a note is {type(packet.frame).__name__}, not Written")
        for frame in session.receive_note(packet):
            self._frame_received(session, frame, now)

    def refused(self, number: int, now: float) -> None:
        """The pool cannot give the whole rest now."""
        self._feed(number, events.Refused(), now)

    def verified(self, number: int, matches: bool, now: float) -> None:
        """The checksum of a chunk was compared."""
        self._feed(number, events.Verified(matches), now)

    def moved_out(self, number: int, now: float) -> None:
        """The buffered chunks are out of the pool."""
        self._feed(number, events.MovedOut(), now)

    def joined(self, number: int, now: float) -> None:
        """All chunks stand in one tensor."""
        self._feed(number, events.Joined(), now)

    def drained(self, number: int, now: float) -> None:
        """The plane proves that no write of the transfer can land any more."""
        self._feed(number, events.Drained(), now)

    def probed(self, peer: int, plane: str, matched: bool) -> None:
        """The probe slot was compared."""
        if peer in self.sessions:
            self.sessions[peer].answer(frames.ProbeAnswer(plane, matched))

    def transfer(self, number: int) -> ReceiveTransfer:
        """Return the transfer of a request that has not been forgotten."""
        return self._requests[number].transfer

    def link_of(self, number: int) -> int:
        """Return the number of the link over which the request is claimed; 0 if none is."""
        session = self.sessions.get(self._requests[number].peer)
        return session.hello.link if session is not None else 0

    def numbers_of(self, request_id: str) -> list[int]:
        """Return the numbers of the open requests with that id."""
        named = self._by_request_id.get(request_id)
        redeemed = sorted(self._redeemed.get(request_id, ()))
        return redeemed if named is None else [named, *redeemed]

    def is_wanted(self, number: int) -> bool:
        """Whether somebody may still ask for the result."""
        request = self._requests.get(number)
        return request is not None and request.is_open

    def is_unasked(self, number: int) -> bool:
        """Whether a sender has begun the request, and nobody here knew of it."""
        request = self._requests.get(number)
        return request is not None and request.is_unasked

    def is_live(self, number: int) -> bool:
        """Whether the request has not ended yet."""
        request = self._requests.get(number)
        return request is not None and not request.transfer.state.is_terminal

    def numbers(self) -> list[int]:
        """Return the numbers of all requests, oldest first."""
        return list(self._requests)

    # What the endpoint asks of its kind.

    def _hello(self, peer: int) -> Hello:
        if peer == 0:
            return self.hello  # a knock: the sender that it reaches makes the first contact
        self._links += 1
        planes = self._plane_offers(self._links)
        return msgspec.structs.replace(self.hello, link=self._links, planes=planes)

    def _is_knock(self, hello: Hello) -> bool:
        return False

    def _is_void(self, command: Command) -> bool:
        """Whether it is a reservation that was answered, replaced or given up meanwhile."""
        if not isinstance(command, Reserve | ReserveRest):
            return False
        request = self._requests.get(command.number)
        return request is None or request.transfer.reservation is not command

    def _greeted(self, session: Session, path: Path, now: float) -> None:
        for request in list(self._unasked.values()):
            if request.transfer.state.is_terminal:
                continue  # its failure was not told yet
            if request.path == path or request.life == session.peer_epoch:
                self._ask(request, session, now)

    def _contacting(self) -> Iterable[Contacting]:
        return self._unasked.values()

    def _contact_failed(self, path: Path, failure: Failure, now: float) -> None:
        for number, request in list(self._unasked.items()):
            if request.path == path:
                self._feed(number, events.Failed(failure), now)

    def _peer_lost(self, session: Session, failure: Failure, proven: bool, now: float) -> None:
        for number in list(self._of_peer.get(session.peer_epoch, ())):
            self.fail(number, failure, now)  # a sender that comes back must not serve it
            if proven:
                self._feed(number, events.Drained(), now)

    def _is_open(self, number: int) -> bool:
        return number in self._requests

    def _expired(self, number: int, now: float) -> None:
        request = self._requests.get(number)
        if request is None or not request.is_open:
            return
        transfer = request.transfer
        if transfer.state.is_terminal:
            message = f"nobody asked for the result of {request.request_id!r} in time"
        else:
            what = f"in {transfer.state}" if transfer.is_claimed else request.unclaimed
            message = f"{request.request_id!r} was not done within {request.timeout:g} s: {what}"
        self.give_up(number, Failure(Reason.TIMEOUT, message), now)

    def _frame_received(self, session: Session, frame: Frame, now: float) -> None:
        match frame:
            case frames.Offer():
                self._offered(session, frame, now)
            case frames.Announce(transfer, total, metadata):
                announced = events.Announced(total, metadata)
                self._unless_too_long(session, transfer, total, announced, now)
            case frames.Written(transfer, sequence, start, count, total, checksum, plane):
                written = events.Written(sequence, start, count, total, checksum, plane)
                length = max(start + count, total or 0)
                self._unless_too_long(session, transfer, length, written, now)
            case frames.Abort(transfer, _, _, drained):
                aborted = events.Aborted(frame.failure, drained)
                self._frame_event(session, transfer, aborted, now)
            case frames.AbortAck(transfer):
                self._frame_event(session, transfer, events.Drained(), now)
            case frames.Probe(plane, nonce):
                link = session.hello.link
                self._do([CompareProbe(session.peer_epoch, link, plane, nonce)])
            case frames.Refuse(redemption, reason, message):
                request = self._requests.get(redemption)
                if request is not None and request.peer == session.peer_epoch:
                    self._feed(redemption, events.Failed(Failure(reason, message)), now)
            case _:
                self.counters["unexpected"] += 1

    # Requests.

    def _add(
        self,
        request_id: str,
        timeout: float,
        now: float,
        *,
        key: bytes = b"",
        reserve: bool = False,
        named: bool = True,
    ) -> _Request:
        frames.check_request(request_id, timeout)
        if len(self._requests) >= self._max_requests:
            message = f"{self._max_requests} open requests: max_waiting of the receiver"
            raise Rejected(message, retryable=True)
        self._number += 1
        transfer = ReceiveTransfer(
            self._number, self._default_tokens, now, always_verifies=self._always_verifies
        )
        request = _Request(request_id, transfer, timeout, now + timeout, key)
        self._requests[self._number] = request
        if named:
            self._by_request_id[request_id] = self._number
        self._set_deadline(request.deadline, self._number)
        if reserve:
            self._apply(request, transfer.expect())
        return request

    def _close(self, request: _Request) -> None:
        """Nobody will ask for the result any more; its id may be used again."""
        request.is_open = False
        request_id, number = request.request_id, request.transfer.number
        if self._by_request_id.get(request_id) == number:
            del self._by_request_id[request_id]
        elif request_id in self._redeemed:
            self._redeemed[request_id].discard(number)
            if not self._redeemed[request_id]:
                del self._redeemed[request_id]
        self._forget_if_over(request)

    def _forget_if_over(self, request: _Request) -> None:
        """Drop a request that holds no block and that nobody can ask for any more."""
        if not request.is_open and request.transfer.is_settled:
            self._requests.pop(request.transfer.number, None)
            self._unasked.pop(request.transfer.number, None)
            if request.transfer.id is not None:
                self._by_transfer.pop((request.peer, request.transfer.id), None)
            self._untie(request.transfer.number, request.peer)

    def _ask(self, request: _Request, session: Session, now: float) -> None:
        number = request.transfer.number
        name = session.peer_hello.name
        if not session.paths:
            message = f"sender {name!r} cannot be reached any more"
            self._feed(number, events.Failed(Failure(Reason.PEER_LOST, message)), now)
        elif request.life and request.life != session.peer_epoch:
            message = "the ticket is void: its sender has been restarted since"
            self._feed(number, events.Failed(Failure(Reason.PEER_LOST, message)), now)
        elif session.peer_hello.role != "sender":
            message = f"the peer {name!r} is no sender"
            self._feed(number, events.Failed(Failure(Reason.REJECTED, message)), now)
        else:
            request.peer = session.peer_epoch
            del self._unasked[number]
            self._tie(number, session, now)
            left = max(0.0, request.deadline - now)
            key = request.redeem_key or b""
            session.send(frames.Redeem(request.request_id, key, number, left))

    # Claims.

    def _offered(self, session: Session, offer: frames.Offer, now: float) -> None:
        peer, transfer = session.peer_epoch, offer.transfer
        if (peer, transfer) in self._by_transfer:
            self.counters["of_no_transfer"] += 1
            return
        failure = self._objection(session, offer)
        if self.is_closing:
            failure = Failure(Reason.CLOSED, "the receiver is closing")
        request = None
        try:
            request = self._match(session, offer)
            if request is None and failure is None:
                request = self._add(transfer.request_id, self._default_timeout, now)
                request.is_unasked = True
        except Rejected as exc:
            failure = Failure(Reason.BUSY if exc.retryable else Reason.REJECTED, exc.message)
        if failure is not None:
            message = frames.clipped(failure.message)
            session.answer(frames.Abort(transfer, failure.reason, message, False))
            if request is not None and (offer.key or request.redeem_key is not None):
                # Nobody else will bring it: fail it now, not at its deadline.
                self._feed(request.transfer.number, events.Failed(failure), now)
        else:
            assert request is not None
            request.peer, number = peer, request.transfer.number
            self._tie(number, session, now)
            self._by_transfer[peer, transfer] = number
            self._feed(number, events.Claimed(transfer, offer.total, offer.metadata), now)

    def _objection(self, session: Session, offer: frames.Offer) -> Failure | None:
        """Say why this transfer cannot be received, whatever request it is for."""
        difference = self._difference(session)
        if difference:
            message = f"sender {session.peer_hello.name!r} has another schema: {difference}"
            return Failure(Reason.SCHEMA, message)
        return self._too_long(offer.total or 0)

    def _compare(self, theirs: Schema) -> str:
        return self._schema.difference(theirs)

    def _match(self, session: Session, offer: frames.Offer) -> _Request | None:
        """Return the request that this claim is for; None if it comes unasked.

        Raises:
            Rejected: there is none, or it must not have it.
        """
        request_id = offer.transfer.request_id
        number = offer.redemption or self._by_request_id.get(request_id)
        if number is None and not offer.key:
            number = self._asked_of(session, request_id)
            if number is None:
                return None
            # It was sent to nobody in particular, and has crossed the question.
            session.send(frames.Refuse(number, Reason.CANCELLED, "it has come"))
        request = self._requests.get(number or 0)
        if request is None or request.transfer.state.is_terminal:
            raise Rejected(f"request {request_id!r} is unknown: finished, given up, or never made")
        if request.transfer.is_claimed:
            raise Rejected(f"request {request_id!r} is claimed already")
        if not hmac.compare_digest(request.key, offer.key):
            wrong = "is not the current one" if offer.key else "is missing"
            raise Rejected(f"the ticket for request {request_id!r} {wrong}")
        asked_of = request.peer, request.request_id
        if offer.redemption and asked_of != (session.peer_epoch, request_id):
            raise Rejected(f"request {request_id!r} was asked of another sender")
        return request

    def _asked_of(self, session: Session, request_id: str) -> int | None:
        """Return the oldest request of which the sender was asked by that id, without a ticket."""
        for number in sorted(self._redeemed.get(request_id, ())):
            request = self._requests[number]
            is_over = request.transfer.is_claimed or request.transfer.state.is_terminal
            if request.peer == session.peer_epoch and not request.redeem_key and not is_over:
                return number
        return None

    def _too_long(self, total: int) -> Failure | None:
        if total <= self._max_tokens:
            return None
        message = f"{total} tokens, but this receiver takes at most {self._max_tokens}"
        return Failure(Reason.REJECTED, message)

    def _unless_too_long(
        self,
        session: Session,
        transfer: TransferId,
        length: int,
        event: events.ReceiveEvent,
        now: float,
    ) -> None:
        failure = self._too_long(length)
        self._frame_event(
            session, transfer, event if failure is None else events.Failed(failure), now
        )

    def _frame_event(
        self, session: Session, transfer: TransferId, event: events.ReceiveEvent, now: float
    ) -> None:
        number = self._by_transfer.get((session.peer_epoch, transfer))
        if number is None:
            self.counters["of_no_transfer"] += 1
            return
        self._feed(number, event, now)

    def _feed(self, number: int, event: events.ReceiveEvent, now: float) -> None:
        request = self._requests.get(number)
        if request is None:
            return
        try:
            commands = request.transfer.handle(event, now)
        except (ProtocolViolation, IllegalTransition) as exc:
            self.counters["violations"] += 1
            failure = Failure(Reason.PROTOCOL, f"the sender broke the protocol: {exc}")
            commands = request.transfer.handle(events.Failed(failure), now)
        self._apply(request, commands)

    def _apply(self, request: _Request, commands: Iterable[Command]) -> None:
        session = self.sessions.get(request.peer)
        for command in commands:
            if isinstance(command, Fail):
                self._commands.append(replace(command, request_id=request.request_id))
            elif not isinstance(command, SendFrame):
                self._commands.append(command)
            elif session is not None:
                session.answer(command.frame)
        self._forget_if_over(request)
