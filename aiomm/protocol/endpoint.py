"""What both endpoints share: sessions with many peers, from first contact to farewell.

Feed it packets, lost paths and the time; take :meth:`Endpoint.commands`. It has no socket and
no clock. :mod:`.sending` and :mod:`.receiving` add the transfers.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable

from ..errors import Failure, ProtocolError, Reason
from .commands import Command, Greet, Part, Transmit
from .frames import PROTOCOL_VERSION, Frame, Goodbye, Hello, Packet, decode, encode
from .session import Path, Session, Timing

__all__ = ["Endpoint"]

MAX_REFUSED_PATHS = 1024
MIN_DEADLINES = 1024


class Endpoint(ABC):
    """One side's protocol state: a session for each life of each peer.

    Args:
        epoch: random, positive, below 2**63; another for every life.
        timing: how sessions keep time.
        max_peers: more than this are refused.
    """

    def __init__(self, epoch: int, *, timing: Timing, max_peers: int) -> None:
        self.epoch = epoch
        self.sessions: dict[int, Session] = {}
        """By the peer's epoch. A lost peer keeps its session: it may come back."""
        self.counters: Counter[str] = Counter()
        """What was ignored, and why."""
        self._timing = timing
        self._max_peers = max_peers
        self._contacts: dict[Path, Session] = {}
        """First contacts that wait for the peer's Hello."""
        self._refused: set[Path] = set()
        self._commands: list[Command] = []
        self._deadlines: list[tuple[float, int]] = []
        self._deadlines_limit = MIN_DEADLINES

    # What the driver feeds in.

    def contact(self, path: Path, now: float) -> None:
        """Say Hello to whoever is at `path`. Again is harmless."""
        if path not in self._contacts and self._session_at(path) is None:
            self._contacts[path] = self._new_session(0, path, now)

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
            self.counters["of_another_life"] += 1
            self._disown(path, packet, "this is another life of the process you mean")
        elif isinstance(packet.frame, Hello):
            self._hello_received(path, packet, packet.frame, now)
        elif packet.target_epoch == self.epoch:
            self._frames_received(path, packet, now)

    def path_lost(self, path: Path, cause: str, now: float) -> None:
        """Learn that nothing gets through `path` any more."""
        self._refused.discard(path)
        contact = self._contacts.pop(path, None)
        if contact is not None:
            self._contact_failed(path, Failure(Reason.PEER_LOST, cause), now)
        for session in list(self.sessions.values()):
            if path in session.paths:
                session.paths.remove(path)
                if not session.paths:
                    self._lose(session, Failure(Reason.PEER_LOST, cause), now)

    def peer_died(self, peer: int, now: float) -> None:
        """Learn that the process with epoch `peer` is dead for certain."""
        session = self.sessions.get(peer)
        if session is not None:
            self._part(session, Failure(Reason.PEER_LOST, "the peer's process died"), now)

    def use_path(self, peer: int, path: Path) -> None:
        """Use another way to `peer` as well, and tell it by a first packet."""
        session = self.sessions.get(peer)
        if session is not None:
            session.add_path(path)
            session.announce_path()

    def say_goodbye(self, failure: Failure) -> None:
        """Tell every peer that this life ends. Call it when no write runs any more."""
        for session in self.sessions.values():
            session.say(Goodbye(failure.reason, failure.message))

    def timer(self, now: float) -> None:
        """Look at everything whose time has come."""
        for session in list(self.sessions.values()):
            if session.is_silent(now):
                silence = f"the peer has not answered for {self._timing.peer_timeout:g} s"
                self._lose(session, Failure(Reason.PEER_LOST, silence), now)
        while self._deadlines and self._deadlines[0][0] <= now:
            self._expired(heapq.heappop(self._deadlines)[1], now)

    # What the driver takes out.

    def commands(self, now: float) -> list[Command]:
        """Return what has to be done now, in order. Call it after every input."""
        commands, self._commands = self._commands, []
        for session in (*self.sessions.values(), *self._contacts.values()):
            if session.paths:
                path = session.paths[0]
                commands += [Transmit(path, packet) for packet in session.packets(now)]
        return commands

    def next_deadline(self) -> float | None:
        """Return when :meth:`timer` and :meth:`commands` have to be called again."""
        deadlines = [
            session.next_deadline()
            for session in (*self.sessions.values(), *self._contacts.values())
            if session.paths
        ]
        if self._deadlines:
            deadlines.append(self._deadlines[0][0])
        return min((at for at in deadlines if at is not None), default=None)

    # What the two kinds of endpoint add.

    @abstractmethod
    def _hello(self, peer: int) -> Hello:
        """Return this side's Hello to the peer with that epoch (0: not known yet)."""

    @abstractmethod
    def _greeted(self, session: Session, path: Path, now: float) -> None:
        """A link stands, first contacted over `path`."""

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

    def _set_deadline(self, at: float, number: int) -> None:
        heapq.heappush(self._deadlines, (at, number))
        if len(self._deadlines) > self._deadlines_limit:
            # Most requests end long before their deadline; do not keep a deadline for each.
            self._deadlines = [each for each in self._deadlines if self._is_open(each[1])]
            heapq.heapify(self._deadlines)
            self._deadlines_limit = MIN_DEADLINES + 2 * len(self._deadlines)

    def _do(self, commands: Iterable[Command]) -> None:
        self._commands.extend(commands)

    # First contact.

    def _new_session(self, peer: int, path: Path, now: float) -> Session:
        return Session(
            self.epoch,
            self._hello(peer),
            peer_epoch=peer,
            path=path,
            now=now,
            timing=self._timing,
        )

    def _session_at(self, path: Path) -> Session | None:
        return next((each for each in self.sessions.values() if path in each.paths), None)

    def _hello_received(self, path: Path, packet: Packet, hello: Hello, now: float) -> None:
        session = self.sessions.get(packet.source_epoch)
        contact = self._contacts.pop(path, None) if packet.target_epoch else None
        if session is None:
            if len(self.sessions) >= self._max_peers:
                self._disown(path, packet, f"too many peers ({self._max_peers})", Reason.BUSY)
                return
            session = contact or self._new_session(packet.source_epoch, path, now)
            session.establish(packet.source_epoch, hello)
            self.sessions[packet.source_epoch] = session
            self._do([Greet(packet.source_epoch, hello)])
        session.add_path(path)
        session.is_lost = False
        if packet.target_epoch == 0:
            session.say(session.hello)
        self._greeted(session, path, now)

    def _frames_received(self, path: Path, packet: Packet, now: float) -> None:
        session = self.sessions.get(packet.source_epoch)
        if session is None:
            self._unknown_peer(path, packet, now)
            return
        if path not in session.paths:
            session.add_path(path)
        for frame in session.receive(packet, now):
            if isinstance(frame, Goodbye):
                self._part(session, Failure(frame.reason, frame.message), now)
                return
            self._frame_received(session, frame, now)

    def _unknown_peer(self, path: Path, packet: Packet, now: float) -> None:
        if isinstance(packet.frame, Goodbye):
            failure = Failure(packet.frame.reason, packet.frame.message)
            if self._contacts.pop(path, None) is not None:
                self._contact_failed(path, failure, now)
            lost = self._session_at(path)
            if lost is not None:
                self._lose(lost, failure, now)
        elif path not in self._contacts:
            self.counters["of_no_session"] += 1
            self._disown(path, packet, "no session with this peer")

    def _disown(
        self, path: Path, packet: Packet, message: str, reason: Reason = Reason.PEER_LOST
    ) -> None:
        """Answer that there is no session: nothing of it is kept, so nothing of it can write."""
        if not isinstance(packet.frame, Goodbye):
            self._answer(path, packet.source_epoch, Goodbye(reason, message))

    def _answer(self, path: Path, target_epoch: int, frame: Frame) -> None:
        packet = Packet(PROTOCOL_VERSION, self.epoch, target_epoch, 0, 0, frame)
        self._do([Transmit(path, encode(packet))])

    def _refuse(self, path: Path, error: ProtocolError, now: float) -> None:
        if self._contacts.pop(path, None) is not None:
            self._contact_failed(path, Failure(Reason.PROTOCOL, error.message), now)
        elif path not in self._refused and len(self._refused) < MAX_REFUSED_PATHS:
            self._refused.add(path)  # once: two versions must not refuse each other for ever
            self._answer(path, 0, Goodbye(Reason.PROTOCOL, error.message[:500]))

    # Farewell.

    def _lose(self, session: Session, failure: Failure, now: float) -> None:
        """The peer cannot be reached. It may still write, and it may come back."""
        session.is_lost = True
        self._peer_lost(session, failure, False, now)
        self._do([Part(session.peer_epoch, failure, proven=False)])

    def _part(self, session: Session, failure: Failure, now: float) -> None:
        """The peer is gone for good, and nothing of it can write any more."""
        del self.sessions[session.peer_epoch]
        self._peer_lost(session, failure, True, now)
        self._do([Part(session.peer_epoch, failure, proven=True)])
