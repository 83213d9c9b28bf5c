"""What is left behind by endpoints that close, and by processes that never close theirs."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

import aiomm
from aiomm._driver.routes import find_route
from aiomm.planes.base import GrantKey, RemoteArena, Run
from aiomm.planes.memory import MemoryPlane
from aiomm.protocol import frames
from tests.conftest import resources
from tests.processes import (
    DEADLINE,
    SCHEMA,
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
from tests.support import no_descriptors_left

pytestmark = [pytest.mark.usefixtures("no_leaks"), pytest.mark.timeout(60)]

ALWAYS = ("-W", "always::ResourceWarning")


def check_warnings(process: Child, text: str) -> None:
    """Check that one warning says `text`, and that nothing but such warnings was printed."""
    lines = process.stderr.decode().splitlines()
    begun = [line for line in lines if not line.startswith(" ")]
    assert all("ResourceWarning" in line for line in begun), process.stderr.decode()
    assert sum(text in line for line in begun) == 1, process.stderr.decode()


async def exit_of(process: Child) -> None:
    """Check that a child which left its loop ends promptly, and with a warning."""
    began = time.monotonic()
    assert await process.wait() == 0
    print(f"exit after {1000 * (time.monotonic() - began):.0f} ms")
    assert time.monotonic() - began < 10
    check_warnings(process, "was never closed")


@pytest.mark.parametrize("uvloop", [False, True], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("plane", ["shm", "tcp"])
async def test_a_sender_that_is_never_closed(plane: str, uvloop: bool) -> None:
    async with (
        receiving() as receiver,
        child("sender", planes=plane, uvloop=uvloop, options=ALWAYS) as sender,
    ):
        ticket = receiver.expect("whole")
        sender.tell("send", ticket=ticket.to_json(), seed=1, num_tokens=2000)
        assert await received(receiver, "whole") == pattern(1, 2000)
        await sender.hear("ended")
        sender.tell("leave")
        await exit_of(sender)
        await until(lambda: receiver.metrics()["peers"] == 0, "the receiver knows")


@pytest.mark.parametrize("uvloop", [False, True], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("plane", ["shm", "tcp"])
async def test_a_sender_that_is_never_closed_in_the_middle_of_transfers(
    plane: str, uvloop: bool
) -> None:
    async with (
        receiving() as receiver,
        child("sender", planes=plane, uvloop=uvloop, options=ALWAYS) as sender,
    ):
        tickets = [receiver.expect(f"r{n}") for n in range(2)]
        sender.tell("claim", ticket=tickets[0].to_json())
        await sender.hear("state", state="SENDING")
        sender.tell("send", ticket=tickets[1].to_json(), seed=1, num_tokens=100, fault="stall")
        await sender.hear("halfway")
        sender.tell("leave")
        await exit_of(sender)
        for number in range(2):
            with pytest.raises(aiomm.AiommError) as caught:
                await receiver.receive(f"r{number}")
            assert isinstance(caught.value, aiomm.PeerLost | aiomm.Cancelled)
        await until(lambda: num_blocks(receiver, "free") == 16, "blocks come back")


@pytest.mark.parametrize("uvloop", [False, True], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("is_busy", [False, True], ids=["idle", "busy"])
async def test_a_receiver_that_is_never_closed(is_busy: bool, uvloop: bool) -> None:
    async with (
        child("receiver", bind="tcp://127.0.0.1:*", uvloop=uvloop, options=ALWAYS) as receiver,
        aiomm.Sender(SCHEMA) as sender,
    ):
        ticket = (await receiver.ask("expect", "ticket", request_id="r"))["ticket"]
        await sender.send(ticket, pattern(1, 500))
        assert (await receiver.hear("ended"))["is_right"]
        transfers = []
        if is_busy:
            ticket = (await receiver.ask("expect", "ticket", request_id="s"))["ticket"]
            transfers.append(sender.claim(ticket))
            async for state in transfers[0].events():
                if state is aiomm.State.SENDING:
                    break
        receiver.tell("leave")
        await exit_of(receiver)
        for transfer in transfers:
            with pytest.raises(aiomm.AiommError) as caught:
                await transfer
            assert isinstance(caught.value, aiomm.PeerLost | aiomm.Cancelled)


async def test_a_lease_that_is_never_released() -> None:
    async with child("receiver", bind="tcp://127.0.0.1:*", options=ALWAYS) as receiver:
        async with aiomm.Sender(SCHEMA) as sender:
            asked = await receiver.ask("expect", "ticket", request_id="r", is_dropped=True)
            await sender.send(asked["ticket"], pattern(1, 500))
            await receiver.hear("dropped")
        receiver.tell("close")
        assert await receiver.wait() == 0
        check_warnings(receiver, "was never released")


@pytest.mark.both_loops
@pytest.mark.parametrize("control", ["auto", "aiozmq"])
async def test_senders_that_close_leave_nothing_at_the_receiver(control: str) -> None:
    async with receiving(control=control) as receiver:
        before: dict[str, set[str]] = {}
        for number in range(3):
            async with aiomm.Sender(SCHEMA, control=control) as sender:
                ticket = receiver.expect("r")
                sending = asyncio.ensure_future(sender.send(ticket, pattern(number, 700)))
                assert await received(receiver, "r") == pattern(number, 700)
                await sending
            await until(lambda: receiver.metrics()["peers"] == 0, "the goodbye arrives")
            before = before or resources()  # the first one made the ZeroMQ threads
        await until(nothing_new(before), "connections end")


@pytest.mark.both_loops
@pytest.mark.parametrize("control", ["auto", "aiozmq"])
async def test_receivers_that_close_leave_nothing_at_the_sender(control: str) -> None:
    async with aiomm.Sender(SCHEMA, control=control) as sender:
        before: dict[str, set[str]] = {}
        for number in range(3):
            async with receiving(control=control) as receiver:
                ticket = receiver.expect("r")
                sending = asyncio.ensure_future(sender.send(ticket, pattern(number, 700)))
                assert await received(receiver, "r") == pattern(number, 700)
                await sending
            await until(lambda: not sender._driver.endpoint.sessions, "the goodbye arrives")
            before = before or resources()
        await until(nothing_new(before), "connections end")


async def test_descriptors_can_run_out_and_come_back() -> None:
    """Requests fail with a typed error meanwhile; afterwards the same endpoints work."""
    async with receiving() as receiver, child("sender") as sender:
        with no_descriptors_left():
            ticket = receiver.expect("r", timeout=1.0)
            sender.tell("send", ticket=ticket.to_json(), seed=1, num_tokens=100, timeout=1.0)
            error, _ = await failed(receiver, "r")
            assert isinstance(error, aiomm.TransferTimeout)
            assert (await sender.hear("ended"))["error"] == "TransferTimeout"
        again = receiver.expect("again")
        sender.tell("send", ticket=again.to_json(), seed=2, num_tokens=100)
        assert await received(receiver, "again") == pattern(2, 100)


async def test_addresses_where_nobody_is_leave_nothing() -> None:
    """Neither at a sender with their tickets, nor at a receiver that asks there."""
    async with receiving() as receiver, aiomm.Sender(SCHEMA) as sender:
        ticket = receiver.expect("r")
        await asyncio.gather(sender.send(ticket, pattern(1, 3)), received(receiver, "r"))
        before = resources()
        for number in range(20):
            gone = f"tcp://127.0.0.1:{number + 1}"
            void = msgspec.structs.replace(ticket, address=gone, epoch=number + 1)
            for call in (
                sender.send(void, pattern(1, 3), timeout=0.05),
                receiver.receive(f"{number}", source=gone, timeout=0.05),
            ):
                with pytest.raises(aiomm.TransferTimeout):
                    await call
        await until(nothing_new(before), "sockets are closed")


FORGETFUL = """
import asyncio, gc, sys
import torch, aiomm
schema = aiomm.Schema(x=aiomm.Field("float32", 8))
async def main():
    receiver = aiomm.Receiver(schema, bind="tcp://127.0.0.1:0", blocks=16)
    await receiver.start()
    sender = aiomm.Sender(schema)
    sending = asyncio.ensure_future(sender.send(receiver.expect("a"), {"x": torch.zeros(10, 8)}))
    (await receiver.receive("a")).release()
    await sending
    if sys.argv[1] == "raise":
        raise LookupError("the user's own")
try:
    asyncio.run(main())
except LookupError:
    pass
gc.collect()
print("collected")
"""


@pytest.mark.parametrize("ending", ["return", "raise"])
def test_endpoints_that_are_forgotten_do_not_hang_the_garbage_collector(ending: str) -> None:
    """Nothing refers to them any more, and nothing was closed: the process goes on, and ends."""
    run = subprocess.run(
        [sys.executable, "-c", FORGETFUL, ending], capture_output=True, text=True, timeout=DEADLINE
    )
    assert (run.returncode, run.stdout) == (0, "collected\n"), run.stderr


class SlowToDetach(MemoryPlane):
    """A plane whose probe fails, and whose arenas close when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.is_closing, self.may_close, self.is_closed = (asyncio.Event() for _ in range(3))

    async def attach(self, offer: bytes) -> RemoteArena:
        return SlowToClose(self)


class SlowToClose(RemoteArena):
    """What it attaches."""

    def __init__(self, plane: SlowToDetach) -> None:
        self.plane = plane

    async def write(self, grant: GrantKey, runs: Sequence[Run]) -> None:
        raise aiomm.PlaneUnavailable("no")

    async def aclose(self) -> None:
        self.plane.is_closing.set()
        await self.plane.may_close.wait()
        self.plane.is_closed.set()


async def test_a_search_cancelled_twice_while_it_detaches() -> None:
    plane = SlowToDetach()
    fields = (frames.FieldSpec("x", "float32", (4,)),)
    hello = frames.Hello(
        "receiver",
        "r",
        fields,
        pool_tokens=128,
        num_probes=1,
        planes=(frames.PlaneOffer(plane.name, b"offer"),),
    )
    finding = find_route(hello, [plane], strict=True, probe=lambda *_: asyncio.Future())
    search = asyncio.ensure_future(finding)
    await plane.is_closing.wait()
    for _ in range(2):
        search.cancel()
        await asyncio.wait([search], timeout=0.01)
        assert not search.done()
    plane.may_close.set()
    await asyncio.wait([search])
    assert search.cancelled()
    assert plane.is_closed.is_set()


SHAPE: dict[str, Any] = {"blocks": 8, "block_size": 4, "default_blocks": 2}


def sizes(receiver: aiomm.Receiver, sender: aiomm.Sender) -> dict[str, int]:
    """Return how much every container holds in what runs the two endpoints."""
    driver, other = receiver._driver, sender._driver
    parts = [driver, driver.endpoint, driver._exports, driver.queue, driver.pool, other]
    parts += [other.endpoint, receiver, sender]
    parts += driver._exports._exports.values()
    parts += [route.arena for route in other._standing.values()]
    parts += [*driver.endpoint.sessions.values(), *other.endpoint.sessions.values()]
    return {
        f"{type(part).__name__}.{name}": len(value)
        for part in parts
        for name, value in vars(part).items()
        if isinstance(value, dict | list | set | deque)
        and name not in ("_deadlines", "_free")  # of requests that are long over, until their time
    }


@pytest.mark.parametrize("plane", ["shm", "tcp", "memory"])
async def test_transfers_that_are_over_leave_nothing(plane: str) -> None:
    """Fifty of them, as much as five: granted at once, resumed, streamed, given up."""
    planes = [MemoryPlane()] if plane == "memory" else plane
    settled: list[dict[str, int]] = []
    async with (
        aiomm.Receiver(SCHEMA, bind="tcp://127.0.0.1:*", planes=planes, **SHAPE) as receiver,
        aiomm.Sender(SCHEMA, planes=planes) as sender,
    ):
        for number in range(50):
            for num_tokens in (3, 20, 100):
                name = f"{number}: {num_tokens}"
                transfer = sender.claim(receiver.expect(name))
                transfer.send(pattern(number, num_tokens))
                async with receiver.receive(name):
                    await transfer
            given_up = sender.claim(receiver.expect(f"{number}"))
            given_up.cancel()
            with pytest.raises(aiomm.Cancelled):
                await receiver.receive(f"{number}")
            if number in (4, 49):
                await until(lambda: not sender._driver.endpoint.num_live, "settled")
                settled.append(sizes(receiver, sender))
    assert settled[0] == settled[1]
