"""The language process: receives what the steps say, and notes when it was there."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack

from ..buffers.arrays import load_array_library
from ..receiver import Receiver
from ..types import Field, Schema
from .beside import Beside
from .floor import Acknowledger
from .link import put_addresses
from .messages import Arrived, tell
from .plan import Plan, Step

__all__ = ["receive_all"]


async def receive_all(plan: Plan, link: socket.socket) -> None:
    """Receive every transfer of the plan; stay until the command closes stdin.

    Args:
        plan: what to do.
        link: to the encoder process, which learns the receivers' addresses on it.
    """
    load_array_library()
    async with AsyncExitStack() as stack:
        receivers = [await stack.enter_async_context(each) for each in _receivers(plan)]
        put_addresses(link, [receiver.address or "" for receiver in receivers])
        beside = Beside(plan, "language")
        Acknowledger(link, beside.spinner)
        await Language(plan, receivers, beside).run()
        await asyncio.get_running_loop().create_future()  # the encoder may need us to the end


def _receivers(plan: Plan) -> list[Receiver]:
    return [
        Receiver(
            Schema(rows=Field("uint8", plan.row_nbytes)),
            bind="tcp://127.0.0.1:*",
            device=plan.device,
            planes=plan.plane,
            blocks=shape.blocks,
            block_size=shape.block_size,
            default_blocks=shape.default_blocks,
            max_tokens=plan.num_tokens(max(plan.sizes)),
            max_buffered_bytes=plan.buffered_nbytes,
            timeout=plan.timeout,
        )
        for shape in plan.pools()
    ]


class Language:
    """Goes through the transfers of the plan."""

    def __init__(self, plan: Plan, receivers: Sequence[Receiver], beside: Beside) -> None:
        self._plan = plan
        self._receivers = receivers
        self._beside = beside

    async def run(self) -> None:
        """Receive them all."""
        for steps in self._plan.told_together():
            arrived = [await self._receive_step(step) for step in steps if step.is_transfer]
            tell([*arrived, *self._beside.beats()])

    async def _receive_step(self, step: Step) -> Arrived:
        if self._plan.concurrency == 1:
            return Arrived(step.number, *await self._receive(step, "0-0"))
        async with asyncio.TaskGroup() as group:
            workers = [
                group.create_task(self._receive_some(step, worker))
                for worker in range(self._plan.concurrency)
            ]
        ends, resumes = zip(*(worker.result() for worker in workers), strict=True)
        return Arrived(step.number, max(ends), max(resumes))

    async def _receive_some(self, step: Step, worker: int) -> tuple[int, int]:
        """Receive what one worker of the encoder sends; return the end, and the most resumes."""
        ended, most = 0, 0
        for number in range(self._plan.transfers_of(step)):
            ended, resumes = await self._receive(step, f"{worker}-{number}")
            most = max(most, resumes)
        return ended, most

    async def _receive(self, step: Step, name: str) -> tuple[int, int]:
        """Return when it was there, and its resumes."""
        receiver = self._receivers[self._plan.pool_of(step.nbytes)]
        with self._beside.spinning(step), self._beside.beating(step):
            lease = await receiver.receive(f"{step.number}-{name}")
            ended = time.monotonic_ns()
        with lease:
            return ended, lease.stats.resumes
