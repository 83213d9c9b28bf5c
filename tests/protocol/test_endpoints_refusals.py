"""What is refused, too much, too late or broken, and that it harms nobody else."""

from __future__ import annotations

import msgspec
import pytest

from aiomm.errors import ProtocolError, Reason, Rejected
from aiomm.protocol import events, frames
from aiomm.protocol.commands import Release
from aiomm.protocol.events import TokensReady
from aiomm.protocol.frames import FieldSpec, Hello
from aiomm.protocol.receive_transfer import ReceiveTransfer
from aiomm.protocol.transfer import ProtocolViolation
from aiomm.types import Allocation, Extent, TransferId

from .pairs import GIVEN_UP, Pair, message, reason
from .receiving_process import Receiving
from .sending_process import Sending
from .world import OTHER_SCHEMA


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
        with pytest.raises(Rejected, match="1 open requests") as caught:
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

    def test_transfers_given_up_before_the_first_contact_keep_nobody_out(self) -> None:
        """Whoever opens and gives up, again and again, does not fill the memory either."""
        pair = Pair()
        sender = Sending(pair.world, "other", max_waiting=2)
        path = sender.path_to("nobody")
        for name in "abcd":
            core = sender.endpoint.open(name, timeout=1.0, now=0.0, path=path)
            sender.endpoint.fail(core.id.generation, GIVEN_UP, 0.0)
        assert list(sender.endpoint._regrets) == [3, 4]

    def test_too_many_receivers_wait_for_a_sender(self) -> None:
        """The next one is busy."""
        pair = Pair()
        pair.sender.crash()
        pair.sender = Sending(pair.world, "sender", max_waiting=1)
        first, second = pair.redeem("a", b""), pair.redeem("b", b"")
        pair.wait()
        assert first not in pair.receiver.outcomes
        assert reason(pair.receiver, second) is Reason.BUSY

    def test_receivers_that_wait_no_more_make_room(self) -> None:
        """One whose deadline has passed, though it has never said so."""
        pair = Pair()
        pair.sender.crash()
        pair.sender = Sending(pair.world, "sender", max_waiting=1)
        pair.meet()
        session = pair.receiver.endpoint.sessions[pair.sender.epoch]
        session.send(frames.Redeem("a", b"", 77, 1.0))
        pair.receiver.pump()
        pair.wait(2.0)
        second = pair.redeem("b", b"")
        pair.wait()
        assert second not in pair.receiver.outcomes

    def test_too_many_redemptions_of_one_offer_by_one_receiver(self) -> None:
        """The next one is busy."""
        pair = Pair(blocks=2)
        pair.sender.crash()
        pair.sender = Sending(pair.world, "sender", max_waiting=2)
        pair.offer(tokens=1000)
        numbers = [pair.redeem() for _ in range(3)]
        pair.wait(0.1)
        assert reason(pair.receiver, numbers[2]) is Reason.BUSY
        assert pair.sender.endpoint.num_live == 2

    def test_a_receiver_that_is_closing_takes_nothing_new(self) -> None:
        """Who comes late is told at once."""
        pair = Pair()
        pair.receiver.endpoint.is_closing = True
        generation = pair.open()
        pair.wait(0.1)
        assert reason(pair.sender, generation) is Reason.CLOSED
        pair.check_settled()

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

    def test_many_deadlines_at_once_are_not_for_one_turn(self) -> None:
        """The rest is due at once, and the timer comes back for it."""
        pair = Pair()
        generations = [pair.open(f"{each}", to=None, timeout=2.0) for each in range(200)]
        endpoint = pair.sender.endpoint
        endpoint.timer(2.0)
        assert 0 < endpoint.num_live < 200
        assert endpoint.next_deadline() <= 2.0
        pair.wait(2.0)
        assert {reason(pair.sender, each) for each in generations} == {Reason.TIMEOUT}

    def test_many_requests_that_ended_long_before_their_deadline(self) -> None:
        """Their deadlines are not kept."""
        pair = Pair()
        for _ in range(1100):
            number = pair.receiver.endpoint.receive("request", 1e6, 0.0)
            pair.receiver.endpoint.taken(number)
            pair.give_up(pair.receiver, number)
            pair.give_up(pair.sender, pair.open(to=None, timeout=1e6))
        assert len(pair.receiver.endpoint._deadlines) < 1050
        assert len(pair.sender.endpoint._deadlines) < 1050
        pair.sender.endpoint.fail(99, GIVEN_UP, 0.0)
        pair.receiver.endpoint.taken(99)

    def test_the_deadline_of_what_is_still_open(self) -> None:
        """It is kept, however many others have ended before theirs."""
        pair = Pair()
        number = pair.receive("here", timeout=2.0)
        generation = pair.open("there", to=None, timeout=2.0)
        for _ in range(1100):
            ended = pair.receiver.endpoint.receive("request", 1e6, 0.0)
            pair.receiver.endpoint.taken(ended)
            pair.give_up(pair.receiver, ended)
            pair.give_up(pair.sender, pair.open(to=None, timeout=1e6))
        pair.wait(3.0)
        assert reason(pair.receiver, number) is Reason.TIMEOUT
        assert reason(pair.sender, generation) is Reason.TIMEOUT

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
        assert pair.receiver.endpoint.numbers_of("request") == [number]
        assert pair.receiver.endpoint.numbers_of("other") == []
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

    @pytest.mark.parametrize("count", [6, 8])
    @pytest.mark.parametrize("is_announced", [False, True])
    def test_a_chunk_past_its_own_total(self, count: int, is_announced: bool) -> None:
        """With a border of the grant or without: the sender's fault, at once."""
        pair = Pair()
        number = pair.expect()
        generation = pair.claim(tokens=None)
        pair.wait()
        transfer = TransferId("request", generation)
        session = pair.sender.endpoint.sessions[pair.receiver.epoch]
        if is_announced:
            session.send(frames.Announce(transfer, 4, b""))
        total = None if is_announced else 4
        session.send(frames.Written(transfer, 0, 0, count, total))
        pair.sender.pump()
        pair.wait()
        assert f"broke the protocol: total 4 after {count} tokens" in message(pair.receiver, number)
        pair.check_settled()

    def test_a_total_below_what_is_being_verified(self) -> None:
        """Tokens that have arrived count, even if their checksum is not compared yet."""
        transfer = ReceiveTransfer(1, 8, 0.0)
        transfer.expect()
        transfer.handle(events.Claimed(TransferId("r", 1), None, b""), 0.0)
        allocation = Allocation((0,), 8, (Extent(0, 8),))
        transfer.handle(events.Reserved(allocation, False), 0.0)
        transfer.handle(events.Written(0, 0, 8, None, b"12345678"), 0.0)
        with pytest.raises(ProtocolViolation, match="total 4 after 8 tokens"):
            transfer.handle(events.Announced(4, b""), 0.0)

    def test_a_chunk_of_nothing(self) -> None:
        """No tokens, and no word of their number: thousands of them would have to be kept."""
        pair = Pair()
        number = pair.expect()
        generation = pair.claim(tokens=None)
        pair.wait()
        session = pair.sender.endpoint.sessions[pair.receiver.epoch]
        session.send(frames.Written(TransferId("request", generation), 0, 0, 0, None, b"0+0"))
        pair.sender.pump()
        pair.wait()
        assert "no tokens written" in message(pair.receiver, number)
        pair.check_settled()

    def test_grants_without_end(self) -> None:
        """Some may come before their turn; more are not kept."""
        pair = Pair()
        generation = pair.open(tokens=None)
        pair.wait()
        core = pair.sender.opened[generation]
        session = pair.receiver.endpoint.sessions[pair.sender.epoch]
        for number in range(1, 10):
            begin = core.granted_tokens + 8 * (number - 1)
            grant = frames.Resume(core.id, number, begin, (number,), (Extent(0, 8),))
            session.send(grant)
        pair.receiver.pump()
        pair.wait()
        assert "grant 9, 9 before its turn" in message(pair.sender, generation)

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

    def test_a_note_of_somebody_else(self) -> None:
        """A sender's own link and life, and nothing but what it has written."""
        pair = Pair()
        pair.meet()
        sender, receiver = pair.sender, pair.receiver.endpoint
        session = sender.endpoint.sessions[receiver.epoch]
        link = session.peer_hello.link
        written = frames.Written(TransferId("request", 1), 0, 0, 8, 8)
        good = frames.decode(session.note(written, 0))
        receiver.note_received(link, frames.encode(good), 1.0)
        assert receiver.counters["of_no_transfer"] == 1
        wrong = {
            "a note of another link": [
                (link + 1, good),
                (link, msgspec.structs.replace(good, source_epoch=99)),
                (link, msgspec.structs.replace(good, target_epoch=99)),
            ],
            "a note is Ping, not Written": [
                (link, msgspec.structs.replace(good, frame=frames.Ping()))
            ],
        }
        for why, notes in wrong.items():
            for number, note in notes:
                with pytest.raises(ProtocolError, match=why):
                    receiver.note_received(number, frames.encode(note), 1.0)
        with pytest.raises(ProtocolError, match="malformed"):
            receiver.note_received(link, b"x", 1.0)
        assert receiver.counters["of_no_transfer"] == 1

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

    def test_an_abort_of_somebody_elses_transfer(self) -> None:
        """Only the receiver that a transfer was offered to has a say in it."""
        pair = Pair()
        generation = pair.open(tokens=None)
        other = Receiving(pair.world, "other", blocks=4)
        pair.sender.endpoint.contact(pair.sender.path_to("other"), pair.now)
        pair.sender.pump()
        pair.wait()
        session = other.endpoint.sessions[pair.sender.epoch]
        transfer = TransferId("request", generation)
        session.send(frames.Abort(transfer, Reason.CANCELLED, "not mine", False))
        other.pump()
        pair.wait()
        assert generation not in pair.sender.outcomes
        assert pair.sender.endpoint.counters["of_no_transfer"] == 1

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

    def test_a_refusal_of_what_was_asked_of_another_sender(self) -> None:
        """Only the one that was asked can refuse."""
        pair = Pair()
        number = pair.redeem(key=b"")
        other = Sending(pair.world, "other")
        other.endpoint.contact(other.path_to("receiver"), pair.now)
        other.pump()
        pair.wait()
        session = other.endpoint.sessions[pair.receiver.epoch]
        session.send(frames.Refuse(number, Reason.REJECTED, "not mine"))
        other.pump()
        pair.wait()
        assert number not in pair.receiver.outcomes
