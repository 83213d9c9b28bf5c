"""The failures that other systems shipped, by their number, shown not to be ours.

Here stand those that two endpoints, a real pool and a real queue can show in virtual time. The
others need real processes, planes or channels.
"""

from __future__ import annotations

import pytest

from aiomm.buffers.pool import PoolError
from aiomm.errors import Failure, Reason
from aiomm.protocol import commands as do
from aiomm.protocol import events, frames
from aiomm.protocol.frames import Packet
from aiomm.protocol.receive_transfer import ReceiveTransfer
from aiomm.protocol.send_transfer import SendTransfer
from aiomm.protocol.states import State
from aiomm.protocol.transfer import ProtocolViolation
from aiomm.types import Extent, TransferId

from .pairs import GIVEN_UP, Pair, reason
from .parts import TRANSFER, allocation
from .receiving_process import Receiving
from .sending_process import Sending
from .world import BLOCK_SIZE, DEFAULT_TOKENS


def sent(pair: Pair, number: int) -> list[int]:
    """Return the positions of the tokens that were delivered, in order."""
    content = pair.receiver.delivered[number].content
    return [token.position for token in content if token is not None]


def test_01_grant_rounding() -> None:
    """8000 tokens were requested, 63 * 128 = 8064 granted, and the rest was never missed or found.

    Only exactly the tokens count: the last block of a grant is not full, and nobody waits for more.
    """
    for tokens in (DEFAULT_TOKENS - 1, 3 * BLOCK_SIZE + 1, 5 * BLOCK_SIZE - 1):
        pair = Pair()
        number = pair.expect()
        pair.claim(tokens=tokens)
        pair.wait()
        assert sent(pair, number) == list(range(tokens))
        pair.check_settled()


def test_02_a_resume_that_starts_no_write() -> None:
    """The state said SENDING, and nothing was ever written under the new grant."""
    transfer = SendTransfer(TRANSFER, 0.0)
    transfer.offer(b"", 0, 30.0)
    transfer.handle(events.TokensReady(20, 20), 0.0)
    transfer.handle(events.Granted(0, 0, (Extent(0, 8),)), 0.0)
    transfer.handle(events.WriteFinished(), 0.0)
    commands = transfer.handle(events.Resumed(8, 1, (Extent(8, 20),)), 0.0)
    assert commands == [do.Write(TRANSFER, 1, 8, (Extent(8, 20),))]


def test_03_the_same_resume_handled_twice() -> None:
    """A level-triggered state machine resumed on every status poll: double free, resume storm.

    Here a resume is an edge with a sequence: a repeated packet changes nothing.
    """
    pair = Pair(blocks=2)
    pair.world.faults.duplication = 1.0
    number = pair.expect()
    generation = pair.claim(tokens=30)
    core = pair.receiver.endpoint.transfer(number)
    pair.wait(3.0)
    assert sent(pair, number) == list(range(30))
    assert core.chunks == [*[4] * 7, 2]
    assert pair.sender.opened[generation].resumes == core.resumes == 7
    pair.check_settled()


def test_04_the_allocator_hands_out_the_same_blocks_again() -> None:
    """Resumes were told apart by their block numbers, so a repeated set looked like a repetition.

    In a pool of one block every grant names the same block.
    """
    pair = Pair(blocks=1)
    number = pair.expect()
    pair.claim(tokens=20)
    core = pair.receiver.endpoint.transfer(number)
    pair.wait(3.0)
    assert [blocks for blocks, _ in core.grants] == [(0,)] * 5
    assert sent(pair, number) == list(range(20))


def test_05_the_length_of_every_chunk_is_its_own() -> None:
    """The length stood in the first block of the first chunk; later chunks read a stale one."""
    pair = Pair(blocks=2)
    number = pair.expect()
    generation = pair.claim(tokens=None)
    pair.wait()
    pair.sender.totals[generation] = 19
    core = pair.receiver.endpoint.transfer(number)
    for available in (3, 11, 19):
        pair.ready(generation, available, 19 if available == 19 else None)
        pair.wait()
    assert core.chunks == [8, 8, 3]
    assert sent(pair, number) == list(range(19))


def test_06_old_blocks_are_kept_until_their_tokens_are_safe() -> None:
    """They were freed before the second allocation, which failed: the first chunk was lost."""
    transfer = ReceiveTransfer(1, 8, 0.0)
    transfer.expect()
    first = allocation(0, 1)
    transfer.handle(events.Claimed(TRANSFER, 20, b""), 0.0)
    transfer.handle(events.Reserved(first), 0.0)
    transfer.handle(events.Written(0, 0, 8, 20), 0.0)
    assert transfer.handle(events.Refused(), 0.0) == [
        do.MoveOut(1, (Extent(0, 8),), 20),
        do.Reserve(1, 12, claimed=True),
    ]
    assert transfer.handle(events.MovedOut(), 0.0) == [do.Release(1, (first,), before=1)]


def test_07_a_transfer_never_goes_backwards() -> None:
    """It went from SENDING back to ALLOC, and "is last" was judged from the local default.

    A grant that is smaller or larger than the default decides when it is full, and nothing else.
    """
    for blocks in (1, 8):
        pair = Pair(blocks=blocks)
        pair.expect()
        generation = pair.claim(tokens=3 * DEFAULT_TOKENS)
        pair.wait(3.0)
        names = [state for state, _ in pair.sender.opened[generation].history]
        assert names.count(State.ALLOC) == 1
        assert names[-1] is State.DONE
        seconds = [at for _, at in pair.sender.opened[generation].history]
        assert seconds == sorted(seconds)


def test_08_the_first_chunk_is_not_taken_twice() -> None:
    """It was enqueued when it arrived and again when the rest came: 1024 + 2000 tokens."""
    pair = Pair()
    pair.world.faults.duplication = 0.7
    number = pair.expect()
    generation = pair.claim(tokens=None)
    pair.wait()
    pair.sender.totals[generation] = 20
    pair.ready(generation, 20, 20)
    pair.wait(3.0)
    assert sent(pair, number) == list(range(20))


def test_09_more_than_one_resume() -> None:
    """Only one was possible."""
    pair = Pair(blocks=1)
    number = pair.expect(timeout=60.0)
    generation = pair.claim(tokens=400, timeout=60.0)
    pair.wait(60.0)
    assert pair.sender.opened[generation].resumes == 99
    assert sent(pair, number) == list(range(400))


def test_10_hold_and_wait() -> None:
    """Several half-received requests waited for each other's blocks for ever."""
    pair = Pair(blocks=4)
    numbers = [pair.expect(f"request{n}", timeout=60.0) for n in range(6)]
    for n in range(6):
        pair.claim(f"request{n}", tokens=40, timeout=60.0)
    pair.wait(30.0)
    for number in numbers:
        assert sent(pair, number) == list(range(40))
    pair.check_settled()


def test_11_timeouts_count() -> None:
    """The code for a timeout was there, but its clock was never started."""
    pair = Pair()
    number = pair.expect(timeout=1.0)
    generation = pair.open("other", to="nowhere", timeout=1.0)
    pair.wait(1.001)
    assert reason(pair.receiver, number) is Reason.TIMEOUT
    assert reason(pair.sender, generation) is Reason.TIMEOUT


def test_12_a_late_frame_and_a_used_request_id() -> None:
    """A late status brought a finished request back, or was taken for one with the same id."""
    pair = Pair()
    old = TransferId("request", pair.open())
    pair.wait()
    number = pair.receive()
    generation = pair.open(tokens=None)
    pair.wait()
    session = pair.sender.endpoint.sessions[pair.receiver.epoch]
    session.send(frames.Written(old, 0, 0, 4, 4))
    session.send(frames.Abort(old, Reason.CANCELLED, "late", True))
    pair.sender.pump()
    pair.wait()
    assert pair.receiver.endpoint.counters["of_no_transfer"] == 2
    assert number not in pair.receiver.outcomes
    pair.sender.totals[generation] = 4
    pair.ready(generation, 4, 4)
    pair.wait()
    assert sent(pair, number) == [0, 1, 2, 3]


def test_13_a_broken_transfer_breaks_no_other() -> None:
    """An exception in one transfer killed the worker. (Real exceptions: see the driver's tests.)"""
    pair = Pair()
    good, bad = pair.expect("good"), pair.expect("bad")
    goes_on, breaks = pair.claim("good", tokens=None), pair.claim("bad", tokens=None)
    pair.wait()
    session = pair.sender.endpoint.sessions[pair.receiver.epoch]
    session.send(frames.Written(TransferId("bad", breaks), 0, 5, 1, None))
    pair.sender.totals[goes_on] = 5
    pair.ready(goes_on, 5, 5)
    pair.wait()
    assert reason(pair.receiver, bad) is Reason.PROTOCOL
    assert sent(pair, good) == list(range(5))


def test_14_a_failure_bans_nobody() -> None:
    """After one failed transfer the peer was never used again."""
    pair = Pair()
    for _ in range(3):
        number = pair.expect()
        generation = pair.claim(tokens=None)
        pair.wait()
        pair.sender.endpoint.write_failed(generation, Failure(Reason.PLANE, "broken"), pair.now)
        pair.sender.pump()
        pair.wait()
        assert reason(pair.receiver, number) is Reason.PLANE
        again = pair.expect()
        pair.claim()
        pair.wait()
        assert reason(pair.receiver, again) is None
    pair.check_settled()


def test_15_a_double_free_is_noticed() -> None:
    """It went unnoticed, and blocks belonged to two requests."""
    pair = Pair()
    number = pair.expect()
    pair.claim(tokens=None)
    pair.wait()
    core = pair.receiver.endpoint.transfer(number)
    pair.give_up(pair.receiver, number)
    pair.wait()
    assert core.handle(events.Drained(), pair.now) == []
    assert core.handle(events.Failed(GIVEN_UP), pair.now) == []
    blocks = pair.receiver.pool.allocate(1)
    assert blocks is not None
    pair.receiver.pool.free(blocks)
    with pytest.raises(PoolError):
        pair.receiver.pool.free(blocks)


def test_16_an_abort_while_a_write_is_in_flight() -> None:
    """The blocks were freed at once, and the late write landed in somebody else's request.

    The sender is stopped in the middle of its write and continued long after the deadline.
    """
    pair = Pair(blocks=2)
    first = pair.expect(timeout=2.0)
    pair.world.faults.write_failure = 0.0
    generation = pair.claim(tokens=8, timeout=60.0)
    while pair.state(generation) is not State.SENDING:
        pair.wait(0.001)
    pair.sender.pause(30.0)
    second = pair.expect("second", timeout=60.0)
    other = Sending(pair.world, "other")
    core = other.endpoint.open(
        "second",
        timeout=60.0,
        now=pair.now,
        path=other.path_to("receiver"),
        life=pair.receiver.epoch,
        key=b"k" * 16,
        ready=events.TokensReady(8, 8),
    )
    other.opened[core.id.generation], other.totals[core.id.generation] = core, 8
    other.pump()
    pair.wait(25.0)
    assert reason(pair.receiver, first) is Reason.TIMEOUT
    assert second not in pair.receiver.outcomes
    assert pair.receiver.pool.num_free == 0
    pair.wait(10.0)
    assert sent(pair, second) == list(range(8))
    pair.check_settled()


def test_17_resumable_at_any_token() -> None:
    """Only at whole blocks: the tokens of a half-filled block were sent again, or lost."""
    transfer = ReceiveTransfer(1, 8, 0.0)
    transfer.expect()
    transfer.handle(events.Claimed(TRANSFER, 20, b""), 0.0)
    transfer.handle(events.Reserved(allocation(0, 1, num_tokens=7)), 0.0)
    (rest,) = transfer.handle(events.Written(0, 0, 7, 20), 0.0)
    assert rest == do.ReserveRest(1, 13, allocation(0, 1, num_tokens=7))
    longer = allocation(0, 1, 2, 3, 4)
    permit, resume = transfer.handle(events.Reserved(longer, extends=True), 0.0)
    assert permit == do.Permit(1, TRANSFER, 1, (Extent(7, 20),))
    expected = frames.Resume(TRANSFER, 1, 7, (2, 3, 4), (Extent(7, 20),))
    assert resume == do.SendFrame(expected)


def test_18_the_encoder_notices_that_the_language_side_died() -> None:
    """It never did, and kept the tensor for ever. (With kill -9: see the tests with processes.)"""
    pair = Pair()
    generation = pair.open(tokens=None)
    pair.wait()
    pair.receiver.crash()
    pair.sender.endpoint.peer_died(pair.receiver.epoch, pair.now)
    pair.sender.pump()
    assert reason(pair.sender, generation) is Reason.PEER_LOST
    assert pair.sender.endpoint.num_live == 0


def test_19_blocks_with_holes() -> None:
    """`min(block_indices)` was taken for the start of one run: blocks in between were overwritten.

    The world refuses any write into a block that is not granted to the transfer that writes.
    """
    pair = Pair(blocks=7)
    pool = pair.receiver.pool
    everything = [pool.allocate(1) for _ in range(7)]
    for block in (6, 0, 3):
        allocated = everything[block]
        assert allocated is not None
        pool.free(allocated)
    number = pair.expect()
    pair.claim(tokens=12)
    core = pair.receiver.endpoint.transfer(number)
    pair.wait()
    assert core.grants[0][1] == (Extent(0, 4), Extent(12, 16), Extent(24, 28))
    assert sent(pair, number) == list(range(12))


def test_20_two_hundred_requests_at_once() -> None:
    """Most were dropped, silently."""
    pair = Pair(blocks=8)
    numbers = [pair.expect(f"request{n}", timeout=600.0) for n in range(200)]
    for n in range(200):
        pair.claim(f"request{n}", tokens=20, timeout=600.0)
    pair.wait(120.0)
    assert [sent(pair, number) for number in numbers] == [list(range(20))] * 200
    pair.check_settled()


def test_21_a_peer_that_stops_reading() -> None:
    """A send without a timeout wedged the scheduler. (A full socket: see the control tests.)

    Here nothing waits: the transfer ends by its own deadline, or when the peer counts as lost.
    """
    pair = Pair()
    pair.meet()
    pair.receiver.pause(100.0)
    early, late = pair.open(timeout=1.0), pair.open("late", timeout=60.0)
    pair.wait(5.0)
    assert reason(pair.sender, early) is Reason.TIMEOUT
    assert reason(pair.sender, late) is Reason.PEER_LOST


def test_23_a_full_pool_is_reported() -> None:
    """Nobody was told, and the other side waited sixty seconds for nothing.

    A full pool is a wait in turn; a full queue is told at once, as something that may pass.
    """
    pair = Pair()
    pair.receiver.crash()
    pair.receiver = Receiving(pair.world, "receiver", blocks=1, max_waiting=1)
    holds, waits, too_many = (pair.open(name, tokens=None) for name in "abc")
    pair.wait(0.1)
    assert pair.sender.outcomes.keys() == {too_many}
    assert reason(pair.sender, too_many) is Reason.BUSY
    pair.give_up(pair.sender, holds)
    pair.wait(0.1)
    assert pair.state(waits) is State.SENDING


def test_24_one_late_acknowledgement_poisons_nothing() -> None:
    """After one acknowledgement timeout every transfer on the link failed."""
    pair = Pair()
    pair.meet()
    pair.world.faults.loss = 1.0
    late = pair.open("late")
    pair.wait(1.0)
    pair.world.faults.loss = 0.0
    other = pair.open("other")
    pair.wait(2.0)
    assert reason(pair.sender, late) is reason(pair.sender, other) is None


def test_25_frames_of_an_old_connection() -> None:
    """A port was used again, and a message of the old connection reached a new request."""
    pair = Pair()
    pair.meet()
    old = pair.receiver.epoch
    pair.receiver.crash()
    pair.receiver = Receiving(pair.world, "receiver", blocks=8)
    number = pair.receive()
    offer = frames.Offer(TransferId("request", 1), b"", 0, 8, b"", 30.0)
    pair.inject_packet(Packet(1, pair.sender.epoch, old, 1, 0, offer), pair.sender, pair.receiver)
    pair.wait()
    assert pair.receiver.endpoint.counters["of_another_life"] == 1
    assert not pair.receiver.endpoint.transfer(number).is_claimed


def test_27_success_is_what_the_receiver_has_accepted() -> None:
    """It was reported when a copy was only enqueued. (Asynchronous copies: see the planes' tests.)

    The sender is done when the receiver says so; a chunk counts when it has landed and was told.
    """
    transfer = SendTransfer(TRANSFER, 0.0)
    transfer.offer(b"", 0, 30.0)
    transfer.handle(events.TokensReady(8, 8), 0.0)
    transfer.handle(events.Granted(0, 0, (Extent(0, 8),)), 0.0)
    with pytest.raises(ProtocolViolation):
        transfer.handle(events.Accepted(), 0.0)
    assert transfer.handle(events.WriteFinished(), 0.0) == [
        do.SendFrame(frames.Written(TRANSFER, 0, 0, 8, 8))
    ]
    assert transfer.handle(events.Accepted(), 0.0) == [do.Finish(TRANSFER)]
