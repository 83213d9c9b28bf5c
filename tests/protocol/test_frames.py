"""What travels: every frame survives the wire, and nothing else gets through."""

from __future__ import annotations

import random
from typing import Any, get_args

import msgspec
import pytest

from aiomm.errors import IncompatibleSchema, ProtocolError, Reason
from aiomm.protocol import frames
from aiomm.protocol.frames import Frame, Packet, clipped, decode, encode
from aiomm.types import Extent, Field, Schema, TransferId

TRANSFER = TransferId("request", 7)
FIELDS = (frames.FieldSpec("embeddings", "bfloat16", (3584,)), frames.FieldSpec("ids", "int32", ()))

SAMPLES: tuple[Frame, ...] = (
    frames.Hello("sender", "encoder", FIELDS),
    frames.Hello(
        "receiver",
        "language",
        FIELDS,
        stream="unix:x",
        pool_tokens=8192,
        num_probes=16,
        link=3,
        planes=(frames.PlaneOffer("shm", b"offer"),),
        takes_any=True,
    ),
    frames.Ack(),
    frames.Ping(),
    frames.Pong(),
    frames.Goodbye(Reason.CLOSED, "bye"),
    frames.Goodbye(Reason.PEER_LOST, "not here", 99),
    frames.Probe("shm", b"n" * 16),
    frames.ProbeAnswer("shm", True),
    frames.Redeem("request", b"k" * 16, 5, 30.0),
    frames.Refuse(5, Reason.BUSY, "too many"),
    frames.Offer(TRANSFER, b"k" * 16, 0, None, b"meta", 30.0),
    frames.Offer(TRANSFER, b"", 5, 2000, b"", 0.0),
    frames.Announce(TRANSFER, 2000, b"meta"),
    frames.Grant(TRANSFER, 0, 0, (15, 16, 14), (Extent(1792, 2176),)),
    frames.Resume(TRANSFER, 1, 384, (3, 9), (Extent(384, 512), Extent(1152, 1280))),
    frames.Written(TRANSFER, 0, 0, 384, None),
    frames.Written(TRANSFER, 1, 384, 256, 640, b"checksum"),
    frames.Accepted(TRANSFER),
    frames.Abort(TRANSFER, Reason.CANCELLED, "the encoder raised", False),
    frames.AbortAck(TRANSFER),
)


def packet(frame: Frame) -> Packet:
    """Return a packet with `frame`."""
    return Packet(1, 11, 22, 3, 4, frame)


def raw(frame: Frame) -> list[Any]:
    """Return the packet of `frame` as the plain lists that stand on the wire."""
    plain: list[Any] = msgspec.msgpack.decode(encode(packet(frame)))
    return plain


def decode_raw(plain: object) -> Packet:
    """Decode what a peer might have sent."""
    return decode(msgspec.msgpack.encode(plain))


@pytest.mark.parametrize("frame", SAMPLES, ids=lambda frame: type(frame).__name__)
def test_every_frame_survives_the_wire(frame: Frame) -> None:
    """What is decoded equals what was encoded, and is of the same type."""
    back = decode(encode(packet(frame)))
    assert back == packet(frame)
    assert type(back.frame) is type(frame)


def test_there_is_a_sample_of_every_frame() -> None:
    """No frame is forgotten in this file."""
    assert {type(frame) for frame in SAMPLES} == set(get_args(Frame))


@pytest.mark.parametrize("frame", SAMPLES, ids=lambda frame: type(frame).__name__)
def test_fields_of_a_newer_peer_are_ignored(frame: Frame) -> None:
    """New fields go to the end: whoever does not know them skips them."""
    plain = raw(frame)
    plain[-1] += ["a field of the future", {"with": ["depth"]}]
    plain.append("and one more in the packet")
    assert decode_raw(plain) == packet(frame)


def test_fields_of_an_older_peer_have_defaults() -> None:
    """What an older peer does not send is as it was then."""
    assert decode_raw([1, 11, 0, 0, 0, ["goodbye", "closed", "bye"]]).frame == frames.Goodbye(
        Reason.CLOSED, "bye"
    )


@pytest.mark.parametrize("frame", SAMPLES, ids=lambda frame: type(frame).__name__)
def test_no_field_may_be_missing_or_of_another_kind(frame: Frame) -> None:
    """Each field of each frame is checked: none takes a mapping, and none without default goes."""
    plain = raw(frame)
    fields = plain[-1]
    for index in range(len(fields)):
        with pytest.raises(ProtocolError):
            decode_raw([*plain[:-1], [*fields[:index], {"a": 1}, *fields[index + 1 :]]])
    required = sum(each.required for each in msgspec.structs.fields(type(frame)))
    if required:
        with pytest.raises(ProtocolError):
            decode_raw([*plain[:-1], fields[:required]])


LONG = 2**62 + 1
OUT_OF_BOUNDS: list[tuple[str, Frame]] = [
    ("a role nobody has", frames.Hello("router", "x", FIELDS)),  # type: ignore[arg-type]
    ("a long name", frames.Hello("sender", "x" * 129, FIELDS)),
    ("no fields", frames.Hello("sender", "x", ())),
    ("too many fields", frames.Hello("sender", "x", FIELDS[:1] * 65)),
    ("a field without name", frames.Hello("sender", "x", (frames.FieldSpec("", "int32", ()),))),
    ("a long dtype", frames.Hello("sender", "x", (frames.FieldSpec("a", "x" * 129, ()),))),
    ("nine dimensions", frames.Hello("sender", "x", (frames.FieldSpec("a", "int8", (1,) * 9),))),
    ("no elements", frames.Hello("sender", "x", (frames.FieldSpec("a", "int8", (0,)),))),
    ("a huge dimension", frames.Hello("sender", "x", (frames.FieldSpec("a", "int8", (2**32,)),))),
    ("a long stream", frames.Hello("sender", "x", FIELDS, stream="x" * 513)),
    ("a negative pool", frames.Hello("sender", "x", FIELDS, pool_tokens=-1)),
    ("a huge pool", frames.Hello("sender", "x", FIELDS, pool_tokens=2**49)),
    ("many probes", frames.Hello("sender", "x", FIELDS, num_probes=2**49)),
    ("a huge link", frames.Hello("sender", "x", FIELDS, link=2**49)),
    (
        "many planes",
        frames.Hello("sender", "x", FIELDS, planes=(frames.PlaneOffer("a", b""),) * 17),
    ),
    (
        "a long offer",
        frames.Hello("sender", "x", FIELDS, planes=(frames.PlaneOffer("a", b"x" * 1025),)),
    ),
    ("a long goodbye", frames.Goodbye(Reason.CLOSED, "x" * 2049)),
    ("a reason nobody knows", frames.Goodbye("moon", "x")),  # type: ignore[arg-type]
    ("a negative epoch", frames.Goodbye(Reason.CLOSED, "x", -1)),
    ("a short nonce", frames.Probe("shm", b"n" * 15)),
    ("a long nonce", frames.Probe("shm", b"n" * 17)),
    ("a plane without name", frames.ProbeAnswer("", True)),
    ("an empty request id", frames.Redeem("", b"", 1, 1.0)),
    ("a long request id", frames.Redeem("x" * 513, b"", 1, 1.0)),
    ("a long key", frames.Redeem("x", b"k" * 17, 1, 1.0)),
    ("a negative timeout", frames.Redeem("x", b"", 1, -1.0)),
    ("an endless timeout", frames.Redeem("x", b"", 1, float("inf"))),
    ("a timeout that is no number", frames.Redeem("x", b"", 1, float("nan"))),
    ("a negative redemption", frames.Refuse(-1, Reason.BUSY, "x")),
    ("generation 0", frames.Accepted(TransferId("x", 0))),
    ("a huge generation", frames.Accepted(TransferId("x", LONG))),
    ("a transfer without id", frames.Accepted(TransferId("", 1))),
    ("a negative total", frames.Offer(TRANSFER, b"", 0, -1, b"", 1.0)),
    ("a huge total", frames.Announce(TRANSFER, 2**49, b"")),
    ("long metadata", frames.Announce(TRANSFER, 1, b"x" * (32 * 1024 + 1))),
    ("many blocks", frames.Grant(TRANSFER, 0, 0, tuple(range(4097)), ())),
    ("many extents", frames.Grant(TRANSFER, 0, 0, (), (Extent(0, 1),) * 4097)),
    ("a negative block", frames.Grant(TRANSFER, 0, 0, (-1,), ())),
    ("a negative extent", frames.Grant(TRANSFER, 0, 0, (), (Extent(-1, 1),))),
    ("a negative start", frames.Resume(TRANSFER, 0, -1, (), ())),
    ("a negative sequence", frames.Written(TRANSFER, -1, 0, 0, None)),
    ("a negative count", frames.Written(TRANSFER, 0, 0, -1, None)),
    ("a long checksum", frames.Written(TRANSFER, 0, 0, 0, None, b"x" * 17)),
    ("a long failure", frames.Abort(TRANSFER, Reason.PLANE, "x" * 2049, True)),
]


@pytest.mark.parametrize(
    "frame", [frame for _, frame in OUT_OF_BOUNDS], ids=[name for name, _ in OUT_OF_BOUNDS]
)
def test_every_field_is_bounded(frame: Frame) -> None:
    """What is too long, negative or not a number never reaches an endpoint."""
    with pytest.raises(ProtocolError, match="malformed packet"):
        decode(encode(packet(frame)))


@pytest.mark.parametrize("index", [1, 2, 3, 4])
@pytest.mark.parametrize("value", [-1, 2**63, "x", None, True, 1.5])
def test_the_head_of_a_packet_is_bounded(index: int, value: object) -> None:
    """Epochs and sequences are whole numbers below 2**63."""
    plain = raw(frames.Ack())
    plain[index] = value
    with pytest.raises(ProtocolError):
        decode_raw(plain)


def test_a_packet_comes_from_somebody() -> None:
    """Epoch 0 is nobody; only the target may be unknown."""
    assert decode_raw([1, 11, 0, 0, 0, ["ack"]]).target_epoch == 0
    with pytest.raises(ProtocolError):
        decode_raw([1, 0, 0, 0, 0, ["ack"]])


@pytest.mark.parametrize("rest", [[], [11, 22, 0, 0, ["ack"]], [{"all": "new"}, [[[1]]]]])
def test_another_version_is_named(rest: list[Any]) -> None:
    """A newer peer may change everything but the place of the version."""
    with pytest.raises(ProtocolError, match="peer speaks protocol version 2, this side 1"):
        decode_raw([2, *rest])


GARBAGE = {
    "nothing": b"",
    "HTTP": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "TLS": bytes.fromhex("16030100f1010000ed0303") + b"\x80" * 100,
    "zeros": bytes(1000),
    "ones": b"\xff" * 1000,
    "a pickle": b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93.",
    "an array that never ends": b"\xdd\xff\xff\xff\xff",
    "a string that never ends": b"\x96\x01\x0b\x16\x00\x00\xdb\xff\xff\xff\xff",
    "bytes that never end": b"\x96\x01\x0b\x16\x00\x00\x92\xa8announce\xc6\xff\xff\xff\xff",
    "deep nesting": b"\x91" * 100_000,
    "deep nesting behind a version": b"\xdc\xff\xff\x01" + b"\x91" * 100_000,
    "a deep field of the future": encode(packet(frames.Ack()))[:-5]
    + b"\x92\xa3ack"
    + b"\x91" * 9999,
    "text that is none": b"\x96\x01\x0b\x16\x00\x00\x93\xa7goodbye\xa6closed\xa2\xff\xfe",
    "a tag that is none": b"\x96\x01\x0b\x16\x00\x00\x91\xa2\xff\xfe",
    "a frame nobody knows": msgspec.msgpack.encode([1, 11, 22, 0, 0, ["teleport", 1]]),
    "a frame without a tag": msgspec.msgpack.encode([1, 11, 22, 0, 0, []]),
    "a mapping": msgspec.msgpack.encode({"version": 1}),
    "more behind it": encode(packet(frames.Ack())) + b"\x00",
}


@pytest.mark.parametrize("encoded", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_is_a_protocol_error(encoded: bytes) -> None:
    """Whatever arrives, only one kind of error comes out."""
    with pytest.raises(ProtocolError):
        decode(encoded)


def mutated(chance: random.Random, encoded: bytes) -> bytes:
    """Change a packet as a broken peer might: flip, cut, repeat, or splice two packets."""
    data = bytearray(encoded)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) or 1)
        match chance.randrange(6):
            case 0 if data:
                data[at] ^= 1 << chance.randrange(8)
            case 1 if data:
                data[at] = chance.choice(
                    b"\x00\x7f\x80\x90\x9f\xc0\xc1\xc4\xca\xcf\xd9\xdc\xdf\xff"
                )
            case 2:
                del data[at : at + chance.randint(1, 8)]
            case 3:
                data[at:at] = chance.randbytes(chance.randint(1, 8))
            case 4:
                data[at:at] = data[at : at + chance.randint(1, 32)]
            case _:
                other = encode(packet(chance.choice(SAMPLES)))
                data[at:] = other[chance.randrange(len(other)) :]
    return bytes(data)


def plain_mutation(chance: random.Random, plain: Any) -> Any:
    """Replace one value somewhere in a packet by another that is well-formed MessagePack."""
    if isinstance(plain, list) and plain and chance.random() < 0.8:
        at = chance.randrange(len(plain))
        return [*plain[:at], plain_mutation(chance, plain[at]), *plain[at + 1 :]]
    strange: list[Any] = [
        None,
        True,
        -1,
        0,
        2**63,
        -(2**63),
        1.5,
        "",
        "x" * 600,
        b"",
        b"x" * 40,
        [],
        {},
        [[]],
    ]
    return chance.choice(strange)


def test_mutations_are_packets_or_protocol_errors() -> None:
    """Forty thousand damaged packets: each is refused in one way, or is a packet within bounds."""
    chance = random.Random(20)
    accepted = 0
    for number in range(40_000):
        frame = chance.choice(SAMPLES)
        if number % 2:
            encoded = mutated(chance, encode(packet(frame)))
        else:
            encoded = msgspec.msgpack.encode(plain_mutation(chance, raw(frame)))
        try:
            back = decode(encoded)
        except ProtocolError:
            continue
        accepted += 1
        assert decode(encode(back)) == back
    assert 1_000 < accepted < 30_000


def test_the_largest_grant_fits_into_a_packet() -> None:
    """2048 blocks of the largest pool there can be, no two adjacent: still below 64 KiB."""
    transfer = TransferId("x" * 512, 2**62)
    blocks = tuple(range(2**41, 2**41 + 4096, 2))
    extents = tuple(Extent(128 * block, 128 * block + 128) for block in blocks)
    grant = frames.Grant(transfer, 2**40, 2**40, blocks, extents)
    assert len(encode(packet(grant))) <= 64 * 1024


def test_the_schema_of_a_hello() -> None:
    """Names, dtypes and shapes come back as they were."""
    schema = Schema(embeddings=Field("bfloat16", 4, 8), ids=Field("int32"))
    hello = frames.Hello("sender", "x", frames.specs_of(schema))
    assert hello.schema == schema


@pytest.mark.parametrize(
    "specs",
    [
        (frames.FieldSpec("a", "float7", ()),),
        (frames.FieldSpec("a", "int8", ()), frames.FieldSpec("a", "int8", ())),
    ],
    ids=["a dtype of the future", "a name twice"],
)
def test_a_schema_that_cannot_be_here(specs: tuple[frames.FieldSpec, ...]) -> None:
    """It is well-formed, but no schema of this side can be equal to it."""
    with pytest.raises(IncompatibleSchema):
        assert frames.Hello("sender", "x", specs).schema


def test_a_field_may_have_any_name() -> None:
    """Also one that is a keyword or a parameter somewhere."""
    specs = (frames.FieldSpec("self", "int8", ()), frames.FieldSpec("class", "int8", ()))
    assert list(frames.Hello("sender", "x", specs).schema) == ["self", "class"]


def test_messages_are_clipped() -> None:
    """Whatever an exception says can travel: cut to length, surrogates replaced."""
    message = clipped("\udc80" + "ü" * 5000)
    assert message == "?" + "ü" * 2047
    frame = frames.Abort(TRANSFER, Reason.PLANE, message, True)
    assert decode(encode(packet(frame))).frame == frame


@pytest.mark.parametrize(
    ("request_id", "timeout", "metadata"),
    [
        ("", 1.0, b""),
        ("x" * 513, 1.0, b""),
        ("{x}", 1.0, b""),
        (" {x}", 1.0, b""),
        ("file\udc80", 1.0, b""),
        ("x", -1.0, b""),
        ("x", float("nan"), b""),
        ("x", float("inf"), b""),
        ("x", 1.0, b"x" * (frames.MAX_METADATA_NBYTES + 1)),
    ],
)
def test_what_no_frame_can_carry_is_refused_before(
    request_id: str, timeout: float, metadata: bytes
) -> None:
    """A frame that the peer would refuse would stop the whole link: it must not be queued."""
    frames.check_request("x" * 512, 1e9, b"x" * frames.MAX_METADATA_NBYTES)
    with pytest.raises(ValueError, match=r"request id|timeout|metadata"):
        frames.check_request(request_id, timeout, metadata)
