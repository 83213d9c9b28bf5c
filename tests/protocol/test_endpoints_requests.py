"""Which claim meets which request, and what becomes of each: two endpoints, no faults."""

from __future__ import annotations

import pytest

from aiomm.errors import Reason, Rejected
from aiomm.protocol import frames
from aiomm.protocol.states import State

from .pairs import GIVEN_UP, KEY, Pair, message, reason
from .receiving_process import Receiving


class TestTickets:
    """The receiver expects, the sender claims."""

    def test_claimed_before_the_length_is_known(self) -> None:
        """The default is granted while the encoder still runs."""
        pair = Pair()
        number = pair.expect()
        generation = pair.claim(tokens=None)
        pair.wait()
        assert pair.state(generation) is State.SENDING
        pair.sender.totals[generation] = 20
        pair.ready(generation, 20, 20)
        pair.wait()
        assert reason(pair.receiver, number) is reason(pair.sender, generation) is None
        assert len(pair.receiver.delivered[number].content) == 20
        pair.check_settled()

    def test_a_second_claim_is_refused(self) -> None:
        """The first one is not disturbed."""
        pair = Pair()
        pair.expect()
        first = pair.claim()
        second = pair.claim()
        pair.wait()
        assert reason(pair.sender, first) is None
        assert reason(pair.sender, second) is Reason.REJECTED
        pair.check_settled()

    def test_a_second_claim_while_the_first_goes_on(self) -> None:
        """It says what is wrong."""
        pair = Pair()
        pair.expect()
        pair.claim(tokens=None)
        second = pair.claim()
        pair.wait()
        assert message(pair.sender, second) == "request 'request' is claimed already"

    @pytest.mark.parametrize(
        ("key", "words"), [(b"x" * 16, "is not the current one"), (b"", "is missing")]
    )
    def test_a_wrong_key(self, key: bytes, words: str) -> None:
        """Knowing the request id is not enough; the right ticket still works."""
        pair = Pair()
        number = pair.expect()
        wrong = pair.open(key=key)
        pair.wait()
        assert words in message(pair.sender, wrong)
        pair.claim()
        pair.wait()
        assert reason(pair.receiver, number) is None

    def test_a_ticket_for_a_request_that_is_over(self) -> None:
        """It cannot bring the request back to life."""
        pair = Pair()
        number = pair.expect()
        pair.give_up(pair.receiver, number)
        generation = pair.claim()
        pair.wait()
        assert "is unknown: finished, given up, or never made" in message(pair.sender, generation)
        pair.check_settled()

    def test_a_ticket_for_a_request_whose_failure_nobody_has_asked_for(self) -> None:
        """The request is still known, and over all the same."""
        pair = Pair()
        pair.receiver.is_forgetful = True
        pair.world.random.random = lambda: 0.05  # type: ignore[method-assign]
        number = pair.expect()
        pair.give_up(pair.receiver, number)
        assert pair.receiver.endpoint.is_wanted(number)
        generation = pair.claim()
        pair.wait()
        assert "is unknown: finished, given up, or never made" in message(pair.sender, generation)

    def test_a_request_lives_until_it_ends(self) -> None:
        """Whoever writes into its blocks asks before."""
        pair = Pair()
        number = pair.expect()
        endpoint = pair.receiver.endpoint
        assert endpoint.is_live(number)
        pair.give_up(pair.receiver, number)
        assert not endpoint.is_live(number)
        assert not endpoint.is_live(number + 1)

    def test_a_request_id_is_expected_once(self) -> None:
        """Until it is over; then the id may be used again."""
        pair = Pair()
        number = pair.expect()
        with pytest.raises(Rejected, match="is in use"):
            pair.expect()
        pair.claim()
        pair.wait()
        assert reason(pair.receiver, number) is None
        again = pair.expect()
        pair.claim()
        pair.wait()
        assert again != number
        assert reason(pair.receiver, again) is None

    def test_receiving_what_is_expected(self) -> None:
        """It is the same request."""
        pair = Pair()
        assert pair.receive() == pair.receive()
        assert pair.expect("other") == pair.receive("other")

    def test_a_redemption_that_has_failed_asks_nobody(self) -> None:
        """Refused, and greeted by the next packet, before anybody was told of the failure."""
        pair = Pair()
        endpoint, sender = pair.receiver.endpoint, pair.sender
        path = pair.receiver.path_to("sender")
        endpoint.redeem("request", b"", path=path, life=0, timeout=9.0, now=pair.now)
        busy = frames.Goodbye(Reason.BUSY, "too many peers")
        for target, frame in ((0, busy), (pair.receiver.epoch, sender.endpoint.hello)):
            packet = frames.Packet(1, sender.epoch, target, 0, 0, frame)
            endpoint.packet_received(path, frames.encode(packet), pair.now)
        pair.receiver.pump()
        pair.wait()
        assert len(endpoint.sessions) == 1
        assert len(sender.endpoint._wanted) == 0

    def test_a_request_is_given_up_once(self) -> None:
        """And one that does not exist is not."""
        pair = Pair()
        number = pair.expect()
        for given_up in (number + 1, number, number):
            pair.receiver.endpoint.fail(given_up, GIVEN_UP, pair.now)
        pair.receiver.pump()
        assert reason(pair.receiver, number) is Reason.CANCELLED


class TestGivenUpBeforeTheLinkStands:
    """The encoder raised at once: whoever waits for it must not wait for a timeout."""

    def test_the_receiver_is_told_as_soon_as_there_is_a_link(self) -> None:
        """By a claim that is aborted in the same breath."""
        pair = Pair()
        number = pair.expect()
        pair.give_up(pair.sender, pair.claim(tokens=None))
        pair.wait(0.1)
        assert reason(pair.receiver, number) is Reason.CANCELLED
        pair.check_settled()

    def test_a_receiver_of_another_life_is_not_told(self) -> None:
        """The ticket was void."""
        pair = Pair()
        number = pair.expect()
        pair.give_up(pair.sender, pair.open(key=KEY, life=98))
        pair.wait()
        assert number not in pair.receiver.outcomes

    def test_nobody_is_told_when_nobody_can_be_reached(self) -> None:
        """And it is not kept for later."""
        pair = Pair()
        pair.world.at_address.pop("receiver")
        pair.give_up(pair.sender, pair.claim(tokens=None))
        pair.sender.endpoint.path_lost(pair.sender.path_to("receiver"), "refused", 0.0)
        pair.world.at_address["receiver"] = pair.receiver
        number = pair.expect()
        pair.meet()
        assert number not in pair.receiver.outcomes

    def test_nobody_is_told_after_the_deadline(self) -> None:
        """By then the receiver has found out by itself."""
        pair = Pair()
        pair.world.at_address.pop("receiver")
        pair.give_up(pair.sender, pair.claim(tokens=None, timeout=1.0))
        pair.claim("other", tokens=None)
        pair.wait(2.0)
        pair.world.at_address["receiver"] = pair.receiver
        number = pair.expect()
        pair.wait(4.0)
        assert number not in pair.receiver.outcomes


class TestUnasked:
    """A sender with a bare request id."""

    def test_the_receiver_grants_on_arrival(self) -> None:
        """Nobody has asked for it; somebody takes it."""
        pair = Pair()
        generation = pair.open()
        pair.wait()
        assert reason(pair.sender, generation) is None
        assert [len(each.content) for each in pair.receiver.delivered.values()] == [10]
        pair.check_settled()

    def test_the_receiver_was_first(self) -> None:
        """Then it is that request."""
        pair = Pair()
        number = pair.receive()
        pair.open()
        pair.wait()
        assert reason(pair.receiver, number) is None

    def test_one_that_takes_anything(self) -> None:
        """Whatever has no other destination goes to the idlest receiver of those that offer it."""
        pair = Pair(takes_any=True)
        early = pair.open("early", to=None)
        pair.meet()
        late = pair.open("late", to=None)
        pair.wait()
        assert reason(pair.sender, early) is reason(pair.sender, late) is None

    def test_one_that_takes_anything_has_fallen_silent(self) -> None:
        """It is sent nothing more; another one is."""
        pair = Pair(takes_any=True)
        first = pair.open(tokens=None)
        pair.wait()
        pair.receiver.pause(60.0)
        pair.wait(6.0)
        assert reason(pair.sender, first) is Reason.PEER_LOST
        other = Receiving(pair.world, "other", blocks=4, takes_any=True)
        pair.sender.endpoint.contact(pair.sender.path_to("other"), pair.now)
        pair.sender.pump()
        pair.wait()
        second = pair.open("second", to=None)
        pair.wait()
        assert reason(pair.sender, second) is None
        assert len(other.delivered) == 1

    def test_nobody_takes_it(self) -> None:
        """It waits for somebody until its deadline."""
        pair = Pair()
        pair.meet()
        generation = pair.open(to=None, timeout=2.0)
        pair.wait(3.0)
        assert "was not done within 2 s: no receiver has asked for it" in message(
            pair.sender, generation
        )


class TestOffers:
    """The sender offers, receivers redeem."""

    def test_redeemed_by_several_and_again_by_the_same(self) -> None:
        """Each gets all of it."""
        pair = Pair()
        pair.offer(tokens=12)
        other = Receiving(pair.world, "other", blocks=4)
        numbers = [pair.redeem(life=pair.sender.epoch) for _ in range(3)]
        number = other.endpoint.redeem(
            "request", KEY, path=other.path_to("sender"), life=0, timeout=9.0, now=0.0
        )
        other.pump()
        pair.wait()
        assert [reason(pair.receiver, each) for each in numbers] == [None] * 3
        assert reason(other, number) is None
        assert len(other.delivered[number].content) == 12
        pair.check_settled()

    def test_exact_grant(self) -> None:
        """The offer tells its length: no resume, nothing granted too much."""
        pair = Pair()
        pair.offer(tokens=20)
        number = pair.redeem()
        core = pair.receiver.endpoint.transfer(number)
        pair.wait()
        assert core.chunks == [20]
        assert core.granted_tokens == 20

    @pytest.mark.parametrize("shorter", ["offer", "redemption"])
    def test_the_shorter_of_both_deadlines_holds(self, shorter: str) -> None:
        """The sender keeps it by itself, where nothing that the receiver says comes through."""
        pair = Pair()
        assert pair.receiver.pool.allocate(8) is not None  # so it waits for a grant
        pair.offer(timeout=2.0 if shorter == "offer" else 9.0)
        pair.redeem(timeout=2.0 if shorter == "redemption" else 9.0)
        pair.wait()
        assert pair.sender.endpoint.num_live == 1
        pair.world.faults.loss = 1.0
        pair.wait(2.0)
        assert [reason(pair.sender, each) for each in pair.sender.outcomes] == [Reason.TIMEOUT]

    @pytest.mark.parametrize("key", [KEY, b"x" * 16])
    def test_what_is_not_on_offer(self, key: bytes) -> None:
        """Withdrawn, or another key: the receiver learns at once."""
        pair = Pair()
        pair.offer()
        if key == KEY:
            pair.sender.endpoint.withdraw("request")
            pair.sender.endpoint.withdraw("request")
        number = pair.redeem(key=key)
        pair.wait()
        assert "is not on offer" in message(pair.receiver, number)
        pair.check_settled()

    def test_withdrawn_while_it_is_served(self) -> None:
        """What has begun goes on."""
        pair = Pair()
        pair.offer(tokens=60)
        number = pair.redeem()
        pair.wait(0.01)
        pair.sender.endpoint.withdraw("request")
        pair.wait(5.0)
        assert reason(pair.receiver, number) is None

    def test_offered_twice(self) -> None:
        """An offer stands once."""
        pair = Pair()
        pair.offer()
        with pytest.raises(Rejected, match="offered already"):
            pair.offer()

    def test_the_receiver_gives_up_while_it_is_served(self) -> None:
        """One abort, and everything is settled."""
        pair = Pair()
        pair.offer(tokens=60)
        number = pair.redeem()
        pair.wait(0.012)
        pair.give_up(pair.receiver, number)
        pair.wait()
        assert reason(pair.receiver, number) is Reason.CANCELLED
        pair.check_settled()


class TestBareRequestIds:
    """Both sides know only the id; the receiver asks the sender."""

    @pytest.mark.parametrize("first", ["sender", "receiver"])
    def test_either_side_may_be_first(self, first: str) -> None:
        """It waits for the other."""
        pair = Pair()
        if first == "sender":
            pair.open(to=None)
            pair.wait()
            number = pair.redeem(key=b"")
        else:
            number = pair.redeem(key=b"")
            pair.wait()
            pair.open(to=None)
        pair.wait()
        assert reason(pair.receiver, number) is None
        pair.check_settled()

    def test_the_oldest_that_still_waits_is_served(self) -> None:
        """Not one of another id, one that was given up, or one that goes elsewhere."""
        pair = Pair()
        pair.open("request", to="nobody", tokens=1)
        given_up = pair.open("request", to=None, tokens=2)
        pair.open("another", to=None, tokens=3)
        for tokens in (4, 5):
            pair.open("request", to=None, tokens=tokens)
        pair.give_up(pair.sender, given_up)
        for tokens in (4, 5):
            number = pair.redeem(key=b"")
            pair.wait()
            assert len(pair.receiver.delivered[number].content) == tokens

    def test_several_wait_for_the_same_id(self) -> None:
        """First come, first served; the next transfer is for the next."""
        pair = Pair()
        first, second = pair.redeem(key=b""), pair.redeem(key=b"")
        pair.wait()
        pair.open(to=None)
        pair.wait()
        assert reason(pair.receiver, first) is None
        assert second not in pair.receiver.outcomes
        pair.open(to=None)
        pair.wait()
        assert reason(pair.receiver, second) is None

    def test_transfers_need_not_come_in_the_order_of_their_generations(self) -> None:
        """The one opened first is asked for last."""
        pair = Pair()
        pair.open("first", to=None)
        pair.open("second", to=None)
        numbers = [pair.redeem("second", b""), pair.redeem("first", b"")]
        pair.wait()
        assert [reason(pair.receiver, each) for each in numbers] == [None, None]

    def test_what_is_addressed_is_for_nobody_else(self) -> None:
        """A receiver that asks for an id does not get what is on its way to another."""
        pair = Pair()
        generation = pair.open(to="elsewhere")
        number = pair.redeem(key=b"")
        pair.wait()
        assert generation not in pair.sender.outcomes
        assert number not in pair.receiver.outcomes

    def test_a_receiver_that_gave_up_is_not_served(self) -> None:
        """The sender is told, and its transfer waits for another."""
        pair = Pair()
        number = pair.redeem(key=b"")
        other = pair.redeem("other", b"")
        pair.wait()
        pair.give_up(pair.receiver, number)
        pair.wait()
        generation = pair.open(to=None)
        pair.wait()
        assert generation not in pair.sender.outcomes
        assert other not in pair.receiver.outcomes

    def test_a_receiver_that_gave_up_before_the_link_stood(self) -> None:
        """There is nobody to be told."""
        pair = Pair()
        number = pair.redeem(key=b"")
        pair.give_up(pair.receiver, number)
        assert reason(pair.receiver, number) is Reason.CANCELLED

    def test_a_receiver_whose_deadline_has_passed_is_not_served(self) -> None:
        """Although its word that it gave up is late."""
        pair = Pair()
        number = pair.redeem(key=b"", timeout=1.0)
        pair.wait(0.5)
        pair.world.faults.loss = 1.0
        pair.wait(1.0)
        assert reason(pair.receiver, number) is Reason.TIMEOUT
        generation = pair.open(to=None)
        pair.world.faults.loss = 0.0
        pair.wait()
        assert generation not in pair.sender.outcomes

    def test_a_receiver_whose_deadline_has_passed_and_whose_link_stood_late(self) -> None:
        """The sender was told what was left of its deadline by then."""
        pair = Pair()
        pair.world.at_address.pop("sender")
        number = pair.redeem(key=b"", timeout=9.0)
        pair.wait(4.0)
        pair.world.at_address["sender"] = pair.sender
        pair.wait(3.0)
        assert number not in pair.receiver.outcomes
        pair.world.faults.loss = 1.0
        pair.wait(2.5)
        assert reason(pair.receiver, number) is Reason.TIMEOUT
        generation = pair.open(to=None)
        pair.world.faults.loss = 0.0
        pair.wait()
        assert generation not in pair.sender.outcomes

    def test_a_receiver_that_is_lost_is_not_served(self) -> None:
        """What others wait for is kept."""
        pair = Pair()
        pair.redeem(key=b"")
        other = Receiving(pair.world, "other", blocks=4)
        number = other.endpoint.redeem(
            "request", b"", path=other.path_to("sender"), life=0, timeout=9.0, now=0.0
        )
        other.pump()
        pair.wait()
        pair.sender.endpoint.peer_died(pair.receiver.epoch, pair.now)
        pair.receiver.crash()
        pair.open(to=None)
        pair.wait()
        assert reason(other, number) is None

    def test_the_sender_is_lost(self) -> None:
        """Whoever waits for it learns at once."""
        pair = Pair()
        number = pair.redeem(key=b"")
        pair.wait()
        pair.receiver.endpoint.peer_died(pair.sender.epoch, pair.now)
        pair.receiver.pump()
        assert reason(pair.receiver, number) is Reason.PEER_LOST
