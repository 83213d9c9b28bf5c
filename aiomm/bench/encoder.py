"""The encoder process: goes through the steps, measures the floors, and sends."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Sequence
from contextlib import aclosing, suppress

from ..buffers.arrays import load_array_library
from ..errors import PlaneUnavailable
from ..protocol.states import State
from ..sender import Sender, Transfer
from ..types import Field, Schema
from .beside import Beside
from .floor import STILL, Copier, Source, acknowledged, copier_on, nanoseconds_of
from .link import take_addresses
from .messages import Copied, Left, Message, tell
from .plan import MEMCPY_ACK, Plan, Step

__all__ = ["send_all"]


async def send_all(plan: Plan, link: socket.socket) -> None:
    """Take every step of the plan, then end.

    Args:
        plan: what to do.
        link: to the language process, which tells its addresses on it, and then answers every
            byte.
    """
    load_array_library()
    source = await asyncio.to_thread(Source, plan.buffer_nbytes, plan.device)
    copier = await asyncio.to_thread(copier_on, source)
    addresses = await asyncio.to_thread(take_addresses, link)
    async with Sender(
        Schema(rows=Field("uint8", plan.row_nbytes)),
        planes=plan.plane,
        checksum=plan.checksum,
        timeout=plan.timeout,
    ) as sender:
        with suppress(PlaneUnavailable):  # then the bytes are copied once more, as for anybody
            await sender.register(source.tensor)
        await Encoder(plan, sender, source, copier, link, addresses).run()


class Encoder:
    """Knows when the step before began."""

    def __init__(
        self,
        plan: Plan,
        sender: Sender,
        source: Source,
        copier: Copier,
        link: socket.socket,
        addresses: Sequence[str],
    ) -> None:
        self._plan = plan
        self._sender = sender
        self._source = source
        self._copier = copier
        self._link = link
        self._addresses = addresses
        self._beside = Beside(plan, "encoder")
        self._began = time.monotonic()

    async def run(self) -> None:
        """Take the steps."""
        for steps in self._plan.told_together():
            taken = [await self._take(step) for step in steps]
            tell([*taken, *self._beside.beats()])

    async def _take(self, step: Step) -> Message:
        if not step.is_transfer:
            await self._pause(step)
            # On the loop's own thread, on purpose: no transfer runs, and nothing comes in between.
            link = self._link if step.path == MEMCPY_ACK else None
            return Copied(step.number, nanoseconds_of(self._copier, step.nbytes, link))
        if self._plan.concurrency > 1:
            return await self._send_many(step)
        transfer = self._claim(step, "0-0")
        await _granted(transfer)
        await self._pause(step)
        at, plane = await self._send(step, transfer)
        if step.is_busy and not step.is_rehearsal:
            acknowledged(self._link, STILL)  # what comes next is measured beside nobody
        return Left(step.number, at, plane)

    async def _send_many(self, step: Step) -> Left:
        """Send from several workers, each one transfer after the other."""
        async with asyncio.TaskGroup() as group:
            workers = [
                group.create_task(self._send_some(step, worker))
                for worker in range(self._plan.concurrency)
            ]
        at, plane = min(worker.result() for worker in workers)
        return Left(step.number, at, plane)

    async def _send_some(self, step: Step, worker: int) -> tuple[int, str]:
        """Return when this worker claimed first, and the plane."""
        began = time.monotonic_ns()
        plane = ""
        for number in range(self._plan.transfers_of(step)):
            transfer = self._claim(step, f"{worker}-{number}")
            await _granted(transfer)
            _, plane = await self._send(step, transfer)
        return began, plane

    def _claim(self, step: Step, name: str) -> Transfer:
        plan = self._plan
        return self._sender.claim(
            f"{step.number}-{name}",
            to=self._addresses[plan.pool_of(step.nbytes)],
            num_tokens=None if plan.resume else plan.num_tokens(step.nbytes),
        )

    async def _send(self, step: Step, transfer: Transfer) -> tuple[int, str]:
        """Return when the tensors were given, and the plane that took them."""
        plan = self._plan
        rows = self._source.next_rows(plan.num_tokens(step.nbytes), plan.row_nbytes)
        with self._beside.spinning(step), self._beside.beating(step):
            began = time.monotonic_ns()
            transfer.send({"rows": rows})
            stats = await transfer
        return began, stats.plane

    async def _pause(self, step: Step) -> None:
        if step.pause:
            await asyncio.sleep(max(0.0, self._began + step.pause - time.monotonic()))
        self._began = time.monotonic()


async def _granted(transfer: Transfer) -> None:
    async with aclosing(transfer.events()) as states:  # type: ignore[type-var]
        async for state in states:
            if state is not State.ALLOC:
                return
