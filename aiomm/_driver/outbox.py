"""How packets leave a driver: at once, or after the user's code has had its turn."""

from __future__ import annotations

import asyncio
import logging
import time

from ..protocol.commands import Transmit

__all__ = ["Outbox"]

logger = logging.getLogger("aiomm")

QUICK_SECONDS = 2e-3
"""A turn that takes longer would hold packets up for too long."""
MEMORY_SECONDS = 10.0
"""For so long after such a turn no packet waits, however quick the next ones are."""


class Outbox:
    """Sends packets in their order.

    A packet wakes its peer, to whom the kernel may give this very processor; then the user, whose
    await is answered already, waits until the peer sleeps again: 0.2 ms where little else runs.
    So the user's turn comes first, once such turns have turned out to be quick. Who works in them
    for long, on a model say, holds nothing up.
    """

    def __init__(self) -> None:
        self._held: list[Transmit] = []
        self._holds = False
        self._answered_at: float | None = None
        """When a user was answered whose turn has not come yet."""
        self._is_turn_coming = False
        self._is_quick = False
        """The last turn was, and so were all of the last seconds."""
        self._slow_until = 0.0

    def send(self, command: Transmit) -> None:
        """Send a packet, now or behind the user's turn."""
        if self._holds:
            self._held.append(command)
        else:
            command.path.channel.send(command.path.peer, command.packet)

    def user_answered(self) -> None:
        """Let what is sent from now on wait for the user's turn, if those are quick."""
        if self._answered_at is None:
            self._answered_at = time.monotonic()
            self._holds = self._is_quick

    def next_turn(self) -> None:
        """The loop will wake all who have been answered by now; come back behind them."""
        if self._answered_at is not None and not self._is_turn_coming:
            self._is_turn_coming = True
            asyncio.get_running_loop().call_soon(self._turn_ended)

    def flush(self) -> None:
        """Send what is held, now. Idempotent."""
        self._holds = False
        held, self._held = self._held, []
        for command in held:
            try:
                self.send(command)
            except Exception:  # a bug with one packet must not cost the others
                logger.exception("! a packet could not be sent: %s", command)

    def _turn_ended(self) -> None:
        now, answered_at = time.monotonic(), self._answered_at
        self._answered_at, self._is_turn_coming = None, False
        if answered_at is not None and now - answered_at > QUICK_SECONDS:
            self._slow_until = now + MEMORY_SECONDS
        self._is_quick = now >= self._slow_until
        self.flush()
