"""The rules that keep a GPU's memory right: with any one of them taken away, a story goes wrong.

Every story runs twice: as the library is, and with its rule removed, when it must fail.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import pytest

import aiomm
from aiomm.gpu import lanes
from aiomm.gpu.fake import FakeArray, FakeRuntime
from aiomm.protocol import frames
from aiomm.protocol.receive_transfer import ReceiveTransfer
from aiomm.types import TransferId
from tests.processes import until
from tests.protocol.planted_bugs import ignore_generation

SCHEMA = aiomm.Schema(rows=aiomm.Field("uint8", 64))
BLOCKS, BLOCK_SIZE = 8, 16
NUM_TOKENS = BLOCKS * BLOCK_SIZE
"""One request fills the pool, so that the next one is given the same blocks."""
NBYTES = NUM_TOKENS * 64
PATIENCE = 10.0
"""Seconds after which a wait has failed."""
MOMENT = 0.2
"""Seconds in which what must not happen has a chance to."""


class Pair(NamedTuple):
    """A receiver and a sender in one process, and their GPU."""

    gpu: FakeRuntime
    receiver: aiomm.Receiver
    sender: aiomm.Sender

    def send(self, request_id: str, value: int, stream: int | None = None) -> aiomm.Transfer:
        """Expect a request, and send rows of that value."""
        transfer = self.sender.claim(self.receiver.expect(request_id), num_tokens=NUM_TOKENS)
        return transfer.send({"rows": self.array(value)}, stream=stream)

    async def receive(self, request_id: str) -> aiomm.Lease:
        """Return the lease of a request."""
        return await self.receiver.receive(request_id)

    def receiving(self, request_id: str) -> asyncio.Task[aiomm.Lease]:
        """Do so beside others."""
        return asyncio.ensure_future(self.receive(request_id))

    def array(self, value: int) -> FakeArray:
        """Return rows of that value, on the device."""
        return FakeArray(self.gpu, 0, bytes([value]) * NBYTES, "uint8", (NUM_TOKENS, 64))


@asynccontextmanager
async def pair_on(gpu: FakeRuntime) -> AsyncIterator[Pair]:
    """Run a receiver with a pool on the device, and a sender, until the block ends."""
    receiver = aiomm.Receiver(
        SCHEMA,
        bind="tcp://127.0.0.1:*",
        device="cuda:0",
        planes="cuda_ipc",
        blocks=BLOCKS,
        block_size=BLOCK_SIZE,
        default_blocks=BLOCKS,
        close_timeout=1.0,
    )
    async with receiver, aiomm.Sender(SCHEMA, planes="cuda_ipc", close_timeout=1.0) as sender:
        pair = Pair(gpu, receiver, sender)
        pair.send("first", 1)
        see(values_of(await receiver.receive("first")), {1})
        yield pair
        gpu.faults.release()


class Wrong(Exception):
    """Something else has arrived, or was seen, than what should have."""


def see(seen: object, expected: object) -> None:
    if seen != expected:
        raise Wrong(f"{seen}, not {expected}")


def values_of(lease: aiomm.Lease) -> set[int]:
    """Return the values that have arrived, and release the lease."""
    with lease:
        rows: Any = lease["rows"]
        assert rows.shape == (NUM_TOKENS, 64)
        return set(rows.unique().tolist())


# The stories.


async def a_tensor_that_is_made_late(pair: Pair) -> None:
    """The copy begins when the producer's stream has made the tensor."""
    gpu, may_make = pair.gpu, threading.Event()
    stream, array = gpu.make_stream(0), pair.array(0)
    gpu.run(stream, lambda: waited(may_make))
    gpu.run(stream, lambda: array.fill(bytes([2]) * NBYTES))
    ticket = pair.receiver.expect("late")
    pair.sender.claim(ticket, num_tokens=NUM_TOKENS).send({"rows": array}, stream=stream)
    receiving = pair.receiving("late")
    await asyncio.wait([receiving], timeout=MOMENT)
    may_make.set()
    see(values_of(await receiving), {2})


async def a_copy_that_takes_its_time(pair: Pair) -> None:
    """The receiver hears of it when it is done, not when it was given to the stream."""
    pair.gpu.faults.delay = 0.2
    pair.send("slow", 3)
    see(values_of(await pair.receiver.receive("slow")), {3})


async def a_copy_that_outlives_its_request(pair: Pair) -> None:
    """Its blocks are nobody's until it has ended."""
    gpu = pair.gpu
    gpu.faults.stall_at = gpu.faults.num_copies + 1
    pair.send("given up", 4).add_done_callback(lambda _: None)
    await until(gpu.faults.stalled.is_set, "the copy has begun")
    pair.receiver.cancel("given up")
    pair.send("next", 5)
    receiving = pair.receiving("next")
    await asyncio.wait([receiving], timeout=MOMENT)
    before = gpu.copied["DtoD"]
    gpu.faults.release()
    await until(lambda: gpu.copied["DtoD"] > before, "the late copy has landed")
    see(values_of(await receiving), {5})


async def a_reader_that_is_slow(pair: Pair) -> None:
    """Blocks that a stream still reads are given to nobody, though the lease is released."""
    gpu, may_read, seen = pair.gpu, threading.Event(), list[set[int]]()
    pair.send("read", 6)
    lease = await pair.receiver.receive("read")
    rows: Any = lease["rows"]
    stream = gpu.make_stream(0)
    gpu.run(stream, lambda: waited(may_read))
    gpu.run(stream, lambda: seen.append(set(rows.unique().tolist())))
    lease.release(stream)
    pair.send("next", 7)
    receiving = pair.receiving("next")
    await asyncio.wait([receiving], timeout=MOMENT)
    may_read.set()
    see(values_of(await receiving), {7})
    await until(lambda: bool(seen), "the reader is through")
    see(seen, [{6}])


async def a_word_of_an_earlier_attempt(pair: Pair) -> None:
    """What a sender says of another transfer counts for none of this one, of the same request."""
    gpu = pair.gpu
    gpu.faults.stall_at = gpu.faults.num_copies + 1
    transfer = pair.send("again", 8)
    await until(gpu.faults.stalled.is_set, "the copy has begun")
    receiving = pair.receiving("again")
    endpoint = pair.receiver._driver.endpoint
    (session,) = endpoint.sessions.values()
    earlier = TransferId("again", transfer._core.id.generation - 1)  # type: ignore[union-attr]
    late = frames.Written(earlier, 0, 0, NUM_TOKENS, NUM_TOKENS, plane="cuda_ipc")
    endpoint._frame_received(session, late, pair.receiver._driver.now())
    pair.receiver._driver.pump()
    await asyncio.wait([receiving], timeout=MOMENT)
    is_early = receiving.done()
    gpu.faults.release()
    see((values_of(await receiving), is_early), ({8}, False))


def waited(event: threading.Event) -> None:
    """Wait on a stream's thread."""
    assert event.wait(PATIENCE)


# What is taken away.


def without_the_producers_event(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lanes.Mark, "delay", lambda self, stream: None)


def without_waiting_before_written(patch: pytest.MonkeyPatch) -> None:
    async def at_once(mark: lanes.Mark) -> None:
        return

    patch.setattr(lanes, "finished", at_once)


def without_quarantine(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ReceiveTransfer, "_may_be_written", lambda self: False)


def without_stream_ordered_release(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(aiomm.Lease, "_readers", lambda self, stream: ())


Story = Callable[[Pair], Awaitable[None]]
RULES: list[tuple[Story, Callable[[pytest.MonkeyPatch], None]]] = [
    (a_tensor_that_is_made_late, without_the_producers_event),
    (a_copy_that_takes_its_time, without_waiting_before_written),
    (a_copy_that_outlives_its_request, without_quarantine),
    (a_reader_that_is_slow, without_stream_ordered_release),
    (a_word_of_an_earlier_attempt, ignore_generation),
]


@pytest.mark.both_loops
@pytest.mark.parametrize("story", [story for story, _ in RULES], ids=lambda each: each.__name__)
async def test_it_goes_well(story: Story, fake: FakeRuntime) -> None:
    async with pair_on(fake) as pair:
        await story(pair)


@pytest.mark.parametrize(("story", "remove"), RULES, ids=lambda each: each.__name__)
async def test_it_goes_wrong_without_its_rule(
    story: Story,
    remove: Callable[[pytest.MonkeyPatch], None],
    fake: FakeRuntime,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with pair_on(fake) as pair:
        with monkeypatch.context() as patch:
            remove(patch)
            with pytest.raises(Wrong):
                await story(pair)
    fake.join()
    fake.violations.clear()  # some of what goes wrong is one
