"""Strangers at the door of a receiver with keys: they get nothing in, and cost it nothing."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import psutil
import pytest

from aiomm import Sender
from aiomm.control.keys import write_key_pair
from tests.processes import SCHEMA, child, pattern
from tests.strangers import KINDS, command_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(90)]

MAX_GROWTH_NBYTES = 10_000_000
NUM_KNOCKS = 20


@asynccontextmanager
async def strangers(address: str) -> AsyncIterator[list[asyncio.Task[None]]]:
    """Have one of each kind knock at `address`; the tasks end when each has knocked often."""
    async with AsyncExitStack() as stack:
        knocks = []
        for kind in KINDS:
            process = await asyncio.create_subprocess_exec(
                *command_of(kind, address), stdout=asyncio.subprocess.PIPE
            )
            stack.push_async_callback(process.wait)
            stack.callback(process.kill)
            assert process.stdout is not None
            knocks.append(asyncio.create_task(_lines(process.stdout, NUM_KNOCKS)))
        yield knocks


async def _lines(stream: asyncio.StreamReader, count: int) -> None:
    for _ in range(count):
        assert await stream.readline()


async def test_strangers_cost_no_memory_and_no_transfer(tmp_path: Path) -> None:
    secret = str(write_key_pair(tmp_path / "shared")[0])
    async with (
        child("receiver", bind="tcp://127.0.0.1:*", key_file=secret, control="zmq") as receiver,
        Sender(SCHEMA, key_file=secret, control="zmq", planes="tcp") as sender,
    ):
        address = (await receiver.ask("where", "address"))["address"]
        numbers = itertools.count()

        async def transfer() -> None:
            number = next(numbers)
            request_id = f"r{number}"
            ticket = (await receiver.ask("expect", "ticket", request_id=request_id))["ticket"]
            await sender.send(ticket, pattern(number, 100))
            assert (await receiver.hear("ended", request_id=request_id))["is_right"]

        for _ in range(50):
            await transfer()
        memory = psutil.Process(receiver.pid).memory_info
        before = memory().rss
        async with strangers(address) as knocks:
            while not all(knock.done() for knock in knocks):
                await transfer()
                assert memory().rss - before < MAX_GROWTH_NBYTES
            await asyncio.gather(*knocks)
        await transfer()
