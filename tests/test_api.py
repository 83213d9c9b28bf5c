"""Requests from `expect` to the lease: lengths, grants, resumes, and who comes first."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import pytest

import aiomm
from aiomm import State, Ticket

from .support import (
    ANYWHERE,
    SCHEMA,
    assert_idle,
    free_blocks,
    frozen_imports,  # noqa: F401
    granted,
    pair,
    same,
    tensors_of,
)

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.mark.both_loops
async def test_the_snippet_of_the_readme() -> None:
    """The code of the architecture document, word by word, with smaller rows."""
    schema = SCHEMA
    sent = tensors_of(2000)
    t, ids, pos = sent.values()
    async with aiomm.Receiver(
        schema, bind=ANYWHERE, blocks=64, block_size=128, default_blocks=8, device="cpu"
    ) as receiver:
        ticket = receiver.expect("req-1", timeout=30)
        async with aiomm.Sender(schema) as sender:
            transfer = sender.claim(ticket)
            await granted(transfer)  # the encoder runs
            transfer.send(
                {"input_embeddings": t, "fill_ids": ids, "mrope_positions": pos},
                metadata={"image": 3, "tags": ["a", None]},
            )
            async with receiver.receive("req-1") as lease:
                assert lease["input_embeddings"].shape == (2000, 64)
                assert lease.num_tokens == 2000
                assert lease.metadata == {"image": 3, "tags": ["a", None]}
                assert lease.buffered_chunks == (1024, 976)
                assert same(dict(lease), sent)
            stats = await transfer
            assert transfer.state is State.DONE
            assert stats.resumes == 1
            states = [state for state, _ in stats.states]
            assert states == ["ALLOC", "SENDING", "AWAITING_RESUME", "SENDING", "DONE"]

            ticket = receiver.expect("req-1b")
            await sender.send(ticket, sent)
            address = receiver.address
            assert address is not None
            await sender.send("req-2", sent, to=address)
            arrivals = aiter(receiver)
            assert {(await anext(arrivals)).detach()["fill_ids"].shape for _ in "ab"} == {(2000,)}
            await asyncio.sleep(0)
            assert_idle(receiver, sender)


@pytest.mark.both_loops
@pytest.mark.parametrize("plane", ["shm", "tcp", "memory"])
@pytest.mark.parametrize(
    ("num_tokens", "chunks"),
    [
        (0, ()),
        (1, (1,)),
        (31, (31,)),
        (32, (32,)),
        (33, (32, 1)),
        (128, (32, 96)),
        (500, (32, 96, 128, 128, 116)),
    ],
)
async def test_an_unknown_length_is_granted_the_default_and_resumed(
    plane: str, num_tokens: int, chunks: tuple[int, ...]
) -> None:
    """Two default blocks of 16 first, then the rest, as much of it as the pool of 8 has."""
    sent = tensors_of(num_tokens)
    async with pair(planes=plane, sender={"planes": plane}) as (receiver, sender):
        transfer = await granted(sender.claim(receiver.expect("r")))
        transfer.send(sent)
        async with receiver.receive("r") as lease:
            assert same(dict(lease), sent)
            assert sum(lease.buffered_chunks) == num_tokens
            assert lease.stats.plane in ([plane] if num_tokens else ["", plane])
            if num_tokens <= 128:  # larger ones may be granted the rest in other pieces
                assert lease.buffered_chunks == chunks
            assert lease.stats.resumes == max(0, len(lease.buffered_chunks) - 1)
        assert (await transfer).buffered_chunks == lease.buffered_chunks
        assert_idle(receiver, sender)


@pytest.mark.parametrize("num_tokens", [0, 1, 15, 17, 100, 128])
async def test_an_announced_length_is_granted_exactly(num_tokens: int) -> None:
    """One grant of exactly the need, larger or smaller than the default; the tensors are views."""
    async with pair() as (receiver, sender):
        transfer = sender.claim(receiver.expect("r"), num_tokens=num_tokens)
        transfer.send(tensors_of(num_tokens))
        async with receiver.receive("r") as lease:
            blocks = -(-num_tokens // 16)
            assert lease.is_view
            assert [len(each) for each in lease.stats.block_indices] == [blocks]
            assert free_blocks(receiver) == 8 - blocks
            assert lease.stats.resumes == 0
            assert same(dict(lease), tensors_of(num_tokens))


async def test_a_resume_that_extends_the_first_extent_gives_one_view() -> None:
    """In an empty pool the next blocks are free: two chunks, one run, no copy."""
    async with pair() as (receiver, sender):
        transfer = await granted(sender.claim(receiver.expect("r")))
        transfer.send(tensors_of(100))
        async with receiver.receive("r") as lease:
            assert lease.buffered_chunks == (32, 68)
            assert lease.is_view
            assert "view" in repr(lease)
            assert same(dict(lease), tensors_of(100))


async def test_a_resume_elsewhere_in_the_pool_is_joined() -> None:
    """A neighbour lies behind the first grant: the two chunks are joined into one tensor."""
    async with pair() as (receiver, sender):
        first = await granted(sender.claim(receiver.expect("first")))
        second = sender.claim(receiver.expect("second"))
        second.send(tensors_of(32, seed=2))
        neighbour = await receiver.receive("second")
        first.send(tensors_of(90, seed=1))
        async with receiver.receive("first") as lease:
            assert lease.buffered_chunks == (32, 58)
            assert not lease.is_view
            assert "joined" in repr(lease)
            assert same(dict(lease), tensors_of(90, seed=1))
            assert same(dict(neighbour), tensors_of(32, seed=2))
            assert free_blocks(receiver) == 6  # the joined lease holds none
        neighbour.release()


async def test_a_claim_before_the_tensors_has_its_grant_by_then() -> None:
    """The round trip hides behind the encoder: the state is SENDING before `send`."""
    async with pair() as (receiver, sender):
        transfer = sender.claim(receiver.expect("r"))
        states = transfer.events()
        assert await anext(states) is State.ALLOC
        assert await anext(states) is State.SENDING
        transfer.send(tensors_of(10))
        assert [state async for state in states] == [State.DONE]
        (await receiver.receive("r")).release()


async def test_a_send_before_the_grant_waits_for_it() -> None:
    """`send` right behind `claim`, before a packet has travelled."""
    async with pair() as (receiver, sender):
        stats = await sender.claim(receiver.expect("r")).send(tensors_of(40))
        assert stats.num_tokens == 40
        assert stats.nbytes == 40 * SCHEMA.token_nbytes
        (await receiver.receive("r")).release()


@pytest.mark.both_loops
@pytest.mark.parametrize("first", ["sender", "receiver"])
async def test_a_bare_request_id_with_either_side_first(first: str) -> None:
    """Whoever comes first waits for the other."""
    async with pair() as (receiver, sender):
        send = sender.send("bare", tensors_of(50), to=receiver.address)
        if first == "sender":
            await send
            lease = await receiver.receive("bare")
        else:
            receiving = asyncio.ensure_future(receiver.receive("bare"))
            await asyncio.sleep(0)
            await send
            lease = await receiving
        with lease:
            assert same(dict(lease), tensors_of(50))
        assert_idle(receiver, sender)


def as_a_double(number: str) -> int:
    """Read a number of JSON as JavaScript and many routers do."""
    return int(float(number))


@pytest.mark.parametrize(
    "carried",
    [
        lambda ticket: ticket,
        lambda ticket: ticket.to_json(),
        lambda ticket: ticket.to_bytes(),
        lambda ticket: Ticket.from_json(ticket.to_json().encode()),
        lambda ticket: json.dumps(json.loads(ticket.to_json(), parse_int=as_a_double)),
        lambda ticket: Ticket.from_bytes(ticket.to_bytes()),
    ],
)
async def test_a_ticket_through_json_and_bytes(
    carried: Callable[[Ticket], Ticket | str | bytes],
) -> None:
    """Whatever form a router carries a ticket in, `claim` and `send` take it."""
    async with pair() as (receiver, sender):
        ticket = receiver.expect("one")
        assert len(ticket.to_bytes()) < 200
        await sender.claim(carried(ticket)).send(tensors_of(3))
        await sender.send(carried(receiver.expect("two")), tensors_of(4))
        assert (await receiver.receive("one")).detach()["fill_ids"].shape == (3,)
        assert (await receiver.receive("two")).detach()["fill_ids"].shape == (4,)


async def test_a_request_id_is_free_again_once_its_result_is_taken() -> None:
    """The same id for three requests, one after the other, each with its own bytes."""
    async with pair() as (receiver, sender):
        for seed in range(3):
            await sender.send(receiver.expect("again"), tensors_of(20, seed))
            async with receiver.receive("again") as lease:
                assert same(dict(lease), tensors_of(20, seed))
        assert_idle(receiver, sender)


@pytest.mark.both_loops
async def test_whatever_arrives_is_taken_in_order_of_completion() -> None:
    """`async for lease in receiver` ends when the receiver is closed."""
    taken = []

    async def take(receiver: aiomm.Receiver) -> None:
        async for lease in receiver:
            with lease:
                taken.append(lease.request_id)
            if len(taken) == 5:
                everything.set()

    everything = asyncio.Event()
    async with pair() as (receiver, sender):
        taking = asyncio.create_task(take(receiver))
        for index in range(5):
            await sender.send(f"r{index}", tensors_of(index), to=receiver.address)
        await everything.wait()
        assert_idle(receiver, sender)
    await taking
    assert taken == [f"r{index}" for index in range(5)]


async def test_arrivals_leave_out_what_is_received_by_its_id() -> None:
    """A request that somebody waits for by its id is not handed to the iteration as well."""
    async with pair() as (receiver, sender):
        receiving = asyncio.ensure_future(receiver.receive("mine"))
        await asyncio.sleep(0)
        await sender.send("mine", tensors_of(1), to=receiver.address)
        await sender.send("anybody's", tensors_of(2), to=receiver.address)
        lease = await anext(aiter(receiver))
        assert lease.request_id == "anybody's"
        lease.release()
        (await receiving).release()


async def test_deadlines_of_the_request_and_of_the_transfer() -> None:
    """An expected request that nobody claims, and a claim without tensors, both time out."""
    async with pair() as (receiver, sender):
        receiver.expect("nobody", timeout=0.05)
        with pytest.raises(aiomm.TransferTimeout, match="no sender has claimed it") as caught:
            await receiver.receive("nobody")
        assert caught.value.retryable
        transfer = sender.claim(receiver.expect("slow"), timeout=0.05)
        receiving = asyncio.ensure_future(receiver.receive("slow"))
        with pytest.raises(TimeoutError, match=r"was not done within 0\.05 s"):
            await transfer
        with pytest.raises(aiomm.TransferTimeout):
            await receiving
        assert_idle(receiver, sender)
