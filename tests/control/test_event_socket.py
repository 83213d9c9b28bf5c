"""The three rules of an edge-triggered socket, one by one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import zmq

from aiomm.control.event_socket import MAX_FRAMES, MESSAGES_PER_TURN, EventSocket

pytestmark = pytest.mark.usefixtures("no_leaks")


class Inbox:
    """Counts messages, and in which turn of the loop each came."""

    def __init__(self) -> None:
        self.turns: list[int] = []
        self.turn = 0
        self.times_emptied = 0
        self.on_message: Callable[[list[bytes]], None] = lambda frames: None
        self.empty = asyncio.Event()

    def turn_began(self) -> None:
        self.turn += 1

    def message_received(self, frames: list[bytes]) -> None:
        self.turns.append(self.turn)
        self.on_message(frames)

    def emptied(self) -> None:
        self.times_emptied += 1
        self.empty.set()


@asynccontextmanager
async def pair(inbox: Inbox) -> AsyncIterator[tuple[EventSocket, zmq.Socket[bytes]]]:
    """Yield a driven socket and the plain one at its other end."""
    with zmq.Context() as context, context.socket(zmq.PAIR) as far:
        near = context.socket(zmq.PAIR)
        near.bind("inproc://pair")
        far.connect("inproc://pair")
        driven = EventSocket(asyncio.get_running_loop(), near, inbox)
        yield driven, far
        driven.close(0)
        driven.close(0)


async def until_messages(inbox: Inbox, count: int) -> None:
    async with asyncio.timeout(20):
        while len(inbox.turns) < count:
            inbox.empty.clear()
            await inbox.empty.wait()


@pytest.mark.both_loops
async def test_no_turn_takes_more_than_the_budget_and_none_is_forgotten() -> None:
    inbox = Inbox()
    async with pair(inbox) as (_, far):
        for _ in range(500):
            far.send(b"message")
        await until_messages(inbox, 500)
    assert max(inbox.turns.count(turn) for turn in set(inbox.turns)) == MESSAGES_PER_TURN
    assert inbox.times_emptied > 0


@pytest.mark.both_loops
async def test_a_message_whose_wake_up_a_send_swallowed_is_found() -> None:
    inbox = Inbox()
    async with pair(inbox) as (driven, far):
        for number in range(200):
            far.send(b"message")
            driven.send([b"swallows the edge"])
            await until_messages(inbox, number + 1)


@pytest.mark.both_loops
@pytest.mark.parametrize("num_frames", [MAX_FRAMES + 1, 2 * MAX_FRAMES, 3 * MAX_FRAMES + 1])
async def test_nothing_of_a_message_with_too_many_frames_is_delivered(num_frames: int) -> None:
    inbox = Inbox()
    messages: list[list[bytes]] = []
    inbox.on_message = messages.append
    longest = [b"frame"] * MAX_FRAMES
    async with pair(inbox) as (_, far):
        for message in (longest, [b"dropped"] * num_frames, [b"one"], [b"dropped"] * num_frames):
            far.send_multipart(message)
        far.send_multipart(longest)
        await until_messages(inbox, 3)
    assert messages == [longest, [b"one"], longest]


@pytest.mark.both_loops
async def test_a_message_of_many_frames_is_dropped_a_few_in_a_turn() -> None:
    inbox = Inbox()
    async with pair(inbox) as (_, far):
        far.send_multipart([b"frame"] * (10 * MAX_FRAMES * MESSAGES_PER_TURN))
        far.send(b"message")
        await until_messages(inbox, 1)
    assert inbox.turns[0] > 10


@pytest.mark.both_loops
async def test_nothing_is_delivered_once_it_is_closed() -> None:
    inbox = Inbox()
    async with pair(inbox) as (driven, far):
        closed = asyncio.Event()

        def close(frames: list[bytes]) -> None:
            driven.close(0)
            closed.set()

        inbox.on_message = close
        for _ in range(10):
            far.send(b"message")
        await asyncio.wait_for(closed.wait(), 20)
        driven.look()
        await asyncio.sleep(0)
    assert len(inbox.turns) == 1
