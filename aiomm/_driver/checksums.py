"""Checksums of chunks, made at once or by threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from ..buffers.checksum import Segment, checksum_of, segments_of
from ..planes.copying import MAX_THREADS, Copies, CopyThreads, LoopTime
from ..types import Schema

__all__ = ["AT_ONCE_NBYTES", "Checksums", "Chunk"]

AT_ONCE_NBYTES = 1 << 20
"""Up to here a chunk is added up on the loop's thread: 0.1 ms, less than the way to another."""


class Chunk(NamedTuple):
    """What a checksum is made of."""

    schema: Schema
    """The receiver's: its order of fields counts."""
    num_tokens: int
    digests_of: Callable[[Sequence[Segment]], bytes]
    """Digests some segments, wherever they are. Blocks."""

    @property
    def nbytes(self) -> int:
        """Bytes of all fields."""
        return self.num_tokens * self.schema.token_nbytes


class Checksums:
    """Adds up the chunks of one endpoint, on threads of its own that start with the first."""

    def __init__(self) -> None:
        self.time = LoopTime()
        """What :meth:`at_once` may take of a turn of the loop; whoever calls it asks first."""
        self._copies = Copies(CopyThreads("checksum", MAX_THREADS))

    def at_once(self, chunk: Chunk) -> bytes:
        """Return the checksum of a short chunk. Blocks."""
        return checksum_of([chunk.digests_of(segments_of(chunk.schema, chunk.num_tokens))])

    async def by_threads(self, chunk: Chunk) -> bytes:
        """Return the checksum of a chunk, of whose segments each thread digests its share."""
        segments = segments_of(chunk.schema, chunk.num_tokens)
        step = max(1, -(-len(segments) // self._copies.num_shares(chunk.nbytes)))
        shares = [segments[first : first + step] for first in range(0, len(segments), step)]
        works = [partial(chunk.digests_of, share) for share in shares]
        return checksum_of(await self._copies.run_all(works))

    async def aclose(self) -> None:
        """End the threads."""
        await self._copies.aclose()
