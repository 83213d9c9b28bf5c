"""How packets leave a driver: at once, or behind a turn of the user's."""

from __future__ import annotations

import asyncio
import logging
import time

from ..protocol.commands import Transmit

__all__ = ["Outbox"]

logger = logging.getLogger("aiomm")

PATIENCE_SECONDS = 2e-3
"""A turn that takes longer holds packets up for too long."""
MEMORY_SECONDS = 10.0
"""For so long no packet waits after that."""


class Outbox:
    """Sends packets in their order.

    A packet wakes its peer, to whom the kernel may give this very processor; then the user, whose
    await is answered already, waits until the peer sleeps again: 0.2 ms where little else runs.
    So the user's turn comes first, unless it has turned out to take long.
    """

    def __init__(self) -> None:
        self._held: list[Transmit] = []
        self._holds_since: float | None = None
        """When the user was let go first; None if packets leave at once."""
        self._is_turn_coming = False
        self._holds_again_at = 0.0

    def send(self, command: Transmit) -> None:
        """Send a packet, now or behind the user's turn."""
        if self._holds_since is None:
            command.path.channel.send(command.path.peer, command.packet)
        else:
            self._held.append(command)

    def let_user_go_first(self) -> None:
        """Hold what is sent from now on until :meth:`next_turn` has come and gone."""
        now = time.monotonic()
        if self._holds_since is None and now >= self._holds_again_at:
            self._holds_since = now

    def next_turn(self) -> None:
        """Whoever has been answered by now is waked by the loop; send what is held after them."""
        if self._holds_since is not None and not self._is_turn_coming:
            self._is_turn_coming = True
            asyncio.get_running_loop().call_soon(self._turn_ended)

    def flush(self) -> None:
        """Send what is held, now. Idempotent."""
        self._holds_since = None
        held, self._held = self._held, []
        for command in held:
            try:
                self.send(command)
            except Exception:  # a bug with one packet must not cost the others
                logger.exception("! a packet could not be sent: %s", command)

    def _turn_ended(self) -> None:
        self._is_turn_coming = False
        now = time.monotonic()
        if self._holds_since is not None and now - self._holds_since > PATIENCE_SECONDS:
            self._holds_again_at = now + MEMORY_SECONDS
        self.flush()
