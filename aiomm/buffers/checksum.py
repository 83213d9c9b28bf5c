"""Checksums of chunks: xxh3-64 over the xxh3-64 of each segment, field after field.

A segment is as many tokens of one field as fit into 1 MiB, from the chunk's first token on. So
threads can share the work, and anybody can do it again. Needs `aiomm[checksum]`.

Adding up takes about 0.1 ms per MiB, in which the GIL is released.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from ..types import Extent, Schema, part_of
from .arena import Arena
from .layout import Layout
from .tensors import TokenRows

if TYPE_CHECKING:
    import xxhash

__all__ = [
    "Segment",
    "checksum_of",
    "digests_of_extents",
    "digests_of_rows",
    "new_digest",
    "segments_of",
]

SEGMENT_NBYTES = 1 << 20


class Segment(NamedTuple):
    """Tokens `[first, first + num_tokens)` of a chunk, of one field."""

    field: str
    first: int
    num_tokens: int


def segments_of(schema: Schema, num_tokens: int) -> list[Segment]:
    """Return the segments of a chunk of `num_tokens` tokens, in the order that counts."""
    return [
        Segment(name, first, min(step, num_tokens - first))
        for name, field in schema.items()
        for step in [max(1, SEGMENT_NBYTES // field.row_nbytes)]
        for first in range(0, num_tokens, step)
    ]


def checksum_of(digests: Iterable[bytes]) -> bytes:
    """Return the 8 bytes of a chunk whose segments, in their order, have these digests."""
    total = new_digest()
    for digest in digests:
        total.update(digest)
    return total.digest()


def digests_of_rows(
    rows: Mapping[str, TokenRows], start: int, segments: Sequence[Segment]
) -> bytes:
    """Return the digests of `segments` of the chunk that begins at token `start` of a source."""
    digests = []
    gathered = memoryview(b"")
    for name, first, count in segments:
        each = rows[name]
        memory = each.view(start + first, count)
        if memory is None:  # not one piece of the host's memory
            nbytes = count * each.row_nbytes
            if len(gathered) < nbytes:
                gathered = memoryview(bytearray(nbytes))
            memory = gathered[:nbytes]
            each.copy_into(memory, start + first, count)
        digest = new_digest()
        digest.update(memory)
        digests.append(digest.digest())
    return b"".join(digests)


def digests_of_extents(
    layout: Layout, arena: Arena, extents: tuple[Extent, ...], segments: Sequence[Segment]
) -> bytes:
    """Return the digests of `segments` of the chunk that lies in `extents` of a pool."""
    digests = []
    ends = list(accumulate(extent.num_tokens for extent in extents))
    for name, first, count in segments:
        digest = new_digest()
        before = bisect_right(ends, first)
        skip = first - (ends[before - 1] if before else 0)
        for extent in part_of(extents[before:], skip, count):
            start, stop = layout.field_range(name, extent)
            digest.update(arena.read(start, stop - start))
        digests.append(digest.digest())
    return b"".join(digests)


def new_digest() -> xxhash.xxh3_64:
    """Return the digest of no bytes, to be updated.

    Raises:
        ImportError: xxhash is not installed; says how to get it.
    """
    try:
        import xxhash
    except ImportError as exc:
        raise ImportError("checksums need xxhash: pip install 'aiomm[checksum]'") from exc
    return xxhash.xxh3_64()
