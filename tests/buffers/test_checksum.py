"""Checksums: the same bytes give the same sum, from a source and from a pool."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import xxhash

from aiomm.buffers.arena import HostArena
from aiomm.buffers.checksum import (
    Segment,
    checksum_of,
    digests_of_extents,
    digests_of_rows,
    segments_of,
)
from aiomm.buffers.layout import Layout
from aiomm.buffers.tensors import rows_of
from aiomm.types import Extent, Field, Schema

SCHEMA = Schema(embeddings=Field("bfloat16", 700), ids=Field("int32"))
EXTENTS = (Extent(3, 503), Extent(600, 1100), Extent(1200, 1201), Extent(1210, 1709))


def source(*, strided: bool) -> dict[str, torch.Tensor]:
    """Return 2000 tokens: over two segments, dense or with gaps."""
    torch.manual_seed(0)
    step = 2 if strided else 1
    return {
        "embeddings": torch.randn(2000, 700 * step).bfloat16()[:, ::step],
        "ids": torch.arange(2000 * step, dtype=torch.int32)[::step],
    }


def test_segments_are_of_one_field_and_at_most_a_mebibyte() -> None:
    schema = Schema(rows=Field("uint8", 700_000), ids=Field("int32"), pairs=Field("int32", 2))
    assert segments_of(schema, 2) == [
        Segment("rows", 0, 1),
        Segment("rows", 1, 1),
        Segment("ids", 0, 2),
        Segment("pairs", 0, 2),
    ]
    long = segments_of(Schema(ids=Field("int32")), (1 << 18) + 5)
    assert long == [Segment("ids", 0, 1 << 18), Segment("ids", 1 << 18, 5)]
    assert segments_of(schema, 0) == []
    assert segments_of(Schema(huge=Field("uint8", 3 << 20)), 2)[1] == Segment("huge", 1, 1)


@pytest.mark.parametrize("num_shares", [1, 2, 3, 7])
@pytest.mark.parametrize("strided", [False, True])
def test_a_source_and_the_pool_it_was_copied_to_agree(strided: bool, num_shares: int) -> None:
    """Tokens 200 to 1700 of a source, and the extents that hold them, have one checksum."""
    layout = Layout(SCHEMA, 1709, 1)
    arena = HostArena(layout.nbytes)
    rows = rows_of(SCHEMA, source(strided=strided))
    for name, each in rows.items():
        first = 200
        for extent in EXTENTS:
            start, stop = layout.field_range(name, extent)
            each.copy_into(arena.view(start, stop - start), first, extent.num_tokens)
            first += extent.num_tokens
    segments = segments_of(SCHEMA, 1500)
    assert len(segments) == 4
    step = -(-len(segments) // num_shares)
    shares = [segments[first : first + step] for first in range(0, len(segments), step)]

    def of_pool() -> bytes:
        return checksum_of(digests_of_extents(layout, arena, EXTENTS, each) for each in shares)

    expected = checksum_of([digests_of_rows(rows, 200, segments)])
    assert checksum_of(digests_of_rows(rows, 200, each) for each in shares) == expected
    assert of_pool() == expected
    for name, extent in (("ids", EXTENTS[-1]), ("embeddings", EXTENTS[2])):
        place = layout.field_range(name, extent).stop - 1
        arena.view(place, 1)[0] ^= 1
        assert of_pool() != expected
        arena.view(place, 1)[0] ^= 1
    assert of_pool() == expected


def test_it_is_plain_xxh3_of_the_xxh3_of_each_segment() -> None:
    """Anybody can compute it."""
    tensors = source(strided=False)
    rows = rows_of(SCHEMA, tensors)
    embeddings, ids = tensors["embeddings"], tensors["ids"]
    pieces = [embeddings[10:758], embeddings[758:1010], ids[10:1010]]
    digests = [
        xxhash.xxh3_64(piece.contiguous().view(torch.uint8).numpy().tobytes()).digest()
        for piece in pieces
    ]
    total = xxhash.xxh3_64(b"".join(digests)).digest()
    assert checksum_of([digests_of_rows(rows, 10, segments_of(SCHEMA, 1000))]) == total


def test_without_xxhash_the_error_names_the_extra() -> None:
    """A missing package is told at once, with the way to get it."""
    script = (
        "import sys; sys.modules['xxhash'] = None\n"
        "import aiomm\n"
        "try: aiomm.Sender(aiomm.Schema(x=aiomm.Field('int8')), checksum=True)\n"
        "except ImportError as exc: print(exc)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout == "checksums need xxhash: pip install 'aiomm[checksum]'\n", run.stderr
