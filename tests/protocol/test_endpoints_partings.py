"""Who is turned away, and how links end: lost, dead, or gone."""

from __future__ import annotations

import pytest

from aiomm.errors import Failure, ProtocolError, Reason
from aiomm.protocol import frames
from aiomm.protocol.frames import Goodbye, Packet, encode
from aiomm.protocol.session import Path
from aiomm.types import TransferId

from .pairs import KEY, Pair, message, reason
from .receiving_process import Receiving
from .sending_process import Sending

_ID = TransferId("request", 1)


class TestLastWords:
    """What is said right before the end, and may be overtaken by it."""

    def test_why_a_transfer_has_failed_is_heard_before_the_end_of_its_sender(self) -> None:
        """Its abort is lost, or on a slower path: who waits still learns that it was cancelled."""
        pair = Pair()
        number = pair.receive()
        generation = pair.open(tokens=None)
        pair.wait(0.1)
        pair.world.faults.longest_delay = 0.0  # what goes one way comes in that order
        pair.world.faults.loss = 1.0
        pair.give_up(pair.sender, generation)
        pair.world.faults.loss = 0.0
        pair.sender.endpoint.say_goodbye(Failure(Reason.CLOSED, "the sender was closed"))
        pair.sender.pump()
        pair.wait(0.1)
        assert reason(pair.receiver, number) is Reason.CANCELLED
        pair.check_settled()


class TestTurnedAway:
    """Who is refused, and that it harms nobody else."""

    def test_garbage_is_answered_once(self) -> None:
        """Raised for the driver's log; the link with others goes on."""
        pair = Pair()
        pair.meet()
        for _ in range(3):
            with pytest.raises(ProtocolError):
                pair.receiver.packets_received("stranger", b"GET / HTTP/1.1")
        assert len(pair.receiver.endpoint.commands(pair.now)) == 1
        assert pair.receiver.endpoint.counters["malformed"] == 3
        pair.receiver.endpoint.path_lost(pair.receiver.path_to("stranger"), "gone", pair.now)
        number = pair.open()
        pair.wait()
        assert reason(pair.sender, number) is None

    def test_garbage_over_a_path_used_again_is_answered_again(self) -> None:
        """Another peer is there now."""
        pair = Pair()
        for _ in range(2):
            with pytest.raises(ProtocolError):
                pair.receiver.packets_received("stranger", b"GET / HTTP/1.1")
            assert len(pair.receiver.endpoint.commands(pair.now)) == 1
            pair.receiver.endpoint.path_lost(pair.receiver.path_to("stranger"), "gone", pair.now)

    def test_another_version_is_named(self) -> None:
        """The side that spoke first learns which version the other speaks."""
        pair = Pair()
        number = pair.open()
        newer = b"\x96\x02" + encode(Packet(1, 9, 0, 0, 0, frames.Ack()))[2:]
        with pytest.raises(ProtocolError, match="version 2"):
            pair.sender.endpoint.packet_received(pair.sender.path_to("receiver"), newer, 0.0)
        pair.sender.pump()
        assert message(pair.sender, number) == "peer speaks protocol version 2, this side 1"
        assert reason(pair.sender, number) is Reason.PROTOCOL

    def test_a_hello_that_the_peer_cannot_read(self) -> None:
        """The peer's answer to nobody in particular ends the contact."""
        pair = Pair()
        pair.world.at_address.pop("receiver")
        number = pair.open()
        no = Packet(1, 77, 0, 0, 0, Goodbye(Reason.PROTOCOL, "malformed packet"))
        pair.inject_packet(no, pair.receiver, pair.sender)
        assert message(pair.sender, number) == "malformed packet"
        pair.inject_packet(no, pair.receiver, pair.sender)

    def test_too_many_peers(self) -> None:
        """The next one is told that this side is busy, which may pass."""
        pair = Pair()
        pair.receiver.crash()
        Receiving(pair.world, "receiver", blocks=4, max_peers=1)
        pair.meet()
        other = Sending(pair.world, "other")
        core = other.endpoint.open(
            "other", timeout=30.0, now=pair.now, path=other.path_to("receiver")
        )
        other.pump()
        pair.wait()
        assert reason(other, core.id.generation) is Reason.BUSY

    def test_too_many_peers_for_the_one_who_calls(self) -> None:
        """The limit holds for contacts of its own, too."""
        pair = Pair()
        sender = Sending(pair.world, "other", max_peers=0)
        core = sender.endpoint.open("x", timeout=9.0, now=0.0, path=sender.path_to("receiver"))
        sender.pump()
        pair.wait()
        assert reason(sender, core.id.generation) is Reason.BUSY

    def test_too_many_peers_for_who_was_asked_to_redeem(self) -> None:
        """The sender that is knocked at says Hello first, and has no place for the answer."""
        pair = Pair()
        pair.sender.crash()
        pair.sender = Sending(pair.world, "sender", max_peers=1)
        pair.meet()
        pair.offer("x")
        other = Receiving(pair.world, "other", blocks=4)
        number = other.endpoint.redeem(
            "x", KEY, path=other.path_to("sender"), life=0, timeout=30.0, now=pair.now
        )
        other.pump()
        pair.wait()
        assert reason(other, number) is Reason.BUSY

    def test_a_late_refusal_does_not_end_a_link(self) -> None:
        """It was said to a first contact, and there is none any more."""
        pair = Pair()
        pair.meet()
        busy = Packet(1, pair.receiver.epoch, 0, 0, 0, Goodbye(Reason.BUSY, "too many"))
        pair.inject_packet(busy, pair.receiver, pair.sender)
        assert pair.sender.parted == []
        assert pair.receiver.epoch in pair.sender.endpoint.sessions

    def test_a_lost_peer_makes_room(self) -> None:
        """For a new one, if nothing is open with it. When it comes back, it is told."""
        pair = Pair()
        pair.receiver.crash()
        pair.receiver = Receiving(pair.world, "receiver", blocks=4, max_peers=1)
        pair.meet()
        receiver, old = pair.receiver.endpoint, pair.sender
        receiver.path_lost(pair.receiver.path_to("sender"), "cut", pair.now)
        pair.sender = Sending(pair.world, "other")
        pair.meet()
        assert list(receiver.sessions) == [pair.sender.epoch]
        assert [part.proven for part in pair.receiver.parted] == [False, True]
        number = pair.redeem(life=old.epoch)
        pair.wait()
        assert message(pair.receiver, number).endswith("to make room for others: max_peers")
        first = old.endpoint.open("x", timeout=9.0, now=pair.now, path=old.path_to("receiver"))
        old.pump()
        pair.wait()
        assert "this link has ended" in message(old, first.id.generation)
        second = old.endpoint.open("y", timeout=9.0, now=pair.now, path=old.path_to("receiver"))
        old.pump()
        pair.wait()
        assert "this link has ended" in message(old, second.id.generation)
        goodbye = Packet(1, old.epoch, pair.receiver.epoch, 0, 0, Goodbye(Reason.CLOSED, "bye"))
        pair.inject_packet(goodbye, old, pair.receiver)

    def test_a_peer_that_was_given_up_is_contacted_again(self) -> None:
        """It still has the link: it is told, and the contact ends, now and the next time."""
        pair = Pair()
        pair.receiver.crash()
        pair.receiver = Receiving(pair.world, "receiver", blocks=4, max_peers=1)
        pair.meet()
        path = pair.receiver.path_to("sender")
        pair.receiver.endpoint.path_lost(path, "cut", pair.now)
        given_up, pair.sender = pair.sender, Sending(pair.world, "other")
        pair.meet()
        for _ in range(2):
            number = pair.redeem(key=b"")
            pair.wait(3.0)
            assert "this link has ended" in message(pair.receiver, number)
        assert given_up.endpoint.sessions == {}
        pair.check_settled()

    def test_a_lost_receiver_makes_room_at_the_sender(self) -> None:
        """The same on the other side, and only for a receiver without transfers."""
        pair = Pair()
        pair.sender.crash()
        pair.sender = Sending(pair.world, "sender", max_peers=1)
        other = Receiving(pair.world, "other", blocks=4)
        first = pair.open(tokens=None)
        pair.wait()
        pair.sender.endpoint.path_lost(pair.sender.path_to("receiver"), "cut", pair.now)
        second = pair.open(to="other")
        pair.wait()
        assert reason(pair.sender, first) is Reason.PEER_LOST
        assert reason(pair.sender, second) is None
        assert list(pair.sender.endpoint.sessions) == [other.epoch]

    def test_a_lost_peer_with_open_transfers_keeps_its_place(self) -> None:
        """What it may still write must not be forgotten."""
        pair = Pair()
        pair.receiver.crash()
        pair.receiver = Receiving(pair.world, "receiver", blocks=4, max_peers=1)
        pair.open(tokens=None)
        pair.wait()
        pair.receiver.endpoint.path_lost(pair.receiver.path_to("sender"), "cut", pair.now)
        pair.receiver.pump()
        old, pair.sender = pair.sender, Sending(pair.world, "other")
        pair.meet()
        assert list(pair.receiver.endpoint.sessions) == [old.epoch]

    def test_frames_to_nobody_are_not_applied(self) -> None:
        """Only a Hello and a refusal may address no life."""
        pair = Pair()
        pair.meet()
        stray = Packet(1, pair.sender.epoch, 0, 1, 0, frames.Offer(_ID, b"", 0, 1, b"", 1.0))
        pair.inject_packet(stray, pair.sender, pair.receiver)
        assert pair.receiver.endpoint.counters["of_no_session"] == 1
        assert pair.receiver.endpoint.numbers() == []

    def test_frames_of_the_wrong_side_are_counted(self) -> None:
        """A receiver's frame to a receiver, or a sender's to a sender."""
        pair = Pair()
        pair.meet()
        pair.inject(pair.sender, frames.Accepted(_ID), to=pair.receiver, sequence=1)
        pair.inject(pair.receiver, frames.AbortAck(_ID), to=pair.sender, sequence=1)
        assert pair.receiver.endpoint.counters["unexpected"] == 1
        assert pair.sender.endpoint.counters["unexpected"] == 1


class TestFarewell:
    """Lost, dead, or gone."""

    def test_goodbye_proves_that_nothing_can_land(self) -> None:
        """The sender closes: its transfers fail at once, and the blocks are free at once."""
        pair = Pair()
        number = pair.expect()
        pair.claim(tokens=None)
        pair.wait()
        pair.sender.endpoint.say_goodbye(Failure(Reason.CLOSED, "the sender was closed"))
        pair.sender.pump()
        pair.wait(0.02)
        assert reason(pair.receiver, number) is Reason.CLOSED
        assert pair.receiver.pool.num_free == 8
        assert [part.proven for part in pair.receiver.parted] == [True]

    def test_goodbye_of_a_peer_that_was_never_greeted(self) -> None:
        """Whoever tries to contact it need not try on."""
        pair = Pair()
        pair.world.at_address.pop("receiver")
        number = pair.open()
        pair.inject(pair.receiver, Goodbye(Reason.CLOSED, "closed"), to=pair.sender)
        pair.inject(pair.receiver, Goodbye(Reason.CLOSED, "closed"), to=pair.sender)
        assert reason(pair.sender, number) is Reason.CLOSED
        other = Pair()
        other.inject(other.receiver, Goodbye(Reason.CLOSED, "closed"), to=other.sender)
        assert other.sender.endpoint.has_ended(other.receiver.epoch)

    def test_a_lost_path_is_no_proof(self) -> None:
        """The request fails at once, but its blocks wait for the sender's word."""
        pair = Pair()
        number = pair.expect()
        pair.claim(tokens=None)
        pair.wait()
        pair.receiver.endpoint.path_lost(pair.receiver.path_to("sender"), "cut", pair.now)
        pair.receiver.pump()
        assert reason(pair.receiver, number) is Reason.PEER_LOST
        assert pair.receiver.pool.num_free < 8
        pair.wait(2.0)
        assert pair.receiver.pool.num_free == 8

    def test_one_of_two_paths_is_lost(self) -> None:
        """Nothing happens: the other one is used."""
        pair = Pair()
        pair.meet()
        stream = Path(1, "stream", "receiver")
        pair.sender.endpoint.use_path(pair.receiver.epoch, stream)
        pair.sender.endpoint.path_lost(stream, "broken", pair.now)
        assert pair.sender.parted == []
        number = pair.open()
        pair.wait()
        assert reason(pair.sender, number) is None

    def test_nobody_is_there(self) -> None:
        """The path breaks before anybody has answered: the transfer fails with the cause."""
        pair = Pair()
        pair.world.at_address.clear()
        sent, asked = pair.open(), pair.redeem()
        elsewhere = pair.open(to="elsewhere"), pair.receive("elsewhere")
        pair.sender.endpoint.path_lost(pair.sender.path_to("receiver"), "refused", 0.0)
        pair.receiver.endpoint.path_lost(pair.receiver.path_to("sender"), "refused", 0.0)
        pair.sender.pump()
        pair.receiver.pump()
        assert message(pair.sender, sent) == message(pair.receiver, asked) == "refused"
        assert elsewhere[0] not in pair.sender.outcomes
        assert elsewhere[1] not in pair.receiver.outcomes

    def test_nobody_is_there_any_more_where_somebody_was_asked(self) -> None:
        """What was asked already goes on: that sender is reached another way by now."""
        pair = Pair()
        number = pair.redeem(key=b"")
        pair.wait()
        path, endpoint = pair.receiver.path_to("sender"), pair.receiver.endpoint
        endpoint.use_path(pair.sender.epoch, Path(1, "stream", "sender"))
        endpoint.path_lost(path, "cut", pair.now)
        endpoint.contact(path, pair.now)
        endpoint.path_lost(path, "refused", pair.now)
        pair.receiver.pump()
        assert number not in pair.receiver.outcomes
        pair.open(to=None)
        pair.wait()
        assert reason(pair.receiver, number) is None

    def test_silence(self) -> None:
        """A peer that stops answering is lost after a while, and welcome when it speaks again."""
        pair = Pair()
        first = pair.open(tokens=None)
        pair.wait()
        pair.receiver.pause(10.0)
        pair.wait(6.0)
        assert "has not answered for 4 s" in message(pair.sender, first)
        pair.wait(6.0)
        second = pair.open()
        pair.wait()
        assert reason(pair.sender, second) is None
        assert len(pair.sender.parted) == 1

    def test_a_redemption_of_who_had_lost_the_sender_is_not_served(self) -> None:
        """It would take the transfer from the one that asks again."""
        pair = Pair()
        pair.meet()
        pair.sender.pause(6.0)
        first = pair.redeem("x", b"")
        pair.wait(7.0)
        assert reason(pair.receiver, first) is Reason.PEER_LOST
        second = pair.redeem("x", b"")
        pair.wait()
        generation = pair.open("x", to=None)
        pair.wait()
        assert reason(pair.sender, generation) is None
        assert reason(pair.receiver, second) is None

    def test_a_redemption_that_the_sender_has_dropped_is_refused(self) -> None:
        """Only the sender has seen the loss: whoever asked must not wait until its deadline."""
        pair = Pair()
        pair.meet()
        number = pair.redeem("x", b"")
        pair.wait()
        pair.sender.endpoint.path_lost(pair.sender.path_to("receiver"), "cut", pair.now)
        pair.sender.pump()
        pair.meet()
        assert reason(pair.receiver, number) is Reason.PEER_LOST
        assert message(pair.receiver, number) == "cut"

    def test_who_was_lost_and_speaks_again_gets_what_waits_for_anybody(self) -> None:
        """A transfer that passed it over while it was silent."""
        pair = Pair(takes_any=True)
        pair.meet()
        generation = pair.open("before", tokens=None, to=None)
        pair.wait()
        pair.receiver.pause(6.0)
        pair.wait(5.0)
        assert reason(pair.sender, generation) is Reason.PEER_LOST
        waiting = pair.open("meanwhile", to=None)
        pair.wait(0.1)
        assert waiting not in pair.sender.outcomes
        pair.wait(3.0)
        assert pair.sender.outcomes[waiting] is None

    def test_silence_and_then_a_lost_path(self) -> None:
        """The peer is lost once."""
        pair = Pair()
        pair.open(tokens=None)
        pair.wait()
        pair.receiver.pause(10.0)
        pair.wait(6.0)
        pair.sender.endpoint.path_lost(pair.sender.path_to("receiver"), "cut", pair.now)
        pair.sender.pump()
        assert len(pair.sender.parted) == 1

    def test_a_peer_without_a_path_cannot_be_used(self) -> None:
        """Transfers towards its life fail at once."""
        pair = Pair()
        pair.meet()
        pair.sender.endpoint.path_lost(pair.sender.path_to("receiver"), "cut", pair.now)
        pair.receiver.endpoint.path_lost(pair.receiver.path_to("sender"), "cut", pair.now)
        sent = pair.open(to=None, life=pair.receiver.epoch)
        asked = pair.receiver.endpoint.redeem(
            "x", b"", path=None, life=pair.sender.epoch, timeout=9.0, now=pair.now
        )
        pair.receiver.pump()
        assert reason(pair.sender, sent) is Reason.PEER_LOST
        assert reason(pair.receiver, asked) is Reason.PEER_LOST

    def test_death_of_somebody_unknown(self) -> None:
        """It is noted, and that is all."""
        pair = Pair()
        pair.sender.endpoint.peer_died(99, 0.0)
        assert pair.sender.endpoint.commands(0.0) == []
