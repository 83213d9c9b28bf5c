"""The session between two lives: each frame once and in order, whatever the channel does."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from aiomm.errors import Reason
from aiomm.protocol import frames
from aiomm.protocol.frames import Frame, Hello, Packet, decode, specs_of
from aiomm.protocol.session import (
    ACKNOWLEDGE_EVERY,
    MAX_ANSWERS,
    MAX_EARLY_FRAMES,
    NEVER,
    Contact,
    Path,
    Session,
    Timing,
)

from .world import SCHEMA

TIMING = Timing()
HELLO = Hello("sender", "here", specs_of(SCHEMA))
SLOW, FAST = Path(0, "zeromq", "peer"), Path(1, "unix", "peer")


def session(now: float = 0.0, *, local: int = 1, peer: int = 2) -> Session:
    """Return one end of a new session."""
    return Session(
        local, HELLO, peer_epoch=peer, peer_hello=HELLO, path=SLOW, now=now, timing=TIMING
    )


def redeem(number: int) -> Frame:
    """Return a frame that can be told apart."""
    return frames.Redeem("request", b"", number, 1.0)


def out(end: Session, now: float) -> list[Packet]:
    """Return the packets that have to go out now."""
    return [decode(each) for each in end.packets(now)]


def frame(sequence: int, acknowledged: int = 0) -> Packet:
    """Return a packet of the peer's with a frame that matters."""
    return Packet(1, 2, 1, sequence, acknowledged, redeem(sequence))


def note(behind: int, number: int) -> Packet:
    """Return a frame that a plane has carried, and that stands behind another one."""
    return Packet(1, 2, 1, behind, 0, redeem(number))


def ack(acknowledged: int) -> Packet:
    """Return an acknowledgement of the peer's."""
    return Packet(1, 2, 1, 0, acknowledged, frames.Ack())


def numbers(received: list[Frame]) -> list[int]:
    """Return which frames these are."""
    return [each.redemption for each in received if isinstance(each, frames.Redeem)]


def sequences(packets: list[Packet]) -> list[int]:
    """Return the places of packets in the order of the link."""
    return [packet.sequence for packet in packets]


class TestSending:
    """What goes out, and when again."""

    def test_frames_are_numbered_and_go_out_once(self) -> None:
        """Each with both epochs; nothing more until an answer is due."""
        end = session()
        end.send(redeem(1))
        end.send(redeem(2))
        packets = out(end, 0.0)
        assert sequences(packets) == [1, 2]
        assert {(each.source_epoch, each.target_epoch) for each in packets} == {(1, 2)}
        assert out(end, 0.1) == []

    def test_unanswered_frames_are_sent_again_with_back_off(self) -> None:
        """After 0.2 s, then each time twice as long, up to 2 s; all of them, oldest first."""
        end = session()
        end.send(redeem(1))
        out(end, 0.0)
        times: list[float] = []
        while len(times) < 6:
            now = end.next_deadline()
            times += [now for each in out(end, now) if each.sequence == 1]
        assert times == pytest.approx([0.2, 0.6, 1.4, 3.0, 5.0, 7.0])

    def test_new_frames_do_not_wait_for_old_ones(self) -> None:
        """What is new goes out at once, alone; the old ones wait for their time."""
        end = session()
        end.send(redeem(1))
        out(end, 0.0)
        end.send(redeem(2))
        assert sequences(out(end, 0.1)) == [2]
        end.send(redeem(3))
        assert sequences(out(end, 0.2)) == [1, 2, 3]

    def test_an_acknowledgement_ends_it(self) -> None:
        """All up to that place are settled; the rest waits afresh, from the first delay on."""
        end = session()
        for number in (1, 2, 3):
            end.send(redeem(number))
        out(end, 0.0)
        out(end, 0.2)
        end.receive(ack(2), 0.3)
        assert end.next_deadline() == pytest.approx(0.5)
        assert sequences(out(end, 0.5)) == [3]
        end.receive(ack(3), 0.6)
        assert end.next_deadline() == NEVER
        assert out(end, 100.0) == []

    def test_an_acknowledgement_of_what_was_never_sent_settles_nothing(self) -> None:
        """A peer cannot acknowledge in advance."""
        end = session()
        end.send(redeem(1))
        end.receive(ack(99), 0.0)
        assert sequences(out(end, 0.0)) == [1]

    def test_a_goodbye_comes_last(self) -> None:
        """Behind the frames that are still queued, so that they are heard before it."""
        end = session()
        end.say(frames.Goodbye(Reason.CLOSED, "bye"))
        end.send(redeem(1))
        assert [type(each.frame) for each in out(end, 0.0)] == [frames.Redeem, frames.Goodbye]

    def test_a_last_word_repeats_what_is_not_acknowledged(self) -> None:
        """Before its time, and once: nobody will do so later."""
        end = session()
        for number in (1, 2, 3):
            end.send(redeem(number))
        out(end, 0.0)
        end.receive(ack(1), 0.01)
        end.send(redeem(4))
        end.say_last(frames.Goodbye(Reason.CLOSED, "bye"))
        assert sequences(out(end, 0.02)) == [2, 3, 4, 0]
        assert out(end, 0.03) == []

    def test_the_greeting_carries_the_hello(self) -> None:
        """Addressed to the peer, whom it answers."""
        packet = decode(session().greeting())
        assert (packet.target_epoch, packet.frame) == (2, HELLO)


class TestReceiving:
    """What comes in, and what of it is handed up."""

    def test_in_order_and_once(self) -> None:
        """Early frames wait for those before them; repeated ones change nothing."""
        end = session()
        assert numbers(end.receive(frame(2), 0.0)) == []
        assert numbers(end.receive(frame(3), 0.0)) == []
        assert numbers(end.receive(frame(2), 0.0)) == []
        assert numbers(end.receive(frame(1), 0.0)) == [1, 2, 3]
        assert numbers(end.receive(frame(1), 0.0)) == []
        assert end.ignored == 2

    def test_frames_far_too_early_are_not_kept(self) -> None:
        """Memory is bounded; they will be sent again."""
        end = session()
        assert end.receive(frame(MAX_EARLY_FRAMES + 1), 0.0) == []
        assert end.ignored == 1
        assert end.receive(frame(MAX_EARLY_FRAMES), 0.0) == []
        assert end.ignored == 1

    def test_a_note_stands_right_behind_the_frames_before_it(self) -> None:
        """Whatever came first; the frames behind it were sent later."""
        end = session()
        assert numbers(end.receive(frame(1), 0.0)) == [1]
        assert numbers(end.receive_note(note(1, 10))) == [10]
        assert numbers(end.receive_note(note(3, 30))) == []
        assert numbers(end.receive_note(note(2, 20))) == []
        assert numbers(end.receive(frame(4), 0.0)) == []
        assert numbers(end.receive(frame(3), 0.0)) == []
        assert numbers(end.receive(frame(2), 0.0)) == [2, 20, 3, 30, 4]
        assert numbers(end.receive_note(note(4, 40))) == [40]
        assert numbers(end.receive(frame(5), 0.0)) == [5]

    def test_a_note_waits_for_a_frame_that_comes_in_order(self) -> None:
        """Also when nothing else is early."""
        end = session()
        assert numbers(end.receive_note(note(1, 10))) == []
        assert numbers(end.receive(frame(1), 0.0)) == [1, 10]

    def test_a_lost_peer_keeps_its_notes(self) -> None:
        """Frames that came too early will come again, notes will not."""
        end = session()
        assert numbers(end.receive_note(note(1, 10))) == []
        end.lose()
        assert numbers(end.receive(frame(1), 1.0)) == [1, 10]

    def test_notes_say_what_was_sent_before_them(self) -> None:
        """Also what waits for room; and they acknowledge nothing that the channel would not."""
        end = session()
        assert decode(end.note(redeem(1), 0)).sequence == 0
        sent = [end.send(redeem(number)) for number in range(MAX_EARLY_FRAMES + 3)]
        assert sent == list(range(1, MAX_EARLY_FRAMES + 4))
        end.receive(frame(1), 0.0)
        assert decode(end.note(redeem(1), sent[-1])) == Packet(1, 1, 2, sent[-1], 1, redeem(1))
        assert end.next_deadline() == pytest.approx(0.025)

    def test_notes_that_wait_are_bounded(self) -> None:
        """A peer that speaks of frames it never sends costs so much and no more."""
        end = session()
        for number in range(MAX_ANSWERS + 5):
            assert end.receive_note(note(2 + number % 2, number)) == []
        assert end.ignored == 5
        end.receive(frame(1), 0.0)
        assert len(end.receive(frame(2), 0.0)) == 1 + MAX_ANSWERS // 2
        assert end.receive_note(note(2**40, 0)) == []
        assert end.ignored == 5

    def test_acknowledgements_ride(self) -> None:
        """On whatever goes out; alone only when nothing does for 25 ms."""
        end = session()
        end.receive(frame(1), 0.0)
        assert end.next_deadline() == pytest.approx(0.025)
        end.send(redeem(1))
        assert [each.acknowledged for each in out(end, 0.01)] == [1]
        assert out(end, 0.03) == []
        end.receive(frame(2), 0.1)
        assert out(end, 0.11) == []
        (alone,) = out(end, 0.125)
        assert (type(alone.frame), alone.acknowledged) == (frames.Ack, 2)

    def test_one_frame_in_many_is_acknowledged_at_once(self) -> None:
        """Whoever sends thousands waits for room."""
        end = session()
        told = []
        for number in range(1, 2 * ACKNOWLEDGE_EVERY + 2):
            end.receive(frame(number), 0.0)
            told += [each.acknowledged for each in out(end, 0.0)]
        assert told == [ACKNOWLEDGE_EVERY, 2 * ACKNOWLEDGE_EVERY]
        assert end.next_deadline() == pytest.approx(0.025)

    def test_repeated_frames_are_acknowledged_again(self) -> None:
        """Or their sender would never stop."""
        end = session()
        end.receive(frame(1), 0.0)
        out(end, 1.0)
        end.receive(frame(1), 2.0)
        assert [each.acknowledged for each in out(end, 2.1)] == [1]

    def test_pings_are_answered(self) -> None:
        """At once; an answer needs no answer."""
        end = session()
        assert end.receive(Packet(1, 2, 1, 0, 0, frames.Ping()), 0.0) == []
        assert [type(each.frame) for each in out(end, 0.0)] == [frames.Pong]
        assert end.receive(Packet(1, 2, 1, 0, 0, frames.Pong()), 0.0) == []
        assert out(end, 0.0) == []

    def test_only_a_goodbye_needs_no_number(self) -> None:
        """Any other frame without a place in the order could be a repetition."""
        end = session()
        goodbye = frames.Goodbye(Reason.CLOSED, "bye")
        assert end.receive(Packet(1, 2, 1, 0, 0, goodbye), 0.0) == [goodbye]
        assert end.receive(Packet(1, 2, 1, 0, 0, redeem(1)), 0.0) == []
        assert end.ignored == 1


class TestSilence:
    """Signs of life."""

    def test_nobody_waits_nobody_asks(self) -> None:
        """An idle session sends nothing, and its peer is never lost."""
        end = session()
        assert end.next_deadline() == NEVER
        assert out(end, 1000.0) == []
        assert not end.is_silent(1000.0)

    def test_a_busy_session_asks_and_then_gives_up(self) -> None:
        """A Ping each second; after 15 s of silence the peer counts as lost."""
        end = session()
        end.begin_waiting(100.0)
        pings = []
        while not end.is_silent(now := end.next_deadline()):
            pings += [now for each in out(end, now) if isinstance(each.frame, frames.Ping)]
        assert pings == [float(at) for at in range(101, 115)]
        assert now == 115.0
        end.is_lost = True
        assert end.next_deadline() == NEVER
        assert out(end, 116.0) == []

    def test_any_packet_is_a_sign_of_life(self) -> None:
        """And a lost peer that speaks is lost no more."""
        end = session()
        end.begin_waiting(0.0)
        end.is_lost = True
        end.receive(ack(0), 14.0)
        assert not end.is_lost
        assert silent_at(end) == 29.0

    def test_silence_counts_from_when_somebody_waits(self) -> None:
        """Not from the last packet before a long pause."""
        end = session()
        end.begin_waiting(1000.0)
        assert out(end, 1001.0)
        end.begin_waiting(1001.5)
        assert silent_at(end) == 1015.0

    def test_an_unanswered_frame_is_waiting_too(self) -> None:
        """From when it was sent, also after a long pause."""
        end = session()
        end.send(redeem(1))
        out(end, 1000.0)
        assert silent_at(end) == 1015.0

    def test_a_lost_peer_is_given_the_same_time_again(self) -> None:
        """When somebody begins to wait for it once more."""
        end = session()
        end.begin_waiting(0.0)
        assert silent_at(end) == 15.0
        end.is_lost = True
        assert not end.is_silent(16.0)
        end.begin_waiting(20.0)
        assert silent_at(end) == 35.0

    def test_while_nobody_asks_the_peer_is_not_silent(self) -> None:
        """This side's loop was held: it asks when it runs again, and waits for the answer."""
        end = session()
        end.begin_waiting(0.0)
        assert not end.is_silent(100.0)
        assert [type(each.frame) for each in out(end, 100.0)] == [frames.Ping]
        assert not end.is_silent(100.5)
        assert silent_at(end) == 114.0  # 15 s, of which 1 s has passed before it was to ask

    def test_a_peer_that_speaks_and_acknowledges_nothing(self) -> None:
        """It is alive, and deaf: after twice its time it is lost; if it comes back, not at once."""
        end = session()
        end.send(redeem(1))
        now = 0.0
        while not end.is_silent(now):
            out(end, now)
            now = end.next_deadline()
            end.receive(ack(0), now)
        assert 30.0 <= now < 35.0
        assert end.silence(now).startswith("the peer has acknowledged nothing that was sent ")
        end.lose()
        for later in range(100):
            out(end, now + later)
        end.receive(ack(0), now + 100)
        assert not end.is_silent(now + 100)

    @pytest.mark.parametrize("peer_timeout", [0.1, 1.0, 15.0])
    def test_a_peer_is_asked_before_it_is_lost(self, peer_timeout: float) -> None:
        """However short its time is."""
        timing = Timing.for_timeout(peer_timeout)
        assert timing.peer_timeout == peer_timeout
        assert 3 * timing.ping < peer_timeout


def silent_at(end: Session) -> float:
    """Let a session ask whenever it wants to; return when its peer counts as silent."""
    while not end.is_silent(now := end.next_deadline()):
        out(end, now)
    return now


class TestPaths:
    """Several ways to one peer."""

    def test_a_burst_behind_which_the_path_changes_is_sent_once(self) -> None:
        """What goes over the better path overtakes the rest, and none of it is too early."""
        near, far = session(local=1, peer=2), session(local=2, peer=1)
        queues: dict[Path, list[bytes]] = {SLOW: [], FAST: []}
        arrived: list[int] = []
        for number in range(1, 1001):
            near.send(redeem(number))
            queues[near.paths[0]] += near.packets(0.0)
            if number == 100:
                near.add_path(FAST)
        for turn in range(500):
            now = turn / 1000
            for path, at_once in ((FAST, 40), (SLOW, 10)):
                for encoded in queues[path][:at_once]:
                    arrived += numbers(far.receive(decode(encoded), now))
                del queues[path][:at_once]
            for encoded in far.packets(now):
                near.receive(decode(encoded), now)
            queues[near.paths[0]] += near.packets(now)
        assert (arrived, far.ignored) == (list(range(1, 1001)), 0)

    def test_the_best_path_is_used(self) -> None:
        """Whatever came first; the same one twice is one."""
        end = session()
        end.add_path(FAST)
        end.add_path(FAST)
        assert end.paths == [FAST, SLOW]

    def test_the_change_is_announced(self) -> None:
        """By an empty packet that shows the peer where to answer."""
        end = session()
        end.announce_path()
        assert [type(each.frame) for each in out(end, 0.0)] == [frames.Ack]


def test_a_first_contact_is_repeated_with_back_off() -> None:
    """A Hello to nobody in particular, until a session stands."""
    contact = Contact(1, HELLO, 5.0, TIMING)
    times = []
    for _ in range(6):
        now = contact.next_deadline()
        (packet,) = map(decode, contact.packets(now))
        assert (packet.source_epoch, packet.target_epoch, packet.frame) == (1, 0, HELLO)
        assert contact.packets(now) == []
        times.append(now - 5.0)
    assert times == pytest.approx([0.0, 0.2, 0.6, 1.4, 3.0, 5.0])


@dataclass
class LossyLink:
    """Two ends over a channel that loses, repeats and reorders, in virtual time."""

    seed: int
    at_once: int = 1
    """Frames of a burst."""
    received: dict[int, list[int]] = field(default_factory=lambda: {1: [], 2: []})

    def run(self, num_frames: int) -> float:
        """Send frames both ways until all have arrived; return the time it took."""
        chance = random.Random(self.seed)
        ends = {1: session(local=1, peer=2), 2: session(local=2, peer=1)}
        flying: list[tuple[float, int, bytes]] = []
        sent = {1: 0, 2: 0}
        now = 0.0
        while min(map(len, self.received.values())) < num_frames or flying:
            now += 0.01
            assert now < 600, "frames never arrived"
            for local, end in ends.items():
                if sent[local] < num_frames and chance.random() < 0.2:
                    for _ in range(self.at_once):
                        sent[local] += 1
                        end.send(redeem(sent[local]))
                for encoded in end.packets(now):
                    copies = chance.choice([0, 0, 1, 1, 1, 2])
                    flying += [
                        (now + chance.random() ** 2, 3 - local, encoded) for _ in range(copies)
                    ]
            landed = [each for each in flying if each[0] <= now]
            flying = [each for each in flying if each[0] > now]
            chance.shuffle(landed)
            for _, target, encoded in landed:
                self.received[target] += numbers(ends[target].receive(decode(encoded), now))
        return now


@pytest.mark.parametrize("seed", range(20))
def test_every_frame_arrives_once_and_in_order(seed: int) -> None:
    """With a third of the packets lost and as many repeated, in any order."""
    link = LossyLink(seed)
    link.run(60)
    assert link.received == {1: list(range(1, 61)), 2: list(range(1, 61))}


@pytest.mark.parametrize("seed", range(3))
def test_every_frame_of_a_burst_arrives_once_and_in_order(seed: int) -> None:
    """Also those for which there was no room at first."""
    link = LossyLink(seed, at_once=400)
    link.run(800)
    assert link.received == {1: list(range(1, 801)), 2: list(range(1, 801))}


class TestPeersThatDoNotAnswer:
    """What a silent or hostile peer can pile up is bounded."""

    def test_no_more_are_on_their_way_than_the_peer_keeps_early(self) -> None:
        """The others follow as soon as there is room for them; only the former go again."""
        end = session()
        for number in range(1, 601):
            end.send(redeem(number))
        window = list(range(1, MAX_EARLY_FRAMES + 1))
        assert sequences(out(end, 0.0)) == window
        assert out(end, 0.1) == []
        end.receive(ack(50), 0.1)
        assert sequences(out(end, 0.1)) == [MAX_EARLY_FRAMES + each for each in range(1, 51)]
        assert sequences(out(end, 0.31)) == [50 + each for each in window]
        end.receive(ack(50 + MAX_EARLY_FRAMES), 0.4)
        assert sequences(out(end, 0.4)) == [50 + MAX_EARLY_FRAMES + each for each in window]
        end.receive(ack(562), 0.5)
        assert sequences(out(end, 0.5)) == list(range(563, 601))
        end.receive(ack(600), 0.6)
        assert end.next_deadline() == NEVER

    def test_a_peer_that_reads_slowly_is_sent_nothing_twice_while_it_goes_on(self) -> None:
        """An acknowledgement lets new frames go, never old ones."""
        end = session()
        for number in range(1, 2001):
            end.send(redeem(number))
        sent = sequences(out(end, 0.0))
        for step in range(1, 201):
            now = 0.1 * step
            end.receive(ack(10 * step), now)
            sent += sequences(out(end, now))
        assert sent == list(range(1, 2001))

    def test_the_last_word_waits_for_no_room(self) -> None:
        """All that was still to be sent goes out in front of it."""
        end = session()
        for number in range(1, 601):
            end.send(redeem(number))
        out(end, 0.0)
        end.say_last(frames.Goodbye(Reason.CLOSED, "bye"))
        assert sequences(out(end, 0.1)) == [*range(1, 601), 0]

    def test_new_frames_go_out_beside_those_that_go_again(self) -> None:
        """A frame queued just when others are due is not held back."""
        end = session()
        end.send(redeem(1))
        out(end, 0.0)
        end.send(redeem(2))
        assert sequences(out(end, 0.2)) == [1, 2]

    def test_thousands_of_answers_without_an_acknowledgement_count_as_silence(self) -> None:
        """They grow no further, and the peer is lost without waiting."""
        end = session()
        for number in range(1, MAX_ANSWERS + 1):
            assert end.answer(redeem(number % 1000)) == number
        assert not end.is_silent(0.0)
        assert end.silence(0.0) == "the peer has not answered for 15 s"
        assert end.answer(redeem(0)) == 0
        assert end.is_silent(0.0)
        assert end.silence(0.0) == f"the peer has left {MAX_ANSWERS} answers unacknowledged"
        assert len(out(end, 0.0)) == MAX_EARLY_FRAMES

    def test_what_was_never_sent_is_not_acknowledged(self) -> None:
        """Whatever the peer says: the answers that wait here still count."""
        end = session()
        for number in range(600):
            end.answer(redeem(number))
        out(end, 0.0)
        end.receive(ack(2**40), 0.0)
        assert len(end._answers) == 600 - MAX_EARLY_FRAMES

    def test_what_this_side_has_to_say_is_no_answer(self) -> None:
        """However much its user does in one turn, nobody is lost for it, nothing left out."""
        end = session()
        most = 2 * MAX_ANSWERS
        for number in range(most):
            end.send(redeem(number % 1000))
        end.answer(redeem(0))
        assert not end.is_silent(0.0)
        sent = []
        while packets := out(end, 0.0):
            sent += sequences(packets)
            end.receive(ack(sent[-1]), 0.0)
        assert sent == list(range(1, most + 2))

    def test_who_was_lost_for_that_and_comes_back_gets_frames_again(self) -> None:
        """Once it has acknowledged the old ones, it counts as silent no more."""
        end = session()
        end.begin_waiting(0.0)
        for number in range(MAX_ANSWERS + 1):
            end.answer(redeem(number % 1000))
        out(end, 0.0)
        end.lose()
        while again := out(end, 1.0):
            end.receive(ack(again[-1].sequence), 1.0)
        assert not end.is_silent(1.0)
        end.answer(redeem(1))
        assert sequences(out(end, 1.0)) == [MAX_ANSWERS + 1]
        assert not end.is_silent(1.0)

    def test_a_lost_peer_s_early_frames_are_not_kept(self) -> None:
        """They will come again if it does."""
        end = session()
        end.receive(frame(2), 0.0)
        end.lose()
        assert numbers(end.receive(frame(1), 1.0)) == [1]
        assert numbers(end.receive(frame(2), 1.0)) == [2]
