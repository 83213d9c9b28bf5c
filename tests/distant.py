"""Children on two hosts or in containers: `python -m tests.distant ROLE LOOP SETTINGS`.

Told what to do as usual, they are those of :mod:`tests.children`, and can tell in addition how
long their loop stood still, how much memory they use, and what their pool's blocks are for.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiomm
from tests import children
from tests.children import ReceiverActor, SenderActor, report
from tests.hosts import Container, Host
from tests.processes import Child, pattern

__all__ = ["distant"]

BEAT = 0.002
"""Seconds between two looks at the clock."""


@asynccontextmanager
async def distant(host: Host | Container, role: str, **settings: object) -> AsyncIterator[Child]:
    """Run one child on `host` until the block ends; it has started its endpoint before."""
    arguments = ["-m", "tests.distant", role, "asyncio", json.dumps(settings)]
    process = Child(arguments, prefix=host.command())
    try:
        await process.hear("ready")
        yield process
    finally:
        await process.close()


class Measured:
    """What both kinds of child tell in addition."""

    _beating: asyncio.Task[None] | None = None
    _longest = 0.0

    def do_beat(self) -> None:
        """Begin to look at the clock, or begin anew."""
        self._longest = 0.0
        if self._beating is None:
            self._beating = asyncio.get_running_loop().create_task(self._beat())

    def do_measure(self) -> None:
        """Report the longest standstill, and the most memory that was ever used."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        report("measured", standstill=self._longest, peak_nbytes=peak)

    async def _beat(self) -> None:
        before = time.monotonic()
        while True:
            await asyncio.sleep(BEAT)
            now = time.monotonic()
            self._longest = max(self._longest, now - before)
            before = now


class DistantSender(Measured, SenderActor):
    """A sender; one tensor can be sent many times at once."""

    def do_flood(self, tickets: list[str], num_tokens: int) -> None:
        """Send the same tokens for every ticket, and report when all are accepted."""
        self.background("flood", self._flood(tickets, num_tokens))

    async def _flood(self, tickets: list[str], num_tokens: int) -> aiomm.TransferStats:
        tensors = pattern(1, num_tokens)
        sends = [self.endpoint.send(ticket, tensors, timeout=60) for ticket in tickets]
        return (await asyncio.gather(*sends))[0]


class DistantReceiver(Measured, ReceiverActor):
    """A receiver."""

    endpoint: aiomm.Receiver

    def do_blocks(self) -> None:
        """Report how many blocks are free and in quarantine, once none is either granted."""
        metrics = self.endpoint.metrics()
        report("blocks", free=metrics["blocks_free"], quarantined=metrics["blocks_quarantined"])

    def do_expect_many(self, count: int) -> None:
        """Expect requests, report their tickets, and drop what arrives when it is right."""
        tickets = [self.endpoint.expect(f"many {n}", timeout=60) for n in range(count)]
        report("tickets", tickets=[ticket.to_json() for ticket in tickets])
        for n in range(count):
            self.background(f"many {n}", self.endpoint.receive(f"many {n}"))


async def main(role: str, settings: dict[str, Any]) -> None:
    """Play one role."""
    await children.obey(DistantSender(settings) if role == "sender" else DistantReceiver(settings))


if __name__ == "__main__":
    role, _, settings = sys.argv[1:]
    asyncio.run(main(role, json.loads(settings)))
