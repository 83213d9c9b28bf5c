"""The two kinds of ZeroMQ socket of a channel: one ROUTER, and a DEALER per connection.

::

    connect()            bind
    DEALER  <--------->  ROUTER      one DEALER has one peer, one ROUTER has many

Each owns one socket of pyzmq's, its monitor and the queues of its peers. ZeroMQ does not say
which peer of a ROUTER is gone, only that some connection ended; the ROUTER then sends every peer
an empty message, which costs nothing and which every intake ignores: for a peer that is gone,
ZeroMQ refuses it (EHOSTUNREACH).
"""

from __future__ import annotations

import asyncio
import errno
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import zmq

from .base import MAX_PACKET_NBYTES
from .connections import host_behind, recover_quickly
from .curve import Complaints
from .delivery import Delivery
from .event_socket import EventMonitor, Intake, Pump

__all__ = ["ChannelSocket", "DealerSocket", "Limits", "PumpFactory", "RouterSocket", "ZmqPeer"]

logger = logging.getLogger("aiomm.control")

PumpFactory = Callable[[asyncio.AbstractEventLoop, "zmq.Socket[bytes]", Intake], Pump]
"""Makes the pump of a socket: :class:`EventSocket`, or one built on another library."""

FAREWELL_MS = 200
"""How long a closed socket may still send what was handed over before, such as a goodbye."""
PROBE_DELAYS = (0.001, 0.004, 0.016, 0.064)
"""When to look again for the peer whose connection ended, in seconds. The monitor's event and
the end of the peer's pipe come from ZeroMQ's own thread on different ways, the event first."""
MAX_FAILURES = 3
"""Handshakes that whoever listens may break off; once can be its restart."""
BROKEN_OFF = (
    "whoever listens there ends every handshake: no endpoint of aiomm, one that wants keys, or one "
    "that does not have the key that is meant"
)
FOREIGN = "no keys, a wrong one, or no ZeroMQ"
REFUSED = "this endpoint's key is not among those that the peer knows"
RETRY_DELAY = 0.01
"""When to try a backlog again without a wake-up, in seconds. ZeroMQ wakes us when there is room,
but a read under way may swallow that wake-up, and for a ROUTER's peer there is nothing to ask."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a peer that does not read may pile up here."""

    queue_packets: int = 256
    """ZeroMQ's high-water mark, per peer and direction."""

    backlog_nbytes: int = 1024 * 1024
    """Bytes waiting beyond that, per peer; past it packets are dropped."""

    peers: int = 4096
    """Peers that may connect to a bound channel; packets of further ones are dropped."""


class ZmqPeer:
    """One peer of a ZeroMQ channel. Opaque to everybody else."""

    __slots__ = ("_limit_nbytes", "backlog", "backlog_nbytes", "identity", "is_alive", "socket")

    def __init__(self, socket: ChannelSocket, identity: bytes, limit_nbytes: int) -> None:
        self.socket = socket
        self.identity = identity
        self.is_alive = True
        self.backlog: deque[bytes] = deque()
        self.backlog_nbytes = 0
        self._limit_nbytes = limit_nbytes

    def __repr__(self) -> str:
        return f"<peer {self.identity!r}>"

    def keep(self, packet: bytes) -> bool:
        """Put `packet` into the backlog; return False if it is full."""
        if self.backlog_nbytes + len(packet) > self._limit_nbytes:
            return False
        self.backlog.append(packet)
        self.backlog_nbytes += len(packet)
        return True

    def drop_oldest(self) -> None:
        """Take the oldest packet out of the backlog."""
        self.backlog_nbytes -= len(self.backlog.popleft())

    def end(self) -> None:
        """Send and deliver nothing more."""
        self.is_alive = False
        self.backlog.clear()
        self.backlog_nbytes = 0


class ChannelSocket(ABC):
    """One ZeroMQ socket of a channel."""

    SOCKET_TYPE: ClassVar[int]

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        context: zmq.Context[zmq.Socket[bytes]],
        delivery: Delivery,
        limits: Limits,
    ) -> None:
        self._loop = loop
        self._delivery = delivery
        self._limits = limits
        self._pump: Pump | None = None
        self._monitor: EventMonitor | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._blocked: set[ZmqPeer] = set()
        self.zmq_socket: zmq.Socket[bytes] = context.socket(self.SOCKET_TYPE)
        self.zmq_socket.setsockopt(zmq.LINGER, 0)
        self.zmq_socket.setsockopt(zmq.MAXMSGSIZE, MAX_PACKET_NBYTES)
        self.zmq_socket.setsockopt(zmq.SNDHWM, limits.queue_packets)
        self.zmq_socket.setsockopt(zmq.RCVHWM, limits.queue_packets)

    def begin(self, pump_factory: PumpFactory) -> None:
        """Deliver from now on."""
        self._monitor = EventMonitor(self._loop, self.zmq_socket, self.connection_changed)
        self._pump = pump_factory(self._loop, self.zmq_socket, self)

    def send(self, peer: ZmqPeer, packet: bytes) -> bool:
        """Send `packet`, or keep it for later; return False if it is dropped."""
        if peer.backlog:  # it must not overtake
            return peer.keep(packet)
        try:
            self._write(peer, packet)
        except zmq.Again:
            self._blocked.add(peer)
            self._arm_retry()
            return peer.keep(packet)
        except zmq.ZMQError as exc:
            self.failed(peer, exc)
            return False
        return True

    def turn_began(self) -> None:
        """Send of every backlog what fits now, each peer on its own."""
        if not self._blocked:
            return
        self.zmq_socket.getsockopt(zmq.EVENTS)  # has ZeroMQ take note of the room its thread made
        for peer in tuple(self._blocked):
            if self._flush(peer):
                self._blocked.discard(peer)

    def look(self) -> None:
        """Have `emptied` called once everything that arrived is delivered."""
        if self._pump is not None:
            self._pump.look()

    def close(self) -> None:
        """Close the socket. What ZeroMQ has taken may still leave within a bound."""
        if self._retry is not None:
            self._retry.cancel()
        if self._monitor is not None:
            self._monitor.close()
        if self._pump is not None:
            self._pump.close(self.linger_ms)
        else:
            self.zmq_socket.close(linger=0)

    @property
    def linger_ms(self) -> int:
        """How long what was handed over may take to leave."""
        return FAREWELL_MS

    @property
    def is_closed(self) -> bool:
        """Whether the socket is closed."""
        return self.zmq_socket.closed

    @property
    def is_connected(self) -> bool:
        """Whether room in a full queue may come at any time."""
        return True

    def _arm_retry(self) -> None:
        waits = bool(self._blocked) and self.is_connected
        if waits and self._retry is None and not self.zmq_socket.closed:
            self._retry = self._loop.call_later(RETRY_DELAY, self._retry_backlogs)

    def _retry_backlogs(self) -> None:
        self._retry = None
        self.turn_began()
        self._arm_retry()

    def _flush(self, peer: ZmqPeer) -> bool:
        """Send of one backlog what fits; return whether nothing is left to try."""
        try:
            while peer.backlog:
                self._write(peer, peer.backlog[0])
                peer.drop_oldest()
        except zmq.Again:
            return False
        except zmq.ZMQError as exc:
            self.failed(peer, exc)
        return True

    def _write(self, peer: ZmqPeer, packet: bytes) -> None:
        if self._pump is None:
            raise zmq.Again
        self._pump.send(self.frames(peer, packet))

    @abstractmethod
    def frames(self, peer: ZmqPeer, packet: bytes) -> list[bytes]:
        """Return the message that brings `packet` to `peer`."""

    @abstractmethod
    def failed(self, peer: ZmqPeer, error: zmq.ZMQError) -> None:
        """Note that a packet to `peer` cannot be sent at all."""

    @abstractmethod
    def forget(self, peer: ZmqPeer) -> None:
        """Deliver nothing of `peer` any more."""

    @abstractmethod
    def connection_changed(self, event: int, value: int) -> None:
        """Take one event of the socket's monitor; `value` is its descriptor or error."""

    @abstractmethod
    def message_received(self, frames: list[bytes]) -> None:
        """Take one whole message."""

    @abstractmethod
    def emptied(self) -> None:
        """Report the peers that are gone, now that all they sent is delivered."""


class DealerSocket(ChannelSocket):
    """The connection that one `connect` began."""

    SOCKET_TYPE = zmq.DEALER

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        context: zmq.Context[zmq.Socket[bytes]],
        delivery: Delivery,
        limits: Limits,
        identity: bytes,
    ) -> None:
        super().__init__(loop, context, delivery, limits)
        self.peer = ZmqPeer(self, identity, limits.backlog_nbytes)
        self._is_connected = False
        self._cause = ""
        self._failures = 0
        self.zmq_socket.setsockopt(zmq.IDENTITY, identity)

    @property
    def is_connected(self) -> bool:
        """Nothing leaves before somebody listens: then the backlog is tried again."""
        return self._is_connected

    @property
    def linger_ms(self) -> int:
        """Nothing can leave while nobody is there: do not wait for it."""
        return FAREWELL_MS if self._is_connected and not self._cause else 0

    def frames(self, peer: ZmqPeer, packet: bytes) -> list[bytes]:
        """A packet is the whole message."""
        return [packet]

    def failed(self, peer: ZmqPeer, error: zmq.ZMQError) -> None:
        """Only a closing context makes a DEALER fail."""
        logger.warning("x cannot send to %s: %s", peer, error)

    def forget(self, peer: ZmqPeer) -> None:
        """Close the connection with its peer."""
        peer.end()
        self._blocked.clear()
        self.close()

    def connection_changed(self, event: int, value: int) -> None:
        """A connection that stood and ended is a loss; before that ZeroMQ just tries again.

        Unless the other side refuses: that does not get better by trying.
        """
        match event:
            case zmq.EVENT_CONNECTED:
                recover_quickly(value)
            case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._is_connected = True
                self._arm_retry()
            case zmq.EVENT_DISCONNECTED if self._is_connected:
                self._end("the connection ended")
            case zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self._end(REFUSED)
            case zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                self._end(FOREIGN)
            case zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                self._failures += 1
                if self._failures == MAX_FAILURES:
                    self._end(BROKEN_OFF)

    def _end(self, cause: str) -> None:
        if not self._cause:
            self._cause = cause
            self.look()

    def message_received(self, frames: list[bytes]) -> None:
        """Deliver a packet; ignore probes and what is not one frame."""
        if len(frames) == 1 and frames[0] and self.peer.is_alive:
            self._delivery.packets(self.peer, frames)

    def emptied(self) -> None:
        """Report the loss once. ZeroMQ would connect again, to whoever listens there by then."""
        if self._cause and self.peer.is_alive:
            self.forget(self.peer)
            self._delivery.lost(self.peer, self._cause)


class RouterSocket(ChannelSocket):
    """The socket that listens, with all peers that connected to it."""

    SOCKET_TYPE = zmq.ROUTER

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        context: zmq.Context[zmq.Socket[bytes]],
        delivery: Delivery,
        limits: Limits,
        complaints: Complaints,
    ) -> None:
        super().__init__(loop, context, delivery, limits)
        # Forgotten peers stay here, silenced, until their connection ends.
        self._peers: dict[bytes, ZmqPeer] = {}
        self._gone: dict[ZmqPeer, None] = {}
        self._next_probes: list[asyncio.Handle] = []
        self._accepted: dict[int, str] = {}
        """The host behind each descriptor, as far as it could be seen."""
        self._is_refusing = False
        self._complaints = complaints
        self.zmq_socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.zmq_socket.setsockopt(zmq.ROUTER_HANDOVER, 0)

    def close(self) -> None:
        """Close the socket and forget every peer."""
        self._cancel_probes()
        for peer in self._peers.values():
            peer.end()
        self._peers.clear()
        self._blocked.clear()
        self._gone.clear()
        super().close()

    def frames(self, peer: ZmqPeer, packet: bytes) -> list[bytes]:
        """The identity says to whom."""
        return [peer.identity, packet]

    def failed(self, peer: ZmqPeer, error: zmq.ZMQError) -> None:
        """A peer that ZeroMQ no longer knows is gone, but what it sent comes first."""
        if error.errno == errno.EHOSTUNREACH:
            self._set_gone(peer)
        else:
            logger.warning("x cannot send to %s: %s", peer, error)

    def forget(self, peer: ZmqPeer) -> None:
        """Silence `peer`. A ROUTER cannot end a single connection."""
        peer.end()
        self._blocked.discard(peer)

    def connection_changed(self, event: int, value: int) -> None:
        """Find out whose connection ended, and say which strangers were not let in."""
        match event:
            case zmq.EVENT_ACCEPTED:
                self._accepted[value] = host_behind(value)
                recover_quickly(value)
            case zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                self._is_refusing = True
            case zmq.EVENT_DISCONNECTED:
                self._disconnected(self._accepted.pop(value, ""))

    def _disconnected(self, host: str) -> None:
        if self._is_refusing:  # ZeroMQ says so right before
            self._is_refusing = False
            self._complaints.make(host, f"x {host or 'somebody'} refused: {FOREIGN}")
        elif self._peers:
            self._cancel_probes()  # many may leave together: one look at all peers is for all
            later = [self._loop.call_later(s, self._probe) for s in PROBE_DELAYS]
            self._next_probes = [self._loop.call_soon(self._probe), *later]

    def message_received(self, frames: list[bytes]) -> None:
        """Deliver a packet of a known or new peer; refuse whatever is not identity and packet."""
        if len(frames) != 2 or not frames[1]:
            logger.debug("x %d frames of %r refused", len(frames), frames[0])
            return
        identity, packet = frames
        peer = self._peers.get(identity) or self._welcome(identity)
        if peer is not None and peer.is_alive:
            self._delivery.packets(peer, [packet])

    def emptied(self) -> None:
        """Report the peers that are gone."""
        gone, self._gone = self._gone, {}
        for peer in gone:
            if self._peers.get(peer.identity) is peer:
                del self._peers[peer.identity]
            if peer.is_alive:
                self.forget(peer)
                self._delivery.lost(peer, "the connection ended")

    def _welcome(self, identity: bytes) -> ZmqPeer | None:
        if len(self._peers) >= self._limits.peers:
            logger.warning("x %r refused: there are %d peers", identity, len(self._peers))
            return None
        peer = ZmqPeer(self, identity, self._limits.backlog_nbytes)
        self._peers[identity] = peer
        return peer

    def _probe(self) -> None:
        for peer in tuple(self._peers.values()):
            if not self.reaches(peer):
                self._set_gone(peer)

    def reaches(self, peer: ZmqPeer) -> bool:
        """Return whether the connection of `peer` stands, by an empty message to it."""
        try:
            self.zmq_socket.send_multipart([peer.identity, b""], zmq.NOBLOCK)
        except zmq.Again:  # full, so it stands
            return True
        except zmq.ZMQError as exc:
            return exc.errno != errno.EHOSTUNREACH
        finally:
            self.look()
        return True

    def _set_gone(self, peer: ZmqPeer) -> None:
        self._gone[peer] = None
        self.look()

    def _cancel_probes(self) -> None:
        for probe in self._next_probes:
            probe.cancel()
        self._next_probes.clear()
