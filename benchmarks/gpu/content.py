"""What is sent: bytes that both ends can make out of a number, and where the first wrong one is."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import aiomm
from aiomm.types import DTYPE_NBYTES

__all__ = ["ONE_FIELD", "TWO_FIELDS", "contents", "difference", "pattern", "schema_of"]

Fields = Mapping[str, Sequence[Any]]
"""A schema as JSON can say it: dtype and shape by name."""

PIECE_NBYTES = 1 << 24
"""More at once is more than `random` can count."""
ONE_FIELD: Fields = {"x": ["uint8", 64 * 1024]}
TWO_FIELDS: Fields = {"x": ["uint8", 1000], "numbers": ["int32", 3]}
"""Rows that are whole numbers of nothing."""


def pattern(seed: int, nbytes: int) -> bytes:
    """Return bytes that no other seed has."""
    chance = random.Random(seed)
    pieces = [min(PIECE_NBYTES, nbytes - done) for done in range(0, nbytes, PIECE_NBYTES)]
    return b"".join(map(chance.randbytes, pieces))


def schema_of(fields: Fields) -> aiomm.Schema:
    """Return the schema."""
    return aiomm.Schema(**{name: aiomm.Field(*field) for name, field in fields.items()})


def contents(fields: Fields, seed: int, num_tokens: int) -> dict[str, bytes]:
    """Return the bytes of each field of a request."""
    return {
        name: pattern(seed * 1000 + number, num_tokens * DTYPE_NBYTES[dtype] * math.prod(shape))
        for number, (name, (dtype, *shape)) in enumerate(fields.items())
    }


def difference(found: bytes, expected: bytes) -> str:
    """Say where two byte strings differ; empty if they do not."""
    if found == expected:
        return ""
    if len(found) != len(expected):
        return f"{len(found)} bytes instead of {len(expected)}"
    import numpy  # whoever compares has it

    wrong = numpy.frombuffer(found, numpy.uint8) != numpy.frombuffer(expected, numpy.uint8)
    first = int(wrong.argmax())
    return (
        f"{int(wrong.sum())} of {len(found)} bytes are wrong, the first at {first}: "
        f"{found[first]:#04x} instead of {expected[first]:#04x}"
    )
