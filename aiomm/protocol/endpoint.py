"""What both endpoints share: sessions with many peers, from first contact to farewell.

Feed it packets, lost paths and the time; take :meth:`Endpoint.commands`. It has no socket and
no clock. :mod:`.sending` and :mod:`.receiving` add the transfers.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from typing import ClassVar, Protocol

from ..errors import Failure, IncompatibleSchema, ProtocolError, Reason
from ..types import Schema
from .agenda import Agenda
from .commands import Command, Greet, Leave, Part, Transmit
from .frames import PROTOCOL_VERSION, Frame, Goodbye, Hello, Packet, clipped, decode, encode
from .session import MAX_ANSWERS, NEVER, Contact, Path, Session, Timing

__all__ = ["Contacting", "Endpoint"]

IGNORED = (
    *("malformed", "violations", "unexpected", "of_no_transfer"),
    *("of_no_session", "of_another_life", "of_an_ended_life"),
)
"""The kinds of packets and frames that are counted instead of obeyed."""
MAX_REFUSED_PATHS = 1024
MAX_ENDED_LIVES = 4096
FORGOTTEN = "it was lost, and forgotten here to make room for others: max_peers"
"""The end of a life that may go on: it comes in again with a new endpoint."""
MIN_DEADLINES = 1024
ANSWERS_EACH = 2
"""To one peer and about one request, in one turn of the loop: granted, and over."""
MAX_EXPIRED = 64
"""Deadlines that are looked at in one turn: a thousand would hold the loop for 16 ms."""


class Contacting(Protocol):
    """What may wait for the answer to a first contact."""

    path: Path | None
    """Where that is."""


class Endpoint(ABC):
    """One side's protocol state: a session for each life of each peer.

    Args:
        epoch: random, positive, below 2**63; another for every life.
        timing: how sessions keep time.
        max_peers: more than this are refused.
        max_requests: that may be open or wait.
    """

    _feeding: ClassVar[tuple[type[Command], ...]]
    """Commands whose execution may feed the endpoint, before the next one is looked at."""

    def __init__(self, epoch: int, *, timing: Timing, max_peers: int, max_requests: int) -> None:
        self.epoch = epoch
        self.sessions: dict[int, Session] = {}
        """By the peer's epoch. A lost peer keeps its session: it may come back."""
        self.counters = Counter(dict.fromkeys(IGNORED, 0))
        """What was ignored, and why."""
        self._timing = timing
        self._max_peers = max_peers
        self._max_answers = max(MAX_ANSWERS, ANSWERS_EACH * max_requests)
        self._at_path: defaultdict[Path, list[Session]] = defaultdict(list)
        """The sessions that may use each path: mostly one."""
        self._contacts: dict[Path, Contact] = {}
        """First contacts that wait for the peer's Hello."""
        self._contacts_at = NEVER
        """When to look at them, at the latest."""
        self._ended: dict[int, str] = {}
        """Lives that are over, and why: a late packet must not begin them again. Oldest first."""
        self._refused: set[Path] = set()
        self._commands: deque[Command] = deque()
        self._of_peer: defaultdict[int, set[int]] = defaultdict(set)
        """The numbers of what is tied to each peer and not over yet."""
        self._agenda = Agenda()
        self._deadlines: list[tuple[float, int]] = []
        self._deadlines_limit = MIN_DEADLINES

    # What the driver feeds in.

    def contact(self, path: Path, now: float, until: float = NEVER, life: int = 0) -> None:
        """Say Hello to whoever is at `path`, until then at least. Again is harmless.

        Nothing is said where `life`, or if that is 0 any, is known to be.
        """
        contact = self._contacts.get(path)
        if contact is not None:
            contact.until = max(contact.until, until)
        elif self._session_at(path, life) is None:
            hello = self._hello(0)
            self._contacts[path] = Contact(self.epoch, hello, now, self._timing, until)
            self._contacts_at = now

    def packet_received(self, path: Path, encoded: bytes, now: float) -> None:
        """Take one packet from `path`.

        Raises:
            ProtocolError: it was not one of this protocol or version; the sender was told if
                that can help. Nothing else is affected.
        """
        try:
            packet = decode(encoded)
        except ProtocolError as exc:
            self.counters["malformed"] += 1
            self._refuse(path, exc, now)
            raise
        if packet.target_epoch not in (0, self.epoch):
            self._of_another_life(path, packet)
        elif packet.target_epoch == 0 and isinstance(packet.frame, Goodbye):
            self._turned_away(path, packet.frame, now)
        elif packet.source_epoch in self._ended:
            self._of_an_ended_life(path, packet, now)
        elif isinstance(packet.frame, Hello):
            self._hello_received(path, packet, packet.frame, now)
        elif packet.target_epoch == self.epoch:
            self._frames_received(path, packet, now)
        else:
            self.counters["of_no_session"] += 1

    def says_hello(self, path: Path) -> bool:
        """Whether a first contact at `path` is not answered yet."""
        return path in self._contacts

    def redirect(self, path: Path, successor: Path, now: float) -> None:
        """Say Hello at another path instead, on behalf of all that wait for an answer."""
        contact = self._contacts.pop(path, None)
        if contact is not None:
            self.contact(successor, now, contact.until)
            for each in self._contacting():
                if each.path == path:
                    each.path = successor

    def path_lost(self, path: Path, cause: str, now: float) -> None:
        """Learn that nothing gets through `path` any more."""
        self._refused.discard(path)
        failure = Failure(Reason.PEER_LOST, cause)
        if self._contacts.pop(path, None) is not None:
            self._contact_failed(path, failure, now)
        for session in list(self._at_path.get(path, ())):
            self._leave_path(session, path, failure, now)

    def peer_died(self, peer: int, now: float) -> None:
        """Learn that the process with epoch `peer` is dead for certain."""
        self._part(peer, Failure(Reason.PEER_LOST, "the peer's process died"), now)

    def has_ended(self, life: int) -> bool:
        """Whether that life of a peer is over for good."""
        return life in self._ended

    def why_void(self, life: int, issuer: str) -> Failure:
        """Say why a ticket of a life that is over, `issuer`, is void."""
        message = f"the ticket is void: its {issuer} is gone: {self._ended[life]}"
        return Failure(Reason.PEER_LOST, message)

    def leads_somewhere(self, path: Path) -> bool:
        """Whether somebody is at `path`, or is said Hello to."""
        return path in self._contacts or self._session_at(path) is not None

    def use_path(self, peer: int, path: Path) -> None:
        """Use another way to `peer` as well, and tell it by a first packet."""
        session = self.sessions.get(peer)
        if session is not None:
            self._add_path(session, path)
            session.announce_path()

    def holds_back(self) -> bool:
        """Whether more is to be said to some peer than may be on its way at once."""
        return any(session.holds_back for session in self.sessions.values())

    def say_goodbye(self, failure: Failure) -> None:
        """Tell every peer that this life ends. Call it when no write runs any more."""
        for session in self.sessions.values():
            session.say_last(Goodbye(failure.reason, clipped(failure.message)))

    def timer(self, now: float) -> None:
        """Look at what is due; of many deadlines at some: then :meth:`next_deadline` is past."""
        for _ in range(MAX_EXPIRED):
            if not self._deadlines or self._deadlines[0][0] > now:
                break
            self._expired(heapq.heappop(self._deadlines)[1], now)
        if self._contacts_at <= now:
            for path in [path for path, each in self._contacts.items() if each.until <= now]:
                del self._contacts[path]
                self._do([Leave(path)])
        for session in self._agenda.due(now):
            if session.is_silent(now):
                self._lose(session, Failure(Reason.PEER_LOST, session.silence(now)), now)

    # What the driver takes out.

    def commands(self, now: float) -> list[Command]:
        """Return what has to be done now, in order. After every input, ask until it is empty."""
        if not (self._commands or self._contacts_at <= now or self._agenda.changed):
            return []
        commands = self._next_batch()
        if self._commands:
            return commands  # packets come last: what they speak of is done by then
        for session in self._agenda.take():
            if session.paths:
                path = session.paths[0]
                commands += [Transmit(path, packet) for packet in session.packets(now)]
                self._agenda.schedule(session, session.next_deadline())
        if self._contacts_at <= now:
            for path, contact in self._contacts.items():
                commands += [Transmit(path, packet) for packet in contact.packets(now)]
            deadlines = (contact.next_deadline() for contact in self._contacts.values())
            self._contacts_at = min(deadlines, default=NEVER)
        return commands

    def next_deadline(self) -> float:
        """Return when :meth:`timer` and :meth:`commands` have to be called again."""
        earliest = self._deadlines[0][0] if self._deadlines else NEVER
        return min(earliest, self._contacts_at, self._agenda.next_deadline())

    @property
    def num_links(self) -> int:
        """Links that stand: sessions whose peer is not lost."""
        return sum(not session.is_lost for session in self.sessions.values())

    # What the two kinds of endpoint add.

    @abstractmethod
    def _hello(self, peer: int) -> Hello:
        """Return this side's Hello to the peer with that epoch (0: not known yet)."""

    @abstractmethod
    def _is_knock(self, hello: Hello) -> bool:
        """Whether this Hello only asks this side to make the first contact."""

    @abstractmethod
    def _compare(self, theirs: Schema) -> str:
        """Say how the sender's schema differs from the receiver's; empty if it does not."""

    def _is_void(self, command: Command) -> bool:
        """Whether there is no need any more for a command that may feed this endpoint."""
        return False

    @abstractmethod
    def _greeted(self, session: Session, path: Path, now: float) -> None:
        """A link stands, first contacted over `path`."""

    @abstractmethod
    def _contacting(self) -> Iterable[Contacting]:
        """Return all that may wait for an answer at some path."""

    @abstractmethod
    def _contact_failed(self, path: Path, failure: Failure, now: float) -> None:
        """Nobody can be reached at `path`."""

    @abstractmethod
    def _frame_received(self, session: Session, frame: Frame, now: float) -> None:
        """Take one frame, once and in order."""

    @abstractmethod
    def _peer_lost(self, session: Session, failure: Failure, proven: bool, now: float) -> None:
        """Fail what goes on with that peer; `proven`: none of its writes can land any more."""

    @abstractmethod
    def _expired(self, number: int, now: float) -> None:
        """A deadline set with :meth:`_set_deadline` has passed."""

    @abstractmethod
    def _is_open(self, number: int) -> bool:
        """Whether the deadline of `number` still means something."""

    def _difference(self, session: Session) -> str:
        """Say how the schemas of both sides differ; they are compared once for a session."""
        if session.difference is None:
            try:
                session.difference = self._compare(session.peer_hello.schema)
            except IncompatibleSchema as exc:
                session.difference = exc.message
        return session.difference

    def _set_deadline(self, at: float, number: int) -> None:
        heapq.heappush(self._deadlines, (at, number))
        if len(self._deadlines) > self._deadlines_limit:
            # Most requests end long before their deadline; do not keep a deadline for each.
            self._deadlines = [each for each in self._deadlines if self._is_open(each[1])]
            heapq.heapify(self._deadlines)
            self._deadlines_limit = MIN_DEADLINES + 2 * len(self._deadlines)

    def _tie(self, number: int, session: Session, now: float) -> None:
        """Wait for that peer until this number is over."""
        self._of_peer[session.peer_epoch].add(number)
        session.begin_waiting(now)

    def _untie(self, number: int, peer: int) -> None:
        """Wait for that peer no longer, unless others do."""
        numbers = self._of_peer[peer]
        numbers.discard(number)
        if not numbers:
            del self._of_peer[peer]
            session = self.sessions.get(peer)
            if session is not None:
                session.end_waiting()

    def _do(self, commands: Iterable[Command]) -> None:
        self._commands.extend(commands)

    def _next_batch(self) -> list[Command]:
        """Return commands up to one whose execution may feed this endpoint in the middle."""
        batch: list[Command] = []
        while self._commands:
            command = self._commands.popleft()
            if not isinstance(command, self._feeding):
                batch.append(command)
            elif not self._is_void(command):
                batch.append(command)
                break
        return batch

    # First contact.

    def _session_at(self, path: Path, life: int = 0) -> Session | None:
        """Return the session at `path`; None if another life is meant, which may be there now."""
        session = next(iter(self._at_path.get(path, ())), None)
        return None if session is None or life not in (0, session.peer_epoch) else session

    def _hello_received(self, path: Path, packet: Packet, hello: Hello, now: float) -> None:
        peer = packet.source_epoch
        self._now_leads_to(path, peer, now)
        session = self.sessions.get(peer)
        if session is None and self._is_knock(hello):
            self.contact(path, now)
            return
        is_contacted = self._contacts.pop(path, None) is not None
        if session is None:
            if len(self.sessions) >= self._max_peers and not self._make_room(now):
                failure = Failure(Reason.BUSY, f"too many peers ({self._max_peers})")
                self._turn_away(path, Goodbye(*failure, packet.target_epoch))
                if is_contacted:
                    self._contact_failed(path, failure, now)
                return
            session = self.sessions[peer] = Session(
                self.epoch,
                self._hello(peer),
                peer_epoch=peer,
                peer_hello=hello,
                path=path,
                now=now,
                timing=self._timing,
                max_answers=self._max_answers,
                changed=self._agenda.note,
            )
            self._at_path[path].append(session)
            self._do([Greet(peer, hello)])
        self._add_path(session, path)
        session.heard(now)
        if packet.target_epoch == 0:
            self._do([Transmit(path, session.greeting())])
        self._greeted(session, path, now)

    def _frames_received(self, path: Path, packet: Packet, now: float) -> None:
        session = self.sessions.get(packet.source_epoch)
        if session is None:
            self._unknown_peer(path, packet, now)
            return
        if path not in session.paths:
            self._add_path(session, path)
        received = session.receive(packet, now)
        if session.is_missed:
            session.is_missed = False
            self._greeted(session, path, now)
        for frame in received:
            if isinstance(frame, Goodbye):
                self._part(session.peer_epoch, Failure(frame.reason, frame.message), now)
                return
            self._frame_received(session, frame, now)

    def _unknown_peer(self, path: Path, packet: Packet, now: float) -> None:
        """A peer has a session of which this side does not know yet, or knew never."""
        self.counters["of_no_session"] += 1
        if isinstance(packet.frame, Goodbye):
            failure = Failure(packet.frame.reason, packet.frame.message)
            self._part(packet.source_epoch, failure, now)
            if self._contacts.pop(path, None) is not None:
                self._contact_failed(path, failure, now)
        else:
            self._now_leads_to(path, packet.source_epoch, now)
            self.contact(path, now)

    # Packets that belong to no session. What answers them is addressed to nobody, but for the
    # answer to a life whose link has ended here: a Goodbye that addresses a life is a last word,
    # and proves that nothing of this side can land there any more. It must never be said for
    # another reason, for the channel may repeat it.

    def _of_another_life(self, path: Path, packet: Packet) -> None:
        self.counters["of_another_life"] += 1
        if not isinstance(packet.frame, Goodbye):
            message = "this is another life of the process you mean"
            self._turn_away(path, Goodbye(Reason.PEER_LOST, message, packet.target_epoch))

    def _of_an_ended_life(self, path: Path, packet: Packet, now: float) -> None:
        """It is late, or its sender lives and one of the two has given up the other (for room)."""
        self.counters["of_an_ended_life"] += 1
        peer, frame = packet.source_epoch, packet.frame
        if not isinstance(frame, Goodbye):
            goodbye = Goodbye(Reason.PEER_LOST, "this link has ended; begin a new life", peer)
            last = Packet(PROTOCOL_VERSION, self.epoch, peer, 0, 0, goodbye)
            self._do([Transmit(path, encode(last))])
        elif frame.absent == self.epoch and self._contacts.pop(path, None) is not None:
            self._contact_failed(path, Failure(frame.reason, frame.message), now)

    def _turn_away(self, path: Path, goodbye: Goodbye) -> None:
        packet = Packet(PROTOCOL_VERSION, self.epoch, 0, 0, 0, goodbye)
        self._do([Transmit(path, encode(packet))])

    def _turned_away(self, path: Path, goodbye: Goodbye, now: float) -> None:
        failure = Failure(goodbye.reason, goodbye.message)
        if goodbye.absent:
            session = self.sessions.get(goodbye.absent)
            if session is not None:
                self._leave_path(session, path, failure, now)
        elif self._contacts.pop(path, None) is not None:
            self._contact_failed(path, failure, now)

    def _refuse(self, path: Path, error: ProtocolError, now: float) -> None:
        if self._contacts.pop(path, None) is not None:
            self._contact_failed(path, Failure(Reason.PROTOCOL, error.message), now)
            self._do([Leave(path)])  # ZeroMQ would keep the connection, whoever is there next
        elif path not in self._refused and len(self._refused) < MAX_REFUSED_PATHS:
            self._refused.add(path)  # once: two versions must not refuse each other for ever
            self._turn_away(path, Goodbye(Reason.PROTOCOL, clipped(error.message)))

    # Farewell.

    def _now_leads_to(self, path: Path, peer: int, now: float) -> None:
        """Whoever was at `path` before is not there any more."""
        failure = Failure(Reason.PEER_LOST, "another life of the process has taken its place")
        for session in list(self._at_path.get(path, ())):
            if session.peer_epoch != peer:
                self._leave_path(session, path, failure, now)

    def _add_path(self, session: Session, path: Path) -> None:
        if path not in session.paths:
            session.add_path(path)
            self._at_path[path].append(session)

    def _forget_at(self, path: Path, session: Session) -> None:
        self._at_path[path].remove(session)
        if not self._at_path[path]:
            del self._at_path[path]

    def _leave_path(self, session: Session, path: Path, failure: Failure, now: float) -> None:
        if path in session.paths:
            session.paths.remove(path)
            self._forget_at(path, session)
            if not session.paths:
                self._lose(session, failure, now)

    def _lose(self, session: Session, failure: Failure, now: float) -> None:
        """The peer cannot be reached. It may still write, and it may come back."""
        if not session.is_lost:
            session.lose()
            self._peer_lost(session, failure, False, now)
            self._do([Part(session.peer_epoch, failure, proven=False)])

    def _part(self, peer: int, failure: Failure, now: float) -> None:
        """The peer is gone for good, and nothing of it can write any more."""
        self._ended[peer] = failure.message
        if len(self._ended) > MAX_ENDED_LIVES:
            del self._ended[next(iter(self._ended))]
        session = self.sessions.pop(peer, None)
        if session is not None:
            for path in session.paths:
                self._forget_at(path, session)
            self._peer_lost(session, failure, True, now)
            self._agenda.forget(session)
            self._do([Part(peer, failure, proven=True)])

    def _make_room(self, now: float) -> bool:
        """Forget a peer that is lost and has nothing to settle; False if there is none."""
        for peer, session in self.sessions.items():
            if session.is_lost and not self._of_peer.get(peer):
                self._part(peer, Failure(Reason.BUSY, FORGOTTEN), now)
                return True
        return False
