"""SIGSTOP past a deadline, then SIGCONT: what wakes up late must not harm anybody."""

from __future__ import annotations

import asyncio

import pytest

import aiomm
from tests.processes import (
    SCHEMA,
    Child,
    bytes_of,
    child,
    failed,
    num_blocks,
    pattern,
    received,
    receiving,
    until,
)

pytestmark = [pytest.mark.usefixtures("no_leaks"), pytest.mark.timeout(60)]

LATE = 1500
"""Tokens of the late write: 12 blocks, and more than one piece on every plane."""


def pool_bytes(receiver: aiomm.Receiver) -> bytes:
    """Return every byte of the pool."""
    arena = receiver._driver.memory.arena
    return bytes(arena.read(0, receiver._driver.layout.nbytes))


def without(receiver: aiomm.Receiver, pool: bytes, extents: list[aiomm.Extent]) -> bytes:
    """Return `pool` with the bytes of `extents` blanked."""
    blanked = bytearray(pool)
    for extent in extents:
        for name in SCHEMA:
            start, stop = receiver._driver.layout.field_range(name, extent)
            blanked[start:stop] = bytes(stop - start)
    return bytes(blanked)


def in_pool(receiver: aiomm.Receiver, pool: bytes, extent: aiomm.Extent) -> dict[str, bytes]:
    """Return the tensors that lie in `extent`."""
    ranges = {name: receiver._driver.layout.field_range(name, extent) for name in SCHEMA}
    return {name: pool[start:stop] for name, (start, stop) in ranges.items()}


async def stop_in_the_middle(receiver: aiomm.Receiver, sender: Child) -> aiomm.Extent:
    """Stop a sender in the middle of a write until the request is over; return its extent."""
    ticket = receiver.expect("late", timeout=1.5)
    waiting = asyncio.ensure_future(failed(receiver, "late"))
    sender.tell("send", ticket=ticket.to_json(), seed=1, num_tokens=LATE, fault="stop")
    await sender.hear("halfway")
    sender.wait_stopped()
    number = max(receiver._driver.endpoint.numbers())
    ((_, (extent,)),) = receiver._driver.endpoint.transfer(number).grants
    error, _ = await waiting
    assert isinstance(error, aiomm.TransferTimeout)
    return extent


async def send_from(
    sender: Child, receiver: aiomm.Receiver, request_id: str, seed: int, num_tokens: int
) -> aiomm.Lease:
    """Move a request and return its lease."""
    ticket = receiver.expect(request_id)
    sender.tell("send", ticket=ticket.to_json(), seed=seed, num_tokens=num_tokens)
    lease = await receiver.receive(request_id)
    assert bytes_of(lease) == pattern(seed, num_tokens)
    return lease


@pytest.mark.both_loops
async def test_a_late_write_into_shared_memory_lands_in_quarantine() -> None:
    """The write cannot be stopped, so its blocks belong to nobody until it is over."""
    async with (
        receiving(planes="shm") as receiver,
        child("sender") as stopped,
        child("sender") as other,
    ):
        extent = await stop_in_the_middle(receiver, stopped)
        late = extent._replace(stop=extent.start + LATE)
        assert num_blocks(receiver, "quarantined") == 12
        leases = [await send_from(other, receiver, f"r{n}", 2 + n, 256) for n in range(2)]
        assert num_blocks(receiver, "free") == 0
        waits = receiver.expect("waits", timeout=0.5)
        other.tell("send", ticket=waits.to_json(), seed=9, num_tokens=10)
        error, _ = await failed(receiver, "waits")
        assert isinstance(error, aiomm.TransferTimeout)  # no quarantined block was given to it
        before = pool_bytes(receiver)
        assert in_pool(receiver, before, late) != pattern(1, LATE)
        stopped.resume()
        await until(lambda: num_blocks(receiver, "quarantined") == 0, "AbortAck")
        after = pool_bytes(receiver)
        assert in_pool(receiver, after, late) == pattern(1, LATE)  # so it did write, late
        assert without(receiver, after, [extent]) == without(receiver, before, [extent])
        assert (await stopped.hear("late"))["error"] is None
        assert (await stopped.hear("ended"))["error"] == "TransferTimeout"
        for number, lease in enumerate(leases):
            assert bytes_of(lease) == pattern(2 + number, 256)
            lease.release()
        (await send_from(stopped, receiver, "all", 5, 16 * 128)).release()


async def test_a_late_write_over_tcp_lands_nowhere() -> None:
    """The receiver withdraws the grant: the blocks are free at once, the bytes are dropped."""
    async with (
        receiving(planes="tcp") as receiver,
        child("sender") as stopped,
        child("sender") as other,
    ):
        await stop_in_the_middle(receiver, stopped)
        assert num_blocks(receiver, "quarantined") == 0
        assert num_blocks(receiver, "free") == 16
        lease = await send_from(other, receiver, "all", 2, 16 * 128)
        before = pool_bytes(receiver)
        stopped.resume()
        assert "withdrawn" in (await stopped.hear("late"))["error"]
        assert (await stopped.hear("ended"))["error"] == "TransferTimeout"
        assert pool_bytes(receiver) == before
        assert bytes_of(lease) == pattern(2, 16 * 128)
        lease.release()
        (await send_from(stopped, receiver, "again", 3, 100)).release()


async def test_a_stopped_sender_that_is_killed_ends_its_quarantine() -> None:
    async with receiving(planes="shm") as receiver, child("sender") as stopped:
        await stop_in_the_middle(receiver, stopped)
        assert num_blocks(receiver, "quarantined") == 12
        stopped.kill()
        await until(lambda: num_blocks(receiver, "free") == 16, "the death proves it")


async def test_a_receiver_closes_although_a_sender_is_stopped() -> None:
    """The bound is `close_timeout`; the late write then lands in memory that nobody reads."""
    async with child("sender") as stopped:
        async with receiving(planes="shm", close_timeout=0.3) as receiver:
            await stop_in_the_middle(receiver, stopped)
        stopped.resume()
        assert (await stopped.hear("late"))["error"] is None
        assert (await stopped.hear("ended"))["error"] is not None
        async with receiving(planes="shm") as receiver:
            (await send_from(stopped, receiver, "next", 3, 100)).release()


@pytest.mark.parametrize("plane", ["shm", "tcp"])
async def test_a_stopped_receiver(plane: str) -> None:
    """The sender's own deadline ends the wait; the receiver, continued, is none the worse."""
    async with (
        child("receiver", planes=plane, bind="tcp://127.0.0.1:*", blocks=16) as receiver,
        aiomm.Sender(SCHEMA) as sender,
    ):
        ticket = (await receiver.ask("expect", "ticket", request_id="r"))["ticket"]
        transfer = sender.claim(ticket, timeout=1.5)
        async for state in transfer.events():
            if state is aiomm.State.SENDING:
                break
        receiver.stop()
        transfer.send(pattern(1, 1500))  # it takes a resume, so it cannot end meanwhile
        with pytest.raises(aiomm.TransferTimeout):
            await transfer
        receiver.resume()
        assert (await receiver.hear("ended"))["error"] == "TransferTimeout"
        for number in range(4):  # more than the pool holds at once: every block came back
            request_id = f"again{number}"
            again = (await receiver.ask("expect", "ticket", request_id=request_id))["ticket"]
            await sender.send(again, pattern(2, 900))
            report = await receiver.hear("ended", request_id=request_id)
            assert report["is_right"], report


async def test_a_receiver_stopped_for_shorter_than_the_deadline() -> None:
    async with (
        child("receiver", bind="tcp://127.0.0.1:*", blocks=16) as receiver,
        aiomm.Sender(SCHEMA) as sender,
    ):
        ticket = (await receiver.ask("expect", "ticket", request_id="r"))["ticket"]
        receiver.stop()
        transfer = sender.claim(ticket).send(pattern(1, 5000))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(transfer._future), 0.7)  # frames are sent again
        receiver.resume()
        assert (await transfer).num_tokens == 5000
        assert (await receiver.hear("ended"))["is_right"]


async def test_a_sender_stopped_for_shorter_than_the_deadline() -> None:
    async with receiving() as receiver, child("sender") as stopped:
        ticket = receiver.expect("r")
        stopped.tell("send", ticket=ticket.to_json(), seed=1, num_tokens=LATE, fault="stop")
        await stopped.hear("halfway")
        stopped.wait_stopped()
        waiting = asyncio.ensure_future(received(receiver, "r"))
        stopped.resume()
        assert await waiting == pattern(1, LATE)
