"""When packets leave: at once, or behind the turn of a user who has just been answered."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from unittest.mock import Mock

import pytest
import torch

from aiomm import PoolClosed, Receiver, Schema
from aiomm._driver import outbox
from aiomm._driver.outbox import Outbox
from aiomm.control.base import Channel, Peer
from aiomm.errors import Failure
from aiomm.protocol.commands import Transmit
from aiomm.protocol.frames import Frame, Goodbye, decode
from aiomm.protocol.session import Path
from aiomm.types import Field

from .support import error_of, granted, pair

pytestmark = pytest.mark.both_loops


class Story:
    """An outbox, and what happens one after the other."""

    def __init__(self) -> None:
        self.outbox = Outbox()
        self.told: list[str] = []
        self.channel = Mock(Channel, send=lambda _, packet: self.told.append(packet.decode()))

    def send(self, packet: str) -> None:
        path = Path(1, self.channel, Mock(Peer))
        self.outbox.send(Transmit(path, packet.encode()))

    def answer_user(self, turn: Callable[[], None] = lambda: None) -> None:
        """Do what a driver does in one pump that wakes a user and then says so."""

        def user() -> None:
            self.told.append("user")
            turn()

        asyncio.get_running_loop().call_soon(user)
        self.outbox.user_answered()
        self.send("accepted")
        self.outbox.next_turn()


async def turns() -> None:
    for _ in range(2):
        await asyncio.sleep(0)


@pytest.fixture
async def story(monkeypatch: pytest.MonkeyPatch) -> Story:
    """One whose user has been quick once, however slow this machine is."""
    monkeypatch.setattr(outbox, "QUICK_SECONDS", 100.0)
    story = Story()
    story.answer_user()
    await turns()
    assert story.told == ["accepted", "user"]
    story.told.clear()
    return story


async def test_packets_leave_at_once(story: Story) -> None:
    story.send("a")
    story.outbox.next_turn()
    assert story.told == ["a"]


async def test_users_who_are_answered_go_first(story: Story) -> None:
    """Also what is said meanwhile waits, so that packets keep their order."""
    story.answer_user(turn=lambda: story.send("released"))
    story.answer_user()
    assert story.told == []
    await turns()
    assert story.told == ["user", "accepted", "accepted", "released", "user"]
    story.send("later")
    assert story.told[-1] == "later"


async def test_who_keeps_the_loop_holds_no_packet_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the first turn, and not in those that follow a slow one for ten seconds."""
    story, clock = Story(), Mock(return_value=100.0)
    monkeypatch.setattr(outbox, "time", Mock(monotonic=clock))

    def work(seconds: float) -> Callable[[], None]:
        return lambda: setattr(clock, "return_value", clock.return_value + seconds)

    held, at_once = ["user", "accepted"], ["accepted", "user"]
    for passed, seconds, order in (
        (0.0, 60.0, at_once),  # it loads a model
        (1.0, 0.0, at_once),
        (8.0, 0.0, at_once),
        (2.0, 0.001, at_once),  # now it is known to be quick
        (0.0, 0.001, held),
        (0.0, 0.050, held),
        (0.0, 0.0, at_once),
        (9.0, 0.050, at_once),
        (9.0, 0.0, at_once),
        (2.0, 0.0, at_once),
        (0.0, 0.0, held),
    ):
        clock.return_value += passed
        story.answer_user(work(seconds))
        await turns()
        assert story.told == order
        story.told.clear()


async def test_what_is_held_can_be_sent_at_once(story: Story) -> None:
    story.answer_user()
    story.outbox.flush()
    story.send("goodbye")
    assert story.told == ["accepted", "goodbye"]
    await turns()
    assert story.told == ["accepted", "goodbye", "user"]


async def test_a_packet_that_cannot_be_sent_costs_no_other(
    story: Story, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Path(1, Mock(Channel, send=Mock(side_effect=ZeroDivisionError)), Mock(Peer))
    story.outbox.user_answered()
    story.outbox.send(Transmit(broken, b"broken"))
    story.answer_user()
    await turns()
    assert story.told == ["user", "accepted"]
    assert "a packet could not be sent" in caplog.text


@pytest.mark.parametrize("is_closed_at_once", [False, True])
async def test_a_receivers_await_returns_before_its_sender_is_told(
    is_closed_at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sender is told in any case, also by one who closes in that very turn."""
    monkeypatch.setattr(outbox, "QUICK_SECONDS", 100.0)
    story = list[str]()
    rows = torch.zeros(3, 64, dtype=torch.uint8)

    async def receive(receiver: Receiver) -> None:
        lease = await receiver.receive("r")
        story.append("user")
        lease.release()
        if is_closed_at_once:
            await receiver.aclose()

    async with pair(Schema(x=Field("uint8", 64))) as (receiver, sender):
        warm = await granted(sender.claim(receiver.expect("warm")))
        warm.send({"x": rows})
        async with receiver.receive("warm"):
            await warm  # by now they talk over their stream
        transfer = await granted(sender.claim(receiver.expect("r")))
        receiving = asyncio.create_task(receive(receiver))
        await asyncio.sleep(0)
        stream = receiver._driver.stream
        assert stream is not None
        send = stream.send

        def noted(peer: Peer, packet: bytes) -> bool:
            story.append("packet")
            return send(peer, packet)

        monkeypatch.setattr(stream, "send", noted)
        transfer.send({"x": rows})
        await transfer
        await receiving
    assert story[:2] == ["user", "packet"]


async def test_who_closes_says_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user was answered in the same turn of the loop in which the last word is said."""
    said = list[Frame]()
    async with pair() as (receiver, sender):
        transfer = await granted(sender.claim(receiver.expect("r")))
        driver = receiver._driver
        say_goodbye = driver.endpoint.say_goodbye

        def answered_meanwhile(failure: Failure) -> None:
            monkeypatch.setattr(driver.outbox, "_is_quick", True)
            driver.outbox.user_answered()
            say_goodbye(failure)

        monkeypatch.setattr(driver.endpoint, "say_goodbye", answered_meanwhile)
        for channel in (driver.stream, driver.channel):
            assert channel is not None
            monkeypatch.setattr(channel, "send", noting(said, channel.send))
        await receiver.aclose()
        assert isinstance(await error_of(transfer), PoolClosed)
    assert isinstance(said[-1], Goodbye)


def noting(said: list[Frame], send: Callable[[Peer, bytes], bool]) -> Callable[[Peer, bytes], bool]:
    """Return a function that sends, if the channel is still open, and notes what."""

    def noted(peer: Peer, packet: bytes) -> bool:
        sent = send(peer, packet)
        if sent:
            said.append(decode(packet).frame)
        return sent

    return noted
