"""Who may write where in a receiver's arena, over all planes."""

from __future__ import annotations

from aiomm._driver.exports import Exports
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


def test_of_a_request_that_goes_on_only_older_grants_are_withdrawn() -> None:
    """The sender writes under the newest while the blocks of the others are moved out."""
    exports, export = Exports(LAYOUT), Withdrawing()
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
