"""The boundary between a channel and its handler: an exception costs one call, no more."""

from __future__ import annotations

import logging
from collections.abc import Callable

from aiomm.control.base import Channel, Handler, Peer

__all__ = ["Delivery"]

_logger = logging.getLogger("aiomm.control")


class Delivery:
    """Calls one handler on behalf of one channel."""

    def __init__(self, channel: Channel, handler: Handler) -> None:
        self._channel = channel
        self._handler = handler

    def packet(self, peer: Peer, packet: bytes) -> None:
        """Deliver one whole packet."""
        self._guard(peer, lambda: self._handler.packet_received(self._channel, peer, packet))

    def lost(self, peer: Peer, cause: str) -> None:
        """Report that `peer` is gone."""
        self._guard(peer, lambda: self._handler.peer_lost(self._channel, peer, cause))

    def died(self, peer: Peer) -> None:
        """Report that the process of `peer` is dead."""
        self._guard(peer, lambda: self._handler.peer_died(self._channel, peer))

    def _guard(self, peer: Peer, call: Callable[[], None]) -> None:
        # The one place where every exception is caught: whatever a handler does wrong with one
        # packet, the next packet and the other peers must still be served.
        try:
            call()
        except Exception:
            _logger.exception("! handler failed on %s; the packet is lost", peer)
