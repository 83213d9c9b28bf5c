"""The seam of the control channel: whole packets in, whole packets out, who came and went.

A channel moves packets and nothing else: it may lose them (the session sends them again),
never cuts, joins or reorders the bytes of one. Everything happens on the loop thread; intake
is by callback, so no cancellation can lose a packet.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import ClassVar, Protocol, TypeAlias

__all__ = ["MAX_PACKET_NBYTES", "Channel", "Handler", "Peer", "check_packet"]

MAX_PACKET_NBYTES = 64 * 1024
"""A longer packet is refused before memory is taken for it; its peer is dropped."""

Peer: TypeAlias = Hashable
"""What a channel calls one of its peers; opaque, hashable, never reused."""


class Handler(Protocol):
    """What a channel calls. An exception in a call costs what it brought, never the channel.

    A handler knows the peers that `connect` returned and those that a packet came from; it
    hears of no others.
    """

    def packets_received(self, channel: Channel, peer: Peer, packets: Sequence[bytes]) -> None:
        """Take whole packets, at least one, that have come together, in their order.

        Each is 1 to :data:`MAX_PACKET_NBYTES` bytes long.
        """

    def peer_lost(self, channel: Channel, peer: Peer, cause: str) -> None:
        """Learn that packets to `peer` go nowhere any more. Called at most once per peer."""

    def peer_died(self, channel: Channel, peer: Peer) -> None:
        """Learn that the process of `peer` is proven dead. Follows `peer_lost`, at most once."""


class Channel(ABC):
    """One endpoint's control channel over one transport."""

    waits_for_listener: ClassVar[bool] = True
    """A peer may be connected before its address is bound; else it is lost at once."""

    proves_death: ClassVar[bool] = False
    """`peer_died` is called; else a lost peer's process may still be running."""

    tells_full_queue: ClassVar[bool] = True
    """`send` returns False when a peer does not keep up; else such packets vanish unseen."""

    shows_disconnect: ClassVar[bool] = True
    """`disconnect` of a peer that connected to us ends its connection, so it sees a loss."""

    address: str | None = None
    """Where peers reach this endpoint, with the real port; None if it does not listen."""

    @abstractmethod
    async def start(self, handler: Handler) -> None:
        """Bind, if an address was given, and begin to deliver.

        Raises:
            OSError: the address cannot be bound.
        """

    @abstractmethod
    def connect(self, address: str) -> Peer:
        """Begin to connect to `address` and return the peer at once; packets may be sent at once.

        Raises:
            ValueError: the address is not one this channel understands or allows.
            PoolClosed: the channel is closed.
        """

    @abstractmethod
    def send(self, peer: Peer, packet: bytes) -> bool:
        """Hand one packet to `peer`'s queue without ever blocking.

        Returns False if the packet was dropped: the peer is gone or its bounded queue is full.

        Raises:
            ValueError: `packet` is empty or longer than :data:`MAX_PACKET_NBYTES`.
        """

    @abstractmethod
    def disconnect(self, peer: Peer) -> None:
        """Forget `peer`; what is queued is sent or dropped. No callback follows.

        A lost peer is to be disconnected too: until then the channel keeps watching for its
        death. Unknown peers are ignored.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Close everything within a bound. Idempotent. No callback follows.

        Packets sent just before still get out to peers that read.
        """


def check_packet(packet: bytes) -> None:
    """Raise ValueError unless `packet` has a length that a channel carries."""
    if not 0 < len(packet) <= MAX_PACKET_NBYTES:
        raise ValueError(f"a packet has 1 to {MAX_PACKET_NBYTES} bytes, not {len(packet)}")
