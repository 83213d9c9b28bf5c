"""Closing: what runs is ended with a typed error on both sides, and nothing is left."""

from __future__ import annotations

import asyncio
import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from aiomm import PeerLost, PoolClosed, Receiver, Sender, State
from aiomm.planes.memory import Faults

from .support import (
    ANYWHERE,
    SCHEMA,
    SMALL_POOL,
    error_of,
    faulty_pair,
    free_blocks,
    frozen_imports,  # noqa: F401
    granted,
    pair,
    same,
    tensors_of,
    until,
)

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.mark.both_loops
@pytest.mark.parametrize("closed", ["sender", "receiver"])
async def test_closing_with_transfers_in_every_state(closed: str) -> None:
    """Waiting, granted, half written, finished: PoolClosed on both sides for what was not done."""
    faults = Faults(stall_at=2)
    async with faulty_pair(faults) as (receiver, sender):
        await sender.send(receiver.expect("finished"), tensors_of(10))
        running = sender.claim(receiver.expect("running"), num_tokens=50).send(tensors_of(50))
        await faults.stalled.wait()
        claimed = await granted(sender.claim(receiver.expect("claimed")))
        waiting = sender.claim(receiver.expect("waiting")).send(tensors_of(100))
        receivings = [
            asyncio.ensure_future(receiver.receive(each))
            for each in ("running", "claimed", "waiting", "unclaimed")
        ]
        await asyncio.sleep(0)
        aclose = sender.aclose if closed == "sender" else receiver.aclose
        closing = asyncio.ensure_future(aclose())
        ended = [await error_of(each) for each in (running, claimed, waiting)]
        faults.release()
        await closing
        if closed == "sender":
            receiver.cancel("unclaimed")
        errors = [await error_of(each) for each in receivings]
        for error in (*ended, *errors[:3]):
            assert isinstance(error, PoolClosed)
            assert f"{closed}-" in error.message
            assert "was closed" in error.message
        # The other side may send again, to the next life; the one that was closed may not.
        assert {error.retryable for error in ended} == {closed == "receiver"}
        assert {error.retryable for error in errors[:3]} == {closed == "sender"}
        assert receiver.metrics()["blocks_quarantined"] == 0
        assert receiver.metrics()["blocks_granted"] == 0
        assert not sender._driver.sources


@pytest.mark.both_loops
async def test_closing_is_idempotent_and_may_be_asked_for_at_once() -> None:
    """Three at a time, then again, then at the end of the block."""
    async with pair() as (receiver, sender):
        await sender.send(receiver.expect("r"), tensors_of(3))
        for endpoint in (sender, receiver):
            await asyncio.gather(*(endpoint.aclose() for _ in range(3)))
            await endpoint.aclose()


async def test_an_endpoint_that_never_started_closes() -> None:
    """Nothing was made, nothing has to go; afterwards it is closed all the same."""
    receiver, sender = Receiver(SCHEMA, bind=ANYWHERE), Sender(SCHEMA)
    await receiver.aclose()
    await sender.aclose()
    with pytest.raises(PoolClosed):
        await receiver.start()
    with pytest.raises(PoolClosed):
        await sender.start()


async def test_closing_while_it_starts() -> None:
    """The start comes to its end first; what waited for it is told."""
    receiver, sender = Receiver(SCHEMA, bind=ANYWHERE, **SMALL_POOL), Sender(SCHEMA)
    starting = asyncio.ensure_future(receiver.start())
    transfer = sender.send("r", tensors_of(1), to="tcp://127.0.0.1:1")
    sending = asyncio.ensure_future(transfer)
    await asyncio.sleep(0)
    await asyncio.gather(receiver.aclose(), sender.aclose())
    await asyncio.wait([starting])
    assert isinstance(await error_of(sending), PoolClosed)


async def test_a_closed_receiver() -> None:
    """Every call raises PoolClosed and names the endpoint; a cancel is harmless."""
    async with pair(name="the receiver") as (receiver, _):
        await receiver.aclose()
        receiver.cancel("r")
        closed = pytest.raises(PoolClosed, match="the receiver is closed")
        with closed:
            receiver.expect("r")
        with closed:
            await receiver.receive("r")
        with closed:
            await receiver.start()
        with closed:
            await anext(aiter(receiver))


async def test_a_closed_sender() -> None:
    """Every call raises PoolClosed and names the endpoint."""
    async with pair(sender={"name": "the sender", "bind": ANYWHERE}) as (receiver, sender):
        ticket = receiver.expect("r")
        await sender.aclose()
        closed = pytest.raises(PoolClosed, match="the sender is closed")
        with closed:
            sender.claim(ticket)
        with closed:
            await sender.send(ticket, tensors_of(1))
        with closed:
            await sender.start()
        with closed:
            sender.offer("r", tensors_of(1))


async def test_leases_outlive_their_receiver() -> None:
    """A view and a joined lease are readable after the close, and can be released and detached."""
    async with pair() as (receiver, sender):
        await sender.send(receiver.expect("view"), tensors_of(20, seed=1))
        view = await receiver.receive("view")
        await sender.send(receiver.expect("copied"), tensors_of(20, seed=2))
        copied = await receiver.receive("copied")
    gc.collect()
    assert same(dict(view), tensors_of(20, seed=1))
    tensor = view["fill_ids"]
    view.release()
    view.release()
    assert tensor[0] == 1000
    assert same(copied.detach(), tensors_of(20, seed=2))


async def test_a_peer_that_has_closed() -> None:
    """A ticket of a receiver that is gone, and a transfer that nobody will grant any more."""
    async with Sender(SCHEMA) as sender:
        async with Receiver(SCHEMA, bind=ANYWHERE, **SMALL_POOL) as receiver:
            ticket = receiver.expect("r")
            claimed = await granted(sender.claim(receiver.expect("claimed")))
        assert isinstance(await error_of(claimed), PoolClosed)
        assert claimed.state is State.FAILED
        with pytest.raises(PeerLost, match="the ticket is void: its receiver is gone"):
            await sender.send(ticket, tensors_of(1))


@pytest.mark.both_loops
async def test_closing_waits_for_no_thread_of_the_loops() -> None:
    """All of them may be at work for somebody who waits for this very end."""
    closed = threading.Event()
    with ThreadPoolExecutor(1) as executor:
        asyncio.get_running_loop().set_default_executor(executor)
        async with pair() as (receiver, sender):
            await sender.send(receiver.expect("finished"), tensors_of(10))
            waiting = asyncio.create_task(asyncio.to_thread(closed.wait, 10))
            await asyncio.gather(sender.aclose(), receiver.aclose())
            assert not waiting.done()
            closed.set()
        assert await waiting
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor())


@pytest.mark.parametrize("closed", ["sender", "receiver"])
async def test_closing_with_a_thousand_open_transfers(closed: str) -> None:
    """The other side has all its blocks back, though most of what it is told has to wait."""
    asyncio.get_running_loop().set_debug(False)
    async with pair(blocks=1000, block_size=1, default_blocks=1) as (receiver, sender):
        await sender.send(receiver.expect("first"), tensors_of(1))
        (await receiver.receive("first")).release()
        transfers = [sender.claim(f"r{i}", to=receiver.address) for i in range(1000)]
        await asyncio.gather(*map(granted, transfers))
        assert free_blocks(receiver) == 0
        closing = asyncio.ensure_future((sender if closed == "sender" else receiver).aclose())
        await until(lambda: free_blocks(receiver) == 1000, receiver._driver, "pump")
        await closing
        for transfer in transfers:
            assert isinstance(await error_of(transfer), PoolClosed)


async def test_closing_with_no_time_for_it() -> None:
    """Whoever waits is told all the same, however many they are."""
    async with pair(sender={"close_timeout": 0.001}) as (_, sender):
        transfers = [sender.send(f"r{i}", tensors_of(1)) for i in range(1000)]
        await asyncio.sleep(0)
        await sender.aclose()
        for transfer in transfers:
            assert isinstance(await error_of(transfer), PoolClosed)
