"""Registered memory of the sender's, in which tensors stand ready for receivers to read.

There is so much of it and no more: who needs a slot waits in line for one. Slots are made when
they are first needed, and kept.
"""

from __future__ import annotations

import asyncio
from collections import deque
from functools import partial

from ...buffers.mapping import map_memory
from ...buffers.memcpy import address_of
from ...errors import PlaneUnavailable
from ..copying import Copies
from .engine import SharedEngine

__all__ = ["SLOT_NBYTES", "Slot", "Staging"]

SLOT_NBYTES = 4 << 20
"""Long enough for the engine, short enough for copying and reading to overlap."""


class Slot:
    """One piece of registered memory."""

    def __init__(self, memory: memoryview) -> None:
        self.memory = memory
        self.address = address_of(memory)


class Staging:
    """The slots of one engine.

    Args:
        engine: which they are registered with.
        copies: runs what blocks.
        nbytes: of all slots together, at most; there is at least one.
    """

    def __init__(self, engine: SharedEngine, copies: Copies, nbytes: int) -> None:
        self._engine = engine
        self._copies = copies
        self._room = max(1, nbytes // SLOT_NBYTES)
        """How many more slots may be made."""
        self._slots: list[Slot] = []
        self._free: list[Slot] = []
        self._line: deque[asyncio.Future[Slot | None]] = deque()
        """Who waits; is given a slot, or None for the room to make one."""

    @property
    def num_slots(self) -> int:
        """How many slots have been made."""
        return len(self._slots)

    async def take(self) -> Slot:
        """Return a slot, waiting in line if none is free. It must not be cancelled.

        Raises:
            PlaneUnavailable: there is no memory for another one.
        """
        if self._free:
            return self._free.pop()
        if self._room:
            self._room -= 1
            return await self._made()
        turn: asyncio.Future[Slot | None] = asyncio.get_running_loop().create_future()
        self._line.append(turn)
        return await turn or await self._made()

    def give(self, slot: Slot) -> None:
        """Return a slot to the first in line."""
        if self._line:
            self._line.popleft().set_result(slot)
        else:
            self._free.append(slot)

    async def aclose(self) -> None:
        """Unregister every slot; nobody may hold one."""
        slots, self._slots, self._free = self._slots, [], []
        for slot in slots:
            await self._copies.run(
                partial(self._engine.unregister, slot.address, slot.memory.nbytes)
            )

    async def _made(self) -> Slot:
        try:
            slot = await self._copies.run(self._make)
        except PlaneUnavailable:
            if self._line:
                self._line.popleft().set_result(None)
            else:
                self._room += 1
            raise
        self._slots.append(slot)
        return slot

    def _make(self) -> Slot:
        slot = Slot(map_memory(SLOT_NBYTES))
        self._engine.register(slot.address, SLOT_NBYTES)
        return slot
