"""Checksums of chunks: xxh3-64 over each field in the pool's order, token after token.

Needs `aiomm[checksum]`. Both functions block for about 0.1 ms per MiB and release the GIL for
large pieces: call them in a thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ..types import Extent
from .arena import Arena
from .layout import Layout
from .tensors import TokenRows

if TYPE_CHECKING:
    import xxhash

__all__ = ["checksum_of_extents", "checksum_of_rows", "new_checksum"]

PIECE_NBYTES = 1 << 20
"""Strided rows are gathered in pieces of this size."""


def new_checksum() -> xxhash.xxh3_64:
    """Return an empty checksum.

    Raises:
        ImportError: xxhash is not installed; says how to get it.
    """
    try:
        import xxhash
    except ImportError as exc:
        raise ImportError("checksums need xxhash: pip install 'aiomm[checksum]'") from exc
    return xxhash.xxh3_64()


def checksum_of_rows(
    rows: Mapping[str, TokenRows], order: Iterable[str], first: int, count: int
) -> bytes:
    """Return the 8 bytes over `count` tokens of a source from `first` on, field by field."""
    total = new_checksum()
    for name in order:
        each = rows[name]
        whole = each.view(first, count)
        if whole is not None:
            total.update(whole)
            continue
        step = max(1, PIECE_NBYTES // each.row_nbytes)
        piece = memoryview(bytearray(min(step, count) * each.row_nbytes))
        for start in range(first, first + count, step):
            num_rows = min(step, first + count - start)
            part = piece[: num_rows * each.row_nbytes]
            each.copy_into(part, start, num_rows)
            total.update(part)
    return total.digest()


def checksum_of_extents(layout: Layout, arena: Arena, extents: Sequence[Extent]) -> bytes:
    """Return the 8 bytes over the tokens in `extents` of a pool, field by field."""
    total = new_checksum()
    for name in layout.schema:
        for extent in extents:
            start, stop = layout.field_range(name, extent)
            total.update(arena.read(start, stop - start))
    return total.digest()
