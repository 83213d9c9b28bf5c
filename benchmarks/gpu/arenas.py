"""A child with an arena on a GPU, or one that writes into it: the plane alone, byte by byte."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import aiomm
from aiomm.buffers.cuda import CudaArena
from aiomm.buffers.layout import ByteRange
from aiomm.buffers.tensors import TokenRows
from aiomm.planes.base import Export, GrantKey, RemoteArena, Run
from aiomm.planes.cuda_ipc import CudaIpcPlane
from benchmarks.gpu.actor import Actor
from benchmarks.gpu.content import difference, pattern

__all__ = ["POISON", "ArenaActor"]

POISON = 0xA5
BYTES = aiomm.Field("uint8")
GRANT = GrantKey(1, 1, 1)


class ArenaActor(Actor):
    """Either end of the plane."""

    arena: CudaArena
    export: Export | None = None
    remote: RemoteArena | None = None

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.plane = CudaIpcPlane()
        self._kept: list[TokenRows] = []

    async def aclose(self) -> None:
        """Close what is open."""
        for each in (self.remote, self.export):
            if each is not None:
                await each.aclose()

    # The end with the memory.

    async def do_offer(self, nbytes: int) -> str:
        """Make an arena and export it; return the offer."""
        self.arena = await asyncio.to_thread(CudaArena, nbytes, f"cuda:{self.device}")
        self.export = await self.plane.export(self.arena)
        self.export.permit(GRANT, [ByteRange(0, nbytes)])
        return self.export.offer(GRANT.link).hex()

    def do_poison(self) -> None:
        """Fill the arena."""
        self.tensors.fill(self._whole(), POISON)

    def do_compare(self, extents: Sequence[tuple[int, int]], seed: int) -> str:
        """Compare the whole arena with what was to be written; return what differs.

        Through a tensor over the memory, and through a copy of aiomm's own.

        Args:
            extents: offset and length of each.
            seed: of what lies in them, one behind the other.
        """
        expected = bytearray([POISON]) * self.arena.nbytes
        written = pattern(seed, sum(length for _, length in extents))
        taken = 0
        for offset, length in extents:
            expected[offset : offset + length] = written[taken : taken + length]
            taken += length
        seen = self.tensors.content(self._whole())
        copied = bytes(self.arena.read(0, self.arena.nbytes))
        return difference(seen, bytes(expected)) or difference(copied, bytes(expected))

    def _whole(self) -> Any:
        memory = self.arena.memory
        return self.runtime.flat_array(memory.device, memory.address, self.arena.nbytes, memory)

    # The end that writes.

    async def do_attach(self, offer: str) -> None:
        """Open the arena."""
        self.remote = await self.plane.attach(bytes.fromhex(offer))

    async def do_write(self, extents: Sequence[tuple[int, int]], seed: int, source: str) -> None:
        """Write a pattern, cut into extents."""
        assert self.remote is not None
        nbytes = sum(length for _, length in extents)
        rows = self._rows(source, pattern(seed, nbytes))
        runs, taken = [], 0
        for offset, length in extents:
            runs.append(Run(rows, taken, length, offset))
            taken += length
        await self.remote.write(GRANT, runs)

    async def do_write_costs(self, nbytes: int, rounds: int) -> dict[str, list[float]]:
        """Return the seconds of writes, and of plain copies of the same bytes in between."""
        assert self.remote is not None
        if not self._kept or self._kept[-1].num_tokens != nbytes:
            self._kept = [self._rows("cuda", pattern(nbytes, 1 << 16) * (nbytes >> 16))]
        plain = self.tensors.plain_copy(self.device, nbytes)
        run = Run(self._kept[-1], 0, nbytes, 0)
        seconds: dict[str, list[float]] = {"write": [], "plain": []}
        for number in range(rounds + 2):
            copied = plain(nbytes)
            began = time.perf_counter()
            await self.remote.write(GRANT, [run])
            if number >= 2:
                seconds["write"].append(time.perf_counter() - began)
                seconds["plain"].append(copied)
        return seconds

    def _rows(self, source: str, content: bytes) -> TokenRows:
        shape = (len(content),)
        tensor = self.tensors.make(source, self.device, content, "uint8", shape)
        return TokenRows.of("bytes", BYTES, tensor)
