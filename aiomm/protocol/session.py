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

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from .frames import PROTOCOL_VERSION, Ack, Frame, Goodbye, Hello, Packet, Ping, Pong, encode

__all__ = ["MAX_ANSWERS", "NEVER", "Contact", "Path", "Session", "Timing"]

NEVER: Final = math.inf
"""A time that does not come."""

MAX_EARLY_FRAMES = 256
"""Kept while an earlier one is missing. No more are on their way at once, so that none of them is
too early, even if a better path overtakes all that is still on another one."""
ACKNOWLEDGE_EVERY = 64
"""One frame in so many is acknowledged at once: others may wait for room behind it."""
MAX_ANSWERS = 8192
"""What a peer may have this side keep for it, at least: answers that it leaves unacknowledged, and
notes."""


@dataclass(frozen=True, slots=True)
class Timing:
    """How a session keeps time, in seconds."""

    resend_first: float = 0.2
    """Until an unanswered frame is sent again; doubles each time, up to `resend_last`."""
    resend_last: float = 2.0
    acknowledge: float = 0.025
    """How long an acknowledgement waits for a packet to ride on."""
    ping: float = 1.0
    """Silence after which a busy session asks for a sign of life; well below `peer_timeout`."""
    peer_timeout: float = 15.0
    """Silence after which the peer counts as lost. Encoders hold their loop for seconds."""

    @classmethod
    def for_timeout(cls, peer_timeout: float) -> Timing:
        """Return what is usual, with a peer that is asked several times before it is lost."""
        return cls(peer_timeout=peer_timeout, ping=min(1.0, peer_timeout / 4))


class Path(NamedTuple):
    """One way to a peer: a channel, and what that calls the peer. Opaque here, and hashable."""

    rank: int
    """Of several paths to one peer the one with the highest rank is used."""
    channel: Any
    peer: Any


class Contact:
    """A first contact: a Hello that is said again until a session stands, or nobody waits."""

    def __init__(
        self, local_epoch: int, hello: Hello, now: float, timing: Timing, until: float = NEVER
    ) -> None:
        self.until = until
        """When nobody waits for it any more."""
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
        """Return when :meth:`packets` has to be asked again, or it is over."""
        return min(self._resend_at, self.until)


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
        max_answers: int = MAX_ANSWERS,
        changed: Callable[[Session], None] = lambda _: None,
    ) -> None:
        self.local_epoch = local_epoch
        self.peer_epoch = peer_epoch
        self.hello = hello
        self.peer_hello = peer_hello
        self.difference: str | None = None
        """How the peer's schema differs from this side's; None before they were compared."""
        self.paths = [path]
        """Ways to reach the peer, the preferred one first; empty while it cannot be reached."""
        self.is_lost = False
        """The peer counts as lost; if it speaks again, the session goes on."""
        self.is_missed = False
        """It was lost and has not been heard since: what waits for anybody passed it over."""
        self.is_choked = False
        """The peer has left too many answers unacknowledged, so that one was not sent."""
        self.is_busy = False
        """Somebody waits for this peer: ask for signs of life, and notice when none come."""
        self.ignored = 0
        """Packets that were repeated, or too early to keep."""
        self._timing = timing
        self._max_answers = max_answers
        self._changed = changed
        self._last_heard = now
        self._sent = 0
        self._delivered = 0
        self._unsent: list[tuple[int, Frame]] = []
        """Frames that were never handed to the channel."""
        self._held: list[tuple[int, Frame]] = []
        """Frames behind those, held back until there is room; see MAX_EARLY_FRAMES."""
        self._unacknowledged: deque[tuple[int, Frame]] = deque()
        """Frames that were handed to the channel, until the peer has acknowledged them."""
        self._answers: deque[int] = deque()
        """The sequences of answers that the peer has not acknowledged."""
        self._early: dict[int, Frame] = {}
        self._notes: dict[int, list[Frame]] = {}
        """What planes have carried, by the sequence of the frame that it waits for."""
        self._num_notes = 0
        self._outbox: list[Frame] = []
        self._resend_after = timing.resend_first
        self._resend_at = self._acknowledge_at = NEVER
        self._num_resent = 0
        self._unheard_since = now
        """How often the oldest unacknowledged frame was sent again, and since when it waits."""
        self._heard_or_asked = now
        """When the peer was heard last, or was last asked for a sign of life since."""

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
        self.is_lost = self.is_missed = True
        self._early.clear()
        self._changed(self)

    def send(self, frame: Frame) -> int:
        """Queue a frame that has to arrive; return its sequence."""
        has_room = len(self._unacknowledged) + len(self._unsent) < MAX_EARLY_FRAMES
        queue = self._unsent if has_room else self._held
        self._sent += 1
        queue.append((self._sent, frame))
        self._changed(self)
        return self._sent

    def answer(self, frame: Frame) -> int:
        """Do the same with a frame that the peer, and not this side's user, has caused.

        A peer that leaves thousands of them unacknowledged counts as silent, and gets no more: 0.
        """
        if len(self._answers) >= self._max_answers:
            self.is_choked = True
            return 0
        sequence = self.send(frame)
        self._answers.append(sequence)
        return sequence

    def note(self, frame: Frame, behind: int) -> bytes:
        """Return a frame for a plane to carry, which stands behind the one with that sequence."""
        return self._encoded(behind, frame)

    def say(self, frame: Frame) -> None:
        """Queue a frame that may be lost: Ping, Pong, Ack; and see :meth:`say_last`."""
        self._outbox.append(frame)
        self._changed(self)

    def say_last(self, goodbye: Goodbye) -> None:
        """Queue the last word, and in front of it, again, all that is not acknowledged.

        Nobody will repeat that any more, and on a better path the last word would overtake it.
        """
        self._resend_at = -NEVER
        self._release(len(self._held))
        self.say(goodbye)

    @property
    def holds_back(self) -> bool:
        """Whether frames wait here until the peer, which is not lost, acknowledges others."""
        return bool(self._held) and not self.is_lost

    def greeting(self) -> bytes:
        """Return this side's Hello to the peer, which answers the peer's."""
        return self._encoded(0, self.hello)

    def heard(self, now: float) -> None:
        """Note a sign of life."""
        self._last_heard = self._heard_or_asked = now
        if self.is_lost:  # and all that could not be sent has failed with that
            self.is_lost = self.is_choked = False
            self._num_resent = 0
        self._changed(self)

    def receive(self, packet: Packet, now: float) -> list[Frame]:
        """Take a packet of this peer's; return the frames that are new and in order."""
        self.heard(now)
        self._settle(packet.acknowledged, now)
        sequence, frame = packet.sequence, packet.frame
        if sequence == 0:
            return self._unsequenced(frame)
        if sequence % ACKNOWLEDGE_EVERY == 0:
            self._acknowledge_at = now
        elif self._acknowledge_at == NEVER:
            self._acknowledge_at = now + self._timing.acknowledge
        if sequence == self._delivered + 1 and not (self._early or self._notes):
            self._delivered = sequence
            return [frame]
        ahead = sequence - self._delivered
        if not 0 < ahead <= MAX_EARLY_FRAMES or sequence in self._early:
            self.ignored += 1
            return []
        self._early[sequence] = frame
        return self._in_order()

    def receive_note(self, packet: Packet) -> list[Frame]:
        """Take what a plane has carried; return it now, or with the frames it stands behind."""
        ahead = packet.sequence - self._delivered
        if ahead <= 0:
            return [packet.frame]
        if self._num_notes < self._max_answers:
            self._notes.setdefault(packet.sequence, []).append(packet.frame)
            self._num_notes += 1
        else:
            self.ignored += 1
        return []

    def packets(self, now: float) -> list[bytes]:
        """Return what has to be handed to the channel now."""
        chosen = self._sequenced(now)  # before the rest: a Goodbye comes last
        if self._outbox:
            chosen += [(0, frame) for frame in self._outbox]
            self._outbox.clear()
        if chosen:
            self._acknowledge_at = NEVER  # every packet acknowledges
        elif self._acknowledge_at <= now:
            self._acknowledge_at = NEVER
            chosen.append((0, Ack()))
        if now >= self._heard_or_asked + self._timing.ping and self._expects_signs():
            chosen.append((0, Ping()))
            # For longer than that nobody has asked: it is no silence of the peer's.
            self._last_heard += now - self._heard_or_asked - self._timing.ping
            self._heard_or_asked = now
        return [self._encoded(*each) for each in chosen] if chosen else []

    def next_deadline(self) -> float:
        """Return when :meth:`packets` or :meth:`is_silent` has to be asked again."""
        earliest = min(self._resend_at, self._acknowledge_at)
        if self._expects_signs():
            ping_at = self._heard_or_asked + self._timing.ping
            return min(earliest, ping_at, self._last_heard + self._timing.peer_timeout)
        return earliest

    def is_silent(self, now: float) -> bool:
        """Somebody waits, and the peer, though it was asked, has said nothing for too long."""
        was_asked = now < self._heard_or_asked + 2 * self._timing.ping  # else this side was held up
        is_silent = was_asked and now >= self._last_heard + self._timing.peer_timeout
        return self._expects_signs() and (self.is_choked or self._is_deaf(now) or is_silent)

    def _is_deaf(self, now: float) -> bool:
        """Whether nothing was acknowledged for twice the peer's time, whatever else it says."""
        limit = 2 * self._timing.peer_timeout
        was_told = self._num_resent * self._timing.resend_last >= limit  # else it was held up here
        return was_told and now >= self._unheard_since + limit

    def silence(self, now: float) -> str:
        """Say why :meth:`is_silent`."""
        if self.is_choked:
            return f"the peer has left {self._max_answers} answers unacknowledged"
        if self._is_deaf(now):
            return f"the peer has acknowledged nothing that was sent {self._num_resent} times"
        return f"the peer has not answered for {self._timing.peer_timeout:g} s"

    def begin_waiting(self, now: float) -> None:
        """Start the clock of silence: from now on somebody waits for this peer."""
        if self.is_lost or not self._waits_for_peer():
            self.heard(now)  # a peer that was lost is given the same time again
        self.is_busy = True
        self._changed(self)

    def end_waiting(self) -> None:
        """Nobody waits for this peer any more."""
        self.is_busy = False

    def _waits_for_peer(self) -> bool:
        return self.is_busy or bool(self._unacknowledged or self._unsent)

    def _expects_signs(self) -> bool:
        """Whether the peer's silence means something."""
        return not self.is_lost and self._waits_for_peer()

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
            if notes := self._notes.pop(self._delivered, None):
                self._num_notes -= len(notes)
                ready += notes
        return ready

    def _settle(self, acknowledged: int, now: float) -> None:
        """Drop what the peer has acknowledged, and let the rest wait afresh."""
        pending = self._unacknowledged
        if not pending or pending[0][0] > acknowledged:
            return
        acknowledged = min(acknowledged, pending[-1][0])  # not what was never sent
        while pending and pending[0][0] <= acknowledged:
            pending.popleft()
        while self._answers and self._answers[0] <= acknowledged:
            self._answers.popleft()
        self._num_resent, self._unheard_since = 0, now
        self._resend_after = self._timing.resend_first
        self._resend_at = now + self._resend_after if pending else NEVER
        if self._held:
            self._release(max(0, MAX_EARLY_FRAMES - len(pending) - len(self._unsent)))

    def _release(self, count: int) -> None:
        """Let so many frames go out for which there was no room."""
        self._unsent += self._held[:count]
        del self._held[:count]

    def _sequenced(self, now: float) -> list[tuple[int, Frame]]:
        """The frames that were never sent, behind those that the peer has not answered in time."""
        chosen: list[tuple[int, Frame]] = []
        if self._resend_at <= now:
            chosen += self._unacknowledged
            self._num_resent += 1
            self._resend_after = min(2 * self._resend_after, self._timing.resend_last)
            self._resend_at = now + self._resend_after
        if self._unsent:
            chosen += self._unsent
            self._unacknowledged += self._unsent
            self._unsent.clear()
            if self._resend_at == NEVER:
                self._unheard_since = now
                self._resend_at = now + self._resend_after
                if not self.is_busy:
                    # Silence counts from when somebody waits.
                    self._last_heard = self._heard_or_asked = now
        return chosen

    def _encoded(self, sequence: int, frame: Frame) -> bytes:
        return encode(
            Packet(
                PROTOCOL_VERSION,
                self.local_epoch,
                self.peer_epoch,
                sequence,
                self._delivered,
                frame,
            )
        )
