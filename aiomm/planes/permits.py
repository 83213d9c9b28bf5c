"""What senders may write, grant by grant; for planes whose receiver can check."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from ..buffers.layout import ByteRange
from .base import GrantKey

__all__ = ["Permit", "Permits"]


class Permit:
    """What one grant may touch, until it is withdrawn."""

    def __init__(self, ranges: Sequence[ByteRange]) -> None:
        self.ranges = _merged(ranges)
        """Ascending, with gaps between them."""
        self.is_withdrawn = False
        self._starts = [part.start for part in self.ranges]

    def covers(self, offset: int, nbytes: int) -> bool:
        """Whether every byte of `[offset, offset + nbytes)` may be written."""
        index = bisect_right(self._starts, offset) - 1
        return index >= 0 and offset + nbytes <= self.ranges[index].stop


class Permits:
    """The permits of all links, to one arena."""

    def __init__(self) -> None:
        self._permits: dict[GrantKey, Permit] = {}

    def add(self, grant: GrantKey, ranges: Sequence[ByteRange]) -> None:
        """Permit `ranges` and nothing else; told the same again, nothing changes."""
        permit = Permit(ranges)
        known = self._permits.get(grant)
        if known is None or known.ranges != permit.ranges:
            self.withdraw(grant)
            self._permits[grant] = permit

    def get(self, grant: GrantKey) -> Permit | None:
        """Return the permit of `grant` if it has one."""
        return self._permits.get(grant)

    def withdraw(self, grant: GrantKey) -> None:
        """Withdraw the permit of `grant`, also from writes that hold it already."""
        permit = self._permits.pop(grant, None)
        if permit is not None:
            permit.is_withdrawn = True

    def withdraw_all(self, link: int | None = None) -> None:
        """Withdraw every permit, or those of one link."""
        for grant in list(self._permits):
            if link is None or grant.link == link:
                self.withdraw(grant)


def _merged(ranges: Sequence[ByteRange]) -> list[ByteRange]:
    """Return `ranges` in ascending order with the adjacent ones joined."""
    merged: list[ByteRange] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1].stop:
            merged[-1] = ByteRange(merged[-1].start, max(stop, merged[-1].stop))
        else:
            merged.append(ByteRange(start, stop))
    return merged
