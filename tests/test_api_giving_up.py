"""Giving up reaches the other side at once, and late bytes change nothing of what comes after."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import pytest

from aiomm import (
    Cancelled,
    PlaneUnavailable,
    Receiver,
    Rejected,
    Sender,
    Transfer,
    TransferTimeout,
)
from aiomm.planes import memory
from aiomm.planes.memory import Faults

from .support import (
    ANYWHERE,
    SCHEMA,
    SMALL_POOL,
    assert_idle,
    error_of,
    faulty_pair,
    free_blocks,
    frozen_imports,  # noqa: F401
    granted,
    pair,
    same,
    tensors_of,
)

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.mark.both_loops
async def test_the_encoder_gives_up_before_it_has_tensors() -> None:
    """`transfer.cancel` reaches the waiting receiver with its reason; both are told the same."""
    async with pair() as (receiver, sender):
        transfer = await granted(sender.claim(receiver.expect("r")))
        receiving = asyncio.ensure_future(receiver.receive("r"))
        transfer.cancel("the picture is broken")
        for error in [await error_of(transfer), await error_of(receiving)]:
            assert isinstance(error, Cancelled)
            assert error.message == "the picture is broken"
            assert not error.retryable
        assert_idle(receiver, sender)


async def test_the_encoder_raises_within_the_claim() -> None:
    """`with sender.claim(ticket):` tells the receiver what was raised, or that nothing was sent."""
    async with pair() as (receiver, sender):
        with (
            contextlib.suppress(ZeroDivisionError),
            sender.claim(receiver.expect("r")) as transfer,
        ):
            await granted(transfer)
            1 / 0  # noqa: B018
        raised = "the encoder raised ZeroDivisionError: division by zero"
        assert (await error_of(receiver.receive("r"))).message == raised
        assert (await error_of(transfer)).message == raised
        with sender.claim(receiver.expect("r")):
            pass
        nothing = "the encoder gave no tensors"
        assert (await error_of(receiver.receive("r"))).message == nothing
        with sender.claim(receiver.expect("r")) as transfer:
            transfer.send(tensors_of(40))
        async with receiver.receive("r") as lease:
            assert lease.num_tokens == 40
        await transfer
        await receiver_used_again(receiver, sender)


@pytest.mark.both_loops
async def test_the_receiver_gives_up() -> None:
    """`receiver.cancel` reaches both who waits here and the sender over there."""
    async with pair() as (receiver, sender):
        transfer = await granted(sender.claim(receiver.expect("r")))
        receiving = asyncio.ensure_future(receiver.receive("r"))
        await asyncio.sleep(0)
        receiver.cancel("r", "the user has left")
        for error in [await error_of(transfer), await error_of(receiving)]:
            assert isinstance(error, Cancelled)
            assert error.message == "the user has left"
        receiver.cancel("r")
        transfer.cancel()
        await receiver_used_again(receiver, sender)


async def test_a_receiver_gives_up_what_it_only_expects() -> None:
    """The id is free again at once, and the old ticket is worth nothing."""
    async with pair() as (receiver, sender):
        old = receiver.expect("r")
        receiver.cancel("r")
        new = receiver.expect("r")
        assert isinstance(await error_of(sender.send(old, tensors_of(4))), Rejected)
        await sender.send(new, tensors_of(5))
        async with receiver.receive("r") as lease:
            assert lease.num_tokens == 5


async def test_a_result_that_nobody_took_is_dropped_by_cancel() -> None:
    """The blocks of a finished request come back."""
    async with pair() as (receiver, sender):
        await sender.send(receiver.expect("r"), tensors_of(40))
        assert free_blocks(receiver) == 5
        receiver.cancel("r")
        assert_idle(receiver, sender)


async def test_a_result_that_nobody_takes_in_time_is_dropped() -> None:
    """By the deadline of the request its blocks come back, and nothing of it is kept."""
    async with pair() as (receiver, sender):
        ticket = receiver.expect("r", timeout=0.2)
        receiver.expect("unclaimed", timeout=0.1)
        await sender.send(ticket, tensors_of(40))
        with pytest.raises(TransferTimeout):
            await receiver.receive("later", timeout=0.3)
        assert_idle(receiver, sender)


@pytest.mark.parametrize("impatient", ["sender", "receiver"])
async def test_a_deadline_of_either_side_ends_both(impatient: str) -> None:
    """A write that stalls: whoever is impatient, both get TransferTimeout."""
    faults = Faults(stall_at=1)
    async with faulty_pair(faults) as (receiver, sender):
        seconds = {impatient: 0.3}
        ticket = receiver.expect("r", timeout=seconds.get("receiver"))
        transfer = sender.claim(ticket, timeout=seconds.get("sender")).send(tensors_of(20))
        receiving = asyncio.ensure_future(receiver.receive("r"))
        await faults.stalled.wait()
        for error in [await error_of(transfer), await error_of(receiving)]:
            assert isinstance(error, TransferTimeout)
            assert "within 0.3 s: in SENDING" in error.message
            assert "SENDING at" in str(error)
        faults.release()
        await receiver_used_again(receiver, sender)


async def receiver_used_again(receiver: Receiver, sender: Sender) -> None:
    """Send as much as the pool has; it is granted only what is proven to be free."""
    receiver.cancel("r")
    transfer = sender.claim(receiver.expect("again"), num_tokens=128)
    transfer.send(tensors_of(128, seed=5))
    async with receiver.receive("again") as lease:
        assert same(dict(lease), tensors_of(128, seed=5))
    await transfer
    assert_idle(receiver, sender)


def cancel_the_transfer(receiver: Receiver, transfer: Transfer) -> None:
    transfer.cancel()


def cancel_at_the_receiver(receiver: Receiver, transfer: Transfer) -> None:
    receiver.cancel("r")


GIVE_UP = pytest.mark.parametrize("give_up", [cancel_the_transfer, cancel_at_the_receiver])


@pytest.mark.both_loops
@GIVE_UP
async def test_the_blocks_of_a_running_write_are_quarantined(
    give_up: Callable[[Receiver, Transfer], None],
) -> None:
    """Until the write has ended they belong to nobody; meanwhile others go on in the rest."""
    faults = Faults(stall_at=1)
    async with faulty_pair(faults) as (receiver, sender):
        transfer = sender.claim(receiver.expect("r"), num_tokens=40).send(tensors_of(40))
        await faults.stalled.wait()
        give_up(receiver, transfer)
        assert isinstance(await error_of(transfer), Cancelled)
        await sender.send(receiver.expect("beside"), tensors_of(60, seed=3))
        async with receiver.receive("beside") as lease:
            assert receiver.metrics()["blocks_quarantined"] == 3
            faults.release()
            large = sender.claim(receiver.expect("large"), num_tokens=64)
            await large.send(tensors_of(64, seed=4))  # needs a block of the three
            assert same(dict(lease), tensors_of(60, seed=3))
        async with receiver.receive("large") as lease:
            assert same(dict(lease), tensors_of(64, seed=4))
        await receiver_used_again(receiver, sender)


@pytest.mark.parametrize("fault", ["fail_at", "short_at", "late_at"])
@pytest.mark.parametrize("number", [1, 2])
async def test_a_failing_write_fails_its_transfer_only(fault: str, number: int) -> None:
    """The first or a resumed write fails; the neighbour's bytes and transfer are untouched."""
    faults = Faults()
    async with faulty_pair(faults) as (receiver, sender):
        await sender.send(receiver.expect("neighbour"), tensors_of(20, seed=1))
        neighbour = await receiver.receive("neighbour")
        setattr(faults, fault, faults.num_writes + number)
        transfer = await granted(sender.claim(receiver.expect("r")))
        receiving = asyncio.ensure_future(receiver.receive("r"))
        transfer.send(tensors_of(90, seed=2))
        for error in [await error_of(transfer), await error_of(receiving)]:
            assert isinstance(error, PlaneUnavailable)
            assert "on demand" in error.message
        assert same(dict(neighbour), tensors_of(20, seed=1))
        neighbour.release()
        await receiver_used_again(receiver, sender)


async def test_the_blocks_of_a_failed_write_wait_until_nothing_can_land(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The plane has to say so; that both sides know of the failure is not enough."""
    is_quiet, quiesce = asyncio.Event(), memory._MemoryArena.quiesce

    async def late(arena: memory._MemoryArena) -> None:
        await is_quiet.wait()
        await quiesce(arena)

    monkeypatch.setattr(memory._MemoryArena, "quiesce", late)
    async with faulty_pair(Faults(late_at=1)) as (receiver, sender):
        transfer = sender.claim(receiver.expect("r"), num_tokens=40).send(tensors_of(40))
        for error in [await error_of(transfer), await error_of(receiver.receive("r"))]:
            assert isinstance(error, PlaneUnavailable)
        await sender.send(receiver.expect("beside"), tensors_of(20))
        assert receiver.metrics()["blocks_quarantined"] == 3
        is_quiet.set()
        async with receiver.receive("beside"):
            pass
        await receiver_used_again(receiver, sender)


@GIVE_UP
async def test_late_bytes_change_nothing_of_the_next_request(
    give_up: Callable[[Receiver, Transfer], None],
) -> None:
    """Two writes stall into the whole pool and are given up; what comes next is intact."""
    faults = Faults(stall_at=1)
    async with faulty_pair(faults) as (receiver, sender):
        transfer = sender.claim(receiver.expect("r"), num_tokens=128).send(tensors_of(128, 1))
        await faults.stalled.wait()
        give_up(receiver, transfer)
        await error_of(transfer)
        after = sender.claim(receiver.expect("next"), num_tokens=128)
        receiving = asyncio.ensure_future(receiver.receive("next"))
        after.send(tensors_of(128, seed=2))
        faults.release()
        with await receiving as lease:
            assert same(dict(lease), tensors_of(128, seed=2))
        await after
        await receiver_used_again(receiver, sender)


async def test_a_claim_given_up_before_the_first_contact_reaches_the_receiver() -> None:
    """Cancelled in the breath in which it was made: the receiver learns it with the Hello."""
    async with pair() as (receiver, sender):
        transfer = sender.claim(receiver.expect("r"))
        transfer.cancel("not a picture")
        sender.claim("s", to=receiver.address).cancel("nor that")
        assert (await error_of(receiver.receive("r"))).message == "not a picture"
        assert (await error_of(receiver.receive("s"))).message == "nor that"
        await receiver_used_again(receiver, sender)


async def test_a_claim_given_up_whose_receiver_is_another_life() -> None:
    """The new life at the old address has the same request id, and is not disturbed."""
    async with Receiver(SCHEMA, bind=ANYWHERE, **SMALL_POOL) as first:
        address = first.address
        old = first.expect("r")
    async with pair(bind=str(address)) as (receiver, sender):
        new = receiver.expect("r")
        sender.claim(old).cancel()
        await sender.send(new, tensors_of(20))
        async with receiver.receive("r") as lease:
            assert lease.num_tokens == 20
        await receiver_used_again(receiver, sender)
