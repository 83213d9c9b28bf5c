"""`aiomm send` and `aiomm recv` move files: whole, by fields, in both directions, or not at all."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from aiomm import Cancelled, PoolClosed, Receiver, Schema, Sender, State, Transfer
from aiomm.cli.files import WHOLE_FILE, field_from
from tests.command import command, outcome_of
from tests.conftest import shared_memory_files
from tests.processes import until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

HERE = "tcp://127.0.0.1:*"
METADATA = {"model": "Qwen2.5-VL", "note": "größer als 1"}
FIELDS = {
    "embeddings": torch.arange(3000 * 64).reshape(3000, 64).bfloat16(),
    "mask": torch.arange(3000) % 3 == 0,
    "scales": torch.arange(12000).reshape(3000, 2, 2).remainder(240).to(torch.float8_e4m3fn),
    "ids": torch.arange(3000, dtype=torch.int64),
}
OPTIONS = ("embeddings=bfloat16:64", "mask=bool", "scales=float8_e4m3fn:2x2", "ids=int64")
SCHEMA = Schema(**dict(map(field_from, OPTIONS)))


@pytest.fixture
def by_fields(tmp_path: Path) -> Path:
    """Return a file whose tensors have 3000 tokens each."""
    path = tmp_path / "fields.safetensors"
    safetensors.torch.save_file(FIELDS, path, metadata=METADATA)
    return path


@pytest.fixture
def of_any_kind(tmp_path: Path) -> Path:
    """Return a file that cannot go by fields, larger than the pool that takes it."""
    path = tmp_path / "any.safetensors"
    tensors = {"weights": torch.randn(10_000, 1000), "scalar": torch.tensor(2.0)}
    safetensors.torch.save_file(tensors, path, metadata=METADATA)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Return a folder that does not exist yet."""
    return tmp_path / "arrived" / "here"


def same_tensors(first: Path, second: Path) -> bool:
    """Whether two files have the same tensors, bit for bit, and the same metadata."""
    with safetensors.safe_open(first, "pt") as one, safetensors.safe_open(second, "pt") as two:
        return (
            one.metadata() == two.metadata()
            and sorted(one.keys()) == sorted(two.keys())
            and all(
                one.get_tensor(name).dtype == two.get_tensor(name).dtype
                and one.get_tensor(name).shape == two.get_tensor(name).shape
                and one.get_tensor(name).untyped_storage().tolist()
                == two.get_tensor(name).untyped_storage().tolist()
                for name in one.keys()  # noqa: SIM118
            )
        )


async def sending_state(transfer: Transfer) -> None:
    """Wait until the receiver has granted."""
    async with aclosing(transfer.events()) as states:  # type: ignore[type-var]
        async for state in states:
            if state is State.SENDING:
                return


async def test_files_travel_whole_to_a_receiver_that_listens(
    by_fields: Path, of_any_kind: Path, out: Path
) -> None:
    files = [by_fields, of_any_kind]
    async with command("recv", "--bind", HERE, "--out", str(out), "--count", "2") as recv:
        address = (await recv.says("receiving at ")).split()[-1]
        sent = await outcome_of("send", *map(str, files), "--connect", address)
        received = await recv.end()
    assert sent.code == received.code == 0, (sent, received)
    assert received.output.splitlines() == [str(out / path.name) for path in files]
    assert "any.safetensors as any: 40.0 MB in " in sent.errors
    assert sorted(os.listdir(out)) == ["any.safetensors", "fields.safetensors"]
    for path in files:
        assert (out / path.name).read_bytes() == path.read_bytes()


async def test_fields_travel_to_a_receiver_that_connects(by_fields: Path, out: Path) -> None:
    """By fields, with a request id that would like to be written elsewhere. No --count."""
    fields = [part for option in OPTIONS for part in ("--field", option)]
    outside = "../../outside"
    sending = ("send", str(by_fields), "--bind", HERE, "--request-id", outside, *fields)
    async with command(*sending) as send:
        address = (await send.says("may connect to")).split()[-1]
        received = await outcome_of("recv", "--connect", address, "--out", str(out), *fields)
        sent = await send.end()
    assert sent.code == received.code == 0, (sent, received)
    [name] = os.listdir(out)
    assert name == "%2E.%2F..%2Foutside.safetensors"
    assert same_tensors(out / name, by_fields)


async def test_a_file_goes_by_fields_to_any_receiver_that_has_them(by_fields: Path) -> None:
    async with Receiver(SCHEMA, bind=HERE, blocks=4) as receiver:
        sending = ("send", str(by_fields), "--connect", str(receiver.address))
        async with command(*sending) as send, receiver.receive("fields", timeout=60) as lease:
            assert lease.metadata | METADATA == lease.metadata
            assert all(torch.equal(torch.as_tensor(lease[name]), FIELDS[name]) for name in FIELDS)
            sent = await send.end()
    assert sent.code == 0, sent
    assert "the receiver has fields" in sent.errors


async def test_a_receiver_with_other_fields_is_told_apart(by_fields: Path) -> None:
    other = Schema(**dict([field_from("pixels=uint8:3")]))
    async with Receiver(other, bind=HERE, blocks=1) as receiver:
        sent = await outcome_of("send", str(by_fields), "--connect", str(receiver.address))
    assert sent.code == 1
    assert "IncompatibleSchema" in sent.errors
    assert "pixels missing; embeddings unexpected" in sent.errors


async def test_what_is_no_file_is_not_kept(out: Path) -> None:
    """1. A stranger sends rows that are no safetensors file. 2. Nothing of it is left."""
    async with command("recv", "--bind", HERE, "--out", str(out), "--count", "1") as recv:
        address = (await recv.says("receiving at ")).split()[-1]
        async with Sender(WHOLE_FILE) as sender:
            rows = {"file": torch.zeros(2, 4096, dtype=torch.uint8)}
            metadata = {"aiomm.nbytes": 5000}
            await sender.send("junk", rows, to=address, metadata=metadata, timeout=60)
        received = await recv.end()
    assert received.code == 1
    assert "junk: what arrived as 'junk' is no safetensors file" in received.errors
    assert os.listdir(out) == []


async def test_recv_tells_of_a_sender_that_gives_up(out: Path) -> None:
    async with command("recv", "--bind", HERE, "--out", str(out), "--count", "1") as recv:
        address = (await recv.says("receiving at ")).split()[-1]
        async with Sender(WHOLE_FILE) as sender:
            transfer = sender.claim("given-up", to=address, timeout=60)
            await sending_state(transfer)
            transfer.cancel("out of patience")
            received = await recv.end()
    assert received.code == 1
    assert "given-up: Cancelled: out of patience" in received.errors
    assert os.listdir(out) == []


async def test_ctrl_c_on_recv_ends_the_senders_transfer(out: Path) -> None:
    before = shared_memory_files()
    async with command("recv", "--bind", HERE, "--out", str(out)) as recv:
        address = (await recv.says("receiving at ")).split()[-1]
        async with Sender(WHOLE_FILE) as sender:
            transfer = sender.claim("cut", to=address, timeout=60)
            await sending_state(transfer)
            recv.interrupt()
            with pytest.raises(PoolClosed):
                await transfer
            received = await recv.end()
    assert received.code == 130
    assert received.errors.endswith("aiomm: interrupted\n")
    assert os.listdir(out) == []
    assert shared_memory_files() == before


async def test_ctrl_c_on_send_ends_the_receivers_transfer(by_fields: Path) -> None:
    """The pool is full, so that the file waits for blocks when the interrupt comes."""
    async with _full() as receiver:
        sending = ("send", str(by_fields), "--connect", str(receiver.address))
        async with command(*sending) as send:
            await until(lambda: _requests_waiting(receiver) == 1, "the file waits for blocks")
            waiting = asyncio.ensure_future(_fails(receiver, "fields"))
            await asyncio.sleep(0)  # it waits from here on
            send.interrupt()
            error = await waiting
            sent = await send.end()
        assert isinstance(error, Cancelled)
        assert sent.code == 130
        assert sent.errors.endswith("aiomm: interrupted\n")


async def test_send_tells_of_a_receiver_that_closes(by_fields: Path) -> None:
    async with _full() as receiver:
        sending = ("send", str(by_fields), "--connect", str(receiver.address))
        async with command(*sending) as send:
            await until(lambda: _requests_waiting(receiver) == 1, "the file waits for blocks")
            await receiver.aclose()
            sent = await send.end()
    assert sent.code == 1
    assert "fields.safetensors: PoolClosed: " in sent.errors


@asynccontextmanager
async def _full() -> AsyncIterator[Receiver]:
    """A receiver whose blocks are all granted to one transfer that never sends."""
    async with Receiver(WHOLE_FILE, bind=HERE, blocks=8) as receiver, Sender(WHOLE_FILE) as sender:
        await sending_state(sender.claim("holds every block", to=receiver.address, timeout=60))
        yield receiver


def _requests_waiting(receiver: Receiver) -> int:
    return receiver.metrics()["requests_waiting_for_blocks"]


async def _fails(receiver: Receiver, request_id: str) -> BaseException | None:
    try:
        (await receiver.receive(request_id, timeout=60)).release()
    except Exception as exc:
        return exc
    return None
