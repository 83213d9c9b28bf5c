"""What all attachments of one plane send from: an engine, its staging, and the user's memory."""

from __future__ import annotations

import asyncio
from functools import partial

from ...buffers.tensors import Memory
from ..copying import Copies, CopyThreads
from .engine import SharedEngine, engine_at
from .staging import Staging

__all__ = ["Outlet", "Outlets"]


class Outlet:
    """The sender's side of one engine.

    Args:
        memory: what the user has registered, by address.
    """

    def __init__(
        self, engine: SharedEngine, copies: Copies, staging: Staging, memory: dict[int, Memory]
    ) -> None:
        self.session = engine.session
        self.copies = copies
        self.staging = staging
        self.num_holders = 0
        self._engine = engine
        self._memory = memory

    def is_registered(self, address: int, nbytes: int) -> bool:
        """Whether so many bytes from `address` on can be read from where they are."""
        return any(memory.holds(address, nbytes) for memory in self._memory.values())

    async def register(self, address: int, nbytes: int) -> None:
        """Register memory with the engine."""
        await self.copies.run(partial(self._engine.register, address, nbytes))

    async def unregister(self, address: int, nbytes: int) -> None:
        """Unregister memory."""
        await self.copies.run(partial(self._engine.unregister, address, nbytes))

    async def aclose(self) -> None:
        """Unregister everything."""
        await self.staging.aclose()
        for address, memory in self._memory.items():
            await self.unregister(address, memory.nbytes)
        await self.copies.aclose()


class Outlets:
    """The outlets of one plane, by the address of this host that receivers are told.

    An outlet lives as long as anything is attached through it.
    """

    def __init__(self, threads: CopyThreads, metadata: str, staging_nbytes: int) -> None:
        self._threads = threads
        self._metadata = metadata
        self._staging_nbytes = staging_nbytes
        self._outlets: dict[str, Outlet] = {}
        self._memory: dict[int, Memory] = {}
        self._turn = asyncio.Lock()

    async def hold(self, host: str) -> Outlet:
        """Return the outlet of `host`; it needs a :meth:`let_go`.

        Raises:
            PlaneUnavailable: there is no engine.
        """
        async with self._turn:
            outlet = self._outlets.get(host)
            if outlet is None:
                outlet = self._outlets[host] = await self._opened(host)
            outlet.num_holders += 1
            return outlet

    async def let_go(self, host: str) -> None:
        """Close the outlet of `host` if nobody else holds it."""
        async with self._turn:
            outlet = self._outlets[host]
            outlet.num_holders -= 1
            if not outlet.num_holders:
                del self._outlets[host]
                await outlet.aclose()

    async def register(self, memory: Memory) -> None:
        """Register `memory` with every engine, also those to come.

        Raises:
            PlaneUnavailable: an engine refuses it.
        """
        async with self._turn:
            for outlet in self._outlets.values():
                await outlet.register(memory.address, memory.nbytes)
            self._memory[memory.address] = memory

    async def unregister(self, memory: Memory) -> None:
        """Take back :meth:`register`."""
        async with self._turn:
            if self._memory.pop(memory.address, None) is not None:
                for outlet in self._outlets.values():
                    await outlet.unregister(memory.address, memory.nbytes)

    async def _opened(self, host: str) -> Outlet:
        copies = Copies(self._threads)
        try:
            engine = await copies.run(partial(engine_at, host, self._metadata))
            staging = Staging(engine, copies, self._staging_nbytes)
            outlet = Outlet(engine, copies, staging, self._memory)
            for address, memory in self._memory.items():
                await outlet.register(address, memory.nbytes)
        except BaseException:
            await copies.aclose()
            raise
        return outlet
