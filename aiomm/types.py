"""The words of the glossary as types: schema, extent, allocation, transfer id, ticket."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import ItemsView, Iterator, KeysView, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta

from .errors import IncompatibleSchema, ProtocolError

__all__ = [
    "DTYPE_NBYTES",
    "Allocation",
    "Extent",
    "Field",
    "Schema",
    "Ticket",
    "TransferId",
    "TransferStats",
    "part_of",
]

DTYPE_NBYTES: Mapping[str, int] = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "uint16": 2,
    "int16": 2,
    "float16": 2,
    "bfloat16": 2,
    "uint32": 4,
    "int32": 4,
    "float32": 4,
    "uint64": 8,
    "int64": 8,
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
}
"""Bytes per element of every dtype that can travel, under its torch name."""

MAX_FIELDS = 64
MAX_NAME = 128
MAX_DIMS = 8
MAX_REQUEST_ID = 512
MAX_TOKENS = 2**48
"""Of one transfer, and in any number of tokens or blocks that travels."""
MAX_GRANT_BLOCKS = 2048
"""Of one grant: they fit into a packet even if each is a run of its own. More come by resume."""


@dataclass(frozen=True, slots=True, init=False)
class Field:
    """One per-token field: `Field("bfloat16", 3584)` is a row of 3584 bfloat16 per token.

    Raises:
        IncompatibleSchema: the dtype is unknown, or a dimension is not a positive integer.
    """

    dtype: str
    """The torch name of the dtype without `torch.`, a key of :data:`DTYPE_NBYTES`."""
    shape: tuple[int, ...]
    """The shape of one token's row; `()` is one element per token."""
    row_nbytes: int = dataclasses.field(repr=False, compare=False)
    """Bytes of one token's row."""

    def __init__(self, dtype: str, *shape: int) -> None:
        if dtype not in DTYPE_NBYTES:
            known = ", ".join(DTYPE_NBYTES)
            raise IncompatibleSchema(f"unknown dtype {dtype!r}; known are {known}")
        if len(shape) > MAX_DIMS or any(type(dim) is not int or dim < 1 for dim in shape):
            raise IncompatibleSchema(
                f"shape per token must be up to {MAX_DIMS} positive integers, got {shape}"
            )
        object.__setattr__(self, "dtype", dtype)
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "row_nbytes", DTYPE_NBYTES[dtype] * math.prod(shape))

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape) if self.shape else ''}"


class Schema(Mapping[str, Field]):
    """The named per-token fields of a transfer, in the order in which the pool lays them out.

    Two schemas are equal when they have the same fields, in whatever order.

    Raises:
        IncompatibleSchema: no field, too many, or a name longer than 128 characters.
    """

    __slots__ = ("_fields", "token_nbytes")

    def __init__(self, /, **fields: Field) -> None:
        if not 1 <= len(fields) <= MAX_FIELDS:
            raise IncompatibleSchema(f"a schema has 1 to {MAX_FIELDS} fields, got {len(fields)}")
        for name, field in fields.items():
            if not isinstance(field, Field):
                raise IncompatibleSchema(f"field {name!r} must be an aiomm.Field, got {field!r}")
            if not 1 <= len(name) <= MAX_NAME:
                raise IncompatibleSchema(f"field name {name[:20]!r}... is over {MAX_NAME} long")
        self._fields = dict(fields)
        self.token_nbytes = sum(field.row_nbytes for field in fields.values())
        """Bytes of one token over all fields."""

    def __getitem__(self, name: str) -> Field:
        return self._fields[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __hash__(self) -> int:
        return hash(frozenset(self._fields.items()))

    def keys(self) -> KeysView[str]:
        """Return the names of the fields."""
        return self._fields.keys()

    def items(self) -> ItemsView[str, Field]:
        """Return the fields with their names."""
        return self._fields.items()

    def difference(self, other: Schema) -> str:
        """Say in one line how `other` differs from this schema; empty when they are equal."""
        parts = [f"{name} missing" for name in self if name not in other]
        parts += [f"{name} unexpected" for name in other if name not in self]
        parts += [
            f"{name} is {other[name]}, expected {self[name]}"
            for name in self
            if name in other and self[name] != other[name]
        ]
        return "; ".join(parts)

    def __repr__(self) -> str:
        return f"Schema({', '.join(f'{name}={field}' for name, field in self._fields.items())})"


_Count = Annotated[int, Meta(ge=0, le=MAX_TOKENS)]


class Extent(NamedTuple):
    """A run of adjacent tokens in the pool: `[start, stop)`."""

    start: _Count
    stop: _Count

    @property
    def num_tokens(self) -> int:
        """Tokens in the run."""
        return self.stop - self.start


def part_of(extents: tuple[Extent, ...], skip: int, count: int) -> tuple[Extent, ...]:
    """Return the part of `extents` that holds `count` tokens behind the first `skip`."""
    if not skip and len(extents) == 1 and extents[0].num_tokens <= count:
        return extents
    chosen: list[Extent] = []
    for start, stop in extents:
        if not count:
            break
        begin, end = start + skip, min(stop, start + skip + count)
        if begin < end:
            chosen.append(Extent(begin, end))
            count -= end - begin
        skip = max(0, skip - (stop - start))
    return tuple(chosen)


@dataclass(frozen=True, slots=True)
class Allocation:
    """Blocks of one pool that belong together.

    The data lies block after block in *ascending* block order, whatever the order of
    `block_indices`; no write may touch a token outside `extents`.
    """

    block_indices: tuple[int, ...]
    """The blocks, in the order in which the free list held them."""
    num_tokens: int
    """Usable tokens; at most blocks times block size, and the sum of `extents`."""
    extents: tuple[Extent, ...]
    """The runs of adjacent tokens, ascending; empty for no tokens."""

    @property
    def start_offset(self) -> int:
        """First token of the first extent (`min(block_indices) * block_size`); 0 if empty."""
        return self.extents[0].start if self.extents else 0

    def tail(self, num_tokens: int) -> tuple[Extent, ...]:
        """Return what remains of `extents` behind the first `num_tokens` tokens."""
        return part_of(self.extents, num_tokens, self.num_tokens)


class TransferId(NamedTuple):
    """One attempt to move a request's tensors.

    `generation` counts the attempts of one Sender and is stamped on every frame, so a late
    frame of an earlier attempt at the same request is recognised.
    """

    request_id: Annotated[str, Meta(min_length=1, max_length=MAX_REQUEST_ID)]
    generation: Annotated[int, Meta(ge=1, le=2**62)]

    def __str__(self) -> str:
        return f"{self.request_id}#{self.generation}"


@dataclass(frozen=True, slots=True)
class TransferStats:
    """What is known of a finished transfer, on either side."""

    request_id: str
    plane: str
    """The plane that moved the bytes; empty if there were none to move."""
    refused_planes: tuple[str, ...]
    """Why each better plane was not taken (known to the sender)."""
    num_tokens: int
    nbytes: int
    buffered_chunks: tuple[int, ...]
    """Tokens that arrived under each grant."""
    resumes: int
    seconds: float
    """From the claim (sender) or the first reservation (receiver) to the end."""
    states: tuple[tuple[str, float], ...]
    """Every state entered, with seconds since the beginning."""
    block_indices: tuple[tuple[int, ...], ...] = ()
    """Blocks of each grant, as the free list held them (known to the receiver)."""
    start_offsets: tuple[int, ...] = ()
    """First token of each grant in the pool (known to the receiver)."""


class Ticket(msgspec.Struct, frozen=True, kw_only=True):
    """The right to one request, small and plain, to be carried by any router.

    `kind` says who issued it: "expect" (the receiver; a sender claims it) or "offer" (the
    sender; receivers redeem it). A ticket grants no memory; only a claim does.
    """

    kind: Literal["expect", "offer"]
    request_id: Annotated[str, Meta(min_length=1, max_length=MAX_REQUEST_ID)]
    address: Annotated[str, Meta(max_length=512)]
    """Where the issuer listens; empty when it only connects."""
    epoch: Annotated[int, Meta(ge=1, le=2**63 - 1)]
    """The life of the issuer; after its restart the ticket is void."""
    key: Annotated[bytes, Meta(min_length=16, max_length=16)]
    """Random; proves that the bearer was given this very ticket."""
    num_tokens: Annotated[int, Meta(ge=0)] | None = None
    """The exact length, where the issuer knows it (offers)."""

    def to_bytes(self) -> bytes:
        """Return the ticket as MessagePack, about 100 bytes."""
        return msgspec.msgpack.encode(self)

    def to_json(self) -> str:
        """Return the ticket as one line of JSON."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def from_bytes(cls, encoded: bytes) -> Ticket:
        """Read what :meth:`to_bytes` wrote.

        Raises:
            ProtocolError: this is not a ticket.
        """
        return cls._decoded(msgspec.msgpack.decode, encoded)

    @classmethod
    def from_json(cls, encoded: str | bytes) -> Ticket:
        """Read what :meth:`to_json` wrote.

        Raises:
            ProtocolError: this is not a ticket.
        """
        return cls._decoded(msgspec.json.decode, encoded)

    @classmethod
    def _decoded(cls, decode: object, encoded: str | bytes) -> Ticket:
        try:
            return decode(encoded, type=cls)  # type: ignore[operator, no-any-return]
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as exc:
            raise ProtocolError(f"not a ticket: {exc}") from exc
