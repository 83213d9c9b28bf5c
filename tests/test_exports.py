"""Who may write where in a receiver's arena, over all planes."""

from __future__ import annotations

import asyncio
from typing import Any

from aiomm._driver.exports import Exports
from aiomm.buffers.arena import HostArena
from aiomm.buffers.layout import Layout
from aiomm.planes.base import Export, GrantKey
from aiomm.types import Extent, Field, Schema

LAYOUT = Layout(Schema(rows=Field("uint8", 4)), 64, 2)


class Withdrawing(Export):
    """Notes what is withdrawn; nothing of it can land any more."""

    def __init__(self) -> None:
        self.withdrawn: list[GrantKey] = []

    def offer(self, link: int) -> bytes:
        return b""

    def revoke(self, grant: GrantKey) -> bool:
        self.withdrawn.append(grant)
        return True

    async def aclose(self) -> None:
        """There is nothing to close."""


class Unproven(Withdrawing):
    """Nobody can tell when the last of what is withdrawn has landed."""

    def revoke(self, grant: GrantKey) -> bool:
        super().revoke(grant)
        return False


def test_of_a_request_that_goes_on_only_older_grants_are_withdrawn() -> None:
    """The sender writes under the newest while the blocks of the others are moved out."""
    exports, export = Exports(LAYOUT, lambda link, notes: None), Withdrawing()
    exports._exports["test"] = export
    grants = [GrantKey(1, 7, sequence) for sequence in range(4)]
    for grant in grants:
        exports.permit(5, grant, (Extent(0, 8),))
    assert exports.revoke(5, before=2)
    assert export.withdrawn == grants[:2]
    assert exports.revoke(5, before=2)
    assert export.withdrawn == grants[:2]
    assert exports.revoke(5)
    assert export.withdrawn == grants
    assert exports._grants == {}
    exports.permit(6, grants[0], (Extent(0, 8),))
    assert exports.revoke(6, before=1)  # all of them: it waits for blocks, and may end so
    assert exports._grants == {}


def over_two_planes() -> Exports:
    """Return exports over one plane that proves the end of what lands, and one that does not."""
    exports, arena = Exports(LAYOUT, lambda link, notes: None), HostArena(LAYOUT.nbytes)
    exports._exports.update(shm=Unproven(), tcp=Withdrawing())
    exports._arenas.update(shm=arena, tcp=arena)
    return exports


def probe(exports: Exports, link: int, plane: str) -> None:
    """Let the probe of a link arrive over a plane."""
    slot = LAYOUT.probe_range(link)
    assert exports.has_arrived(link, plane, bytes(slot.stop - slot.start))


def test_only_the_planes_that_a_sender_uses_have_to_prove_that_nothing_lands() -> None:
    """Before its probe has arrived over one of them it may use any."""
    exports = over_two_planes()
    exports.permit(5, GrantKey(1, 7, 0), (Extent(0, 8),))
    assert not exports.revoke(5)
    probe(exports, 1, "tcp")
    exports.permit(6, GrantKey(1, 8, 0), (Extent(0, 8),))
    assert exports.revoke(6)
    probe(exports, 1, "shm")
    exports.permit(7, GrantKey(1, 9, 0), (Extent(0, 8),))
    assert not exports.revoke(7)


def test_of_a_link_that_is_gone_nothing_is_kept() -> None:
    """A receiver that runs for months has seen many."""
    exports = over_two_planes()
    probe(exports, 1, "tcp")
    exports.forget(1)
    assert exports._planes_of_link == {}


class Reading(Unproven):
    """A write that this side itself still reads."""

    def __init__(self, reading: asyncio.Future[None]) -> None:
        super().__init__()
        self.reading = reading

    def landing(self, grant: GrantKey) -> list[asyncio.Future[Any]]:
        return [self.reading]


async def test_what_this_side_puts_into_blocks_is_landing_until_it_is_there() -> None:
    """Of that request, and then nothing is kept of it."""
    exports, upload = (
        Exports(LAYOUT, lambda link, notes: None),
        asyncio.get_running_loop().create_future(),
    )
    exports._exports["test"] = Reading(upload)
    exports.permit(5, GrantKey(1, 7, 0), (Extent(0, 8),))
    assert exports.revoke(5)
    assert exports.landing(5) == [upload]
    assert exports.landing(6) == []
    upload.set_result(None)
    await asyncio.sleep(0)
    assert exports._landing == {}
