"""Checksums: the same bytes give the same sum, from a source and from a pool."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import xxhash

from aiomm.buffers.arena import HostArena
from aiomm.buffers.checksum import checksum_of_extents, checksum_of_rows
from aiomm.buffers.layout import Layout
from aiomm.buffers.tensors import rows_of
from aiomm.types import Extent, Field, Schema

SCHEMA = Schema(embeddings=Field("bfloat16", 700), ids=Field("int32"))
EXTENTS = (Extent(3, 503), Extent(600, 1100))


def source(*, strided: bool) -> dict[str, torch.Tensor]:
    """Return 1500 tokens: over a megabyte, dense or with gaps."""
    torch.manual_seed(0)
    step = 2 if strided else 1
    return {
        "embeddings": torch.randn(1500, 700 * step).bfloat16()[:, ::step],
        "ids": torch.arange(1500 * step, dtype=torch.int32)[::step],
    }


@pytest.mark.parametrize("strided", [False, True])
def test_a_source_and_the_pool_it_was_copied_to_agree(strided: bool) -> None:
    """Tokens 200 to 1200 of a source, and the two extents that hold them, have one checksum."""
    layout = Layout(SCHEMA, 1100, 1)
    arena = HostArena(layout.nbytes)
    rows = rows_of(SCHEMA, source(strided=strided))
    for name, each in rows.items():
        first = 200
        for extent in EXTENTS:
            start, stop = layout.field_range(name, extent)
            each.copy_into(arena.view(start, stop - start), first, extent.num_tokens)
            first += extent.num_tokens
    expected = checksum_of_rows(rows, SCHEMA, 200, 1000)
    assert checksum_of_extents(layout, arena, EXTENTS) == expected
    arena.view(layout.field_range("ids", EXTENTS[1]).stop - 1, 1)[0] ^= 1
    assert checksum_of_extents(layout, arena, EXTENTS) != expected


def test_it_is_plain_xxh3_of_the_fields_one_after_the_other() -> None:
    """Anybody can compute it."""
    tensors = source(strided=False)
    rows = rows_of(SCHEMA, tensors)
    total = xxhash.xxh3_64()
    for name in SCHEMA:
        total.update(tensors[name][10:20].contiguous().view(torch.uint8).numpy().tobytes())
    assert checksum_of_rows(rows, SCHEMA, 10, 10) == total.digest()


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
