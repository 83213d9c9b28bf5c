"""Failures that other systems shipped and that need the whole library to be shown.

The numbers are those of the list in `docs/`; what the protocol core alone can show stands in
`tests/protocol/test_regressions.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest

import aiomm
from aiomm.planes.base import GrantKey, RemoteArena, Run
from aiomm.planes.memory import Faults, MemoryPlane
from aiomm.planes.shm import ShmPlane
from tests.processes import SCHEMA, child, failed, num_blocks, pattern, received, receiving, until

pytestmark = [pytest.mark.usefixtures("no_leaks"), pytest.mark.timeout(60)]


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


async def test_16_a_sender_that_closes_before_its_write_is_over_says_no_goodbye() -> None:
    """A goodbye proves that nothing can land any more; this one would not be true."""
    faults = Faults(stall_at=1)
    async with receiving(planes=[MemoryPlane()]) as receiver:
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
