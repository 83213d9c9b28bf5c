"""Failures that other systems shipped and that need the whole library to be shown.

The numbers are those of the list in `docs/`; what the protocol core alone can show stands in
`tests/protocol/test_regressions.py`.
"""

from __future__ import annotations

import asyncio

import pytest

import aiomm
from aiomm.planes.base import RemoteArena
from aiomm.planes.memory import MemoryPlane
from tests.processes import SCHEMA, failed, num_blocks, pattern, receiving, until

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
