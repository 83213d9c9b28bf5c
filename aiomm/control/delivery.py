"""The boundary between a channel and its handler: an exception costs one call, no more."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from .base import Channel, Handler, Peer

__all__ = ["Delivery"]

logger = logging.getLogger("aiomm.control")


class Delivery:
    """Calls one handler on behalf of one channel."""

    def __init__(self, channel: Channel, handler: Handler) -> None:
        self._channel = channel
        self._handler = handler

    def packets(self, peer: Peer, packets: Sequence[bytes]) -> None:
        """Deliver whole packets."""
        try:
            self._handler.packets_received(self._channel, peer, packets)
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

    def _log(self, peer: Peer) -> None:
        """Note the exception, which ends here: the next packets and other peers must be served."""
        logger.exception("! handler failed on %s; it goes on with the next call", peer)
