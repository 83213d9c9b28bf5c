"""A plane that writes everything many times over: a long queue of copies, to be killed in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aiomm.planes.base import Export, GrantKey, Plane, RemoteArena, Run
from benchmarks.gpu.actor import announce

__all__ = ["WRITING", "Repeating"]

WRITING = "writing"
"""Announced when a repeated write begins."""


class Repeating(Plane):
    """Another plane, whose sender writes everything many times over: a long queue of copies."""

    def __init__(self, inner: Plane) -> None:
        self.inner = inner
        self.name = inner.name  # type: ignore[misc]
        self.repeats = 1

    def writes_into(self, device: str) -> bool:
        """Say what the inner plane says."""
        return self.inner.writes_into(device)

    def unusable(self) -> str | None:
        """Say what the inner plane says."""
        return self.inner.unusable()

    async def export(self, arena: Any) -> Export:
        """Open the arena as the inner plane does."""
        return await self.inner.export(arena)

    async def attach(self, offer: bytes) -> RemoteArena:
        """Attach as the inner plane does."""
        return RepeatingArena(self, await self.inner.attach(offer))


class RepeatingArena(RemoteArena):
    """What a sender writes through."""

    def __init__(self, plane: Repeating, inner: RemoteArena) -> None:
        self.plane = plane
        self.inner = inner

    async def write(self, grant: GrantKey, runs: Sequence[Run]) -> None:
        """Write, the probe of a handshake once."""
        repeats = self.plane.repeats if grant.generation else 1
        if repeats > 1:
            announce(WRITING)
        await self.inner.write(grant, list(runs) * repeats)

    async def quiesce(self) -> None:
        """Wait as the inner plane does."""
        await self.inner.quiesce()

    async def aclose(self) -> None:
        """Detach."""
        await self.inner.aclose()
