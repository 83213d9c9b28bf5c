"""The link with one incarnation of one peer: each frame once and in order, over a lossy channel.

The channel below may lose, repeat, delay and reorder packets, and may change (from ZeroMQ to
a same-host stream and back) at any time. A session numbers the frames that matter, sends them
again until they are acknowledged, and hands each one up once, in order. Acknowledgements ride
on every packet; alone they travel only when nothing else does for a while.

Both epochs stand in every packet. A packet that addresses another life of this process, or
comes from another life of the peer, never reaches a session. Between two lives there is only
ever one session, so its numbers never begin again and a late packet is always recognised.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from .frames import PROTOCOL_VERSION, Ack, Frame, Goodbye, Hello, Packet, Ping, Pong, encode

__all__ = ["Contact", "Path", "Session", "Timing", "sooner"]

MAX_EARLY_FRAMES = 256
MAX_UNACKNOWLEDGED = 8192


@dataclass(frozen=True, slots=True)
class Timing:
    """How a session keeps time, in seconds."""

    resend_first: float = 0.2
    """Until an unanswered frame is sent again; doubles each time, up to `resend_last`."""
    resend_last: float = 2.0
    acknowledge: float = 0.025
    """How long an acknowledgement waits for a packet to ride on."""
    ping: float = 1.0
    """Silence after which a busy session asks for a sign of life."""
    peer_timeout: float = 15.0
    """Silence after which the peer counts as lost. Encoders hold their loop for seconds."""


class Path(NamedTuple):
    """One way to a peer: a channel, and what that channel calls the peer. Opaque here."""

    rank: int
    """Of several paths to one peer the one with the highest rank is used."""
    channel: Hashable
    peer: Hashable


class Contact:
    """A first contact: a Hello that is said again until a session stands."""

    def __init__(self, local_epoch: int, hello: Hello, now: float, timing: Timing) -> None:
        self._packet = encode(Packet(PROTOCOL_VERSION, local_epoch, 0, 0, 0, hello))
        self._timing = timing
        self._resend_after = timing.resend_first
        self._resend_at = now

    def packets(self, now: float) -> list[bytes]:
        """Return what has to be handed to the channel now."""
        if now < self._resend_at:
            return []
        self._resend_at = now + self._resend_after
        self._resend_after = min(2 * self._resend_after, self._timing.resend_last)
        return [self._packet]

    def next_deadline(self) -> float:
        """Return when :meth:`packets` has to be asked again."""
        return self._resend_at


class Session:
    """Reliable, ordered frames to and from one peer.

    Feed it packets and frames, then take :meth:`packets`; call again at :meth:`next_deadline`.

    Args:
        local_epoch: this endpoint's life.
        hello: this endpoint's Hello to that peer.
        peer_epoch: the peer's life.
        peer_hello: the peer's Hello.
        path: the first way to reach the peer.
        changed: is called when there may be packets to take, or another deadline.
    """

    def __init__(
        self,
        local_epoch: int,
        hello: Hello,
        *,
        peer_epoch: int,
        peer_hello: Hello,
        path: Path,
        now: float,
        timing: Timing,
        changed: Callable[[Session], None] = lambda _: None,
    ) -> None:
        self.local_epoch = local_epoch
        self.peer_epoch = peer_epoch
        self.hello = hello
        self.peer_hello = peer_hello
        self.paths = [path]
        """Ways to reach the peer, the preferred one first; empty while it cannot be reached."""
        self.is_lost = False
        """The peer counts as lost; if it speaks again, the session goes on."""
        self.is_choked = False
        """The peer has left too much unacknowledged."""
        self.is_busy = False
        """Somebody waits for this peer: ask for signs of life, and notice when none come."""
        self.ignored = 0
        """Packets that were repeated, or too early to keep."""
        self._timing = timing
        self._changed = changed
        self._last_heard = now
        self._sent = 0
        self._delivered = 0
        self._unacknowledged: deque[tuple[int, Frame]] = deque()
        self._unsent = 0
        """How many of the last of `_unacknowledged` were never handed to the channel."""
        self._early: dict[int, Frame] = {}
        self._outbox: list[Frame] = []
        self._resend_after = timing.resend_first
        self._resend_at: float | None = None
        self._acknowledge_at: float | None = None
        self._ping_at: float | None = None

    def add_path(self, path: Path) -> None:
        """Add a way to reach the peer, and use it if it is the best."""
        if path not in self.paths:
            self._changed(self)
            self.paths = sorted([*self.paths, path], key=lambda each: -each.rank)

    def announce_path(self) -> None:
        """Let a packet travel at once, so that the peer learns of the best path."""
        self.say(Ack())

    def lose(self) -> None:
        """Count the peer as lost; what came too early from it will come again."""
        self.is_lost = True
        self._early.clear()
        self._changed(self)

    def send(self, frame: Frame) -> None:
        """Queue a frame that has to arrive.

        A peer that leaves thousands unacknowledged counts as silent, and gets no more.
        """
        if len(self._unacknowledged) >= MAX_UNACKNOWLEDGED:
            self.is_choked = True
            return
        self._sent += 1
        self._unacknowledged.append((self._sent, frame))
        self._unsent += 1
        self._changed(self)

    def say(self, frame: Frame) -> None:
        """Queue a frame that may be lost: Ping, Pong, Ack, and a last Goodbye."""
        self._outbox.append(frame)
        self._changed(self)

    def greeting(self) -> bytes:
        """Return this side's Hello to the peer, which answers the peer's."""
        return encode(self._packet(0, self.hello))

    def heard(self, now: float) -> None:
        """Note a sign of life."""
        self._last_heard = now
        self._ping_at = None
        self.is_lost = False
        self._changed(self)

    def receive(self, packet: Packet, now: float) -> list[Frame]:
        """Take a packet of this peer's; return the frames that are new and in order."""
        self.heard(now)
        self._settle(packet.acknowledged, now)
        frame = packet.frame
        if packet.sequence == 0:
            return self._unsequenced(frame)
        if self._acknowledge_at is None:
            self._acknowledge_at = now + self._timing.acknowledge
        if packet.sequence <= self._delivered or packet.sequence in self._early:
            self.ignored += 1
            return []
        if packet.sequence > self._delivered + MAX_EARLY_FRAMES:
            self.ignored += 1
            return []
        self._early[packet.sequence] = frame
        return self._in_order()

    def packets(self, now: float) -> list[bytes]:
        """Return what has to be handed to the channel now."""
        chosen = self._sequenced(now)  # before the rest: a Goodbye comes last
        chosen += [self._packet(0, frame) for frame in self._outbox]
        self._outbox.clear()
        if self._acknowledge_at is not None and (chosen or self._acknowledge_at <= now):
            self._acknowledge_at = None
            chosen = chosen or [self._packet(0, Ack())]
        if self._ping_is_due(now):
            chosen.append(self._packet(0, Ping()))
            self._ping_at = now
        return [encode(packet) for packet in chosen]

    def next_deadline(self) -> float | None:
        """Return when :meth:`packets` or :meth:`is_silent` has to be asked again."""
        earliest = sooner(self._resend_at, self._acknowledge_at)
        if self._waits_for_peer() and not self.is_lost:
            earliest = sooner(earliest, self._next_ping())
            earliest = sooner(earliest, self._last_heard + self._timing.peer_timeout)
        return earliest

    def is_silent(self, now: float) -> bool:
        """Somebody waits, and the peer has said nothing for too long."""
        return (
            self._waits_for_peer()
            and not self.is_lost
            and (self.is_choked or now >= self._last_heard + self._timing.peer_timeout)
        )

    def begin_waiting(self, now: float) -> None:
        """Start the clock of silence: from now on somebody waits for this peer."""
        if self.is_lost or not self._waits_for_peer():
            self.heard(now)  # a peer that was lost is given the same time again
        self.is_busy = True
        self._changed(self)

    def _waits_for_peer(self) -> bool:
        return self.is_busy or bool(self._unacknowledged)

    def _next_ping(self) -> float:
        since = self._last_heard if self._ping_at is None else self._ping_at
        return since + self._timing.ping

    def _ping_is_due(self, now: float) -> bool:
        return self._waits_for_peer() and not self.is_lost and now >= self._next_ping()

    def _unsequenced(self, frame: Frame) -> list[Frame]:
        match frame:
            case Ack() | Pong():
                return []
            case Ping():
                self.say(Pong())
                return []
            case Goodbye():
                return [frame]
            case _:
                self.ignored += 1  # it could have been repeated
                return []

    def _in_order(self) -> list[Frame]:
        ready = []
        while (frame := self._early.pop(self._delivered + 1, None)) is not None:
            self._delivered += 1
            ready.append(frame)
        return ready

    def _settle(self, acknowledged: int, now: float) -> None:
        """Drop what the peer has acknowledged, and let the rest wait afresh."""
        pending = len(self._unacknowledged) - self._unsent
        settled = 0
        while settled < pending and self._unacknowledged[0][0] <= acknowledged:
            self._unacknowledged.popleft()
            settled += 1
        if settled:
            self._resend_after = self._timing.resend_first
            self._resend_at = now + self._resend_after if settled < pending else None

    def _sequenced(self, now: float) -> list[Packet]:
        """The frames that were never sent, or the first again if the peer has not answered."""
        first_unsent = len(self._unacknowledged) - self._unsent
        fresh: list[tuple[int, Frame]] = []
        if self._resend_at is not None and self._resend_at <= now:
            # The peer keeps no more than so many that are too early.
            fresh += islice(self._unacknowledged, min(first_unsent, MAX_EARLY_FRAMES))
            self._resend_after = min(2 * self._resend_after, self._timing.resend_last)
            self._resend_at = now + self._resend_after
        fresh += islice(self._unacknowledged, first_unsent, None)
        self._unsent = 0
        if fresh and self._resend_at is None:
            self._resend_at = now + self._resend_after
            if not self.is_busy:
                self._last_heard = now  # silence counts from when somebody waits
        elif not self._unacknowledged:
            self._resend_at = None
        return [self._packet(sequence, frame) for sequence, frame in fresh]

    def _packet(self, sequence: int, frame: Frame) -> Packet:
        return Packet(
            PROTOCOL_VERSION, self.local_epoch, self.peer_epoch, sequence, self._delivered, frame
        )


def sooner(one: float | None, other: float | None) -> float | None:
    """Return the earlier of two times, either of which may be never."""
    if one is None or other is None:
        return other if one is None else one
    return one if one < other else other
