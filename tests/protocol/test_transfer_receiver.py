"""The receiver's half from beginning to end, with its exact commands."""

from __future__ import annotations

import pytest

from aiomm.protocol import commands as do
from aiomm.protocol import events, frames
from aiomm.protocol.events import Reserved, Written
from aiomm.protocol.receive_transfer import ReceiveTransfer
from aiomm.protocol.states import State
from aiomm.protocol.transfer import ProtocolViolation, merged
from aiomm.types import Extent

from .parts import FAILURE, TRANSFER, allocation

ALLOC, SENDING, AWAITING_RESUME, DONE, FAILED = State
DEFAULT = 1024
BLOCK = 128


def run_of(first_block: int, num_tokens: int) -> Extent:
    """Return the extent of `num_tokens` from the beginning of a block on."""
    return Extent(first_block * BLOCK, first_block * BLOCK + num_tokens)


def states(transfer: ReceiveTransfer) -> list[State]:
    """Return every state that was entered."""
    return [state for state, _ in transfer.history]


class TestReceiver:
    """The receiver's half, by itself."""

    def claimed(self, total: int | None) -> ReceiveTransfer:
        """Return a transfer whose sender has claimed it."""
        transfer = ReceiveTransfer(1, DEFAULT, 0.0)
        assert transfer.expect() == [do.Reserve(1, DEFAULT, claimed=False)]
        want = DEFAULT if total is None else total
        assert transfer.handle(events.Claimed(TRANSFER, total, b"meta"), 0.5) == [
            do.Reserve(1, want, claimed=True)
        ]
        assert transfer.metadata == b"meta"
        return transfer

    def grant(self, sequence: int, start: int, *extents: Extent, blocks: range) -> list[object]:
        """Return the commands of a grant."""
        frame = frames.Resume if sequence else frames.Grant
        return [
            do.Permit(1, TRANSFER, sequence, extents),
            do.SendFrame(frame(TRANSFER, sequence, start, tuple(blocks), extents)),
        ]

    def deliver(self, *allocations: object, extents: tuple[Extent, ...]) -> list[object]:
        """Return the commands at the end of a good transfer."""
        accepted = do.SendFrame(frames.Accepted(TRANSFER))
        return [do.Deliver(1, allocations, extents), accepted]  # type: ignore[arg-type]

    def test_2000_tokens_over_the_default(self) -> None:
        """Rest not adjacent: two grants, two runs, joined once at the end."""
        transfer = self.claimed(None)
        first, second = allocation(*range(8), size=BLOCK), allocation(*range(20, 28), size=BLOCK)
        assert transfer.handle(Reserved(first), 1.0) == self.grant(
            0, 0, Extent(0, 1024), blocks=range(8)
        )
        assert transfer.handle(Written(0, 0, 1024, 2000), 2.0) == [do.ReserveRest(1, 976, first)]
        assert states(transfer)[-1] is AWAITING_RESUME
        assert transfer.handle(Reserved(second), 3.0) == self.grant(
            1, 1024, run_of(20, 1024), blocks=range(20, 28)
        )
        assert transfer.handle(Written(1, 1024, 976, 2000), 4.0) == [
            do.Join(1, (Extent(0, 1024), run_of(20, 976)), 2000)
        ]
        assert states(transfer)[-1] is SENDING
        assert transfer.handle(events.Joined(), 5.0) == [
            do.Release(1, (first, second)),
            *self.deliver(extents=()),
        ]
        assert states(transfer) == [ALLOC, SENDING, AWAITING_RESUME, SENDING, DONE]
        assert transfer.chunks == [1024, 976]

    def test_the_rest_is_prepared_while_the_first_grant_is_filled(self) -> None:
        """And where the next blocks are free, the run grows: one view, no copy, no release."""
        transfer = self.claimed(None)
        first = allocation(*range(8), size=BLOCK)
        transfer.handle(Reserved(first), 1.0)
        assert transfer.handle(events.Announced(2000, b"more"), 1.5) == [
            do.ReserveRest(1, 976, first)
        ]
        longer = allocation(*range(16), size=BLOCK, num_tokens=2000)
        assert transfer.handle(Reserved(longer, extends=True), 1.5) == self.grant(
            1, 1024, Extent(1024, 2000), blocks=range(8, 16)
        )
        assert transfer.handle(Written(0, 0, 1024, 2000), 2.0) == []
        assert transfer.history[-2:] == [(AWAITING_RESUME, 2.0), (SENDING, 2.0)]
        assert transfer.handle(Written(1, 1024, 976, 2000), 3.0) == self.deliver(
            longer, extents=(Extent(0, 2000),)
        )
        assert transfer.metadata == b"more"

    def test_a_known_total_is_granted_exactly(self) -> None:
        """Larger or smaller than the default: one grant, no resume."""
        for total in (2000, 100):
            transfer = self.claimed(total)
            exact = allocation(*range(-(-total // BLOCK)), size=BLOCK, num_tokens=total)
            transfer.handle(Reserved(exact), 1.0)
            assert transfer.handle(Written(0, 0, total, total), 2.0) == self.deliver(
                exact, extents=(Extent(0, total),)
            )
            assert transfer.resumes == 0

    def test_the_total_may_turn_out_smaller_than_the_grant(self) -> None:
        """Nothing more is reserved; what was granted too much goes back with the result."""
        transfer = self.claimed(None)
        first = allocation(*range(8), size=BLOCK)
        transfer.handle(Reserved(first), 1.0)
        assert transfer.handle(events.Announced(100, b""), 1.5) == []
        assert transfer.handle(Written(0, 0, 100, 100), 2.0) == self.deliver(
            first, extents=(Extent(0, 100),)
        )

    def test_a_total_announced_before_the_grant(self) -> None:
        """The reservation is changed; the same transfer never waits twice."""
        transfer = self.claimed(None)
        assert transfer.handle(events.Announced(2000, b""), 0.6) == [do.Reserve(1, 2000, True)]
        assert transfer.reservation == do.Reserve(1, 2000, True)

    def test_many_resumes_through_a_small_pool(self) -> None:
        """Each time the buffered chunk moves out, and blocks are asked for at once (rule 3).

        Once one has, nobody asks whether the next could stay.
        """
        transfer = self.claimed(50)
        held = allocation(3, size=BLOCK, num_tokens=20)
        transfer.handle(Reserved(held), 1.0)
        for sequence in range(2):
            start = 20 * sequence
            full = transfer.handle(Written(sequence, start, 20, 50), 2.0)
            if not sequence:
                assert full == [do.ReserveRest(1, 30, held)]
                full = transfer.handle(events.Refused(), 2.0)
            assert full == [
                do.MoveOut(1, (Extent(384, 404),), 50),
                do.Reserve(1, 50 - start - 20, claimed=True),
            ]
            assert transfer.handle(events.MovedOut(), 3.0) == [
                do.Release(1, (held,), before=sequence + 1)
            ]
            num_tokens = min(20, 30 - start)
            held = allocation(3, size=BLOCK, num_tokens=num_tokens)
            transfer.handle(Reserved(held), 4.0)
        assert transfer.handle(Written(2, 40, 10, 50), 5.0) == [do.Join(1, (Extent(384, 394),), 50)]
        assert transfer.handle(events.Joined(), 6.0) == [
            do.Release(1, (held,)),
            *self.deliver(extents=()),
        ]
        assert transfer.chunks == [20, 20, 10]
        assert transfer.resumes == 2

    def test_one_chunk_is_written_while_another_moves_out(self) -> None:
        """What is landed meanwhile moves out next; only blocks that were moved out go back."""
        transfer = self.claimed(50)
        first, second, third = (
            allocation(block, size=BLOCK, num_tokens=count)
            for block, count in ((3, 20), (9, 20), (3, 10))
        )
        transfer.handle(Reserved(first), 1.0)
        transfer.handle(Written(0, 0, 20, 50), 2.0)
        assert transfer.handle(events.Refused(), 2.0)[1] == do.Reserve(1, 30, claimed=True)
        transfer.handle(Reserved(second), 2.5)
        assert transfer.state is SENDING
        assert transfer.handle(Written(1, 20, 20, 50), 3.0) == [do.ReserveRest(1, 10, second)]
        assert transfer.handle(events.Refused(), 3.0) == []
        assert transfer.handle(events.MovedOut(), 3.5) == [
            do.Release(1, (first,), before=1),
            do.MoveOut(1, (Extent(1152, 1172),), 50),
            do.Reserve(1, 10, claimed=True),
        ]
        transfer.handle(Reserved(third), 4.0)
        assert transfer.handle(Written(2, 40, 10, 50), 4.5) == []
        assert transfer.handle(events.MovedOut(), 5.0) == [
            do.Release(1, (second,), before=2),
            do.Join(1, (Extent(384, 394),), 50),
        ]
        assert transfer.handle(events.Joined(), 6.0) == [
            do.Release(1, (third,)),
            *self.deliver(extents=()),
        ]
        assert transfer.chunks == [20, 20, 10]

    def test_what_is_full_moves_out_also_if_its_length_came_meanwhile(self) -> None:
        """The length asks for blocks; whoever waits for them must hold none."""
        transfer = self.claimed(None)
        first, second = allocation(0, size=BLOCK), allocation(5, size=BLOCK)
        transfer.handle(Reserved(first), 1.0)
        transfer.handle(Written(0, 0, 128, None), 2.0)
        transfer.handle(events.Refused(), 2.0)
        transfer.handle(Reserved(second), 2.5)
        transfer.handle(Written(1, 128, 128, None), 3.0)
        assert transfer.handle(events.Refused(), 3.0) == []
        assert transfer.handle(events.Announced(300, b""), 3.5) == [do.Reserve(1, 44, True)]
        assert transfer.handle(events.MovedOut(), 4.0) == [
            do.Release(1, (first,), before=1),
            do.MoveOut(1, (Extent(640, 768),), 300),
            do.Reserve(1, 44, claimed=True),
        ]

    def test_blocks_that_move_out_are_not_extended(self) -> None:
        """They go back when they are out, and what stands behind them would go with them."""
        transfer = self.claimed(None)
        first = allocation(0, size=BLOCK)
        transfer.handle(Reserved(first), 1.0)
        transfer.handle(Written(0, 0, 128, None), 2.0)
        transfer.handle(events.Refused(), 2.0)
        second = allocation(5, size=BLOCK)
        transfer.handle(Reserved(second), 2.5)
        assert transfer.handle(events.Announced(300, b""), 2.6) == [do.ReserveRest(1, 44, second)]
        moving = self.moving_stream()
        moving.handle(events.Announced(2000, b""), 3.0)
        assert moving.reservation == do.Reserve(1, 976, True)

    def test_giving_up_while_one_chunk_is_written_and_another_moves_out(self) -> None:
        """All blocks come back once, when the copy has ended and the sender has drained."""
        for endings in (
            (events.MovedOut(), events.Drained()),
            (events.Drained(), events.MovedOut()),
        ):
            transfer = self.claimed(50)
            first, second = (allocation(block, size=BLOCK, num_tokens=20) for block in (3, 9))
            transfer.handle(Reserved(first), 1.0)
            transfer.handle(Written(0, 0, 20, 50), 2.0)
            transfer.handle(events.Refused(), 2.0)
            transfer.handle(Reserved(second), 2.5)
            commands = transfer.handle(events.Failed(FAILURE), 3.0)
            assert commands[0] == do.Quarantine(1, (first, second))
            assert transfer.handle(endings[0], 4.0) == []
            assert transfer.handle(endings[1], 5.0) == [do.Release(1, (first, second))]
            assert transfer.is_settled

    def test_an_attempt_to_be_early_may_fail(self) -> None:
        """Nothing is copied for it; the blocks are asked for again when the grant is full."""
        transfer = self.claimed(None)
        first = allocation(*range(8), size=BLOCK)
        transfer.handle(Reserved(first), 1.0)
        transfer.handle(events.Announced(2000, b""), 1.5)
        assert transfer.handle(events.Refused(), 1.5) == []
        assert transfer.handle(Written(0, 0, 1024, 2000), 2.0) == [do.ReserveRest(1, 976, first)]

    def test_the_length_comes_between_the_question_and_the_answer(self) -> None:
        """A stream's default is asked for; the exact rest replaces it, still without waiting."""
        transfer = self.claimed(None)
        first = allocation(*range(8), size=BLOCK)
        transfer.handle(Reserved(first), 1.0)
        stream = transfer.handle(Written(0, 0, 1024, None), 2.0)
        assert stream == [do.ReserveRest(1, 1024, first)]
        exact = transfer.handle(events.Announced(2000, b""), 2.0)
        assert exact == [do.ReserveRest(1, 976, first)]
        assert transfer.reservation is exact[0]

    def test_the_length_comes_while_it_waits_for_blocks(self) -> None:
        """The place in the queue is kept, for the exact rest."""
        transfer = self.waiting_stream()
        assert transfer.handle(events.Announced(2000, b""), 4.0) == [do.Reserve(1, 976, True)]

    def test_a_stream_that_ends_while_it_waits_for_blocks(self) -> None:
        """It waits no longer, and is joined from what was moved out."""
        transfer = self.waiting_stream()
        assert transfer.handle(events.Announced(1024, b""), 4.0) == []
        assert transfer.handle(Written(0, 1024, 0, 1024), 4.0) == [
            do.Unreserve(1),
            do.Join(1, (), 1024),
        ]
        late = allocation(30, size=BLOCK)
        assert transfer.handle(Reserved(late), 4.5) == [do.Release(1, (late,))]
        assert transfer.handle(events.Joined(), 5.0) == self.deliver(extents=())
        assert states(transfer) == [ALLOC, SENDING, AWAITING_RESUME, DONE]
        assert transfer.resumes == 0

    def test_a_stream_that_ends_while_chunks_are_moved_out(self) -> None:
        """The copy that runs is let run; then it is joined. Blocks are waited for no longer."""
        transfer = self.moving_stream()
        assert transfer.handle(Written(0, 1024, 0, 1024), 3.0) == [do.Unreserve(1)]
        released, join = transfer.handle(events.MovedOut(), 4.0)
        assert isinstance(released, do.Release)
        assert join == do.Join(1, (), 1024)
        assert transfer.handle(events.Joined(), 5.0) == self.deliver(extents=())

    def test_a_stream_whose_length_is_known_while_chunks_are_moved_out(self) -> None:
        """Told that nothing is left, it waits for the sender to say that this was all."""
        transfer = self.moving_stream()
        assert transfer.handle(events.Announced(1024, b""), 3.0) == []
        assert [type(each) for each in transfer.handle(events.MovedOut(), 4.0)] == [do.Release]
        assert transfer.handle(Written(0, 1024, 0, 1024), 5.0) == [
            do.Unreserve(1),
            do.Join(1, (), 1024),
        ]

    def test_a_stream_that_ends_at_a_border_after_a_resume_was_granted(self) -> None:
        """The resume was for nothing; its blocks go back with the result."""
        transfer = self.claimed(None)
        first, second = allocation(0, size=BLOCK), allocation(5, size=BLOCK)
        transfer.handle(Reserved(first), 1.0)
        transfer.handle(Written(0, 0, 128, None), 2.0)
        transfer.handle(Reserved(second), 3.0)
        assert transfer.handle(Written(0, 128, 0, 128), 4.0) == self.deliver(
            first, second, extents=(Extent(0, 128),)
        )
        assert transfer.chunks == [128]

    def test_a_stream_whose_length_comes_while_its_last_chunk_is_verified(self) -> None:
        """It is whole as soon as that is done; the sender's word that this was all comes after."""
        transfer = self.claimed(None)
        first, second = allocation(5, size=BLOCK), allocation(0, size=BLOCK)
        transfer.handle(Reserved(first), 1.0)
        transfer.handle(Written(0, 0, 128, None), 2.0)
        transfer.handle(Reserved(second), 2.0)
        transfer.handle(Written(1, 128, 128, None, b"sum"), 3.0)
        assert transfer.handle(events.Announced(256, b""), 3.5) == []
        assert [type(each) for each in transfer.handle(events.Verified(True), 4.0)] == [do.Join]
        assert transfer.handle(Written(1, 256, 0, 256), 4.5) == []
        with pytest.raises(ProtocolViolation):
            transfer.handle(Written(1, 256, 1, 256), 4.5)

    def test_zero_tokens(self) -> None:
        """Nothing is granted, and nothing is delivered: an empty tensor."""
        transfer = self.claimed(0)
        nothing = allocation(size=BLOCK)
        assert transfer.handle(Reserved(nothing), 1.0) == self.grant(0, 0, blocks=range(0))
        assert transfer.handle(Written(0, 0, 0, 0), 2.0) == self.deliver(nothing, extents=())

    def test_blocks_with_holes(self) -> None:
        """Two extents: joined into one tensor, in ascending order."""
        transfer = self.claimed(384)
        holes = allocation(9, 3, 4, size=BLOCK)
        transfer.handle(Reserved(holes), 1.0)
        assert transfer.handle(Written(0, 0, 384, 384), 2.0) == [
            do.Join(1, (Extent(384, 640), Extent(1152, 1280)), 384)
        ]

    def test_giving_up_while_the_peer_may_write(self) -> None:
        """The blocks are quarantined until the sender says drained; its word counts once."""
        transfer = self.claimed(None)
        first = allocation(*range(8), size=BLOCK)
        transfer.handle(Reserved(first), 1.0)
        assert transfer.handle(events.Failed(FAILURE), 2.0) == [
            do.Quarantine(1, (first,)),
            do.SendFrame(frames.Abort(TRANSFER, *FAILURE, drained=False)),
            do.Fail(1, FAILURE),
        ]
        assert transfer.handle(events.Drained(), 3.0) == [do.Release(1, (first,))]
        assert transfer.handle(events.Drained(), 3.0) == []

    def test_giving_up_when_the_grant_is_full(self) -> None:
        """Nothing can land: no quarantine. A copy that runs is awaited before blocks are freed."""
        transfer = self.moving_stream()
        assert transfer.handle(events.Failed(FAILURE), 3.0) == [
            do.Unreserve(1),
            do.SendFrame(frames.Abort(TRANSFER, *FAILURE, drained=False)),
            do.Fail(1, FAILURE),
        ]
        assert not transfer.is_settled
        assert [type(each) for each in transfer.handle(events.MovedOut(), 4.0)] == [do.Release]
        assert transfer.is_settled

    def test_giving_up_while_it_is_joined(self) -> None:
        """The same for the last copy."""
        transfer = self.claimed(256)
        holes = allocation(3, 5, size=BLOCK)
        transfer.handle(Reserved(holes), 1.0)
        transfer.handle(Written(0, 0, 256, 256), 2.0)
        assert [type(c) for c in transfer.handle(events.Failed(FAILURE), 3.0)] == [
            do.SendFrame,
            do.Fail,
        ]
        assert transfer.handle(events.Joined(), 4.0) == [do.Release(1, (holes,))]
        assert transfer.state is FAILED

    def test_giving_up_while_what_is_shorter_than_its_grant_is_joined(self) -> None:
        """Nothing lands in the rest of the grant any more: no quarantine."""
        transfer = self.claimed(None)
        transfer.handle(Reserved(allocation(3, 5, size=BLOCK)), 1.0)
        transfer.handle(Written(0, 0, 200, 200), 2.0)
        assert [type(c) for c in transfer.handle(events.Failed(FAILURE), 3.0)] == [
            do.SendFrame,
            do.Fail,
        ]

    def test_giving_up_before_anybody_has_claimed(self) -> None:
        """There is nobody to tell, and the soft hold goes back."""
        transfer = ReceiveTransfer(1, DEFAULT, 0.0)
        transfer.expect()
        assert transfer.handle(events.Failed(FAILURE), 1.0) == [
            do.Unreserve(1),
            do.Fail(1, FAILURE),
        ]

    @pytest.mark.parametrize("drained", [False, True])
    def test_the_sender_gives_up(self, drained: bool) -> None:
        """It is not told what it said; only its word that it drained frees the blocks."""
        transfer = self.claimed(None)
        first = allocation(*range(8), size=BLOCK)
        transfer.handle(Reserved(first), 1.0)
        blocks = do.Release(1, (first,)) if drained else do.Quarantine(1, (first,))
        assert transfer.handle(events.Aborted(FAILURE, drained), 2.0) == [
            blocks,
            do.Fail(1, FAILURE),
        ]

    def test_both_give_up_at_once(self) -> None:
        """The sender's `drained` crosses our abort, and ends the quarantine all the same."""
        transfer = self.claimed(None)
        first = allocation(*range(8), size=BLOCK)
        transfer.handle(Reserved(first), 1.0)
        transfer.handle(events.Failed(FAILURE), 2.0)
        assert transfer.handle(events.Aborted(FAILURE, True), 2.1) == [do.Release(1, (first,))]

    @pytest.mark.parametrize(
        "chunk",
        [
            Written(1, 0, 8, None),
            Written(0, 1, 8, None),
            Written(0, 0, 1025, None),
            Written(0, 0, 8, 7),
        ],
        ids=["never granted", "a gap", "too long", "more than all"],
    )
    def test_a_chunk_that_cannot_be(self, chunk: Written) -> None:
        """What was written is checked against what was granted and against the length."""
        transfer = self.claimed(None)
        transfer.handle(Reserved(allocation(*range(8), size=BLOCK)), 1.0)
        if chunk.total == 7:
            transfer.handle(Written(0, 0, 8, None), 1.5)
            chunk = Written(0, 8, 8, 7)
        with pytest.raises(ProtocolViolation):
            transfer.handle(chunk, 2.0)

    def test_the_length_cannot_change(self) -> None:
        """Whoever announces twice must say the same."""
        transfer = self.claimed(100)
        with pytest.raises(ProtocolViolation, match="total was 100 tokens, now 101"):
            transfer.handle(events.Announced(101, b""), 1.0)

    def moving_stream(self) -> ReceiveTransfer:
        """Return a stream whose first 1024 tokens are being moved out."""
        transfer = self.claimed(None)
        transfer.handle(Reserved(allocation(*range(8), size=BLOCK)), 1.0)
        transfer.handle(Written(0, 0, 1024, None), 2.0)
        transfer.handle(events.Refused(), 2.0)
        return transfer

    def waiting_stream(self) -> ReceiveTransfer:
        """Return a stream whose first 1024 tokens were moved out; it waits for blocks."""
        transfer = self.moving_stream()
        transfer.handle(events.MovedOut(), 3.0)
        return transfer


def test_neighbours_become_one_run() -> None:
    """Only neighbours in the order of the tokens merge; empty extents vanish."""
    a, b, c = Extent(0, 4), Extent(4, 8), Extent(12, 16)
    assert merged((a, b, c)) == (Extent(0, 8), c)
    assert merged((b, a)) == (b, a)
    assert merged((Extent(4, 4), a)) == (a,)


class TestChecksums:
    """A chunk with a checksum counts when it is verified, and not before (rule 6)."""

    def granted(self, *, early_rest: bool) -> ReceiveTransfer:
        """Return a transfer with a first grant of 1024 tokens, and perhaps one for the rest."""
        transfer = ReceiveTransfer(1, DEFAULT, 0.0)
        transfer.expect()
        transfer.handle(events.Claimed(TRANSFER, None, b""), 0.0)
        transfer.handle(Reserved(allocation(*range(8), size=BLOCK)), 0.0)
        if early_rest:
            transfer.handle(events.Announced(2000, b""), 0.0)
            longer = allocation(*range(16), size=BLOCK, num_tokens=2000)
            transfer.handle(Reserved(longer, extends=True), 0.0)
        return transfer

    def test_it_counts_when_it_is_verified(self) -> None:
        """Until then nothing moves; then the transfer is done."""
        transfer = self.granted(early_rest=False)
        assert transfer.handle(Written(0, 0, 100, 100, b"sum"), 1.0) == [
            do.Verify(1, (Extent(0, 100),), b"sum", "")
        ]
        assert (transfer.state, transfer.transferred_tokens) == (SENDING, 0)
        commands = transfer.handle(events.Verified(matches=True), 2.0)
        assert [type(command) for command in commands] == [do.Deliver, do.SendFrame]
        assert (transfer.state, transfer.transferred_tokens) == (DONE, 100)

    def test_chunks_are_verified_in_order(self) -> None:
        """The second arrives while the first is compared; each is compared where it lies."""
        transfer = self.granted(early_rest=True)
        transfer.handle(Written(0, 0, 1024, 2000, b"one"), 1.0)
        assert transfer.handle(Written(1, 1024, 976, 2000, b"two"), 1.0) == []
        assert transfer.handle(events.Verified(matches=True), 2.0) == [
            do.Verify(1, (Extent(1024, 2000),), b"two", "")
        ]
        assert transfer.chunks == [1024]
        transfer.handle(events.Verified(matches=True), 3.0)
        assert (transfer.state, transfer.chunks) == (DONE, [1024, 976])

    def test_a_chunk_without_one_waits_behind_a_chunk_with_one(self) -> None:
        """Chunks count in order."""
        transfer = self.granted(early_rest=True)
        transfer.handle(Written(0, 0, 1024, 2000, b"one"), 1.0)
        assert transfer.handle(Written(1, 1024, 976, 2000), 1.0) == []
        transfer.handle(events.Verified(matches=True), 2.0)
        assert transfer.state is DONE

    def test_without_one_it_may_still_have_to_be_brought_to_its_place(self) -> None:
        """Every chunk is verified where the driver asks for it; the plane is told."""
        transfer = ReceiveTransfer(1, DEFAULT, 0.0, always_verifies=True)
        transfer.expect()
        transfer.handle(events.Claimed(TRANSFER, 100, b""), 0.0)
        transfer.handle(Reserved(allocation(0, size=BLOCK, num_tokens=100)), 0.0)
        assert transfer.handle(Written(0, 0, 100, 100, plane="tcp"), 1.0) == [
            do.Verify(1, (Extent(0, 100),), b"", "tcp")
        ]
        commands = transfer.handle(events.Verified(matches=True), 2.0)
        assert [type(command) for command in commands] == [do.Deliver, do.SendFrame]
        assert (transfer.state, transfer.plane) == (DONE, "tcp")

    def test_a_changed_chunk_fails_the_transfer(self) -> None:
        """The blocks behind it may still be written: quarantine, and the sender is told."""
        transfer = self.granted(early_rest=True)
        transfer.handle(Written(0, 0, 1024, 2000, b"one"), 1.0)
        commands = transfer.handle(events.Verified(matches=False), 2.0)
        assert [type(command) for command in commands] == [
            do.Quarantine,
            do.SendFrame,
            do.Fail,
        ]
        assert transfer.failure is not None
        assert "tokens 0 to 1024 arrived changed" in transfer.failure.message

    def test_a_comparison_that_ends_too_late_changes_nothing(self) -> None:
        """The transfer has failed meanwhile."""
        transfer = self.granted(early_rest=False)
        transfer.handle(Written(0, 0, 100, 100, b"sum"), 1.0)
        transfer.handle(events.Failed(FAILURE), 2.0)
        assert transfer.handle(events.Verified(matches=True), 3.0) == []
        assert transfer.state is FAILED

    def test_what_is_written_behind_an_uncounted_chunk_is_checked_at_once(self) -> None:
        """A gap, or more after the end, is a violation when its frame arrives."""
        transfer = self.granted(early_rest=True)
        transfer.handle(Written(0, 0, 1024, 2000, b"one"), 1.0)
        with pytest.raises(ProtocolViolation, match="expected from 1024 on"):
            transfer.handle(Written(1, 1025, 975, 2000, b"two"), 1.0)

    def test_a_repeated_last_word_changes_nothing(self) -> None:
        """A transfer that is complete and being joined is not completed twice."""
        transfer = self.granted(early_rest=False)
        transfer.handle(Written(0, 0, 1024, None), 1.0)
        transfer.handle(Reserved(allocation(*range(20, 28), size=BLOCK)), 2.0)
        transfer.handle(Written(1, 1024, 976, 2000, b"two"), 3.0)
        assert transfer.handle(Written(1, 2000, 0, 2000), 3.0) == []
        commands = transfer.handle(events.Verified(matches=True), 4.0)
        assert [type(command) for command in commands] == [do.Join]
