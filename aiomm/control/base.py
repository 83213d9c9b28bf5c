"""The seam of the control channel: whole packets in, whole packets out, who came and went.

A channel moves packets and nothing else: it may lose them (the session sends them again),
never cuts, joins or reorders the bytes of one. Everything happens on the loop thread; intake
is by callback, so no cancellation can lose a packet.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import Protocol, TypeAlias

__all__ = ["MAX_PACKET_NBYTES", "Channel", "Handler", "Peer"]

MAX_PACKET_NBYTES = 64 * 1024
"""A longer packet is refused before memory is taken for it; its peer is dropped."""

Peer: TypeAlias = Hashable
"""What a channel calls one of its peers; opaque, hashable, never reused."""


class Handler(Protocol):
    """What a channel calls. An exception in a call costs that packet, never the channel."""

    def packet_received(self, channel: Channel, peer: Peer, packet: bytes) -> None:
        """Take one whole packet, at most :data:`MAX_PACKET_NBYTES` long."""

    def peer_lost(self, channel: Channel, peer: Peer, cause: str) -> None:
        """Learn that packets to `peer` go nowhere any more. Called at most once per peer."""

    def peer_died(self, channel: Channel, peer: Peer) -> None:
        """Learn that the process of `peer` is proven dead: nothing it started can still write."""


class Channel(ABC):
    """One endpoint's control channel over one transport."""

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
            ValueError: the address is not one this channel understands.
        """

    @abstractmethod
    def send(self, peer: Peer, packet: bytes) -> bool:
        """Hand one packet to `peer`'s queue without ever blocking.

        Returns False if the packet was dropped: the peer is gone or its bounded queue is full.
        """

    @abstractmethod
    def disconnect(self, peer: Peer) -> None:
        """Forget `peer`; what is queued is sent or dropped. No callback follows."""

    @abstractmethod
    async def aclose(self) -> None:
        """Close everything within a bound. Idempotent."""
