"""Bad input: a typed error that says what is wrong and whose fault it is, and nobody else suffers.

Every test has a healthy transfer under way before the bad thing happens, which completes after it.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import numpy
import pytest
import torch

from aiomm import (
    AiommError,
    Cancelled,
    Field,
    IncompatibleSchema,
    PeerLost,
    PlaneUnavailable,
    ProtocolError,
    Receiver,
    Rejected,
    Schema,
    Sender,
    Ticket,
)
from aiomm.protocol import frames

from .support import (
    ANYWHERE,
    SCHEMA,
    SMALL_POOL,
    assert_idle,
    error_of,
    frozen_imports,  # noqa: F401
    granted,
    pair,
    same,
    tensors_of,
)

pytestmark = pytest.mark.usefixtures("no_leaks")


@asynccontextmanager
async def healthy(**receiver: Any) -> AsyncIterator[tuple[Receiver, Sender]]:
    """Yield a pair with a transfer that is half way, and complete it at the end."""
    async with pair(**receiver) as (receiving, sending):
        neighbour = await granted(sending.claim(receiving.expect("neighbour")))
        yield receiving, sending
        neighbour.send(tensors_of(50, seed=8))
        async with receiving.receive("neighbour") as lease:
            assert same(dict(lease), tensors_of(50, seed=8))
        await neighbour
        assert_idle(receiving, sending)


# Schemas and tensors.


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        (Schema(input_embeddings=SCHEMA["input_embeddings"]), "fill_ids missing"),
        (Schema(**{**SCHEMA, "extra": Field("int8")}), "extra unexpected"),
        (
            Schema(**{**SCHEMA, "fill_ids": Field("int64")}),
            "fill_ids is int64, expected int32",
        ),
        (
            Schema(**{**SCHEMA, "input_embeddings": Field("bfloat16", 32)}),
            "input_embeddings is bfloat16[32], expected bfloat16[64]",
        ),
    ],
)
async def test_another_schema(schema: Schema, told: str) -> None:
    """Both sides are told how the schemas differ, and the sender can still reach others."""
    async with healthy() as (receiver, _), Sender(schema, name="stranger") as stranger:
        ticket = receiver.expect("r")
        receiving = asyncio.ensure_future(receive(receiver, "r"))
        transfer = stranger.claim(ticket)
        for error in [await error_of(transfer), await error_of(receiving)]:
            assert isinstance(error, IncompatibleSchema)
            assert "has another schema" in error.message
            assert not error.retryable
        assert told in (await error_of(transfer)).message


async def receive(receiver: Receiver, request_id: str) -> Any:
    return await receiver.receive(request_id)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"fill_ids": torch.zeros(20)}, "field 'fill_ids' is float32 [20], expected int32"),
        (
            {"mrope_positions": torch.zeros(20, 4, dtype=torch.int32)},
            "field 'mrope_positions' is int32 [20, 4], expected int32 [num_tokens, 3]",
        ),
        (
            {"fill_ids": torch.zeros(19, dtype=torch.int32)},
            "'input_embeddings' has 20, 'fill_ids' has 19",
        ),
        ({"pixels": torch.zeros(20)}, "unknown ['pixels']"),
        ({"fill_ids": None}, "field 'fill_ids' must be a tensor or bytes, got NoneType"),
        ({"fill_ids": b"123"}, "3 bytes, which is no whole number of rows of 4"),
        ({"fill_ids": torch.tensor(3, dtype=torch.int32)}, "is int32 []"),
        ({"fill_ids": torch.zeros(20, dtype=torch.int32).to_sparse()}, "no dense rows"),
    ],
)
async def test_tensors_that_do_not_match_the_schema(change: dict[str, Any], told: str) -> None:
    """`send` raises before anything travels, and the ticket can still be used."""
    async with healthy() as (receiver, sender):
        ticket = receiver.expect("r")
        error = await error_of(sender.send(ticket, {**tensors_of(20), **change}))
        assert isinstance(error, IncompatibleSchema)
        assert told in error.message
        await sender.send(ticket, tensors_of(3))
        (await receiver.receive("r")).release()


async def test_metadata_that_cannot_travel() -> None:
    """Too large, or not plain: Rejected, with the size or the type, and the claim goes on."""
    async with healthy() as (receiver, sender):
        transfer = sender.claim(receiver.expect("r"))
        with pytest.raises(Rejected, match="metadata has 40009 bytes, over the 32768"):
            transfer.send(tensors_of(3), metadata={"blob": "x" * 40_000})
        with pytest.raises(Rejected, match="metadata must be plain values"):
            transfer.send(tensors_of(3), metadata={"tensor": torch.zeros(3)})
        transfer.send(tensors_of(3), metadata={"blob": "x" * 32_000})
        async with receiver.receive("r") as lease:
            assert len(lease.metadata["blob"]) == 32_000


async def test_metadata_that_is_none() -> None:
    """A peer that sends bytes which are no metadata: ProtocolError, and the blocks come back."""
    for nonsense in (b"\xc1", msgspec.msgpack.encode([1, 2])):
        async with healthy() as (receiver, sender):
            transfer = sender.claim(receiver.expect("r"))
            assert transfer._core is not None
            transfer._core.metadata = nonsense
            transfer.send(tensors_of(3))
            with pytest.raises(ProtocolError, match="metadata"):
                await receiver.receive("r")


# Requests and tickets.


def altered(ticket: Ticket, **changes: Any) -> Ticket:
    return msgspec.structs.replace(ticket, **changes)


@pytest.mark.parametrize(
    ("alter", "told"),
    [
        (lambda t: altered(t, request_id="other"), "'other' is unknown"),
        (lambda t: altered(t, key=bytes(16)), "the ticket for request 'r' is not the current one"),
    ],
)
async def test_a_ticket_that_is_not_the_receivers(
    alter: Callable[[Ticket], Ticket], told: str
) -> None:
    """Unknown request, wrong key: Rejected; the right ticket still works."""
    async with healthy() as (receiver, _), Sender(SCHEMA) as sender:
        ticket = receiver.expect("r")
        error = await error_of(sender.send(alter(ticket), tensors_of(2)))
        assert isinstance(error, Rejected)
        assert not error.retryable
        assert told in error.message
        await sender.send(ticket, tensors_of(2))
        (await receiver.receive("r")).release()


async def test_a_ticket_of_another_life() -> None:
    """Who issued it is gone, whoever is at the address: PeerLost, as if that had just happened."""
    async with healthy() as (receiver, _), Sender(SCHEMA) as sender:
        ticket = receiver.expect("r")
        other = altered(ticket, epoch=ticket.epoch - 1)
        error = await error_of(sender.send(other, tensors_of(2)))
        assert isinstance(error, PeerLost)
        assert error.message == "the ticket is void: its receiver has been restarted since"
        await sender.send(ticket, tensors_of(2))
        (await receiver.receive("r")).release()


async def test_a_request_that_needs_a_ticket_is_not_had_by_its_name() -> None:
    """A bare send to an id that was expected with a ticket: Rejected, it is missing."""
    async with healthy() as (receiver, sender):
        receiver.expect("r")
        error = await error_of(sender.send("r", tensors_of(2), to=receiver.address))
        assert isinstance(error, Rejected)
        assert error.message == "the ticket for request 'r' is missing"
        receiver.cancel("r")


async def test_a_ticket_with_an_address_beside_it() -> None:
    """Rejected at once, by whoever was given both, without a word of the ticket's key."""
    async with healthy() as (receiver, sender), Sender(SCHEMA, bind="tcp://127.0.0.1:*") as other:
        expected, offered = receiver.expect("r"), other.offer("s", tensors_of(2)).ticket
        elsewhere = "tcp://127.0.0.1:1"
        with pytest.raises(Rejected, match=elsewhere):
            sender.claim(expected, to=elsewhere)
        with pytest.raises(Rejected, match=elsewhere):
            await sender.send(expected, tensors_of(2), to=elsewhere)
        with pytest.raises(Rejected, match=elsewhere) as error:
            await receiver.receive(offered, source=elsewhere)
        assert "key" not in error.value.message
        receiver.cancel("r")


async def test_a_request_id_that_looks_like_a_ticket() -> None:
    """It could be expected, but never received: a ValueError says so at once."""
    async with healthy() as (receiver, sender), Sender(SCHEMA, bind="tcp://127.0.0.1:*") as other:
        with pytest.raises(ValueError, match=r"the first no \{"):
            receiver.expect("{r}")
        with pytest.raises(ValueError, match=r"the first no \{"):
            other.offer("{r}", tensors_of(1))
        with pytest.raises(ProtocolError, match="not a ticket"):
            await sender.send("{r}", tensors_of(1))


class Name(str):
    """No string of MessagePack, though it is one of Python."""


async def test_numbers_and_names_of_other_libraries() -> None:
    """They travel as the plain values that they are."""
    seven, three, nine = numpy.int64(7), torch.tensor(3), torch.tensor(9.0)
    async with healthy() as (receiver, sender):
        ticket = receiver.expect(Name("r"), timeout=numpy.float64(9))
        transfer = sender.claim(ticket, num_tokens=seven, timeout=nine)
        transfer.send(tensors_of(7))
        async with receiver.receive(numpy.str_("r"), timeout=numpy.float32(9)) as lease:
            assert lease.num_tokens == 7
        await transfer
        transfer = sender.claim(Name("s"), to=receiver.address, num_tokens=three)
        transfer.send(tensors_of(3))
        async with receiver.receive("s") as lease:
            assert lease.num_tokens == 3
        await transfer


@pytest.mark.parametrize(
    ("num_tokens", "told"),
    [
        ("5", "whole number, not '5'"),
        (2.5, "whole number, not 2.5"),
        (-1, "not -1"),
        (2**70, "not 1180591620717411303424"),
    ],
)
async def test_a_length_that_is_none(num_tokens: Any, told: str) -> None:
    """The error names it, and nothing has been sent: the ticket is still good."""
    async with healthy() as (receiver, sender):
        ticket = receiver.expect("r")
        with pytest.raises((TypeError, ValueError), match=told):
            sender.claim(ticket, num_tokens=num_tokens)
        await sender.send(ticket, tensors_of(2))
        (await receiver.receive("r")).release()


@pytest.mark.parametrize("timeout", ["5", None.__class__, object()])
async def test_a_timeout_that_is_none(timeout: Any) -> None:
    """Told by every call that takes one."""
    async with healthy() as (receiver, sender), Sender(SCHEMA, bind="tcp://127.0.0.1:*") as other:
        told = "a timeout is a number of seconds"
        with pytest.raises(TypeError, match=told):
            receiver.expect("r", timeout=timeout)
        with pytest.raises(TypeError, match=told):
            await receiver.receive("r", timeout=timeout)
        with pytest.raises(TypeError, match=told):
            sender.claim("r", to=receiver.address, timeout=timeout)
        with pytest.raises(TypeError, match=told):
            other.offer("r", tensors_of(1), timeout=timeout)


@pytest.mark.parametrize("request_id", [None, 5, Field("int32")])
async def test_a_request_that_is_none(request_id: Any) -> None:
    """Neither an id nor a ticket."""
    async with healthy() as (receiver, sender):
        with pytest.raises(TypeError, match="a request id is a string"):
            receiver.expect(request_id)
        with pytest.raises(TypeError, match="not a ticket or a request id"):
            sender.claim(request_id)
        with pytest.raises(TypeError, match="not a ticket or a request id"):
            await receiver.receive(request_id)


async def test_a_ticket_made_by_hand() -> None:
    """It is checked as if it had been read: else it would break the link of all others."""
    async with healthy() as (receiver, sender):
        ticket = receiver.expect("r")
        for changes in ({"key": b"x" * 100}, {"epoch": -1}, {"epoch": numpy.int64(1)}):
            with pytest.raises(ProtocolError, match="not a ticket"):
                sender.claim(msgspec.structs.replace(ticket, **changes))
        await sender.send(ticket, tensors_of(2))
        (await receiver.receive("r")).release()


@pytest.mark.parametrize("is_started", [False, True])
async def test_an_address_that_is_none(is_started: bool) -> None:
    """The transfer says so, whether the sender is up or not: it does not wait for ever."""
    async with healthy():
        sender = Sender(SCHEMA)
        if is_started:
            await sender.start()
        for address in (123, b"tcp://127.0.0.1:1"):
            with pytest.raises(TypeError, match="an address is a string"):
                sender.claim("q", to=address)  # type: ignore[arg-type]
        assert isinstance(await error_of(sender.claim("q", to="127.0.0.1")), Rejected)
        await sender.aclose()


async def test_an_exception_is_a_reason() -> None:
    """What an encoder or a scheduler has caught may be passed on as it is."""
    async with healthy() as (receiver, sender):
        transfer = await granted(sender.claim(receiver.expect("r")))
        transfer.cancel(RuntimeError("the tower fell"))
        with pytest.raises(Cancelled, match="the tower fell"):
            await receiver.receive("r")
        other = await granted(sender.claim(receiver.expect("s")))
        receiver.cancel("s", LookupError("no such user"))
        with pytest.raises(Cancelled, match="no such user"):
            await other


async def test_one_request_twice() -> None:
    """A second `expect`, a second claim of the ticket, and a claim of what is done."""
    async with healthy() as (receiver, sender), Sender(SCHEMA) as second:
        ticket = receiver.expect("r")
        with pytest.raises(Rejected, match="'r' is in use"):
            receiver.expect("r")
        first = await granted(sender.claim(ticket))
        error = await error_of(second.send(ticket, tensors_of(9)))
        assert isinstance(error, Rejected)
        assert "'r' is claimed already" in error.message
        await first.send(tensors_of(20))
        async with receiver.receive("r") as lease:
            assert lease.num_tokens == 20
        error = await error_of(second.send(ticket, tensors_of(9)))
        assert "'r' is unknown: finished, given up, or never made" in error.message


@pytest.mark.parametrize("announced", [True, False])
async def test_a_request_over_max_tokens(announced: bool) -> None:
    """Told at the claim or with the tensors; both sides get Rejected with both numbers."""
    async with healthy(max_tokens=100) as (receiver, sender):
        ticket = receiver.expect("r")
        receiving = asyncio.ensure_future(receive(receiver, "r"))
        if announced:
            transfer = sender.claim(ticket, num_tokens=101)
        else:
            transfer = (await granted(sender.claim(ticket))).send(tensors_of(101))
        error = await error_of(transfer)
        assert isinstance(error, Rejected)
        assert "101 tokens, but this receiver takes at most 100" in error.message
        if announced:  # somebody else may still come with the ticket
            receiver.cancel("r")
        assert isinstance(await error_of(receiving), AiommError)


@pytest.mark.parametrize(
    "nonsense", ["{", '{"kind": "expect"}', b"\x00", b"", b"GET / HTTP/1.1", "{}" * 1000]
)
async def test_what_is_no_ticket(nonsense: str | bytes) -> None:
    """Claimed, sent or redeemed: ProtocolError, at once."""
    async with healthy() as (receiver, sender):
        with pytest.raises(ProtocolError, match="not a ticket"):
            sender.claim(nonsense)
        with pytest.raises(ProtocolError, match="not a ticket"):
            await sender.send(nonsense, tensors_of(1))
        with pytest.raises(ProtocolError, match="not a ticket"):
            await receiver.receive(nonsense)


@pytest.mark.parametrize("request_id", ["", "x" * 513, "\ud800"])
async def test_request_ids_that_no_frame_can_carry(request_id: str) -> None:
    """Empty, over 512 characters, or no Unicode: said by whoever is given it."""
    async with healthy() as (receiver, sender):
        with pytest.raises(ValueError, match="a request id is 1 to 512 characters"):
            receiver.expect(request_id)
        with pytest.raises(ValueError, match="a request id is 1 to 512 characters"):
            await receiver.receive(request_id)
        error = await error_of(sender.send(request_id, tensors_of(1), to=receiver.address))
        assert "a request id is 1 to 512 characters" in error.message


async def test_addresses_that_are_none_and_addresses_that_are_not_allowed() -> None:
    """Malformed, or off this host without `insecure`; no packet goes anywhere."""
    async with healthy() as (receiver, sender):
        for address in ("nowhere", "tcp://10.0.0.1:80", "http://127.0.0.1:80"):
            error = await error_of(sender.send("r", tensors_of(1), to=address))
            assert isinstance(error, Rejected)
            with pytest.raises(ValueError):  # noqa: PT011
                await receiver.receive("r", source=address)
            with pytest.raises(ValueError):  # noqa: PT011
                Receiver(SCHEMA, connect=address)
    for endpoint in (Receiver, Sender):
        with pytest.raises(ValueError, match="insecure"):
            endpoint(SCHEMA, bind="tcp://0.0.0.0:0")


# Strangers on the port.


async def spoken_to(address: str, said: bytes) -> bytes:
    """Say something to the control port, and return what is said until it hangs up."""
    host, port = address.removeprefix("tcp://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(said)
        writer.write_eof()
        return await reader.read()
    except OSError:  # it has hung up already
        return b""
    finally:
        writer.close()


@pytest.mark.both_loops
@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        bytes(range(256)) * 64,
        b"\x80\x04\x95pickle",
        b"",
    ],
    ids=["HTTP", "garbage", "pickle", "nothing"],
)
async def test_a_stranger_on_the_port(said: bytes) -> None:
    """It is hung up on; whoever was there goes on, whoever comes later is let in."""
    async with healthy() as (receiver, _):
        assert receiver.address is not None
        await spoken_to(receiver.address, said)
        async with Sender(SCHEMA) as late:
            await late.send(receiver.expect("r"), tensors_of(3))
        (await receiver.receive("r")).release()
        assert receiver.metrics()["peers"] <= 2


async def test_packets_that_are_none(caplog: pytest.LogCaptureFixture) -> None:
    """A ZeroMQ peer that sends garbage or another version is refused, with one line in the log."""
    import zmq.asyncio

    async with healthy() as (receiver, _):
        assert receiver.address is not None
        with zmq.asyncio.Context() as context:
            for packet in (b"\xc1\xc1", b"x" * 1000, of_another_version()):
                stranger = context.socket(zmq.DEALER)
                stranger.connect(receiver.address)
                await stranger.send(packet)
                refusal = frames.decode(await stranger.recv()).frame
                assert isinstance(refusal, frames.Goodbye)
                assert refusal.reason == "protocol"
                stranger.close(linger=0)
        assert receiver.metrics()["ignored_malformed"] == 3
    refusals = [line for line in caplog.text.splitlines() if "refuses" in line]
    assert len(refusals) == 3
    assert "version 99" in refusals[2]


def of_another_version() -> bytes:
    packet = frames.Packet(1, 5, 0, 0, 0, frames.Ping())
    return frames.encode(msgspec.structs.replace(packet, version=99))


# What this machine does not have.


async def test_no_memory_for_the_pool() -> None:
    """The start says how much was asked for; a smaller pool can be had afterwards."""
    schema = Schema(x=Field("float64", 2**17))
    async with healthy():
        receiver = Receiver(schema, bind=ANYWHERE, blocks=2**20, block_size=2**10)
        with pytest.raises(PlaneUnavailable, match="bytes"):
            await receiver.start()
        await receiver.aclose()
        async with Receiver(SCHEMA, bind=ANYWHERE, **SMALL_POOL):
            pass


async def test_a_port_that_belongs_to_somebody_else() -> None:
    """OSError, as from any server."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        async with healthy():
            with pytest.raises(OSError, match="in use"):
                async with Receiver(SCHEMA, bind=f"tcp://127.0.0.1:{port}", **SMALL_POOL):
                    pass
