"""The language process: receives what the steps say, and notes when it was there."""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import AsyncExitStack

from ..buffers.arrays import load_array_library
from ..receiver import Receiver
from ..types import Field, Schema
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
        Acknowledger(link)
        for steps in plan.told_together():
            tell(
                [
                    await _receive_step(plan, receivers[plan.pool_of(step.nbytes)], step)
                    for step in steps
                    if step.is_transfer
                ]
            )
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
            timeout=plan.timeout,
        )
        for shape in plan.pools()
    ]


async def _receive_step(plan: Plan, receiver: Receiver, step: Step) -> Arrived:
    if plan.concurrency == 1:
        return Arrived(step.number, *await _receive(receiver, f"{step.number}-0-0"))
    async with asyncio.TaskGroup() as group:
        workers = [
            group.create_task(_receive_some(plan, receiver, step, worker))
            for worker in range(plan.concurrency)
        ]
    ends, resumes = zip(*(worker.result() for worker in workers), strict=True)
    return Arrived(step.number, max(ends), max(resumes))


async def _receive_some(plan: Plan, receiver: Receiver, step: Step, worker: int) -> tuple[int, int]:
    """Receive what one worker of the encoder sends; return the end, and the most resumes."""
    ended, most = 0, 0
    for number in range(plan.transfers_of(step)):
        ended, resumes = await _receive(receiver, f"{step.number}-{worker}-{number}")
        most = max(most, resumes)
    return ended, most


async def _receive(receiver: Receiver, request_id: str) -> tuple[int, int]:
    async with receiver.receive(request_id) as lease:
        ended = time.monotonic_ns()
        return ended, lease.stats.resumes
