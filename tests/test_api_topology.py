"""Who listens, who connects, how many of each, on which loop, and over which plane."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack, aclosing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from aiomm import (
    PlaneUnavailable,
    PoolClosed,
    Receiver,
    Rejected,
    Sender,
    Ticket,
    TransferTimeout,
)
from aiomm._driver import base
from aiomm.planes.memory import MemoryPlane

from .conftest import LoopFactory, loop_factories
from .support import (
    ANYWHERE,
    SCHEMA,
    SMALL_POOL,
    assert_idle,
    error_of,
    frozen_imports,  # noqa: F401
    granted,
    logged,
    no_descriptors_left,
    pair,
    same,
    tensors_of,
    until,
)

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.mark.both_loops
async def test_many_senders_to_one_receiver() -> None:
    """Eight senders, two requests each at once, into a pool of eight blocks."""
    async with AsyncExitStack() as stack:
        receiver = Receiver(SCHEMA, bind=ANYWHERE, **SMALL_POOL)
        await stack.enter_async_context(receiver)
        senders = [await stack.enter_async_context(Sender(SCHEMA)) for _ in range(8)]
        sending = [
            asyncio.ensure_future(
                sender.send(receiver.expect(f"{i}-{j}"), tensors_of(40, seed=10 * i + j))
            )
            for i, sender in enumerate(senders)
            for j in range(2)
        ]
        for i in range(8):
            for j in range(2):
                async with receiver.receive(f"{i}-{j}") as lease:
                    assert same(dict(lease), tensors_of(40, seed=10 * i + j))
        await asyncio.gather(*sending)
        assert receiver.metrics()["peers"] == 8
        for sender in senders:
            assert_idle(receiver, sender)


@pytest.mark.both_loops
async def test_one_sender_to_many_receivers() -> None:
    """Four receivers; one that is closed half way is no concern of the others."""
    async with AsyncExitStack() as stack:
        sender = await stack.enter_async_context(Sender(SCHEMA))
        receivers = [
            await stack.enter_async_context(Receiver(SCHEMA, bind=ANYWHERE, **SMALL_POOL))
            for _ in range(4)
        ]
        claims = [await granted(sender.claim(each.expect("r"))) for each in receivers]
        await receivers[0].aclose()
        for seed, (receiver, claim) in enumerate(zip(receivers, claims, strict=True)):
            claim.send(tensors_of(90, seed))
            if seed:
                async with receiver.receive("r") as lease:
                    assert same(dict(lease), tensors_of(90, seed))
                await claim
        await error_of(claims[0])
        assert_idle(receivers[3], sender)


@pytest.mark.both_loops
async def test_many_first_contacts_at_once_make_one_link() -> None:
    """Twenty calls before the first packet has travelled, by ticket and by address."""
    async with pair(blocks=32) as (receiver, sender):
        address = receiver.address
        calls = [sender.send(receiver.expect(f"t{i}"), tensors_of(i)) for i in range(10)]
        calls += [sender.send(f"a{i}", tensors_of(i), to=address) for i in range(10)]
        await asyncio.gather(*calls)
        assert len(receiver._driver.endpoint.sessions) == 1
        assert len(sender._driver.endpoint.sessions) == 1
        for i in range(10):
            for name in "ta":
                (await receiver.receive(f"{name}{i}")).release()
        assert_idle(receiver, sender)


@pytest.mark.both_loops
@pytest.mark.parametrize("control", ["zmq", "aiozmq"])
async def test_every_control_channel(control: str) -> None:
    """Without the stream of one host, over either library: resume, cancel, goodbye."""
    async with pair(control=control, sender={"control": control}) as (receiver, sender):
        transfer = await granted(sender.claim(receiver.expect("r")))
        transfer.send(tensors_of(300))
        async with receiver.receive("r") as lease:
            assert same(dict(lease), tensors_of(300))
        await transfer
        cancelled = await granted(sender.claim(receiver.expect("c")))
        cancelled.cancel("enough")
        assert (await error_of(receiver.receive("c"))).message == "enough"
        waiting = asyncio.ensure_future(wait_for(receiver, "w"))
        claimed = await granted(sender.claim("w", to=receiver.address))
        await receiver.aclose()
        assert isinstance(await error_of(claimed), PoolClosed)
        assert isinstance(await error_of(waiting), PoolClosed)


# The encoder listens.


@pytest.mark.parametrize("order", ["sent first", "at once", "asked first"])
async def test_a_receiver_that_takes_anything_asks_for_some_of_it(order: str) -> None:
    """What is sent to nobody in particular may come on both grounds; it is one transfer."""
    async with Sender(SCHEMA, bind=ANYWHERE) as sender:
        address, driver = sender.address or "", sender._driver
        async with Receiver(SCHEMA, connect=address, **SMALL_POOL) as receiver:
            for name in (f"r{index}" for index in range(20)):
                if order == "sent first":
                    await sender.send(name, tensors_of(3))
                    await take_from(receiver, name, address)
                    continue
                take = asyncio.ensure_future(take_from(receiver, name, address))
                if order == "asked first":
                    await until(partial(len, driver.endpoint._wanted), driver, "packets_received")
                await asyncio.gather(sender.send(name, tensors_of(3)), take)
            assert_idle(receiver, sender)


async def test_what_was_sent_to_anybody_and_cannot_be_taken_ends_the_question_too() -> None:
    """Nobody else will bring it: the one who asked learns it at once, not at his deadline."""
    async with Sender(SCHEMA, bind=ANYWHERE) as sender:
        address = sender.address or ""
        async with Receiver(SCHEMA, connect=address, max_tokens=50, **SMALL_POOL) as receiver:
            await asyncio.gather(take_from(receiver, "a", address), sender.send("a", tensors_of(3)))
            asking = asyncio.ensure_future(take_from(receiver, "b", address))
            sending = asyncio.ensure_future(sender.send("b", tensors_of(60)))
            for each in (asking, sending):
                error = await error_of(each)
                assert isinstance(error, Rejected)
                assert "at most 50" in error.message


async def take_from(receiver: Receiver, request_id: str, source: str) -> None:
    """Ask a sender for a request, and release what it sends."""
    async with receiver.receive(request_id, source=source) as lease:
        assert same(dict(lease), tensors_of(3))


@pytest.mark.both_loops
@pytest.mark.parametrize("first", ["sender", "receiver"])
async def test_the_receiver_asks_a_sender_that_listens(first: str) -> None:
    """`receive(id, source=address)`, with the tensors there before or after."""
    async with (
        Sender(SCHEMA, bind=ANYWHERE) as sender,
        Receiver(SCHEMA, **SMALL_POOL) as receiver,
    ):
        assert sender.address is not None
        receiving = asyncio.ensure_future(wait_for(receiver, "r", source=sender.address))
        if first == "receiver":
            driver = sender._driver
            await until(lambda: driver.endpoint._wanted, driver, "packets_received")
        sending = asyncio.ensure_future(sender.send("r", tensors_of(70)))
        with await receiving as lease:
            assert same(dict(lease), tensors_of(70))
        await sending
        assert_idle(receiver, sender)


async def wait_for(receiver: Receiver, request_id: str, **arguments: Any) -> Any:
    return await receiver.receive(request_id, **arguments)


@pytest.mark.both_loops
async def test_a_receiver_that_connects_takes_what_has_no_other_destination() -> None:
    """`Receiver(connect=address)`: bare sends go there, before and after it has connected."""
    async with Sender(SCHEMA, bind=ANYWHERE) as sender:
        assert sender.address is not None
        early = asyncio.ensure_future(sender.send("early", tensors_of(10)))
        await asyncio.sleep(0)
        async with Receiver(SCHEMA, connect=sender.address, **SMALL_POOL) as receiver:
            assert receiver.address is None
            await early
            await sender.send("late", tensors_of(20))
            async with aclosing(aiter(receiver)) as arrivals:  # type: ignore[type-var]
                for request_id in ("early", "late"):
                    lease = await anext(arrivals)
                    assert lease.request_id == request_id
                    lease.release()
            assert_idle(receiver, sender)


@pytest.mark.parametrize("entered", [True, False])
async def test_tickets_of_a_receiver_that_connects(entered: bool) -> None:
    """Its tickets have no address: the sender finds it by its life, claimed early or late."""
    async with Sender(SCHEMA, bind=ANYWHERE) as sender:
        assert sender.address is not None
        receiver = Receiver(SCHEMA, connect=[sender.address], **SMALL_POOL)
        if entered:
            await receiver.start()
        ticket = receiver.expect("r")
        assert ticket.address == ""
        await sender.send(ticket.to_json(), tensors_of(60))
        async with receiver.receive("r") as lease:
            assert same(dict(lease), tensors_of(60))
        await receiver.aclose()


async def test_a_receiver_that_connects_finds_the_next_life_of_a_sender() -> None:
    """The encoder is started again at its address; nobody has to tell the receiver."""
    async with Sender(SCHEMA, bind=ANYWHERE) as first:
        address = first.address
        assert address is not None
        receiver = Receiver(SCHEMA, connect=address, **SMALL_POOL)
        await receiver.start()
        await first.send("first", tensors_of(1))
    async with Sender(SCHEMA, bind=address) as second:
        await second.send("second", tensors_of(2))
    (await receiver.receive("first")).release()
    (await receiver.receive("second")).release()
    await receiver.aclose()


async def test_a_contact_that_becomes_a_standing_one_is_not_left(tmp_path: Path) -> None:
    """The request that was first there times out; the sender that comes later is heard."""
    address = f"ipc://{tmp_path}/late"
    async with Receiver(SCHEMA, bind=ANYWHERE, **SMALL_POOL) as receiver:
        driver = receiver._driver
        asking = asyncio.ensure_future(wait_for(receiver, "r", source=address, timeout=0.1))
        await until(lambda: driver._at_address, driver, "pump")
        driver.standing_contacts = frozenset({address})
        driver._keep_contacts()
        assert isinstance(await error_of(asking), TransferTimeout)
        async with Sender(SCHEMA, bind=address):
            await until(lambda: driver.endpoint.sessions, driver, "packets_received")


async def test_standing_contacts_are_made_when_descriptors_are_free_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tried again once each time, not once for every contact; none is in the way of others."""
    monkeypatch.setattr(base, "REFUSED_DELAY", 0.01)
    addresses = [f"ipc://{tmp_path}/{name}" for name in "abc"]

    def failures() -> list[str]:
        return [record.message for record in caplog.records if "does not connect" in record.message]

    async with Receiver(SCHEMA, bind=ANYWHERE, **SMALL_POOL) as receiver:
        driver = receiver._driver
        driver.standing_contacts = frozenset(addresses)
        calls = 0

        def third_call() -> bool:
            nonlocal calls
            calls += 1
            return calls == 3

        with no_descriptors_left():
            driver.loop.call_soon(lambda: driver._keep_contacts())
            await until(third_call, driver, "_keep_contacts")
        assert len(failures()) == 3
        assert all(address in failures()[0] for address in addresses)
        await until(lambda: len(driver._at_address) == 3, driver, "pump")


async def test_a_standing_contact_that_was_turned_away_comes_when_there_is_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The sender had all its peers; one of them leaves."""
    monkeypatch.setattr(base, "REFUSED_DELAY", 0.05)
    async with Sender(SCHEMA, bind=ANYWHERE, max_peers=1) as sender:
        address = sender.address
        assert address is not None
        first = Receiver(SCHEMA, connect=address, **SMALL_POOL)
        await first.start()
        await until(lambda: sender._driver.endpoint.sessions, sender._driver, "packets_received")
        async with Receiver(SCHEMA, connect=address, **SMALL_POOL) as second:
            driver = second._driver
            await until(lambda: driver.endpoint.sessions, driver, "packets_received")
            await first.aclose()
            sending = asyncio.ensure_future(sender.send("r", tensors_of(3)))
            (await second.receive("r")).release()
            await sending


# Starting.


@pytest.mark.parametrize("name", loop_factories())
def test_endpoints_that_are_never_entered(name: str) -> None:
    """First use starts them, on whatever loop runs; closing them is optional but polite."""

    async def main() -> None:
        receiver, sender = Receiver(SCHEMA, bind=ANYWHERE, **SMALL_POOL), Sender(SCHEMA)
        with pytest.raises(Rejected, match="a port of your choice"):
            receiver.expect("r")  # nobody knows the port yet
        await receiver.start()
        transfer = sender.claim(receiver.expect("r"))
        transfer.send(tensors_of(50))
        async with receiver.receive("r") as lease:
            assert lease.num_tokens == 50
        await transfer
        await asyncio.gather(receiver.aclose(), sender.aclose())

    run(loop_factories()[name], main())


def run(factory: LoopFactory, main: Any) -> None:
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main)


def test_asyncio_run_and_uvloop_run() -> None:
    """The two usual ways to run a program, one after the other in one process."""
    uvloop = pytest.importorskip("uvloop")

    async def main() -> None:
        async with pair() as (receiver, sender):
            await sender.send(receiver.expect("r"), tensors_of(50))
            (await receiver.receive("r")).release()

    asyncio.run(main())
    uvloop.run(main())


async def test_a_ticket_before_the_start_with_a_chosen_port(unused_tcp_port: int) -> None:
    """With the port named, `expect` gives a ticket before anything is bound."""
    receiver = Receiver(SCHEMA, bind=f"tcp://127.0.0.1:{unused_tcp_port}", **SMALL_POOL)
    ticket = receiver.expect("r")
    assert ticket.address == receiver.address == f"tcp://127.0.0.1:{unused_tcp_port}"
    async with Sender(SCHEMA) as sender:
        await sender.send(ticket, tensors_of(2))
    (await receiver.receive("r")).release()
    await receiver.aclose()


@pytest.mark.parametrize("port", ["0", "*"])
async def test_any_port(port: str) -> None:
    """`address` tells the real port, on either side."""
    bind = f"tcp://127.0.0.1:{port}"
    async with (
        Receiver(SCHEMA, bind=bind, **SMALL_POOL) as receiver,
        Sender(SCHEMA, bind=bind) as sender,
    ):
        for address in (receiver.address, sender.address):
            assert address is not None
            assert int(address.rpartition(":")[2]) > 0


async def test_an_ipc_address(tmp_path: Any) -> None:
    """A path instead of a port."""
    bind = f"ipc://{tmp_path}/control"
    async with pair(bind=bind) as (receiver, sender):
        ticket = receiver.expect("r")
        assert Ticket.from_json(ticket.to_json()).address == bind
        await sender.send(ticket, tensors_of(2))
        (await receiver.receive("r")).release()


async def test_an_address_that_is_taken() -> None:
    """The start raises OSError, and leaves nothing behind; what waits for it is told."""
    async with Receiver(SCHEMA, bind=ANYWHERE, **SMALL_POOL) as receiver:
        second = Receiver(SCHEMA, bind=receiver.address, **SMALL_POOL)
        with pytest.raises(OSError, match="in use"):
            await second.start()
        with pytest.raises(OSError, match="in use"):
            await second.receive("r")
        with pytest.raises(PoolClosed, match=r"could not start: .*in use"):
            second.expect("r")  # its ticket would lead to the other one
        await second.aclose()
        sender = Sender(SCHEMA, bind=receiver.address)
        error = await error_of(sender.send("r", tensors_of(1), to=receiver.address))
        assert "in use" in error.message
        await sender.aclose()


# Planes.


async def test_the_first_plane_that_works_is_taken_and_the_reasons_are_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """`memory` is preferred but the receiver lacks it: shm it is, and stats and log say why."""
    caplog.set_level(logging.INFO, "aiomm")
    sender = {"planes": [MemoryPlane(), "shm"], "name": "encoder"}
    async with pair(planes=["shm", "tcp"], sender=sender) as (receiver, encoder):
        stats = await encoder.send(receiver.expect("r"), tensors_of(40))
        assert stats.plane == "shm"
        assert stats.refused_planes == ("memory: the receiver does not have it",)
        async with receiver.receive("r") as lease:
            assert lease.stats.plane == "shm"
    assert logged(caplog.text, "plane shm", "memory: the receiver does not have it")


async def test_what_is_missing_on_the_side_of_the_sender_is_told_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rather than that the receiver, on a machine like this one, does not have it either."""
    monkeypatch.setattr(MemoryPlane, "unusable", lambda self: "a library is missing")
    sender = {"planes": [MemoryPlane(), "shm"]}
    async with pair(planes=["shm"], sender=sender) as (receiver, encoder):
        stats = await encoder.send(receiver.expect("r"), tensors_of(40))
        assert stats.refused_planes == ("memory: a library is missing",)


@pytest.mark.parametrize("strict", ["sender", "both"])
async def test_strict_never_falls_back(strict: str) -> None:
    """With `strict` the first plane or an error, which names plane and reason, on both sides."""
    sender: dict[str, Any] = {"planes": ["memory", "tcp"], "strict": True}
    async with pair(planes=["tcp"], strict=strict == "both", sender=sender) as (receiver, encoder):
        transfer = encoder.claim(receiver.expect("r")).send(tensors_of(40))
        receiving = asyncio.ensure_future(wait_for(receiver, "r"))
        for error in [await error_of(transfer), await error_of(receiving)]:
            assert isinstance(error, PlaneUnavailable)
            assert "the plane asked for does not reach" in error.message
            assert "memory: the receiver does not have it" in error.message
        assert_idle(receiver, encoder)


@pytest.mark.parametrize("endpoint", [Receiver, Sender])
def test_a_plane_that_does_not_exist(endpoint: Any) -> None:
    """The constructor names the planes that there are."""
    with pytest.raises(PlaneUnavailable, match=r"no plane 'carrier'; known are .*shm.*tcp"):
        endpoint(SCHEMA, planes="carrier")


async def test_the_log_tells_the_life_of_a_request(caplog: pytest.LogCaptureFixture) -> None:
    """`grep -E "resume|block_indices|start_offset"` finds every grant, with its numbers."""
    caplog.set_level(logging.INFO, "aiomm")
    async with pair() as (receiver, sender):
        transfer = await granted(sender.claim(receiver.expect("the-request")))
        transfer.send(tensors_of(60))
        (await receiver.receive("the-request")).release()
    first = "block_indices=[0, 1] start_offset=0 tokens=32"
    assert logged(caplog.text, "> grant the-request#1:", first)
    rest = "block_indices=[2, 3] start_offset=32 tokens=28"
    assert logged(caplog.text, "> resume the-request#1:", rest)
