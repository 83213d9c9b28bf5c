"""Encoder first: the sender issues the ticket, and receivers redeem it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import torch

from aiomm import (
    AiommError,
    Cancelled,
    Field,
    IncompatibleSchema,
    Lease,
    OfferedTicket,
    PeerLost,
    PoolClosed,
    Receiver,
    Rejected,
    Schema,
    Sender,
    Ticket,
)
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
    same,
    tensors_of,
    until,
)

pytestmark = pytest.mark.usefixtures("no_leaks")


@asynccontextmanager
async def offering(
    num_receivers: int = 1, schema: Schema = SCHEMA, **settings: Any
) -> AsyncIterator[tuple[Sender, list[Receiver]]]:
    """Yield a sender that listens, and receivers that only connect."""
    async with AsyncExitStack() as stack:
        sender = await stack.enter_async_context(Sender(schema, bind=ANYWHERE, timeout=20.0))
        receivers = [
            await stack.enter_async_context(
                Receiver(schema, **{**SMALL_POOL, "timeout": 20.0, **settings})
            )
            for _ in range(num_receivers)
        ]
        yield sender, receivers


async def redeem(receiver: Receiver, ticket: Ticket | str | bytes) -> Lease:
    return await receiver.receive(ticket)


@pytest.mark.both_loops
@pytest.mark.parametrize("form", ["ticket", "json", "bytes"])
async def test_an_offer_is_redeemed(form: str) -> None:
    """In any form; the ticket tells the length, and the grant is exact."""
    async with offering() as (sender, [receiver]):
        offered = sender.offer("r", tensors_of(50), metadata={"k": 1})
        assert offered.ticket.num_tokens == 50
        forms: dict[str, Ticket | str | bytes] = {
            "ticket": offered.ticket,
            "json": offered.to_json(),
            "bytes": offered.to_bytes(),
        }
        async with receiver.receive(forms[form]) as lease:
            assert lease.request_id == "r"
            assert lease.metadata == {"k": 1}
            assert lease.buffered_chunks == (50,)
            assert lease.is_view
            assert free_blocks(receiver) == 4
            assert same(dict(lease), tensors_of(50))
        offered.withdraw()
        assert await offered == 1
        assert_idle(receiver, sender)


async def test_thirty_offers_of_8_mib_fit_a_pool_of_exactly_thirty() -> None:
    """Redeemed at once and all thirty leases held: nothing is pinned beyond the need."""
    schema = Schema(x=Field("float32", 2048))
    tensor = torch.zeros(1024, 2048)  # 8 MiB: 8 blocks, less than the default of 10
    async with offering(1, schema, blocks=240, block_size=128, default_blocks=10) as (
        sender,
        [receiver],
    ):
        offers = []
        for index in range(30):
            tensor[index] = index
            offers.append(sender.offer(f"r{index}", {"x": tensor}))
        leases = await asyncio.gather(*(redeem(receiver, each.ticket) for each in offers))
        assert [lease.request_id for lease in leases] == [f"r{index}" for index in range(30)]
        for lease in leases:
            assert lease.is_view
            assert lease.stats.resumes == 0
            assert lease["x"][7, 0] == 7
        assert free_blocks(receiver) == 0
        for lease in leases:
            lease.release()
        for offered in offers:
            offered.withdraw()
            assert await offered == 1
        assert_idle(receiver, sender)


async def test_one_offer_is_redeemed_by_three_and_again_by_the_same() -> None:
    """At once by three receivers, two of them twice; each has tensors of its own."""
    async with offering(3) as (sender, receivers):
        offered = sender.offer("r", tensors_of(40))
        redeemers = [*receivers, *receivers[:2]]
        leases = await asyncio.gather(*(redeem(each, offered.ticket) for each in redeemers))
        assert all(same(dict(lease), tensors_of(40)) for lease in leases)
        for lease in leases:
            lease.release()
        async with receivers[2].receive(offered.to_json()) as lease:
            assert same(dict(lease), tensors_of(40))
        offered.withdraw()
        assert await offered == 6
        assert offered.redeemed == 6
        for receiver in receivers:
            assert_idle(receiver, sender)


async def test_an_offer_that_nobody_redeems_ends_by_itself() -> None:
    """By its timeout; the tensors are let go, and its id may be offered again."""
    async with offering() as (sender, [receiver]):
        offered = sender.offer("r", tensors_of(5), timeout=0.05)
        assert "standing" in repr(offered)
        assert await offered == 0
        assert "ended" in repr(offered)
        assert not sender._driver.offers
        error = await error_of(receiver.receive(offered.ticket))
        assert isinstance(error, Rejected)
        assert "'r' is not on offer: withdrawn, expired or unknown" in error.message
        again = sender.offer("r", tensors_of(6))
        assert (await error_of(receiver.receive(offered.ticket))).message == error.message
        async with receiver.receive(again.ticket) as lease:
            assert lease.num_tokens == 6
        again.withdraw()
        assert await again == 1
        assert_idle(receiver, sender)


async def test_withdrawn_twice_and_while_it_is_being_redeemed() -> None:
    """What has begun goes on, what comes later is refused; the handle ends with the last one."""
    faults = Faults(stall_at=1)
    async with faulty_pair(faults, sender={"bind": ANYWHERE}) as (receiver, sender):
        offered = sender.offer("r", tensors_of(40))
        begun = asyncio.ensure_future(redeem(receiver, offered.ticket))
        await faults.stalled.wait()
        offered.withdraw()
        offered.withdraw()
        assert isinstance(await error_of(receiver.receive(offered.ticket)), Rejected)
        assert offered.redeemed == 0
        faults.release()
        with await begun as lease:
            assert same(dict(lease), tensors_of(40))
        assert await offered == 1
        assert_idle(receiver, sender)


@pytest.mark.parametrize("is_redeemed", [False, True])
async def test_the_handle_ends_with_its_sender(is_redeemed: bool) -> None:
    """Closing the sender ends its offers; who redeems is told that it was closed, or is gone."""
    faults = Faults()
    async with faulty_pair(faults, sender={"bind": ANYWHERE}) as (receiver, sender):
        async with receiver.receive(sender.offer("first", tensors_of(5)).ticket):
            pass  # the receiver knows the sender, and so hears its farewell
        driver = receiver._driver
        parting = asyncio.ensure_future(until(lambda: True, driver, "parted"))
        offered = sender.offer("r", tensors_of(40))
        if is_redeemed:
            faults.stall_at = 2
            redeeming = asyncio.ensure_future(redeem(receiver, offered.ticket))
            await faults.stalled.wait()
        closing = asyncio.ensure_future(sender.aclose())
        if is_redeemed:
            assert isinstance(await error_of(redeeming), PoolClosed)
            faults.release()
        await closing
        assert await offered == 0
        await parting
        with pytest.raises(PeerLost, match="the ticket is void: its sender is gone"):
            await receiver.receive(offered.ticket)
        assert_idle(receiver, sender)


async def test_a_ticket_of_an_earlier_life() -> None:
    """The sender was restarted at the same address: the ticket is void, and that is said."""
    async with offering() as (_, [receiver]):
        async with Sender(SCHEMA, bind=ANYWHERE) as first:
            offered = first.offer("r", tensors_of(5))
            address = first.address
        async with Sender(SCHEMA, bind=address) as second:
            second.offer("r", tensors_of(5))
            with pytest.raises(PeerLost, match="the ticket is void: its sender"):
                await receiver.receive(offered.ticket)


async def test_cancelling_a_redemption_leaves_the_offer_standing() -> None:
    """Given up while the write stalls; the same receiver gets everything afterwards."""
    faults = Faults(stall_at=1)
    async with faulty_pair(faults, sender={"bind": ANYWHERE}) as (receiver, sender):
        offered = sender.offer("r", tensors_of(100))
        redeeming = asyncio.ensure_future(redeem(receiver, offered.ticket))
        await faults.stalled.wait()
        redeeming.cancel()
        await asyncio.wait([redeeming])
        faults.release()
        async with receiver.receive(offered.ticket) as lease:
            assert same(dict(lease), tensors_of(100))
        offered.withdraw()
        assert await offered == 1
        assert_idle(receiver, sender)


async def test_redemptions_are_cancelled_by_their_request_id() -> None:
    """All of that id, whether they are served or wait, and no other."""
    async with offering() as (sender, (receiver,)):
        ticket = sender.offer("request", tensors_of(100)).ticket
        (await receiver.receive(ticket)).release()  # the link stands
        offer = sender.offer("other", tensors_of(100))
        other = asyncio.ensure_future(_take(receiver, offer.ticket))
        waits = [asyncio.ensure_future(_take(receiver, ticket)) for _ in range(2)]
        waits.append(asyncio.ensure_future(_take(receiver, "request", sender.address)))
        await asyncio.sleep(0)
        receiver.cancel("request", "the user hung up")
        for wait in waits:
            error = await error_of(wait)
            assert isinstance(error, Cancelled)
            assert "the user hung up" in error.message
        await other
        assert not receiver._driver.endpoint._redeemed
        assert free_blocks(receiver) == SMALL_POOL["blocks"]


async def _take(receiver: Receiver, request: Ticket | str, source: str | None = None) -> None:
    """Receive and release; unlike `receive` itself, this begins when its task runs."""
    (await receiver.receive(request, source=source)).release()


async def test_what_cannot_be_offered() -> None:
    """A second offer of an id, wrong tensors, and a sender where nobody can redeem."""
    async with offering() as (sender, [receiver]):
        offered = sender.offer("r", tensors_of(5))
        with pytest.raises(Rejected, match="'r' is offered already"):
            sender.offer("r", tensors_of(5))
        with pytest.raises(IncompatibleSchema, match="fill_ids"):
            sender.offer("s", {**tensors_of(5), "fill_ids": torch.zeros(5)})
        async with Sender(SCHEMA) as deaf:
            with pytest.raises(Rejected, match="only a started sender with bind="):
                deaf.offer("r", tensors_of(5))
        async with receiver.receive(offered.ticket) as lease:
            assert lease.num_tokens == 5


async def test_a_ticket_is_not_used_the_wrong_way_round() -> None:
    """A sender claims no offer, and a receiver redeems no ticket of a receiver."""
    async with offering() as (sender, [receiver]):
        offered: OfferedTicket = sender.offer("r", tensors_of(5))
        with pytest.raises(Rejected, match="this ticket is an offer: a receiver redeems it"):
            sender.claim(offered.ticket)
        with pytest.raises(AiommError, match="this ticket is for a sender to claim"):
            await receiver.receive(receiver.expect("s"))


async def test_a_forged_key() -> None:
    """The right id with another key is refused, in the same words as an id that is unknown."""
    async with offering() as (sender, [receiver]):
        offered = sender.offer("r", tensors_of(5))
        forged = {"key": b"0123456789abcdef", "kind": "offer", "request_id": "r"}
        ticket = Ticket(
            **forged,  # type: ignore[arg-type]
            address=offered.ticket.address,
            epoch=offered.ticket.epoch,
        )
        with pytest.raises(Rejected, match="'r' is not on offer: withdrawn, expired or unknown"):
            await receiver.receive(ticket)
        assert offered.redeemed == 0
