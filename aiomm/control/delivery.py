"""The boundary between a channel and its handler: an exception costs one call, no more."""

from __future__ import annotations

import logging

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
        try:
            self._handler.packet_received(self._channel, peer, packet)
        except Exception:
            self._log(peer)

    def lost(self, peer: Peer, cause: str) -> None:
        """Report that `peer` is gone."""
        try:
            self._handler.peer_lost(self._channel, peer, cause)
        except Exception:
            self._log(peer)

    def died(self, peer: Peer) -> None:
        """Report that the process of `peer` is dead."""
        try:
            self._handler.peer_died(self._channel, peer)
        except Exception:
            self._log(peer)

    # Every exception ends here: whatever a handler does wrong with one packet, the next packet
    # and the other peers must still be served.
    def _log(self, peer: Peer) -> None:
        _logger.exception("! handler failed on %s; it goes on with the next call", peer)
