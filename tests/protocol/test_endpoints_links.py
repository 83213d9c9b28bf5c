"""First contact, and other lives at the same address."""

from __future__ import annotations

import pytest

from aiomm.errors import Reason
from aiomm.protocol import frames
from aiomm.protocol.frames import Goodbye, Packet
from aiomm.protocol.session import Contact, Path
from aiomm.types import TransferId

from .pairs import KEY, Pair, message, reason
from .receiving_process import Receiving
from .sending_process import Sending
from .world import World

_ID = TransferId("request", 1)


class TestFirstContact:
    """Either side may speak first; there is one link in the end."""

    def test_the_sender_speaks_first(self) -> None:
        """One Hello each way."""
        pair = Pair()
        pair.meet()
        assert pair.sender.greeted == [pair.receiver.epoch]
        assert pair.receiver.greeted == [pair.sender.epoch]

    def test_the_receiver_speaks_first(self) -> None:
        """It knocks; the sender makes the contact."""
        pair = Pair()
        pair.receiver.endpoint.contact(pair.receiver.path_to("sender"), 0.0)
        pair.receiver.pump()
        pair.wait()
        assert pair.sender.greeted == [pair.receiver.epoch]
        assert pair.receiver.greeted == [pair.sender.epoch]

    @pytest.mark.parametrize("seed", range(20))
    def test_both_at_once_make_one_link(self, seed: int) -> None:
        """With one number for it, known to both, whatever crosses on the way."""
        pair = Pair(seed=seed)
        for process, other in ((pair.sender, "receiver"), (pair.receiver, "sender")):
            process.endpoint.contact(process.path_to(other), 0.0)
            process.pump()
        pair.wait()
        (here,) = pair.sender.endpoint.sessions.values()
        (there,) = pair.receiver.endpoint.sessions.values()
        assert here.peer_hello.link == there.hello.link > 0
        assert pair.sender.greeted == [pair.receiver.epoch]

    def test_who_does_not_answer_is_looked_at_when_it_is_due(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And not with every packet of somebody else's: there may be hundreds."""
        pair = Pair()
        pair.meet()
        for number in range(3):
            pair.sender.endpoint.contact(pair.sender.path_to(f"nobody-{number}"), pair.now)
        pair.sender.pump()
        looked_at: list[float] = []
        original = Contact.packets

        def packets(self: Contact, now: float) -> list[bytes]:
            looked_at.append(now)
            return original(self, now)

        monkeypatch.setattr(Contact, "packets", packets)
        pair.expect()
        pair.claim()
        pair.wait(0.1)
        assert looked_at == []
        pair.wait(0.2)
        assert len(looked_at) >= 3

    def test_a_contact_goes_on_at_another_path(self) -> None:
        """Whoever waits for it, and for as long; at the old one nobody is waited for any more."""
        pair = Pair()
        generation = pair.open("request", to="gone", timeout=5.0)
        endpoint, old = pair.sender.endpoint, pair.sender.path_to("gone")
        assert endpoint.says_hello(old)
        endpoint.redirect(old, pair.sender.path_to("receiver"), pair.now)
        endpoint.path_lost(old, "it is gone", pair.now)
        pair.sender.pump()
        number = pair.receive("request")
        pair.wait()
        assert pair.sender.outcomes[generation] is None
        assert pair.receiver.outcomes[number] is None

    def test_who_is_never_there_is_left_when_nobody_waits_any_more(self) -> None:
        """The last one counts; whoever comes later makes contact anew."""
        pair = Pair()
        pair.open("a", to="nobody", timeout=8.0)
        pair.open("b", to="nobody", timeout=5.0)
        pair.wait(7.9)
        assert pair.sender.left == []
        pair.wait(0.2)
        nobody = pair.sender.path_to("nobody")
        assert pair.sender.left == [nobody]
        assert not pair.sender.endpoint.leads_somewhere(nobody)
        pair.open("c", to="nobody", timeout=5.0)
        assert pair.sender.endpoint.leads_somewhere(nobody)
        pair.wait(5.1)
        assert pair.sender.left == [nobody, nobody]

    def test_a_receiver_leaves_a_sender_that_is_never_there(self) -> None:
        """When its redemption has timed out."""
        pair = Pair()
        pair.sender.crash()
        pair.redeem(timeout=5.0)
        pair.wait(5.1)
        assert pair.receiver.left == [pair.receiver.path_to("sender")]

    def test_a_standing_contact_is_never_left(self) -> None:
        """Whoever is contacted for ever may be late."""
        pair = Pair()
        path = pair.sender.path_to("nobody")
        pair.sender.endpoint.contact(path, 0.0)
        pair.open(to="nobody", timeout=5.0)
        pair.wait(1000.0)
        assert pair.sender.left == []
        assert pair.sender.endpoint.leads_somewhere(path)

    def test_a_second_contact_over_another_way_joins_the_link(self) -> None:
        """The answer comes over the way that was asked, so the contact ends."""
        pair = Pair()
        pair.meet()
        other_way = Path(0, "network", "receiver")
        pair.sender.endpoint.path_lost(other_way, "cut", pair.now)
        number = pair.open()
        pair.wait()
        assert reason(pair.sender, number) is None
        assert len(pair.sender.endpoint.sessions) == 1
        pair.check_settled()

    def test_a_receiver_that_has_a_link_knocks_over_another_way(self) -> None:
        """It is answered over that way, although a better one exists."""
        pair = Pair()
        pair.meet()
        session = pair.receiver.endpoint.sessions[pair.sender.epoch]
        pair.receiver.endpoint.use_path(pair.sender.epoch, Path(1, "stream", "sender"))
        pair.receiver.endpoint.path_lost(pair.receiver.path_to("sender"), "cut", pair.now)
        pair.receiver.endpoint.contact(pair.receiver.path_to("sender"), pair.now)
        pair.receiver.pump()
        pair.wait()
        assert pair.receiver.path_to("sender") in session.paths

    def test_hello_is_repeated_until_it_is_answered(self) -> None:
        """Nobody is there yet; then somebody is."""
        world = World(0)
        sender = Sending(world, "sender")
        sender.endpoint.contact(sender.path_to("receiver"), 0.0)
        sender.pump()
        world.run(5.0)
        assert sender.greeted == []
        receiver = Receiving(world, "receiver", blocks=1)
        world.run(10.0)
        assert sender.greeted == [receiver.epoch]

    def test_frames_that_overtake_the_hello(self) -> None:
        """They are not lost: they come again when the link stands."""
        pair = Pair(takes_any=True)
        pair.open(to=None)
        pair.receiver.endpoint.contact(pair.receiver.path_to("sender"), 0.0)
        pair.receiver.pump()
        pair.wait()
        assert [len(each.content) for each in pair.receiver.delivered.values()] == [10]

    def test_a_link_that_one_side_does_not_know_of(self) -> None:
        """The Hello went one way only, then the way broke: the first frame makes the link whole."""
        pair = Pair()
        hello = Packet(1, pair.sender.epoch, 0, 0, 0, pair.sender.endpoint.hello)
        pair.inject_packet(hello, pair.sender, pair.receiver)
        pair.world.at_address.pop("sender")
        pair.wait()
        pair.world.at_address["sender"] = pair.sender
        assert pair.sender.greeted == []
        number = pair.redeem(key=b"")
        pair.open(to=None)
        pair.wait(3.0)
        assert reason(pair.receiver, number) is None

    def test_two_senders_are_no_pair(self) -> None:
        """The one that wants to send learns why not."""
        pair = Pair()
        pair.world.at_address["receiver"] = Sending(pair.world, "receiver")
        number = pair.open()
        pair.wait()
        assert "is no receiver" in message(pair.sender, number)

    def test_two_receivers_are_no_pair(self) -> None:
        """The one that wants to receive learns why not."""
        pair = Pair()
        Receiving(pair.world, "sender", blocks=1)
        number = pair.redeem()
        pair.wait()
        assert "is no sender" in message(pair.receiver, number)

    def test_probes_travel(self) -> None:
        """The sender asks whether its nonce arrived; later nobody is asked."""
        pair = Pair()
        pair.sender.endpoint.probe(99, "shm", b"n" * 16)
        pair.receiver.endpoint.probed(99, "shm", matched=True)
        pair.meet()
        pair.sender.endpoint.probe(pair.receiver.epoch, "shm", b"n" * 16)
        pair.sender.pump()
        pair.wait()
        assert [(each.plane, each.matched) for each in pair.sender.probed] == [("shm", True)]

    def test_another_way_is_used_as_well(self) -> None:
        """The driver has found a better one, and the peer learns of it by a packet."""
        pair = Pair()
        pair.meet()
        better = Path(1, "network", "receiver")
        pair.sender.endpoint.use_path(pair.receiver.epoch, better)
        pair.sender.endpoint.use_path(99, better)
        pair.sender.pump()
        assert pair.sender.endpoint.sessions[pair.receiver.epoch].paths[0] is better


class TestRestart:
    """Another life at the same address."""

    def test_the_receiver_begins_another_life(self) -> None:
        """The sender is told at once, and its next transfer goes to the new life."""
        pair = Pair()
        pair.meet()
        first = pair.open(tokens=None)
        pair.wait()
        pair.receiver.crash()
        new = Receiving(pair.world, "receiver", blocks=8)
        pair.ready(first, 10, 10)
        pair.wait()
        assert reason(pair.sender, first) is Reason.PEER_LOST
        second = pair.open()
        pair.wait()
        assert reason(pair.sender, second) is None
        assert len(new.delivered) == 1

    def test_the_sender_begins_another_life(self) -> None:
        """Its Hello over the same way ends what the old life had begun."""
        pair = Pair()
        number = pair.expect()
        pair.claim(tokens=None)
        pair.wait()
        pair.sender.crash()
        pair.sender = Sending(pair.world, "sender")
        pair.meet()
        assert reason(pair.receiver, number) is Reason.PEER_LOST
        assert pair.receiver.pool.num_free < 8
        pair.receiver.endpoint.peer_died(pair.receiver.parted[0].peer, pair.now)
        pair.receiver.pump()
        assert pair.receiver.pool.num_free == 8

    def test_frames_for_another_life_are_not_applied(self) -> None:
        """They are counted, and answered once each; goodbyes are not answered."""
        pair = Pair()
        pair.meet()
        old = Packet(1, pair.sender.epoch, 99, 1, 0, frames.Offer(_ID, b"", 0, 1, b"", 1.0))
        pair.inject_packet(old, pair.sender, pair.receiver)
        goodbye = Packet(1, pair.sender.epoch, 99, 0, 0, Goodbye(Reason.CLOSED, "bye"))
        pair.inject_packet(goodbye, pair.sender, pair.receiver)
        pair.wait()
        assert pair.receiver.endpoint.counters["of_another_life"] == 2
        assert pair.receiver.endpoint.numbers() == []
        assert pair.receiver.epoch in pair.sender.endpoint.sessions

    def test_a_late_hello_of_a_dead_life(self) -> None:
        """It begins nothing: that life is known to be over."""
        pair = Pair()
        hello = Packet(1, pair.sender.epoch, 0, 0, 0, pair.sender.endpoint.hello)
        pair.receiver.endpoint.peer_died(pair.sender.epoch, 0.0)
        pair.inject_packet(hello, pair.sender, pair.receiver)
        assert pair.receiver.endpoint.sessions == {}
        assert pair.receiver.endpoint.has_ended(pair.sender.epoch)
        assert pair.receiver.endpoint.counters["of_an_ended_life"] == 1

    def test_ended_lives_are_not_remembered_for_ever(self) -> None:
        """The oldest is forgotten when there are thousands."""
        receiver = Pair().receiver
        for life in range(100, 100 + 4097):
            receiver.endpoint.peer_died(life, 0.0)
        assert not receiver.endpoint.has_ended(100)
        assert receiver.endpoint.has_ended(101)

    @pytest.mark.parametrize("side", ["sender", "receiver"])
    def test_a_ticket_of_an_earlier_life(self, side: str) -> None:
        """Whoever bears it learns that it is void, however he gets in touch."""
        pair = Pair()
        if side == "receiver":
            number = pair.open(key=b"k" * 16, life=98)
            pair.wait()
            assert "void" in message(pair.sender, number)
        else:
            number = pair.redeem(life=98)
            pair.wait()
            assert "void" in message(pair.receiver, number)

    def test_a_ticket_without_an_address(self) -> None:
        """Its issuer only connects: whoever bears it waits until that life gets in touch."""
        pair = Pair()
        pair.offer("offered")
        pair.expect("expected")
        redeemed = pair.receiver.endpoint.redeem(
            "offered", KEY, path=None, life=pair.sender.epoch, timeout=9.0, now=0.0
        )
        claimed = pair.open("expected", key=KEY, life=pair.receiver.epoch, to=None)
        pair.meet()
        assert reason(pair.receiver, redeemed) is None
        assert reason(pair.sender, claimed) is None

    def test_a_ticket_of_a_life_that_is_known_to_be_over(self) -> None:
        """It fails at once, without contacting anybody."""
        pair = Pair()
        pair.sender.endpoint.peer_died(98, 0.0)
        pair.receiver.endpoint.peer_died(98, 0.0)
        assert "gone" in message(pair.sender, pair.open(life=98))
        assert "gone" in message(pair.receiver, pair.redeem(life=98))


def test_the_hello_of_a_receiver_names_link_and_planes() -> None:
    """Each link has its own; a knock has none."""
    pair = Pair()
    pair.meet()
    other = Sending(pair.world, "other")
    other.endpoint.contact(other.path_to("receiver"), pair.now)
    other.pump()
    pair.wait()
    links = [each.hello.link for each in pair.receiver.endpoint.sessions.values()]
    assert links == [1, 2]
