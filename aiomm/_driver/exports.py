"""The receiver's arena, open over every plane that works, and who may write where in it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

from ..buffers.arena import Arena, HostArena
from ..buffers.layout import Layout
from ..errors import PlaneUnavailable
from ..planes.base import Export, GrantKey, Plane
from ..protocol.frames import PlaneOffer
from ..types import Extent

__all__ = ["Exports"]

logger = logging.getLogger("aiomm.receiver")


class Exports:
    """One export per plane; grants are permitted on all of them, and revoked on all.

    Args:
        layout: of the arena.
        noted: given the notes that planes have carried over a link.
    """

    def __init__(self, layout: Layout, noted: Callable[[int, Sequence[bytes]], None]) -> None:
        self._layout = layout
        self._noted = noted
        self._exports: dict[str, Export] = {}
        self._arenas: dict[str, Arena] = {}
        """What each of them opens."""
        self._planes_of_link: dict[int, set[str]] = {}
        """The planes whose probes have arrived over each link."""
        self._grants: dict[int, list[GrantKey]] = {}
        self._landing: dict[int, list[asyncio.Future[Any]]] = {}
        """What this side was itself putting into each request's blocks when they were withdrawn."""

    async def open(
        self, arena: Arena, staging: HostArena | None, planes: Sequence[Plane], *, strict: bool
    ) -> None:
        """Open `arena` over `planes`, as far as they can be used.

        Args:
            arena: the pool's memory.
            staging: memory of the host, laid out as the pool is, for planes that do not write
                into the pool's device. What lands there has to be copied into the pool.
            planes: in order of preference.
            strict: the first one or none.

        Raises:
            PlaneUnavailable: none can be used; says why for each.
        """
        refused = []
        for plane in planes[:1] if strict else planes:
            try:
                await self._open(arena, staging, plane)
            except PlaneUnavailable as exc:
                refused.append(f"{plane.name}: {exc.message}")
                logger.info("! no plane %s here: %s", plane.name, exc)
        if not self._exports:
            raise PlaneUnavailable(f"no plane can be used: {'; '.join(refused)}")

    async def _open(self, arena: Arena, staging: HostArena | None, plane: Plane) -> None:
        places = [arena] if staging is None else [arena, staging]
        places = [place for place in places if plane.writes_into(place.device)]
        if not places:
            raise PlaneUnavailable(f"does not write into a pool on {arena.device}")
        reason = plane.unusable()
        if reason is not None:
            raise PlaneUnavailable(reason)
        for place in places:
            try:
                export = self._exports[plane.name] = await plane.export(place)
            except PlaneUnavailable as exc:
                if place is places[-1]:
                    raise
                logger.info("! no plane %s into %s: %s", plane.name, place.device, exc)
            else:
                export.noted = self._noted
                self._arenas[plane.name] = place
                return

    async def aclose(self) -> None:
        """Close every export. Idempotent."""
        for export in self._exports.values():
            await export.aclose()
        self._exports.clear()

    def offers(self, link: int) -> tuple[PlaneOffer, ...]:
        """Return what the sender on `link` needs, and let it write into its probe slot."""
        slot = self._layout.probe_range(link)
        for export in self._exports.values():
            export.permit(GrantKey.of_probe(link), [slot])
        return tuple(PlaneOffer(name, export.offer(link)) for name, export in self._exports.items())

    def has_arrived(self, link: int, plane: str, nonce: bytes) -> bool:
        """Whether the probe slot of `link` holds `nonce`; if so, the link may use `plane`."""
        slot = self._layout.probe_range(link)
        if plane not in self._exports:
            return False
        if bytes(self._arenas[plane].read(slot.start, slot.stop - slot.start)) != nonce:
            return False
        self._planes_of_link.setdefault(link, set()).add(plane)
        return True

    def arena_of(self, plane: str) -> Arena | None:
        """Return the memory that senders write into over `plane`: the pool's, or staging."""
        return self._arenas.get(plane)

    def permit(self, number: int, grant: GrantKey, extents: tuple[Extent, ...]) -> None:
        """Let the grant's sender write the tokens in `extents`, for request `number`."""
        ranges = [
            self._layout.field_range(name, extent)
            for name in self._layout.schema
            for extent in extents
        ]
        for export in self._exports.values():
            export.permit(grant, ranges)
        self._grants.setdefault(number, []).append(grant)

    def revoke(self, number: int, *, before: int | None = None) -> bool:
        """Withdraw the grants of a request: all, or those before a sequence number.

        True if the planes prove that nothing can land but what :meth:`landing` returns. A sender
        whose probe has not arrived yet may use any of them.
        """
        proven = True
        grants = self._grants.pop(number, [])
        if before is not None:
            kept = [grant for grant in grants if grant.sequence >= before]
            if kept:
                self._grants[number] = kept
            grants = [grant for grant in grants if grant.sequence < before]
        for grant in grants:
            used = self._planes_of_link.get(grant.link, self._exports)
            for name, export in self._exports.items():
                if export.revoke(grant) or name not in used:
                    continue
                landing = export.landing(grant)
                for into_blocks in landing:
                    self.note_landing(number, into_blocks)
                if not landing:
                    proven = False
        return proven

    def note_landing(self, number: int, into_blocks: asyncio.Future[Any]) -> None:
        """Note that this side itself is putting something into the blocks of a request."""
        self._landing.setdefault(number, []).append(into_blocks)
        into_blocks.add_done_callback(lambda _: self.landing(number))

    def landing(self, number: int) -> list[asyncio.Future[Any]]:
        """Return what this side itself still puts into blocks of a request that was revoked."""
        running = [each for each in self._landing.pop(number, ()) if not each.done()]
        if running:
            self._landing[number] = running
        return running

    def forget(self, link: int) -> None:
        """Drop what is kept for the sender on `link`, which is gone for good."""
        for export in self._exports.values():
            export.revoke(GrantKey.of_probe(link))
            export.forget(link)
        self._planes_of_link.pop(link, None)
