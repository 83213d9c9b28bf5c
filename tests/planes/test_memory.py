"""The in-memory plane passes the contract, and fails exactly as it is told to."""

from __future__ import annotations

import asyncio

import pytest

from aiomm.buffers.arena import Arena, HostArena
from aiomm.buffers.layout import ByteRange
from aiomm.errors import PlaneUnavailable
from aiomm.planes.base import GrantKey, Plane
from aiomm.planes.memory import Faults, MemoryPlane

from .contract import (
    ARENA_NBYTES,
    GRANT,
    LINK,
    Link,
    PlaneContract,
    expected_content,
    random_rows,
    whole,
)

TENSOR = random_rows(10, 64)


class TestMemoryPlane(PlaneContract):
    def make_plane(self) -> Plane:
        self.faults = Faults()
        return MemoryPlane(faults=self.faults)

    def make_arena(self, nbytes: int) -> Arena:
        return HostArena(nbytes)

    async def test_a_delayed_write_lands(self, link: Link) -> None:
        self.faults.delay = 1e-6
        await link.write([whole(TENSOR, 0)])
        assert link.content() == expected_content(ARENA_NBYTES, (0, TENSOR))

    async def test_fails_at_the_nth_write(self, link: Link) -> None:
        self.faults.fail_at = 2
        await link.write([whole(TENSOR, 0)])
        with pytest.raises(PlaneUnavailable, match="write 2"):
            await link.write([whole(TENSOR, 1000)])
        await link.write([whole(TENSOR, 2000)])
        await link.remote.quiesce()
        parts = [(0, TENSOR), (2000, TENSOR)]
        assert link.content() == expected_content(ARENA_NBYTES, *parts)

    async def test_a_short_write_copies_half_and_fails(self, link: Link) -> None:
        self.faults.short_at = 1
        with pytest.raises(PlaneUnavailable, match="short"):
            await link.write([whole(TENSOR, 0)])
        assert link.content() == expected_content(ARENA_NBYTES, (0, TENSOR[:5]))

    async def test_a_stalled_write_waits_for_its_release(self, link: Link) -> None:
        self.faults.stall_at = 1
        stalled = asyncio.create_task(link.write([whole(TENSOR, 0)]))
        await self.faults.stalled.wait()
        await link.write([whole(TENSOR, 1000)], GRANT._replace(sequence=2))
        assert link.content() == expected_content(ARENA_NBYTES, (1000, TENSOR))
        self.faults.release()
        await stalled
        parts = [(0, TENSOR), (1000, TENSOR)]
        assert link.content() == expected_content(ARENA_NBYTES, *parts)

    async def test_a_late_write_lands_when_quiesce_is_awaited(self, link: Link) -> None:
        self.faults.late_at = 1
        with pytest.raises(PlaneUnavailable, match="late"):
            await link.write([whole(TENSOR, 0)])
        assert link.export.revoke(GRANT) is False
        assert link.content() == expected_content(ARENA_NBYTES)
        await link.remote.quiesce()
        assert link.content() == expected_content(ARENA_NBYTES, (0, TENSOR))

    async def test_a_probe_neither_counts_nor_fails(self, link: Link) -> None:
        self.faults.fail_at = 1
        await link.write([whole(TENSOR, 0)], GrantKey.of_probe(LINK))
        assert self.faults.num_writes == 0
        with pytest.raises(PlaneUnavailable, match="write 1"):
            await link.write([whole(TENSOR, 0)])

    async def test_refuses_what_is_not_granted(self, link: Link) -> None:
        link.export.permit(GRANT, [ByteRange(0, 100)])
        with pytest.raises(PlaneUnavailable, match="not granted"):
            await link.remote.write(GRANT, [whole(TENSOR, 0)])
        assert link.content() == expected_content(ARENA_NBYTES)
