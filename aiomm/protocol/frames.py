"""The control frames: everything that two endpoints ever say to each other.

A frame travels in a :class:`Packet` together with both epochs and the link's sequence
numbers. All are msgspec arrays: new fields go to the end and have a default; any other change
increments :data:`PROTOCOL_VERSION`. Every field is bounded before memory is taken for it.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, TypeAlias

import msgspec
from msgspec import Meta

from ..errors import Failure, IncompatibleSchema, ProtocolError, Reason
from ..types import (
    MAX_DIMS,
    MAX_FIELDS,
    MAX_GRANT_BLOCKS,
    MAX_NAME,
    MAX_REQUEST_ID,
    MAX_TOKENS,
    Extent,
    Field,
    Schema,
    TransferId,
)

__all__ = [
    "MAX_METADATA_NBYTES",
    "PROTOCOL_VERSION",
    "Abort",
    "AbortAck",
    "Accepted",
    "Ack",
    "Announce",
    "FieldSpec",
    "Frame",
    "Goodbye",
    "Grant",
    "Hello",
    "Offer",
    "Packet",
    "Ping",
    "PlaneOffer",
    "Pong",
    "Probe",
    "ProbeAnswer",
    "Redeem",
    "Refuse",
    "Resume",
    "Written",
    "check_metadata",
    "check_request",
    "check_request_id",
    "clipped",
    "decode",
    "encode",
    "specs_of",
]

PROTOCOL_VERSION: Final = 1
MAX_METADATA_NBYTES = 32 * 1024
MAX_MESSAGE = 2048
MAX_SECONDS = 1e9

Epoch = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Count = Annotated[int, Meta(ge=0, le=MAX_TOKENS)]
Seconds = Annotated[float, Meta(ge=0, le=MAX_SECONDS)]
Message = Annotated[str, Meta(max_length=MAX_MESSAGE)]
Name = Annotated[str, Meta(min_length=1, max_length=MAX_NAME)]
RequestId = Annotated[str, Meta(min_length=1, max_length=MAX_REQUEST_ID)]
Key = Annotated[bytes, Meta(max_length=16)]
Metadata = Annotated[bytes, Meta(max_length=MAX_METADATA_NBYTES)]
Extents = Annotated[tuple[Extent, ...], Meta(max_length=MAX_GRANT_BLOCKS)]
BlockIndices = Annotated[tuple[Count, ...], Meta(max_length=MAX_GRANT_BLOCKS)]


class _Struct(msgspec.Struct, frozen=True, array_like=True, tag=str.lower):
    """What all frames share: frozen, an array on the wire, tagged with their name."""


class FieldSpec(msgspec.Struct, frozen=True, array_like=True):
    """One field of a schema, on the wire."""

    name: Name
    dtype: Name
    shape: Annotated[tuple[Annotated[int, Meta(ge=1, le=2**31)], ...], Meta(max_length=MAX_DIMS)]


class PlaneOffer(msgspec.Struct, frozen=True, array_like=True):
    """One way into the receiver's arena: a plane's name and what it needs to attach."""

    plane: Name
    offer: Annotated[bytes, Meta(max_length=1024)]


class Hello(_Struct, frozen=True):
    """First frame of either side; answers the other's. Sent again until answered."""

    role: Literal["sender", "receiver"]
    name: Annotated[str, Meta(max_length=MAX_NAME)]
    """For people: which endpoint this is."""
    fields: Annotated[tuple[FieldSpec, ...], Meta(min_length=1, max_length=MAX_FIELDS)]
    stream: Annotated[str, Meta(max_length=512)] = ""
    """Address of the same-host stream, if this side has one."""
    pool_tokens: Count = 0
    """Receiver: tokens of the pool, from which the sender computes the arena's layout."""
    pool_device: Annotated[str, Meta(max_length=MAX_NAME)] = "cpu"
    """Receiver: where the pool lies, `"cpu"` or a device of its own such as `"cuda:0"`."""
    num_probes: Count = 0
    link: Count = 0
    """Receiver: its number for this link, which names the sender's grants and its probe slot."""
    planes: Annotated[tuple[PlaneOffer, ...], Meta(max_length=16)] = ()
    takes_any: bool = False
    """Receiver: send me whatever has no other destination."""

    @property
    def schema(self) -> Schema:
        """The schema that the fields describe.

        Raises:
            IncompatibleSchema: a dtype is unknown here, or a name comes twice.
        """
        fields = {spec.name: Field(spec.dtype, *spec.shape) for spec in self.fields}
        if len(fields) != len(self.fields):
            raise IncompatibleSchema("a field name comes twice in the peer's schema")
        return Schema(**fields)


class Ack(_Struct, frozen=True):
    """Carries nothing but the packet's `acknowledged`."""


class Ping(_Struct, frozen=True):
    """Asks for a sign of life from the peer's event loop."""


class Pong(_Struct, frozen=True):
    """Answers a :class:`Ping`."""


class Goodbye(_Struct, frozen=True):
    """Ends the link: this life will not write, grant or answer any more; its writes are drained.

    Addressed to no life (epoch 0) it says less: whoever makes a first contact is turned away.
    """

    reason: Reason
    message: Message
    absent: Epoch = 0
    """The life that has no place here (any more): the one asked for, or the one that asked."""


class Probe(_Struct, frozen=True):
    """Sender: I wrote this nonce into my probe slot through this plane; did it arrive?"""

    plane: Name
    nonce: Annotated[bytes, Meta(min_length=16, max_length=16)]


class ProbeAnswer(_Struct, frozen=True):
    """Receiver: whether the probe slot holds the nonce."""

    plane: Name
    matched: bool


class Redeem(_Struct, frozen=True):
    """Receiver: send me this request. Answered by an :class:`Offer` or a :class:`Refuse`."""

    request_id: RequestId
    key: Key
    """The ticket's key; empty to ask by bare request id."""
    redemption: Count
    """The receiver's number for this attempt; comes back in the answer."""
    timeout: Seconds


class Refuse(_Struct, frozen=True):
    """Ends a :class:`Redeem`: the sender cannot serve it, or the receiver wants it no more."""

    redemption: Count
    reason: Reason
    message: Message


class Offer(_Struct, frozen=True):
    """Sender: asks for a grant for this transfer (a claim, where it carries a ticket's key)."""

    transfer: TransferId
    key: Key
    redemption: Count
    """The :class:`Redeem` that this answers; 0 if none."""
    total: Count | None
    """Tokens of the whole transfer; None while the sender does not know."""
    metadata: Metadata
    timeout: Seconds
    """The sender gives up after this long, measured from now on its own clock."""


class Announce(_Struct, frozen=True):
    """Sender: now the length (and the metadata) is known. Sent before the first write."""

    transfer: TransferId
    total: Count
    metadata: Metadata


class Grant(_Struct, frozen=True):
    """Receiver: these extents are yours to write, with tokens from `start` on."""

    transfer: TransferId
    sequence: Count
    """Counts the grants of one transfer: 0 for the Grant, then one for each Resume."""
    start: Count
    """`transferred_tokens` at which this grant begins."""
    block_indices: BlockIndices
    extents: Extents


class Resume(Grant, frozen=True):
    """Receiver: the same for the rest. May arrive early; applies when the last one is full."""


class Written(_Struct, frozen=True):
    """Sender: tokens `[start, start + count)` have landed in grant `sequence`."""

    transfer: TransferId
    sequence: Count
    start: Count
    count: Count
    total: Count | None
    """Tokens of the whole transfer; None while the sender does not know."""
    checksum: Annotated[bytes, Meta(max_length=16)] = b""
    plane: Annotated[str, Meta(max_length=MAX_NAME)] = ""
    """The plane that they were written over."""


class Accepted(_Struct, frozen=True):
    """Receiver: everything has arrived; the transfer is done."""

    transfer: TransferId


class Abort(_Struct, frozen=True):
    """Either side: the transfer is over. From the sender, `drained` ends the quarantine at once."""

    transfer: TransferId
    reason: Reason
    message: Message
    drained: bool

    @property
    def failure(self) -> Failure:
        """The failure that it reports."""
        return Failure(self.reason, self.message)


class AbortAck(_Struct, frozen=True):
    """Sender: no write of this transfer runs or can land any more."""

    transfer: TransferId


Frame: TypeAlias = (
    Hello
    | Ack
    | Ping
    | Pong
    | Goodbye
    | Probe
    | ProbeAnswer
    | Redeem
    | Refuse
    | Offer
    | Announce
    | Grant
    | Resume
    | Written
    | Accepted
    | Abort
    | AbortAck
)


class Packet(msgspec.Struct, frozen=True, array_like=True):
    """What a control channel carries: one frame, addressed from one life to another."""

    version: Literal[1]
    source_epoch: Annotated[int, Meta(ge=1, le=2**63 - 1)]
    target_epoch: Epoch
    """The life it is meant for; 0 in the first Hello, which cannot know."""
    sequence: Count
    """Place in the link's order; 0 for frames that need no acknowledgement."""
    acknowledged: Count
    """All sequences up to this one have arrived."""
    frame: Frame


class _AnyVersion(msgspec.Struct, array_like=True):
    version: Annotated[int, Meta(ge=0, le=2**31)]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Packet)
_any_version = msgspec.msgpack.Decoder(_AnyVersion)
_MALFORMED = (msgspec.MsgspecError, UnicodeError, RecursionError)


def encode(packet: Packet) -> bytes:
    """Return `packet` as MessagePack, at most 64 KiB."""
    return _encoder.encode(packet)


def decode(encoded: bytes) -> Packet:
    """Read one packet.

    Raises:
        ProtocolError: it is no packet, or one of another protocol version; says which.
    """
    try:
        return _decoder.decode(encoded)
    except _MALFORMED as exc:
        malformed = exc
    try:
        version = _any_version.decode(encoded).version
    except _MALFORMED:
        version = PROTOCOL_VERSION
    if version != PROTOCOL_VERSION:
        raise ProtocolError(
            f"peer speaks protocol version {version}, this side {PROTOCOL_VERSION}"
        ) from malformed
    raise ProtocolError(f"malformed packet of {len(encoded)} bytes: {malformed}") from malformed


def clipped(message: str) -> str:
    """Return `message` as it may stand in a frame, whatever an exception has put into it."""
    return message.encode(errors="replace").decode()[:MAX_MESSAGE]


def check_request(request_id: str, timeout: float, metadata: bytes = b"") -> None:
    """Refuse what no frame can carry, before it gets into one.

    Raises:
        ValueError: the request id, the timeout or the metadata is out of bounds.
    """
    check_request_id(request_id)
    if not 0 <= timeout <= MAX_SECONDS:
        raise ValueError(f"a timeout is 0 to {MAX_SECONDS:g} seconds, not {timeout}")
    check_metadata(metadata)


def check_request_id(request_id: str) -> None:
    """Refuse a request id that no frame can carry, or that looks like the JSON of a ticket.

    Raises:
        ValueError: it is one.
    """
    is_text = 1 <= len(request_id) <= MAX_REQUEST_ID and clipped(request_id) == request_id
    if not is_text or request_id.lstrip().startswith("{"):
        raise ValueError(
            f"a request id is 1 to {MAX_REQUEST_ID} characters of valid Unicode, the first no {{"
        )


def check_metadata(metadata: bytes) -> None:
    """Refuse metadata that no frame can carry.

    Raises:
        ValueError: it is too long.
    """
    if len(metadata) > MAX_METADATA_NBYTES:
        raise ValueError(f"{len(metadata)} bytes of metadata; {MAX_METADATA_NBYTES} can be sent")


def specs_of(schema: Schema) -> tuple[FieldSpec, ...]:
    """Return `schema` as it stands in a Hello."""
    return tuple(FieldSpec(name, field.dtype, field.shape) for name, field in schema.items())
