"""More than the pool holds: everything completes, limits are told, and no order deadlocks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch

from aiomm import Cancelled, Field, Receiver, Rejected, Schema, Sender
from aiomm.planes.memory import Faults

from .support import (
    ANYWHERE,
    SCHEMA,
    assert_idle,
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
async def test_two_hundred_requests_against_thirty_two_blocks() -> None:
    """All at once, each three times its default grant; every byte of every one arrives."""

    async def take(receiver: Receiver, index: int) -> None:
        async with receiver.receive(f"r{index}") as lease:
            assert same(dict(lease), tensors_of(100, seed=index))

    asyncio.get_running_loop().set_debug(False)  # which makes it eight times slower
    async with pair(blocks=32) as (receiver, sender):
        sends = [sender.send(receiver.expect(f"r{i}"), tensors_of(100, seed=i)) for i in range(200)]
        takes = [take(receiver, i) for i in range(200)]
        await asyncio.gather(*sends, *takes)
        assert_idle(receiver, sender)


async def test_results_are_taken_in_another_order_than_they_arrive() -> None:
    """Finished results fill the pool; the one awaited needs blocks, and gets theirs."""
    async with pair() as (receiver, sender):
        sends = []
        for name in "abcd":
            transfer = sender.claim(receiver.expect(name), num_tokens=32)
            await transfer.send(tensors_of(32, seed=ord(name)))
        assert free_blocks(receiver) == 0
        for name in "efgh":
            transfer = sender.claim(receiver.expect(name), num_tokens=100)
            sends.append(transfer.send(tensors_of(100, seed=ord(name))))
        for name in "hgfedcba":
            async with receiver.receive(name) as lease:
                length = 32 if name < "e" else 100
                assert same(dict(lease), tensors_of(length, seed=ord(name)))
        await asyncio.gather(*(wait_for(each) for each in sends))
        assert_idle(receiver, sender)


async def wait_for(awaitable: Any) -> Any:
    return await awaitable


async def test_blocks_that_a_result_did_not_need_go_to_whoever_waits() -> None:
    """At once, though nobody takes that result."""
    async with pair(default_blocks=8) as (receiver, sender):
        first = await granted(sender.claim(receiver.expect("a")))
        second = sender.claim(receiver.expect("b"))
        driver = receiver._driver
        await until(lambda: driver.queue.num_waiting, driver, "packets_received")
        await first.send(tensors_of(10))
        await (await granted(second)).send(tensors_of(20))
        for name in "ab":
            async with receiver.receive(name):
                pass
        assert_idle(receiver, sender)


async def test_results_stay_in_the_pool_while_nobody_waits() -> None:
    """A pool full of untaken results holds senders back, until one of them is asked for."""
    async with pair() as (receiver, sender):
        for name in "ab":
            await sender.claim(receiver.expect(name), num_tokens=64).send(tensors_of(64))
        waiting = sender.claim(receiver.expect("c"), num_tokens=64).send(tensors_of(64, seed=3))
        driver = receiver._driver
        await until(lambda: driver.queue.num_waiting, driver, "packets_received")
        assert receiver.metrics()["bytes_buffered"] == 0
        assert receiver.metrics()["blocks_filled"] == 8
        async with receiver.receive("c") as lease:
            assert same(dict(lease), tensors_of(64, seed=3))
            assert receiver.metrics()["bytes_buffered"] == 64 * SCHEMA.token_nbytes
        for name in "ab":
            async with receiver.receive(name) as lease:
                assert lease.is_view is (name == "b")
                assert same(dict(lease), tensors_of(64))
        await waiting
        assert_idle(receiver, sender)


async def test_untaken_results_move_out_only_as_far_as_the_limit_goes() -> None:
    """With `max_buffered_bytes=0` nothing moves: the awaited one ends at its deadline."""
    async with pair(max_buffered_bytes=0) as (receiver, sender):
        await sender.claim(receiver.expect("a"), num_tokens=128).send(tensors_of(128))
        sender.claim(receiver.expect("b", timeout=0.2)).send(tensors_of(5))
        error = await error_of(receiver.receive("b"))
        assert "in ALLOC" in error.message
        async with receiver.receive("a") as lease:
            assert same(dict(lease), tensors_of(128))


@asynccontextmanager
async def moving_out(receiver: Receiver) -> AsyncIterator[None]:
    """Hold up the move of an untaken result, from its beginning to the end of the block."""
    driver = receiver._driver
    driver._copies._threads.are_late = True  # so it waits for its turn on the loop's thread
    async with driver._copies._on_loop._one_at_a_time:
        await until(lambda: driver._making_room, driver, "make_room")
        yield


@pytest.mark.parametrize("taken", ["meanwhile", "dropped"])
async def test_a_result_that_is_taken_while_it_moves(taken: str) -> None:
    """The copy is thrown away: the lease is a view, or the result is gone; no block leaks."""
    async with pair() as (receiver, sender):
        await sender.claim(receiver.expect("a"), num_tokens=128).send(tensors_of(128))
        transfer = sender.claim(receiver.expect("b"), num_tokens=20).send(tensors_of(20))
        awaited = asyncio.ensure_future(wait_for(receiver.receive("b")))
        async with moving_out(receiver):
            if taken == "meanwhile":
                async with receiver.receive("a") as lease:
                    assert lease.is_view
                    assert same(dict(lease), tensors_of(128))
            else:
                receiver.cancel("a")
        with await awaited as lease:
            assert same(dict(lease), tensors_of(20))
        await transfer
        assert_idle(receiver, sender)


async def test_one_result_at_a_time_moves_out() -> None:
    """However often blocks are short meanwhile."""
    async with pair() as (receiver, sender):
        await sender.claim(receiver.expect("a"), num_tokens=128).send(tensors_of(128))
        transfer = sender.claim(receiver.expect("b"), num_tokens=20).send(tensors_of(20))
        awaited = asyncio.ensure_future(wait_for(receiver.receive("b")))
        async with moving_out(receiver):
            driver = receiver._driver
            moving = driver._making_room
            driver.make_room()
            assert driver._making_room is moving
        with await awaited as lease:
            assert same(dict(lease), tensors_of(20))
        await transfer
        async with receiver.receive("a") as lease:
            assert same(dict(lease), tensors_of(128))
        assert_idle(receiver, sender)


async def test_the_next_result_moves_when_one_is_taken_while_it_moves() -> None:
    """Its blocks are the user's now, so those of the next one are wanted."""
    async with pair() as (receiver, sender):
        for name in "ac":
            await sender.claim(receiver.expect(name), num_tokens=64).send(tensors_of(64))
        transfer = sender.claim(receiver.expect("b"), num_tokens=20).send(tensors_of(20))
        awaited = asyncio.ensure_future(wait_for(receiver.receive("b")))
        async with moving_out(receiver):
            held = await receiver.receive("a")
        with await awaited as lease:
            assert same(dict(lease), tensors_of(20))
        held.release()
        await transfer
        async with receiver.receive("c") as lease:
            assert same(dict(lease), tensors_of(64))
        assert_idle(receiver, sender)


async def test_all_that_is_known_to_come_counts_as_buffered_from_the_first_chunk_on() -> None:
    """Memory is taken for all of it at once."""
    faults = Faults(stall_at=2)
    async with faulty_pair(faults, default_blocks=8) as (receiver, sender):
        transfer = sender.claim(receiver.expect("r"), num_tokens=200).send(tensors_of(200))
        receiving = asyncio.ensure_future(wait_for(receiver.receive("r")))
        driver = receiver._driver
        await until(lambda: driver.buffered_bytes, driver, "execute")
        assert receiver.metrics()["bytes_buffered"] == 200 * SCHEMA.token_nbytes
        await faults.stalled.wait()
        faults.release()
        with await receiving as lease:
            assert same(dict(lease), tensors_of(200))
        await transfer
        assert_idle(receiver, sender)


async def test_too_many_open_requests() -> None:
    """`max_waiting` of the receiver: retryable, on either side, and soon there is room again."""
    async with pair(max_waiting=3) as (receiver, sender):
        tickets = [receiver.expect(name) for name in "abc"]
        with pytest.raises(Rejected, match="3 open requests: max_waiting of") as caught:
            receiver.expect("d")
        assert caught.value.retryable
        error = await error_of(sender.send("d", tensors_of(1), to=receiver.address))
        assert isinstance(error, Rejected)
        assert error.retryable
        await sender.send(tickets[0], tensors_of(1))
        (await receiver.receive("a")).release()
        await sender.send("d", tensors_of(1), to=receiver.address)
        (await receiver.receive("d")).release()


async def test_transfers_that_fail_unasked_keep_nobody_out() -> None:
    """However many a sender gives up; what failed last can still be asked for."""
    async with pair(max_waiting=8) as (receiver, sender):
        for index in range(20):
            (await granted(sender.claim(f"r{index}", to=receiver.address))).cancel("no")
        await sender.send("good", tensors_of(1), to=receiver.address)
        (await receiver.receive("good")).release()
        for name in ("r18", "r19"):
            assert isinstance(await error_of(receiver.receive(name)), Cancelled)
        assert_idle(receiver, sender)


async def test_transfers_that_fail_as_expected_are_all_told() -> None:
    """Whoever has expected them may ask for each of them, late as it may be."""
    async with pair(max_waiting=8) as (receiver, sender):
        for index in range(8):
            (await granted(sender.claim(receiver.expect(f"r{index}")))).cancel("no")
        for index in range(8):
            assert isinstance(await error_of(receiver.receive(f"r{index}")), Cancelled)
        assert_idle(receiver, sender)


async def test_thousands_of_transfers_in_one_turn() -> None:
    """More than the receiver takes: those are told so, and cost the others nothing."""
    tensors, most = tensors_of(1), 4096

    async def take(receiver: Receiver, index: int) -> None:
        async with receiver.receive(f"r{index}") as lease:
            assert same(dict(lease), tensors)

    asyncio.get_running_loop().set_debug(False)
    async with pair(max_waiting=most) as (receiver, sender):
        await sender.send(receiver.expect("first"), tensors)
        (await receiver.receive("first")).release()
        names = [f"r{index}" for index in range(most + 1000)]
        sends = [sender.send(name, tensors, to=receiver.address) for name in names]
        takes = [take(receiver, index) for index in range(most)]
        results = await asyncio.gather(*sends, *takes, return_exceptions=True)
        errors = [each for each in results if isinstance(each, BaseException)]
        told = {str(each).partition(" (")[0] for each in errors}
        assert told == {f"{most} open requests: max_waiting of the receiver"}
        assert len(errors) == 1000
        assert_idle(receiver, sender)


async def test_too_many_transfers_wait_for_a_receiver() -> None:
    """`max_waiting` of the sender counts those that nobody has asked for yet."""
    async with pair(sender={"max_waiting": 2}) as (receiver, sender):
        waiting = [asyncio.ensure_future(sender.send(name, tensors_of(1))) for name in "ab"]
        await asyncio.sleep(0)
        error = await error_of(sender.send("c", tensors_of(1)))
        assert isinstance(error, Rejected)
        assert error.retryable
        for each in waiting:
            each.cancel()
        await asyncio.wait(waiting)
        await sender.send(receiver.expect("e"), tensors_of(1))
        (await receiver.receive("e")).release()


async def test_a_transfer_over_the_limit_of_buffered_bytes() -> None:
    """Longer than the pool and than what may ever be held outside: told to both, for good."""
    async with pair(max_buffered_bytes=1000) as (receiver, sender):
        transfer = await granted(sender.claim(receiver.expect("r")))
        receiving = asyncio.ensure_future(wait_for(receiver.receive("r")))
        transfer.send(tensors_of(500))
        for error in [await error_of(transfer), await error_of(receiving)]:
            assert isinstance(error, Rejected)
            assert not error.retryable
            assert "over max_buffered_bytes=1000" in error.message
        await sender.send(receiver.expect("small"), tensors_of(100))
        (await receiver.receive("small")).release()
        assert_idle(receiver, sender)


async def test_transfers_that_are_together_over_the_limit_of_buffered_bytes() -> None:
    """The second is told to come again, and may when the first one is taken."""
    async with pair(max_buffered_bytes=80_000) as (receiver, sender):
        await sender.send(receiver.expect("first"), tensors_of(500))
        error = await error_of(sender.send(receiver.expect("second"), tensors_of(500)))
        assert isinstance(error, Rejected)
        assert error.retryable
        assert "over max_buffered_bytes=80000" in error.message
        with pytest.raises(Rejected):
            await receiver.receive("second")
        (await receiver.receive("first")).release()
        await sender.send(receiver.expect("again"), tensors_of(500))
        (await receiver.receive("again")).release()


async def test_many_fields_make_a_grant_shorter() -> None:
    """All its runs are listed at once, one for each block of each field."""
    schema = Schema(**{f"f{number}": Field("uint8", 1) for number in range(64)})
    tensors = {name: torch.zeros(100, 1, dtype=torch.uint8) for name in schema}
    async with (
        Receiver(schema, bind=ANYWHERE, blocks=200, block_size=1, default_blocks=1) as receiver,
        Sender(schema) as sender,
    ):
        sending = asyncio.ensure_future(sender.send(receiver.expect("r"), tensors))
        async with receiver.receive("r") as lease:
            assert lease.buffered_chunks == (32, 32, 32, 4)
        await sending


async def test_more_peers_than_a_receiver_takes() -> None:
    """The third sender is refused with a retryable error; when one has left there is room."""
    async with pair(max_peers=2) as (receiver, first):
        await first.send("1", tensors_of(1), to=receiver.address)
        async with Sender(SCHEMA) as third:
            async with Sender(SCHEMA) as second:
                await second.send("2", tensors_of(1), to=receiver.address)
                error = await error_of(third.send("3", tensors_of(1), to=receiver.address))
                assert "too many peers (2)" in error.message
                assert error.retryable
            await third.send("3", tensors_of(1), to=receiver.address)
        for name in "123":
            (await receiver.receive(name)).release()
