"""Failures that other systems shipped and that need the whole library to be shown.

The numbers are those of the protocol's list of failures; what the protocol core alone can show
stands in `tests/protocol/test_regressions.py`.
"""

from __future__ import annotations

import ast
import asyncio
import logging
import pickle
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq

import aiomm
from aiomm.planes.base import GrantKey, Plane, RemoteArena, Run
from aiomm.planes.memory import Faults, MemoryPlane
from aiomm.planes.shm import ShmPlane
from aiomm.planes.tcp import TcpPlane
from aiomm.protocol.frames import Packet, Written, encode
from tests.processes import (
    SCHEMA,
    Child,
    child,
    failed,
    num_blocks,
    pattern,
    received,
    receiving,
    until,
)

pytestmark = [pytest.mark.usefixtures("no_leaks"), pytest.mark.timeout(60)]


@asynccontextmanager
async def over(plane: Plane, **settings: Any) -> AsyncIterator[tuple[aiomm.Receiver, aiomm.Sender]]:
    """Run both sides in this process, over one plane."""
    async with (
        receiving(planes=[plane], **settings) as receiver,
        aiomm.Sender(SCHEMA, planes=[plane]) as sender,
    ):
        yield receiver, sender


async def move(
    sender: aiomm.Sender, receiver: aiomm.Receiver, request_id: str, seed: int, num_tokens: int
) -> None:
    """Send and receive one request, and compare every byte."""
    ticket = receiver.expect(request_id)
    sending = asyncio.ensure_future(sender.send(ticket, pattern(seed, num_tokens)))
    assert await received(receiver, request_id) == pattern(seed, num_tokens)
    await sending


class RaisesOnce(MemoryPlane):
    """A plane whose first write raises what no plane should."""

    has_raised = False

    async def attach(self, offer: bytes) -> RemoteArena:
        return RaisingArena(self, await super().attach(offer))


class RaisingArena(RemoteArena):
    """Raises in the first write that is no probe."""

    def __init__(self, plane: RaisesOnce, inner: RemoteArena) -> None:
        self.plane = plane
        self.inner = inner

    async def write(self, grant: GrantKey, runs: Sequence[Run]) -> None:
        if grant.generation and not self.plane.has_raised:
            self.plane.has_raised = True
            raise ZeroDivisionError("a bug in a plane")
        await self.inner.write(grant, runs)

    async def aclose(self) -> None:
        await self.inner.aclose()


async def test_13_an_unforeseen_exception_fails_one_transfer() -> None:
    """An exception in one transfer kills the worker, and all its requests hang."""
    async with over(RaisesOnce()) as (receiver, sender):
        tickets = {f"r{n}": receiver.expect(f"r{n}") for n in range(6)}
        waiting = [asyncio.ensure_future(received(receiver, name)) for name in tickets]
        sending = [sender.send(ticket, pattern(1, 50)) for ticket in tickets.values()]
        outcomes = await asyncio.gather(*sending, return_exceptions=True)
        (error,) = [each for each in outcomes if isinstance(each, BaseException)]
        assert isinstance(error, aiomm.PlaneUnavailable)
        assert "ZeroDivisionError: a bug in a plane" in str(error)
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert sum(each == pattern(1, 50) for each in results) == 5
        await until(lambda: num_blocks(receiver, "free") == 16, "blocks come back")


class FailsToAttach(MemoryPlane):
    """A plane that cannot attach for a while, as when descriptors have run out."""

    is_broken = True

    async def attach(self, offer: bytes) -> RemoteArena:
        if self.is_broken:
            raise aiomm.PlaneUnavailable("no descriptors left")
        return await super().attach(offer)


async def test_14_a_plane_that_was_not_found_once_is_looked_for_again() -> None:
    """One failed transfer bans the peer for ever."""
    plane = FailsToAttach()
    async with (
        receiving(planes=[plane]) as receiver,
        aiomm.Sender(SCHEMA, planes=[plane]) as sender,
    ):
        with pytest.raises(aiomm.PlaneUnavailable, match="no descriptors left"):
            await sender.send(receiver.expect("first"), pattern(1, 10))
        assert isinstance((await failed(receiver, "first"))[0], aiomm.PlaneUnavailable)
        plane.is_broken = False
        second = receiver.expect("second")
        waiting = asyncio.ensure_future(received(receiver, "second"))
        await sender.send(second, pattern(2, 10))
        assert await waiting == pattern(2, 10)


class SlowToAttach(MemoryPlane):
    """A plane whose attaching waits until it is let go on."""

    def __init__(self) -> None:
        super().__init__()
        self.may_attach = asyncio.Event()

    async def attach(self, offer: bytes) -> RemoteArena:
        await self.may_attach.wait()
        return await super().attach(offer)


async def test_16_a_timeout_before_the_plane_is_found_proves_nothing() -> None:
    """An abort frees the blocks although the sender is still to write them.

    The receiver does not even know yet which plane the sender will write over.
    """
    plane = SlowToAttach()
    async with (
        receiving(planes=[plane]) as receiver,
        aiomm.Sender(SCHEMA, planes=[plane]) as sender,
    ):
        ticket = receiver.expect("r", timeout=0.3)
        transfer = sender.claim(ticket).send(pattern(1, 200))
        error, _ = await failed(receiver, "r")
        assert isinstance(error, aiomm.TransferTimeout)
        with pytest.raises(aiomm.TransferTimeout):
            await transfer
        assert num_blocks(receiver, "quarantined") == 2
        plane.may_attach.set()
        await until(lambda: num_blocks(receiver, "free") == 16, "the sender has acknowledged")
        assert plane.faults.num_writes == 0


async def test_16_a_sender_that_closes_before_its_write_is_over_says_no_goodbye() -> None:
    """A goodbye proves that nothing can land any more; this one would not be true."""
    faults = Faults(stall_at=1)
    async with receiving(planes=[MemoryPlane()], close_timeout=0.2) as receiver:
        ticket = receiver.expect("r")
        planes = [MemoryPlane(faults=faults)]
        async with aiomm.Sender(SCHEMA, planes=planes, close_timeout=0.2) as sender:
            sender.claim(ticket).send(pattern(1, 200))
            await faults.stalled.wait()
        error, _ = await failed(receiver, "r")
        assert isinstance(error, aiomm.PoolClosed)
        assert num_blocks(receiver, "quarantined") == 2


class BreaksWithReceiver(MemoryPlane):
    """A plane that learns first of the receiver's death, in the middle of a write."""

    def __init__(self, kill: Callable[[], object]) -> None:
        super().__init__()
        self.kill = kill
        self.name = "shm"  # type: ignore[misc]

    async def attach(self, offer: bytes) -> RemoteArena:
        arena = await ShmPlane().attach(offer)
        return BreakingArena(arena, self.kill)


class BreakingArena(RemoteArena):
    """Kills the receiver and fails, in any write but the handshake's probe."""

    def __init__(self, inner: RemoteArena, kill: Callable[[], object]) -> None:
        self.inner = inner
        self.kill = kill

    async def write(self, grant: GrantKey, runs: Sequence[Run]) -> None:
        if grant.generation:
            self.kill()
            raise aiomm.PlaneUnavailable("connection reset by peer")
        await self.inner.write(grant, runs)

    async def aclose(self) -> None:
        await self.inner.aclose()


async def test_18_a_receiver_that_dies_in_a_write_is_a_lost_peer() -> None:
    """The encoder never notices that the language side died, or takes it for a broken plane."""
    async with child("receiver", bind="tcp://127.0.0.1:*") as receiver:
        planes = [BreaksWithReceiver(receiver.kill)]
        async with aiomm.Sender(SCHEMA, planes=planes) as sender:
            ticket = (await receiver.ask("expect", "ticket", request_id="r"))["ticket"]
            with pytest.raises(aiomm.PeerLost):
                await sender.send(ticket, pattern(1, 100))
            await until(lambda: not sender._driver.sources, "it lets go of the tensors")


async def test_20_two_hundred_simultaneous_requests() -> None:
    """Two hundred simultaneous requests: most silently dropped."""
    async with (
        receiving(blocks=8, block_size=16, default_blocks=2) as receiver,
        aiomm.Sender(SCHEMA) as sender,
    ):
        await asyncio.gather(*(move(sender, receiver, f"r{n}", n, 40) for n in range(200)))
        assert num_blocks(receiver, "free") == 8


async def test_21_a_peer_that_stops_reading_holds_nobody() -> None:
    """A send without a timeout wedges the whole scheduler when the peer stops reading."""
    async with (
        child("receiver", bind="tcp://127.0.0.1:*") as stopped,
        receiving() as receiver,
        aiomm.Sender(SCHEMA) as sender,
    ):
        ticket = (await stopped.ask("expect", "ticket", request_id="r"))["ticket"]
        sender.claim(ticket, timeout=1.0)
        stopped.stop()
        metadata = {"long": "x" * 30_000}  # more than its sockets and our queues hold
        claims = [sender.claim(ticket, num_tokens=1, timeout=1.0) for _ in range(200)]
        for claim in claims:
            claim.send(pattern(1, 1), metadata=metadata)
        for number in range(5):
            await move(sender, receiver, f"r{number}", number, 100)
        outcomes = await asyncio.gather(*claims, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {aiomm.TransferTimeout}


async def test_22_a_slow_write_blocks_nobody_else() -> None:
    """One slow peer blocks all others: waits serialise, or a lock is held during the copy."""
    faults = Faults(stall_at=1)
    async with (
        over(MemoryPlane(faults=faults)) as (slow, sender),
        receiving(planes=[MemoryPlane()]) as quick,
    ):
        stalled = sender.claim(slow.expect("stalled")).send(pattern(1, 300))
        await faults.stalled.wait()
        for number in range(5):
            await move(sender, quick, f"q{number}", number, 1000)
            await move(sender, slow, f"s{number}", number, 1000)
        assert not stalled.done()
        faults.release()
        assert await received(slow, "stalled") == pattern(1, 300)
        await stalled


async def test_23_a_full_pool_is_told() -> None:
    """Pool full is reported to nobody; the other side waits 60 s for nothing."""
    async with over(MemoryPlane(), max_waiting=2) as (receiver, sender):
        held = receiver.expect("held")
        transfer = sender.claim(held, num_tokens=16 * 128)
        await until(lambda: transfer.state is aiomm.State.SENDING, "the pool is taken")
        late = receiver.expect("late")
        with pytest.raises(aiomm.Rejected) as refused:
            receiver.expect("too many")
        assert refused.value.retryable
        with pytest.raises(aiomm.TransferTimeout, match="ALLOC"):
            await sender.send(late, pattern(1, 10), timeout=0.2)
        transfer.cancel()


async def test_24_one_timeout_poisons_no_later_transfer() -> None:
    """One acknowledgement timeout poisons every transfer on the link."""
    faults = Faults(stall_at=1)
    async with over(MemoryPlane(faults=faults)) as (receiver, sender):
        first = sender.claim(receiver.expect("first", timeout=0.3)).send(pattern(1, 300))
        await faults.stalled.wait()
        assert isinstance((await failed(receiver, "first"))[0], aiomm.TransferTimeout)
        with pytest.raises(aiomm.TransferTimeout):
            await first
        for number in range(5):
            await move(sender, receiver, f"r{number}", number, 1000)
        assert num_blocks(receiver, "quarantined") == 3
        faults.release()
        await until(lambda: num_blocks(receiver, "free") == 16, "the write is over")
        await move(sender, receiver, "last", 9, 2048)


async def move_from(sender: Child, receiver: aiomm.Receiver, request_id: str) -> None:
    """Have a child send one request."""
    ticket = receiver.expect(request_id)
    sender.tell("send", ticket=ticket.to_json(), seed=1, num_tokens=10)
    assert await received(receiver, request_id) == pattern(1, 10)
    assert (await sender.hear("ended"))["error"] is None


def deliver(address: str, packet: bytes) -> None:
    """Hand one packet to whoever listens there, from a stranger's connection."""
    context = zmq.Context()
    connection = context.socket(zmq.DEALER)
    connection.connect(address)
    connection.send(packet)
    connection.close(linger=2000)
    context.term()


async def test_25_an_old_message_reaches_no_new_request() -> None:
    """A message of an old connection is delivered to a new request (port re-use)."""
    async with child("sender") as sender:
        async with receiving() as old:
            address = old.address
            assert address is not None
            epoch = old._driver.endpoint.epoch
            late = old.expect("r")
            await move_from(sender, old, "earlier")
        async with receiving(bind=address) as new:
            assert new.address == address
            ticket = new.expect("r")
            written = Written(aiomm.types.TransferId("r", 1), 0, 0, 100, 100)
            deliver(address, encode(Packet(1, 77, epoch, 1, 0, written)))
            await until(lambda: new.metrics().get("ignored_of_another_life", 0) > 0, "ignored")
            sender.tell("send", ticket=late.to_json(), seed=1, num_tokens=10)
            assert (await sender.hear("ended"))["error"] == "PeerLost"
            sender.tell("send", ticket=ticket.to_json(), seed=2, num_tokens=10)
            assert await received(new, "r") == pattern(2, 10)


async def test_26_nothing_that_arrives_is_executed(tmp_path: Path) -> None:
    """Pickle on a network socket: remote code execution (CVE-2026-3060, CVE-2025-32444)."""
    proof = tmp_path / "executed"

    class Exploit:
        def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
            return Path.touch, (proof,)

    async with over(ShmPlane()) as (receiver, sender):
        assert receiver.address is not None
        deliver(receiver.address, pickle.dumps(Exploit()))
        await until(lambda: receiver.metrics().get("ignored_malformed", 0) > 0, "refused")
        await move(sender, receiver, "r", 1, 100)
    assert not proof.exists()
    pickle.loads(pickle.dumps(Exploit()))
    assert proof.exists()


def test_26_no_module_can_execute_what_arrives() -> None:
    """Pickle on a network socket: remote code execution (CVE-2026-3060, CVE-2025-32444)."""
    forbidden = {"pickle", "marshal", "shelve", "cloudpickle", "dill"}
    package = Path(aiomm.__file__).parent
    for module in package.rglob("*.py"):
        for node in ast.walk(ast.parse(module.read_text())):
            names = {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            if isinstance(node, ast.ImportFrom):
                names.add(node.module or "")
            called = getattr(node, "func", None)
            assert not names & forbidden, module
            assert getattr(called, "attr", "") not in {"recv_pyobj", "send_pyobj"}, module
            assert getattr(called, "id", "") not in {"eval", "exec"}, module


async def test_27_done_means_landed() -> None:
    """Success reported when a copy was only enqueued (asynchronous device copies)."""
    faults = Faults(stall_at=1)
    async with over(MemoryPlane(faults=faults)) as (receiver, sender):
        transfer = sender.claim(receiver.expect("r")).send(pattern(1, 300))
        waiting = asyncio.ensure_future(received(receiver, "r"))
        await faults.stalled.wait()
        await move(sender, receiver, "other", 2, 300)  # the loop has had its turns
        assert transfer.state is aiomm.State.SENDING
        assert transfer.transferred_tokens == 0
        assert not waiting.done()
        faults.release()
        assert await waiting == pattern(1, 300)
        assert (await transfer).num_tokens == 300


async def test_28_a_fall_back_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """A silent fall-back to a path 100 times slower, unnoticed for weeks."""
    caplog.set_level(logging.INFO, "aiomm")
    async with receiving(planes="tcp") as receiver:
        async with aiomm.Sender(SCHEMA, planes=["shm", "tcp"]) as sender:
            ticket = receiver.expect("r")
            sending = asyncio.ensure_future(sender.send(ticket, pattern(1, 10)))
            async with receiver.receive("r") as lease:
                assert lease.stats.plane == "tcp"
            stats = await sending
            assert stats.plane == "tcp"
            assert stats.refused_planes == ("shm: the receiver does not have it",)
        assert "plane tcp" in caplog.text
        assert "shm: the receiver does not have it" in caplog.text
        async with aiomm.Sender(SCHEMA, planes=["shm", "tcp"], strict=True) as strict:
            with pytest.raises(aiomm.PlaneUnavailable, match="shm: the receiver does not have it"):
                await strict.send(receiver.expect("s"), pattern(1, 10))
        planes = [MemoryPlane(), TcpPlane()]  # named, not guessed: ours is in another process
        async with aiomm.Sender(SCHEMA, planes=planes) as sender:
            await move(sender, receiver, "t", 3, 10)


PROTOCOL_TESTS = Path(__file__).parent / "protocol" / "test_regressions.py"


@pytest.mark.skipif(not PROTOCOL_TESTS.exists(), reason="the protocol's own are not written yet")
def test_every_failure_of_the_list_has_a_test() -> None:
    text = Path(__file__).read_text() + PROTOCOL_TESTS.read_text()
    named = {int(number) for number in re.findall(r"^(?:async )?def test_(\d+)_", text, re.M)}
    assert named == set(range(1, 29))
