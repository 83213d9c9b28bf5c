"""Which claim meets which request, and what becomes of each: two endpoints, no faults."""

from __future__ import annotations

import pytest

from aiomm.errors import Reason, Rejected
from aiomm.protocol import frames
from aiomm.protocol.commands import Release
from aiomm.protocol.events import TokensReady
from aiomm.protocol.frames import FieldSpec, Hello
from aiomm.protocol.states import State
from aiomm.types import TransferId

from .pairs import GIVEN_UP, KEY, Pair, message, reason
from .receiving_process import Receiving
from .sending_process import Sending
from .world import OTHER_SCHEMA


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

    def test_a_request_id_is_expected_once(self) -> None:
        """Until it is over; then the id may be used again."""
        pair = Pair()
        number = pair.expect()
        with pytest.raises(Rejected, match="expected already"):
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

    def test_a_request_is_given_up_by_its_id(self) -> None:
        """And one that does not exist is not."""
        pair = Pair()
        number = pair.expect()
        pair.receiver.endpoint.cancel("other", GIVEN_UP, pair.now)
        pair.receiver.endpoint.cancel("request", GIVEN_UP, pair.now)
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

    def test_nobody_takes_it(self) -> None:
        """It waits for somebody until its deadline."""
        pair = Pair()
        pair.meet()
        generation = pair.open(to=None, timeout=2.0)
        pair.wait(3.0)
        assert "was not done within 2 s: no receiver was reached" in message(
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
        pair.wait()
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


class TestSchemas:
    """Both sides must mean the same tensors."""

    def test_a_ticket_in_wrong_hands_fails_on_both_sides(self) -> None:
        """At once, and each is told what differs."""
        pair = Pair(schema=OTHER_SCHEMA)
        number = pair.expect()
        generation = pair.claim()
        pair.wait(0.1)
        assert "embeddings is float32[8]" in message(pair.receiver, number)
        assert reason(pair.sender, generation) is Reason.SCHEMA
        pair.check_settled()

    def test_an_offer_of_something_else_fails_on_both_sides(self) -> None:
        """The receiver does not wait for its deadline."""
        pair = Pair(schema=OTHER_SCHEMA)
        pair.offer()
        number = pair.redeem()
        pair.wait(0.1)
        assert reason(pair.receiver, number) is Reason.SCHEMA
        pair.check_settled()

    def test_a_stranger_with_another_schema_harms_nobody(self) -> None:
        """The request waits for the right sender."""
        pair = Pair()
        number = pair.receive()
        stranger = Sending(pair.world, "stranger", schema=OTHER_SCHEMA)
        core = stranger.endpoint.open(
            "request", timeout=9.0, now=0.0, path=stranger.path_to("receiver")
        )
        stranger.pump()
        pair.wait()
        assert reason(stranger, core.id.generation) is Reason.SCHEMA
        assert number not in pair.receiver.outcomes
        pair.open()
        pair.wait()
        assert reason(pair.receiver, number) is None

    @pytest.mark.parametrize("side", ["sender", "receiver"])
    def test_a_dtype_of_the_future(self, side: str) -> None:
        """It is told as a difference, not as a crash."""
        pair = Pair()
        process = pair.sender if side == "sender" else pair.receiver
        assert isinstance(process, Sending | Receiving)
        strange = (FieldSpec("embeddings", "float4_e2m1", (8,)),)
        process.endpoint.hello = Hello("sender" if side == "sender" else "receiver", "x", strange)
        generation = pair.open()
        pair.wait()
        assert reason(pair.sender, generation) is Reason.SCHEMA
        assert "float4_e2m1" in message(pair.sender, generation)

    def test_a_difference_too_long_for_a_frame(self) -> None:
        """It is cut; it does not stop the link."""
        pair = Pair()
        many = tuple(FieldSpec(f"{'x' * 120}{n}", "int8", ()) for n in range(64))
        pair.sender.endpoint.hello = Hello("sender", "x", many)
        generation = pair.open()
        pair.wait()
        assert len(message(pair.sender, generation)) == 2048
        pair.check_settled()


class TestLimits:
    """What is over a limit is told, never dropped."""

    def test_too_many_requests(self) -> None:
        """The receiver's own are refused; a sender's are busy, and may come again."""
        pair = Pair()
        pair.receiver.crash()
        pair.receiver = Receiving(pair.world, "receiver", blocks=4, max_requests=1)
        pair.expect()
        with pytest.raises(Rejected, match="1 requests are open") as caught:
            pair.expect("other")
        assert caught.value.retryable
        generation = pair.open("other")
        pair.wait()
        assert reason(pair.sender, generation) is Reason.BUSY

    def test_too_many_wait_for_blocks(self) -> None:
        """The queue is full: busy, on both sides."""
        pair = Pair()
        pair.receiver.crash()
        pair.receiver = Receiving(pair.world, "receiver", blocks=1, max_waiting=1)
        for name in "abc":
            pair.open(name, tokens=None)
        pair.wait()
        reasons = [reason(pair.sender, number) for number in pair.sender.outcomes]
        assert reasons == [Reason.BUSY]

    def test_too_many_transfers_wait_for_a_receiver(self) -> None:
        """The sender's user may try again later."""
        pair = Pair()
        sender = Sending(pair.world, "other", max_waiting=1)
        sender.endpoint.open("a", timeout=1.0, now=0.0)
        with pytest.raises(Rejected) as caught:
            sender.endpoint.open("b", timeout=1.0, now=0.0)
        assert caught.value.retryable

    def test_too_many_receivers_wait_for_a_sender(self) -> None:
        """The next one is busy."""
        pair = Pair()
        pair.sender.crash()
        pair.sender = Sending(pair.world, "sender", max_waiting=1)
        first, second = pair.redeem("a", b""), pair.redeem("b", b"")
        pair.wait()
        assert first not in pair.receiver.outcomes
        assert reason(pair.receiver, second) is Reason.BUSY

    def test_a_transfer_that_is_too_long_is_refused_when_it_is_claimed(self) -> None:
        """On both sides at once, where it is the ticket's."""
        pair = Pair()
        number = pair.expect()
        generation = pair.claim(tokens=1001)
        pair.wait(0.1)
        assert (
            message(pair.sender, generation) == "1001 tokens, but this receiver takes at most 1000"
        )
        assert reason(pair.receiver, number) is Reason.REJECTED
        pair.check_settled()

    def test_a_transfer_that_turns_out_too_long(self) -> None:
        """Announced later, it is aborted then."""
        pair = Pair()
        generation = pair.open(tokens=None)
        pair.wait()
        pair.ready(generation, 1001, 1001)
        pair.wait()
        assert reason(pair.sender, generation) is Reason.REJECTED
        pair.check_settled()

    def test_a_stream_that_does_not_end(self) -> None:
        """It is cut at the limit, although it has never told a length."""
        pair = Pair(blocks=20)
        generation = pair.open(tokens=None, timeout=300.0)
        pair.ready(generation, 5000, None)
        pair.wait(60.0)
        assert "tokens, but this receiver takes at most 1000" in message(pair.sender, generation)
        pair.check_settled()

    @pytest.mark.parametrize("name", ["", "x" * 513, "\udc80"])
    def test_request_ids_that_cannot_travel(self, name: str) -> None:
        """They are refused where they come from: a frame that cannot be read stops a link."""
        pair = Pair()
        for call in (pair.expect, pair.receive, pair.redeem, pair.open, pair.offer):
            with pytest.raises(ValueError, match="request id"):
                call(name)
        assert pair.sender.endpoint.num_live == 0
        assert pair.receiver.endpoint.numbers() == []

    def test_metadata_that_cannot_travel(self) -> None:
        """The same, also when it comes later."""
        pair = Pair()
        generation = pair.open(tokens=None)
        ready = TokensReady(1, 1, b"x" * 40_000)
        with pytest.raises(ValueError, match="metadata"):
            pair.sender.endpoint.tokens_ready(generation, ready, 0.0)


class TestDeadlines:
    """Durations, kept by each side on its own clock."""

    def test_nobody_claims(self) -> None:
        """The soft hold goes back."""
        pair = Pair()
        number = pair.expect(timeout=1.0)
        pair.wait(1.1)
        assert message(pair.receiver, number) == (
            "'request' was not done within 1 s: no sender has claimed it"
        )
        pair.check_settled()

    @pytest.mark.parametrize("late", ["sender", "receiver"])
    def test_the_encoder_takes_too_long(self, late: str) -> None:
        """Either side's deadline ends it on both, and says in which state it stood."""
        pair = Pair()
        number = pair.expect(timeout=1.0 if late == "receiver" else 9.0)
        generation = pair.claim(tokens=None, timeout=1.0 if late == "sender" else 9.0)
        pair.wait(1.2)
        assert reason(pair.receiver, number) is Reason.TIMEOUT
        assert reason(pair.sender, generation) is Reason.TIMEOUT
        assert "not done within 1 s: in SENDING" in message(pair.sender, generation)
        pair.check_settled()

    def test_a_result_that_nobody_takes(self) -> None:
        """Its blocks come back at the deadline, and the request id is free."""
        pair = Pair()
        pair.receiver.is_forgetful = True
        pair.world.random.random = lambda: 0.05  # type: ignore[method-assign]
        number = pair.expect(timeout=3.0)
        pair.claim()
        pair.wait(1.0)
        assert reason(pair.receiver, number) is None
        assert pair.receiver.pool.num_free < 8
        pair.wait(3.0)
        assert pair.receiver.pool.num_free == 8
        assert not pair.receiver.endpoint.is_wanted(number)
        pair.check_settled()

    def test_many_requests_that_ended_long_before_their_deadline(self) -> None:
        """Their deadlines are not kept."""
        pair = Pair()
        for _ in range(1100):
            number = pair.receiver.endpoint.receive("request", 1e6, 0.0)
            pair.receiver.endpoint.taken(number)
            pair.give_up(pair.receiver, number)
        assert len(pair.receiver.endpoint._deadlines) < 1050
        pair.sender.endpoint.fail(99, GIVEN_UP, 0.0)
        pair.receiver.endpoint.taken(99)

    def test_answers_for_a_request_that_is_forgotten(self) -> None:
        """Blocks that come too late go back; other answers mean nothing any more."""
        pair = Pair()
        pair.receiver.endpoint.drained(99, 0.0)
        blocks = pair.receiver.pool.allocate(2)
        assert blocks is not None
        pair.receiver.endpoint.reserved(99, blocks, False, 0.0)
        assert pair.receiver.endpoint.commands(0.0) == [Release(99, (blocks,))]

    def test_who_is_known(self) -> None:
        """Questions the driver asks."""
        pair = Pair()
        number, generation = pair.expect(), pair.claim(tokens=None)
        assert pair.receiver.endpoint.number_of("request") == number
        assert pair.receiver.endpoint.number_of("other") is None
        assert pair.receiver.endpoint.link_of(number) == 0
        assert pair.sender.endpoint.has(generation)
        assert not pair.sender.endpoint.has(99)
        assert pair.sender.endpoint.peer_of(99) == 0


class TestBrokenPeers:
    """What no peer of ours would do."""

    def test_a_chunk_that_nobody_granted(self) -> None:
        """The transfer fails on both sides, for a reason; the link goes on."""
        pair = Pair()
        number = pair.expect()
        generation = pair.claim(tokens=None)
        pair.wait()
        session = pair.sender.endpoint.sessions[pair.receiver.epoch]
        session.send(frames.Written(TransferId("request", generation), 3, 0, 1, None))
        pair.sender.pump()
        pair.wait()
        assert reason(pair.receiver, number) is Reason.PROTOCOL
        assert "the sender broke the protocol: tokens written that nobody granted" in message(
            pair.receiver, number
        )
        assert reason(pair.sender, generation) is Reason.PROTOCOL
        assert pair.receiver.endpoint.counters["violations"] == 1
        pair.check_settled()

    def test_an_acceptance_of_what_was_never_sent(self) -> None:
        """The same for the sender."""
        pair = Pair()
        generation = pair.open(tokens=None)
        pair.wait()
        session = pair.receiver.endpoint.sessions[pair.sender.epoch]
        session.send(frames.Accepted(TransferId("request", generation)))
        pair.receiver.pump()
        pair.wait()
        assert "the receiver broke the protocol" in message(pair.sender, generation)
        pair.check_settled()

    def test_the_same_offer_twice(self) -> None:
        """The second one is ignored."""
        pair = Pair()
        generation = pair.open(tokens=None)
        pair.wait()
        session = pair.sender.endpoint.sessions[pair.receiver.epoch]
        again = frames.Offer(TransferId("request", generation), b"", 0, None, b"", 9.0)
        session.send(again)
        pair.sender.pump()
        pair.wait()
        assert pair.receiver.endpoint.counters["of_no_transfer"] == 1
        assert generation not in pair.sender.outcomes

    def test_an_answer_to_somebody_elses_question(self) -> None:
        """A redemption is answered by whom it was asked of, for what it was asked."""
        pair = Pair()
        number = pair.redeem("wanted", b"")
        pair.wait()
        session = pair.sender.endpoint.sessions[pair.receiver.epoch]
        session.send(frames.Offer(TransferId("other", 50), b"", number, 1, b"", 9.0))
        session.send(frames.Refuse(77, Reason.REJECTED, "no"))
        pair.sender.pump()
        pair.wait()
        assert number not in pair.receiver.outcomes

    def test_an_abort_of_something_long_forgotten(self) -> None:
        """It is acknowledged all the same: nothing of it can land."""
        pair = Pair()
        pair.meet()
        session = pair.receiver.endpoint.sessions[pair.sender.epoch]
        session.send(frames.Abort(TransferId("old", 9), Reason.TIMEOUT, "late", False))
        pair.receiver.pump()
        pair.wait()
        assert pair.receiver.endpoint.counters["of_no_transfer"] == 1

    def test_a_refusal_of_what_was_asked(self) -> None:
        """Whatever its reason."""
        pair = Pair()
        number = pair.redeem(key=b"")
        pair.wait()
        session = pair.sender.endpoint.sessions[pair.receiver.epoch]
        session.send(frames.Refuse(number, Reason.CLOSED, "closing"))
        pair.sender.pump()
        pair.wait()
        assert reason(pair.receiver, number) is Reason.CLOSED
