"""Planes that carry notes: the word of what was written travels with the bytes."""

from __future__ import annotations

import asyncio
import logging

import pytest

from aiomm import TransferTimeout
from aiomm.protocol import frames
from aiomm.protocol.session import Session

from .support import error_of, granted, pair, same, tensors_of

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


async def test_a_note_that_makes_no_sense_costs_only_its_transfer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The receiver says so once for each, and others arrive."""
    async with pair(planes="tcp") as (receiver, sender):
        with monkeypatch.context() as broken, caplog.at_level(logging.WARNING):
            broken.setattr(Session, "note", lambda *_: b"nonsense")
            transfer = sender.send(receiver.expect("r", timeout=0.5), tensors_of(20), timeout=0.5)
            assert isinstance(await error_of(transfer), TransferTimeout)
            assert "refuses a note over link 1: malformed packet of 8 bytes" in caplog.text
        sending = asyncio.ensure_future(sender.send(receiver.expect("s"), tensors_of(20)))
        async with receiver.receive("s") as lease:
            assert same(lease, tensors_of(20))
        await sending
