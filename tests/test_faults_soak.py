"""Three hundred requests, and everything goes wrong: at the end it is as at the beginning."""

from __future__ import annotations

import asyncio
import os
import random
import threading
from collections import Counter
from contextlib import AsyncExitStack

import psutil
import pytest

import aiomm
from tests.conftest import resources
from tests.processes import Child, child, nothing_new, pattern, received, receiving, until

pytestmark = [pytest.mark.usefixtures("no_leaks"), pytest.mark.timeout(120), pytest.mark.slow]

NUM_REQUESTS = 300
NUM_SENDERS = 3
AT_ONCE = 12
NUM_KILLS = 8
GROWTH_NBYTES = 64 * 2**20
"""What the process may grow by: a leaked lease per request would be 200 MiB."""


class Soak:
    """One receiver with a small pool, and senders that are killed and begin new lives."""

    def __init__(self, receiver: aiomm.Receiver, stack: AsyncExitStack) -> None:
        self.receiver = receiver
        self.stack = stack
        self.random = random.Random(20260301)
        self.senders: dict[int, Child] = {}
        self.outcomes: Counter[str] = Counter()

    async def begin(self, place: int) -> None:
        """Begin the next life of the sender in `place`."""
        self.senders[place] = await self.stack.enter_async_context(
            child("sender", planes=["shm", "tcp"][place % 2], name=f"sender-{place}")
        )

    async def replace(self, place: int) -> None:
        """Kill the sender in `place`, and begin its next life."""
        dead = self.senders.pop(place)
        dead.kill()
        await dead.close()
        await self.begin(place)

    async def request(self, number: int, limit: asyncio.Semaphore) -> None:
        """Move one request, or let it go wrong, and note how it ends."""
        async with limit:
            request_id = f"r{number}"
            fate = self.random.choices(
                ["sent", "cancelled there", "cancelled here", "too late", "kept waiting"],
                [70, 8, 8, 7, 7],
            )[0]
            num_tokens = self.random.choice([0, 1, 100, 600, 1500, 2500])
            # What is told to a sender that has just been killed waits for its deadline, too.
            timeout = 0.5 if fate in ("too late", "kept waiting") else 4.0
            try:
                await self.attempt(request_id, fate, number, num_tokens, timeout)
            except (aiomm.AiommError, asyncio.CancelledError) as exc:
                self.outcomes[type(exc).__name__] += 1
            else:
                self.outcomes["received"] += 1

    async def attempt(
        self, request_id: str, fate: str, seed: int, num_tokens: int, timeout: float
    ) -> None:
        """Bring one request to its fate."""
        ticket = self.receiver.expect(request_id, timeout=timeout)
        sender = self.random.choice(list(self.senders.values()))
        order = {"ticket": ticket.to_json(), "seed": seed, "num_tokens": num_tokens}
        waiting = asyncio.ensure_future(received(self.receiver, request_id))
        try:
            if fate == "kept waiting":
                pass
            elif fate == "cancelled there":
                sender.tell("claim", ticket=ticket.to_json())
                sender.tell("cancel", request_id=request_id)
            elif fate == "too late":
                sender.tell("claim", ticket=ticket.to_json())
            else:
                sender.tell("send", **order)
            if fate == "cancelled here":
                await asyncio.sleep(0)
                waiting.cancel()
        except (BrokenPipeError, ValueError):  # it has just been killed
            self.receiver.cancel(request_id)
        assert await waiting == pattern(seed, num_tokens)


async def test_three_hundred_requests_with_faults() -> None:
    process = psutil.Process(os.getpid())
    async with receiving(blocks=8, max_waiting=1000) as receiver, AsyncExitStack() as stack:
        soak = Soak(receiver, stack)
        async with child("sender") as first:  # what stays for good is there from now on
            ticket = receiver.expect("first")
            first.tell("send", ticket=ticket.to_json(), seed=1, num_tokens=2500)
            assert await received(receiver, "first") == pattern(1, 2500)
        for copies in (receiver._driver._joins, receiver._driver._copies):
            num_threads = copies._threads.num_threads
            await copies.run_all([threading.Barrier(num_threads).wait] * num_threads)
        await until(lambda: receiver.metrics()["peers"] == 0, "the first sender is gone")
        before, used = resources(), process.memory_info().rss
        for place in range(NUM_SENDERS):
            await soak.begin(place)
        limit = asyncio.Semaphore(AT_ONCE)
        requests = [
            asyncio.ensure_future(soak.request(number, limit)) for number in range(NUM_REQUESTS)
        ]
        for kill in range(NUM_KILLS):
            due = (kill + 1) * NUM_REQUESTS // (NUM_KILLS + 1)
            await until(lambda due=due: soak.outcomes.total() >= due, "the next kill is due")  # type: ignore[misc]
            await soak.replace(kill % NUM_SENDERS)
        await asyncio.gather(*requests)
        print(dict(soak.outcomes))
        assert soak.outcomes.total() == NUM_REQUESTS
        assert soak.outcomes["received"] > NUM_REQUESTS / 3
        assert soak.outcomes["PeerLost"] > 0
        await until(lambda: receiver.metrics()["blocks_free"] == 8, "every block is free")
        for sender in soak.senders.values():
            sender.kill()
        await stack.aclose()
        await until(lambda: receiver.metrics()["peers"] == 0, "every sender is gone")
        assert receiver.metrics()["requests_open"] == 0
        await until(nothing_new(before), "descriptors and threads are as before")
        assert process.memory_info().rss - used < GROWTH_NBYTES
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        assert not others
