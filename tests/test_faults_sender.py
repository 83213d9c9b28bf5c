"""kill -9 of a sender in the middle of a transfer, as the receiver sees it."""

from __future__ import annotations

import asyncio
import statistics
from pathlib import Path

import pytest

import aiomm
from tests.conftest import resources
from tests.processes import (
    Child,
    child,
    failed,
    nothing_new,
    num_blocks,
    pattern,
    received,
    receiving,
    until,
)

pytestmark = [pytest.mark.usefixtures("no_leaks"), pytest.mark.timeout(60)]

WAYS = [
    pytest.param("shm", "auto", id="shm"),
    pytest.param("tcp", "auto", id="tcp"),
    pytest.param("shm", "zmq", id="zmq"),
    pytest.param("shm", "aiozmq", id="aiozmq"),
]
FAULTS = ["claimed", "stall", "mute"]


async def reach(sender: Child, ticket: aiomm.Ticket, fault: str) -> None:
    """Bring a transfer to where `fault` says, and return once it is there."""
    if fault == "claimed":
        sender.tell("claim", ticket=ticket.to_json())
        await sender.hear("state", state="SENDING")
    else:
        sender.tell("send", ticket=ticket.to_json(), seed=1, num_tokens=300, fault=fault)
        await sender.hear("halfway" if fault == "stall" else "landed")


async def kill_in_the_middle(receiver: aiomm.Receiver, sender: Child, fault: str) -> float:
    """Kill a sender there; return the seconds until its request failed."""
    ticket = receiver.expect(fault)
    waiting = asyncio.ensure_future(failed(receiver, fault))
    await reach(sender, ticket, fault)
    at = sender.kill()
    error, failed_at = await waiting
    assert isinstance(error, aiomm.PeerLost)
    assert error.story
    return failed_at - at


def maps_an_arena(pid: int) -> bool:
    """Whether the process has a receiver's arena in its memory."""
    return "memfd:aiomm" in Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.both_loops
@pytest.mark.parametrize("plane", ["shm", "tcp"])
async def test_a_killed_sender_fails_its_request_only(plane: str) -> None:
    await kill_again_and_again(plane, "auto")


@pytest.mark.parametrize("control", ["zmq", "aiozmq"])
async def test_a_killed_sender_on_zeromq(control: str) -> None:
    await kill_again_and_again("shm", control)


async def kill_again_and_again(plane: str, control: str) -> None:
    """Kill a sender at every stage of a transfer; check that nobody else is harmed."""
    async with (
        receiving(planes=plane, control=control) as receiver,
        child("sender", planes=plane, control=control, name="bystander") as bystander,
    ):
        other = receiver.expect("other")
        bystander.tell("claim", ticket=other.to_json())
        await bystander.hear("state", state="SENDING")
        exports = receiver._driver._exports
        await until(lambda: bool(exports._planes_of_link), "the bystander's plane is there")
        before, free = resources(), num_blocks(receiver, "free")
        for fault in FAULTS:  # each round is the next life of the same sender
            async with child("sender", planes=plane, control=control, name="victim") as victim:
                ticket = receiver.expect("good")
                victim.tell("send", ticket=ticket.to_json(), seed=2, num_tokens=700)
                assert await received(receiver, "good") == pattern(2, 700)
                seconds = await kill_in_the_middle(receiver, victim, fault)
                print(f"{plane} {control} {fault}: PeerLost after {1000 * seconds:.1f} ms")
                assert seconds < 5
                await until(lambda: num_blocks(receiver, "free") == free, "blocks come back")
            await until(nothing_new(before), f"descriptors go after {fault}")
            assert receiver.metrics()["peers"] == 1
        bystander.tell("give", request_id="other", seed=3, num_tokens=500)
        assert await received(receiver, "other") == pattern(3, 500)


async def test_every_transfer_of_the_killed_sender_fails_at_once() -> None:
    async with receiving() as receiver, child("sender") as sender:
        tickets = {f"r{n}": receiver.expect(f"r{n}") for n in range(12)}
        waiting = [asyncio.ensure_future(failed(receiver, name)) for name in tickets]
        for ticket in tickets.values():
            sender.tell("claim", ticket=ticket.to_json())
        for _ in range(8):  # the pool has room for so many; the others wait in turn
            await sender.hear("state", state="SENDING")
        sender.kill()
        errors = [error for error, _ in await asyncio.gather(*waiting)]
        assert {type(error) for error in errors} == {aiomm.PeerLost}
        await until(lambda: num_blocks(receiver, "free") == 16, "blocks come back")
        assert receiver.metrics()["requests_waiting_for_blocks"] == 0
        assert receiver.metrics()["requests_open"] == 0


async def test_a_request_that_waits_for_blocks_gets_those_of_the_killed_sender() -> None:
    async with receiving() as receiver, child("sender") as victim, child("sender") as other:
        whole = receiver.expect("whole")
        victim.tell("claim", ticket=whole.to_json(), num_tokens=16 * 128)
        await victim.hear("state", state="SENDING")
        later = receiver.expect("later")
        other.tell("send", ticket=later.to_json(), seed=4, num_tokens=1000)
        await until(lambda: receiver.metrics()["requests_waiting_for_blocks"] == 1, "it waits")
        victim.kill()
        assert await received(receiver, "later") == pattern(4, 1000)


async def test_the_end_of_an_unclaimed_sender_harms_no_request() -> None:
    """A sender that has not claimed is nobody's sender yet: the ticket can go to another."""
    async with receiving() as receiver:
        async with child("sender") as first:
            ticket = receiver.expect("earlier")
            first.tell("send", ticket=ticket.to_json(), seed=1, num_tokens=10)
            assert await received(receiver, "earlier") == pattern(1, 10)
            ticket = receiver.expect("ours")
            first.kill()
        await until(lambda: receiver.metrics()["peers"] == 0, "the death is known")
        async with child("sender") as second:
            second.tell("send", ticket=ticket.to_json(), seed=5, num_tokens=10)
            assert await received(receiver, "ours") == pattern(5, 10)


async def test_a_killed_sender_of_offers() -> None:
    """Encoder first: the receiver connects, redeems, and learns of the death likewise."""
    async with receiving() as receiver, child("sender", bind="tcp://127.0.0.1:*") as sender:
        good = await sender.ask("offer", "ticket", request_id="good", seed=6, num_tokens=400)
        async with receiver.receive(good["ticket"]) as lease:
            assert lease.num_tokens == 400
        sender.tell("fault", fault="stall")
        bad = await sender.ask("offer", "ticket", request_id="bad", seed=6, num_tokens=400)
        waiting = asyncio.ensure_future(failed(receiver, bad["ticket"]))
        await sender.hear("halfway")
        at = sender.kill()
        error, failed_at = await waiting
        assert isinstance(error, aiomm.PeerLost)
        print(f"offer: PeerLost after {1000 * (failed_at - at):.1f} ms")
        await until(lambda: num_blocks(receiver, "free") == 16, "blocks come back")


async def test_a_child_of_the_killed_sender_lives_on() -> None:
    """It holds copies of every connection, so only the pidfd can tell; it cannot reach the pool."""
    async with receiving() as receiver, child("sender") as sender:
        ticket = receiver.expect("r")
        waiting = asyncio.ensure_future(failed(receiver, "r"))
        await reach(sender, ticket, "stall")
        assert maps_an_arena(sender.pid)
        forked = (await sender.ask("fork", "forked"))["pid"]
        try:
            assert not maps_an_arena(forked)
            at = sender.kill()
            error, failed_at = await waiting
            assert isinstance(error, aiomm.PeerLost)
            assert failed_at - at < 5
            await until(lambda: num_blocks(receiver, "free") == 16, "blocks come back")
        finally:
            sender.kill_orphan(forked)


async def test_a_blocked_loop_is_not_a_lost_peer() -> None:
    """A real encoder holds its loop, and the GIL, for seconds."""
    async with (
        receiving(peer_timeout=15.0) as receiver,
        child("sender", peer_timeout=15.0) as sender,
    ):
        ticket = receiver.expect("r")
        sender.tell("claim", ticket=ticket.to_json())
        await sender.hear("state", state="SENDING")
        sender.tell("block", seconds=2.0)
        sender.tell("give", request_id="r", seed=7, num_tokens=900)
        assert await received(receiver, "r") == pattern(7, 900)


async def test_a_silent_peer_is_lost_after_its_timeout_and_may_come_back() -> None:
    """Silence proves nothing: the blocks stay in quarantine until the sender says it is drained."""
    async with receiving(peer_timeout=1.5) as receiver, child("sender") as sender:
        ticket = receiver.expect("r")
        sender.tell("claim", ticket=ticket.to_json())
        await sender.hear("state", state="SENDING")
        sender.stop()
        error, _ = await failed(receiver, "r")
        assert isinstance(error, aiomm.PeerLost)
        assert "not answered for 1.5 s" in str(error)
        assert num_blocks(receiver, "quarantined") == 2
        sender.resume()
        await until(lambda: num_blocks(receiver, "free") == 16, "the sender has acknowledged")
        again = receiver.expect("again")
        sender.tell("send", ticket=again.to_json(), seed=8, num_tokens=50)
        assert await received(receiver, "again") == pattern(8, 50)


@pytest.mark.slow
@pytest.mark.parametrize(("plane", "control"), WAYS)
async def test_how_soon_a_death_is_known(plane: str, control: str) -> None:
    """Prints the median over three kills; run with -s to see it."""
    seconds = []
    async with receiving(planes=plane, control=control) as receiver:
        for _ in range(3):
            async with child("sender", planes=plane, control=control) as sender:
                seconds.append(await kill_in_the_middle(receiver, sender, "stall"))
    print(f"{plane} {control}: PeerLost after {1000 * statistics.median(seconds):.1f} ms (median)")
    assert statistics.median(seconds) < 1
