"""kill -9 of a receiver in the middle of a transfer, as the sender sees it."""

from __future__ import annotations

import time
from typing import Any

import pytest

import aiomm
from aiomm.planes.registry import make_planes
from tests.children import FaultyPlane
from tests.conftest import resources
from tests.processes import SCHEMA, Child, child, nothing_new, pattern, until

pytestmark = [pytest.mark.usefixtures("no_leaks"), pytest.mark.timeout(60)]

ANYWHERE = "tcp://127.0.0.1:*"


async def ticket_of(receiver: Child, request_id: str) -> str:
    """Have the child expect and receive a request."""
    return str((await receiver.ask("expect", "ticket", request_id=request_id))["ticket"])


async def claimed(sender: aiomm.Sender, ticket: str) -> aiomm.Transfer:
    """Return a transfer that has its grant and no tensors."""
    transfer = sender.claim(ticket)
    async for state in transfer.events():
        if state is aiomm.State.SENDING:
            break
    return transfer


async def send_to(sender: aiomm.Sender, receiver: Child, request_id: str, seed: int) -> None:
    """Move one request and have the receiver compare every byte."""
    await sender.send(await ticket_of(receiver, request_id), pattern(seed, 300))
    assert (await receiver.hear("ended", request_id=request_id))["is_right"]


@pytest.mark.both_loops
@pytest.mark.parametrize("plane", ["shm", "tcp"])
async def test_a_killed_receiver_fails_its_transfers_and_no_others(plane: str) -> None:
    await kill_in_the_middle(plane, "auto")


@pytest.mark.parametrize("control", ["zmq", "aiozmq"])
async def test_a_killed_receiver_on_zeromq(control: Any) -> None:
    await kill_in_the_middle("shm", control)


async def kill_in_the_middle(plane: str, control: Any) -> None:
    """Kill a receiver with transfers at two stages; check that nobody else is harmed."""
    settings: dict[str, Any] = {"planes": plane, "control": control, "bind": ANYWHERE}
    faulty = FaultyPlane(make_planes(plane)[0])
    async with (
        child("receiver", **settings) as bystander,
        aiomm.Sender(SCHEMA, planes=[faulty], control=control, close_timeout=0.3) as sender,
    ):
        other = await claimed(sender, await ticket_of(bystander, "other"))
        async with child("receiver", **settings) as victim:
            await send_to(sender, victim, "good", 1)
            granted = await claimed(sender, await ticket_of(victim, "granted"))
            landed = await claimed(sender, await ticket_of(victim, "landed"))
            faulty.fault = "mute"
            landed.send(pattern(2, 300))
            await until(lambda: not faulty.fault, "the write is under way")
            at = victim.kill()
            for transfer in (granted, landed):
                with pytest.raises(aiomm.PeerLost) as caught:
                    await transfer
                assert caught.value.story
            seconds = time.monotonic() - at
            print(f"{plane} {control}: PeerLost after {1000 * seconds:.1f} ms")
            assert seconds < 5
        other.send(pattern(3, 400))
        await other
        assert (await bystander.hear("ended", request_id="other"))["is_right"]


@pytest.mark.parametrize("plane", ["shm", "tcp"])
async def test_the_tensors_of_a_dead_receiver_are_let_go(plane: str) -> None:
    settings: dict[str, Any] = {"planes": plane, "bind": ANYWHERE}
    async with child("receiver", **settings) as bystander, aiomm.Sender(SCHEMA) as sender:
        await send_to(sender, bystander, "first", 1)
        before = resources()
        async with child("receiver", **settings) as receiver:
            await send_to(sender, receiver, "good", 1)
            transfer = await claimed(sender, await ticket_of(receiver, "r"))
            receiver.kill()
            with pytest.raises(aiomm.PeerLost):
                await transfer
        transfer.send(pattern(1, 10))  # too late, and harmless
        assert not sender._driver.sources
        assert not sender._driver.endpoint.num_live
        await until(nothing_new(before), "connections and threads end")


async def test_another_receiver_and_the_next_life_of_the_same() -> None:
    """The new life listens where the old one did: old tickets are void, new ones work."""
    async with aiomm.Sender(SCHEMA) as sender:
        async with child("receiver", bind=ANYWHERE) as first:
            address = (await first.ask("where", "address"))["address"]
            await send_to(sender, first, "good", 1)
            unclaimed = await ticket_of(first, "unclaimed")
            transfer = await claimed(sender, await ticket_of(first, "claimed"))
            first.kill()
            with pytest.raises(aiomm.PeerLost):
                await transfer
        async with child("receiver", bind=ANYWHERE) as elsewhere:
            await send_to(sender, elsewhere, "elsewhere", 2)
        async with child("receiver", bind=address) as second:
            with pytest.raises(aiomm.PeerLost, match="void"):
                await sender.send(unclaimed, pattern(3, 10))
            await send_to(sender, second, "again", 4)
            await send_to(sender, second, "claimed", 5)  # an id of the old life, used anew


async def test_an_old_ticket_when_nobody_listens_there_any_more() -> None:
    async with aiomm.Sender(SCHEMA) as sender:
        async with child("receiver", bind=ANYWHERE) as receiver:
            await send_to(sender, receiver, "good", 1)
            old = await ticket_of(receiver, "old")
            receiver.kill()
        with pytest.raises(aiomm.AiommError) as caught:
            await sender.send(old, pattern(1, 10), timeout=0.5)
        assert isinstance(caught.value, aiomm.TransferTimeout | aiomm.PeerLost)


async def test_a_receiver_that_is_killed_before_the_plane_is_found() -> None:
    async with aiomm.Sender(SCHEMA, close_timeout=1.0) as sender:
        async with child("receiver", bind=ANYWHERE) as receiver:
            ticket = await ticket_of(receiver, "r")
            transfer = sender.claim(ticket, timeout=1.0).send(pattern(1, 3000))
            receiver.kill()
            with pytest.raises(aiomm.AiommError) as caught:
                await transfer
        assert isinstance(caught.value, aiomm.TransferTimeout | aiomm.PeerLost)
