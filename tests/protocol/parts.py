"""Small things that many tests of transfers are made of."""

from __future__ import annotations

from aiomm.errors import Failure, Reason
from aiomm.types import Allocation, Extent, TransferId

TRANSFER = TransferId("request", 1)
FAILURE = Failure(Reason.CANCELLED, "given up")
BLOCK = 4


def allocation(*blocks: int, num_tokens: int | None = None, size: int = BLOCK) -> Allocation:
    """Return an allocation of `blocks` of `size` tokens: the same extents as a pool's."""
    tokens = len(blocks) * size if num_tokens is None else num_tokens
    extents: list[Extent] = []
    left = tokens
    for block in sorted(blocks):
        start, stop = block * size, block * size + min(size, left)
        left -= stop - start
        if extents and extents[-1].stop == start:
            extents[-1] = Extent(extents[-1].start, stop)
        else:
            extents.append(Extent(start, stop))
    return Allocation(blocks, tokens, tuple(extents))
