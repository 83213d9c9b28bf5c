"""Where each field of each token lies in an arena."""

from __future__ import annotations

from typing import NamedTuple

from ..types import Extent, Schema

__all__ = ["PROBE_NBYTES", "ByteRange", "Layout"]

ALIGNMENT = 4096
PROBE_NBYTES = 16
"""Bytes of the nonce that a sender writes to prove that its plane reaches this arena."""


class ByteRange(NamedTuple):
    """Bytes `[start, stop)` of an arena."""

    start: int
    stop: int


class Layout:
    """Field after field (not token after token): one extent is one run of bytes per field.

    A finished transfer that lies in one extent can therefore be handed out as one dense
    view per field. Behind the fields lie `num_probes` slots of :data:`PROBE_NBYTES` bytes.

    Both sides compute the same layout from the same three arguments.

    Args:
        schema: the receiver's schema; its order is the order in the arena.
        num_tokens: tokens of the whole pool.
        num_probes: probe slots, one for each of as many links as can stand at once.
    """

    def __init__(self, schema: Schema, num_tokens: int, num_probes: int) -> None:
        self.schema = schema
        self.num_tokens = num_tokens
        self.num_probes = num_probes
        self.offsets: dict[str, int] = {}
        """First byte of each field."""
        offset = 0
        for name, field in schema.items():
            self.offsets[name] = offset
            offset += -(-field.row_nbytes * num_tokens // ALIGNMENT) * ALIGNMENT
        self._probes = offset
        offset += num_probes * PROBE_NBYTES
        self.nbytes = -(-offset // ALIGNMENT) * ALIGNMENT
        """Bytes of the whole arena."""

    def field_range(self, name: str, extent: Extent) -> ByteRange:
        """Return the bytes that hold field `name` of the tokens in `extent`."""
        offset, row = self.offsets[name], self.schema[name].row_nbytes
        return ByteRange(offset + extent.start * row, offset + extent.stop * row)

    def probe_range(self, link: int) -> ByteRange:
        """Return the bytes of the probe slot of the receiver's link number `link`."""
        start = self._probes + link % self.num_probes * PROBE_NBYTES
        return ByteRange(start, start + PROBE_NBYTES)
