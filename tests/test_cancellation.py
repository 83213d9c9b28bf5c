"""Cancelled at every await point: nothing stays open, every block is free, the next one works."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from aiomm import Receiver, Sender

from .support import (
    ANYWHERE,
    SCHEMA,
    SMALL_POOL,
    after_packets,
    assert_idle,
    cancelled_at,
    frozen_imports,  # noqa: F401
    granted,
    pair,
    same,
    tensors_of,
)

pytestmark = pytest.mark.usefixtures("no_leaks")

MAX_STEPS = 40
"""No scenario here suspends more often."""

Scenario = Callable[[Receiver, Sender], Coroutine[Any, Any, object]]


async def sends(receiver: Receiver, sender: Sender) -> object:
    """The sender's call, with a receiver that waits for it."""
    receiver.expect("r")
    return await sender.send("s", tensors_of(100), to=receiver.address)


async def awaits_a_claim(receiver: Receiver, sender: Sender) -> object:
    """A claim whose tensors come after the grant."""
    transfer = await granted(sender.claim(receiver.expect("r")))
    transfer.send(tensors_of(100))
    return await transfer


async def receives(receiver: Receiver, sender: Sender) -> object:
    """The receiver's await."""
    transfer = sender.claim(receiver.expect("r"))
    transfer.send(tensors_of(100))
    lease = await receiver.receive("r")
    lease.release()
    return lease


async def receives_in_a_block(receiver: Receiver, sender: Sender) -> object:
    """`async with`, and an await while the lease is held."""
    transfer = sender.claim(receiver.expect("r"))
    transfer.send(tensors_of(200))
    async with receiver.receive("r") as lease:
        await asyncio.sleep(0)
    await transfer
    return lease


async def takes_what_arrives(receiver: Receiver, sender: Sender) -> object:
    """The iteration over arrivals."""
    transfer = sender.claim(receiver.expect("r"))
    transfer.send(tensors_of(100))
    async for lease in receiver:
        lease.release()
        return lease
    return None


SCENARIOS = [sends, awaits_a_claim, receives, receives_in_a_block, takes_what_arrives]


async def still_works(receiver: Receiver, sender: Sender) -> None:
    """Fill the whole pool over the same link; then nothing at all is left of what came before.

    Frames arrive in order, so what a cancelled request had to settle is settled first.
    """
    give_up(receiver)
    transfer = sender.claim(receiver.expect("next"), num_tokens=128)
    transfer.send(tensors_of(128, seed=9))
    async with receiver.receive("next") as lease:
        assert same(dict(lease), tensors_of(128, seed=9))
    await transfer
    give_up(receiver)
    assert_idle(receiver, sender)


def give_up(receiver: Receiver) -> None:
    """Drop what the cancelled user of a scenario would have taken later."""
    receiver.cancel("r")
    receiver.cancel("s")


@pytest.mark.both_loops
@pytest.mark.parametrize("late", [False, True], ids=["as it waits", "as its turn has come"])
@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_cancelled_at_every_await_point(scenario: Scenario, late: bool) -> None:
    """Both when the wait begins and in the moment when what it waited for is there."""
    async with pair() as (receiver, sender):
        ended, step = None, 0
        while ended is None and step < MAX_STEPS:
            ended = await cancelled_at(step, scenario(receiver, sender), late=late)
            await still_works(receiver, sender)
            step += 1
        assert ended is not None
        assert step > 1


@pytest.mark.both_loops
@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_cancelled_after_every_packet(scenario: Scenario) -> None:
    """Cancelled when the k-th packet has come to either side, for every k of the conversation."""
    async with pair() as (receiver, sender):
        await still_works(receiver, sender)
        for count in range(1, MAX_STEPS):
            task = asyncio.ensure_future(scenario(receiver, sender))
            with after_packets(count, receiver, sender, then=task.cancel):
                await asyncio.wait([task])
            await still_works(receiver, sender)
            if not task.cancelled():
                break
        assert not task.cancelled()
        assert count > 2


async def test_a_result_that_comes_while_a_cancelled_receive_has_not_run_yet() -> None:
    """The task is cancelled and, before its turn, the request ends: nobody gets it, nothing leaks.

    Once by a failure and once by tensors, which hold blocks.
    """
    async with pair() as (receiver, sender):
        receiving = asyncio.ensure_future(receiver.receive("r"))
        await asyncio.sleep(0)
        receiving.cancel()
        receiver.cancel("r")
        await asyncio.wait([receiving])
        assert receiving.cancelled()

        transfer = sender.claim(receiver.expect("r"))
        receiving = asyncio.ensure_future(receiver.receive("r"))
        await granted(transfer)
        results = receiver._driver.results
        ended = results.ended

        def cancel_and_end(*arguments: Any) -> None:
            receiving.cancel()
            ended(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(results, "ended", cancel_and_end)
            await transfer.send(tensors_of(32))
            await asyncio.wait([receiving])
        assert receiving.cancelled()
        await still_works(receiver, sender)


@pytest.mark.both_loops
@pytest.mark.parametrize("late", [False, True], ids=["as it waits", "as its turn has come"])
async def test_start_and_close_cancelled_at_every_await_point(late: bool) -> None:
    """A life from start to close: whatever is cancelled, a second close leaves nothing behind."""

    async def life(receiver: Receiver, sender: Sender) -> bool:
        await receiver.start()
        transfer = sender.claim(receiver.expect("r"))
        transfer.send(tensors_of(40))
        (await receiver.receive("r")).release()
        await sender.aclose()
        await receiver.aclose()
        return True

    ended, step = None, 0
    while ended is None and step < MAX_STEPS:
        receiver, sender = Receiver(SCHEMA, bind=ANYWHERE, **SMALL_POOL), Sender(SCHEMA)
        ended = await cancelled_at(step, life(receiver, sender), late=late)
        await asyncio.gather(sender.aclose(), receiver.aclose())
        step += 1
    assert ended is not None
    assert step > 4
