"""Planes that carry notes: the word of what was written travels with the bytes."""

from __future__ import annotations

import asyncio
import logging

import pytest

from aiomm import Cancelled, TransferTimeout
from aiomm.planes.tcp import receiving
from aiomm.protocol import frames
from aiomm.protocol.session import Session

from .support import error_of, granted, pair, same, tensors_of, until

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[frames.Frame]:
    """Return what both sides send over their control channels from now on."""
    frames_sent: list[frames.Frame] = []
    send = Session.send

    def noticed(session: Session, frame: frames.Frame) -> None:
        frames_sent.append(frame)
        send(session, frame)

    monkeypatch.setattr(Session, "send", noticed)
    return frames_sent


@pytest.mark.parametrize("checksum", [False, True])
async def test_no_frame_tells_what_a_note_has_told(
    sent: list[frames.Frame], checksum: bool
) -> None:
    """Of several chunks, and everything arrives; over shm there are no notes."""
    for planes, has_notes in (("tcp", True), ("shm", False)):
        sent.clear()
        async with pair(planes=planes, sender={"checksum": checksum}) as (receiver, sender):
            transfer = await granted(sender.claim(receiver.expect("r")))
            transfer.send(tensors_of(200))
            async with receiver.receive("r") as lease:
                assert same(lease, tensors_of(200))
                assert lease.stats.plane == planes
            stats = await transfer
            assert stats.num_tokens == 200
            assert len(stats.buffered_chunks) > 2
            assert any(isinstance(frame, frames.Written) for frame in sent) != has_notes


async def test_notes_that_make_no_sense_cost_only_their_transfers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The receiver says so once for each link, and others arrive."""
    async with pair(planes="tcp") as (receiver, sender):
        with monkeypatch.context() as broken, caplog.at_level(logging.WARNING):
            broken.setattr(Session, "note", lambda *_: b"nonsense")
            for name in "ab":
                ticket = receiver.expect(name, timeout=0.3)
                transfer = sender.send(ticket, tensors_of(20), timeout=0.3)
                assert isinstance(await error_of(transfer), TransferTimeout)
            complaint = "refuses a note over link 1: malformed packet of 8 bytes"
            assert caplog.text.count(complaint) == 1
        sending = asyncio.ensure_future(sender.send(receiver.expect("s"), tensors_of(20)))
        async with receiver.receive("s") as lease:
            assert same(lease, tensors_of(20))
        await sending
        driver = receiver._driver
        forgotten = until(lambda: not driver._links, driver, "parted")
        await asyncio.gather(forgotten, sender.aclose())
        assert not driver._complained


async def test_a_transfer_that_was_cancelled_is_not_received_with_other_bytes() -> None:
    """Its tensor changes as soon as it is over, whenever that is."""
    outcomes = set()
    async with pair(planes="tcp", blocks=64, block_size=64, default_blocks=64) as (
        receiver,
        sender,
    ):
        for turns in range(25):
            sent, original = tensors_of(4000, turns), tensors_of(4000, turns)
            name = f"r{turns}"
            transfer = await granted(sender.claim(receiver.expect(name)))
            transfer.send(sent)
            receiving = asyncio.ensure_future(receiver.receive(name))
            for _ in range(turns):
                await asyncio.sleep(0)
            transfer.cancel()
            for tensor in sent.values():
                tensor.zero_()
            try:
                with await receiving as lease:
                    outcomes.add("received")
                    assert same(lease, original)
            except Cancelled:
                outcomes.add("cancelled")
    assert outcomes == {"received", "cancelled"}


@pytest.mark.both_loops
async def test_a_close_before_the_planes_own_answer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The transfer is accepted, so nobody waits for it, or connects anew for it."""
    async with pair(planes="tcp") as (receiver, sender):
        await sender.send(receiver.expect("first"), tensors_of(20))
        with caplog.at_level(logging.WARNING):
            monkeypatch.setattr(receiving, "encode_answer", lambda _: b"")
            await sender.send(receiver.expect("last"), tensors_of(20))
            assert sender._driver._tasks
            await sender.aclose()
            await receiver.aclose()
    assert not caplog.records
