"""The sender's half from beginning to end, with its exact commands."""

from __future__ import annotations

import pytest

from aiomm.errors import Failure, Reason
from aiomm.protocol import commands as do
from aiomm.protocol import events, frames
from aiomm.protocol.events import TokensReady, WriteFinished
from aiomm.protocol.send_transfer import SendTransfer
from aiomm.protocol.states import State
from aiomm.protocol.transfer import ProtocolViolation
from aiomm.types import Extent

from .parts import FAILURE, TRANSFER

ALLOC, SENDING, AWAITING_RESUME, DONE, FAILED = State
DEFAULT = 1024
BLOCK = 128


def run_of(first_block: int, num_tokens: int) -> Extent:
    """Return the extent of `num_tokens` from the beginning of a block on."""
    return Extent(first_block * BLOCK, first_block * BLOCK + num_tokens)


def states(transfer: SendTransfer) -> list[State]:
    """Return every state that was entered."""
    return [state for state, _ in transfer.history]


def written(sequence: int, start: int, count: int, total: int | None) -> do.SendFrame:
    """Return the command that tells of a chunk."""
    return do.SendFrame(frames.Written(TRANSFER, sequence, start, count, total))


def is_settled(transfer: SendTransfer) -> bool:
    """Tell whether nothing of it can land any more."""
    return transfer.is_settled


class TestSender:
    """The sender's half, by itself."""

    def offered(self, *ready: TokensReady) -> SendTransfer:
        """Return a transfer that was offered, after its tokens became ready."""
        transfer = SendTransfer(TRANSFER, 0.0)
        for event in ready:
            assert transfer.handle(event, 0.0) == []
        transfer.offer(b"", 0, 30.0)
        return transfer

    def test_2000_tokens_over_the_default(self) -> None:
        """1024 tokens, a resume, 976 tokens: the states of the design, word for word."""
        transfer = SendTransfer(TRANSFER, 0.0)
        assert transfer.offer(b"key", 0, 30.0) == [
            do.SendFrame(frames.Offer(TRANSFER, b"key", 0, None, b"", 30.0))
        ]
        assert transfer.handle(TokensReady(2000, 2000, b"meta"), 1.0) == [
            do.SendFrame(frames.Announce(TRANSFER, 2000, b"meta"))
        ]
        first, second = run_of(10, 1024), run_of(40, 976)
        assert transfer.handle(events.Granted(0, 0, (first,)), 2.0) == [
            do.Write(TRANSFER, 0, 0, (first,))
        ]
        assert transfer.handle(WriteFinished(), 3.0) == [written(0, 0, 1024, 2000)]
        assert transfer.handle(events.Resumed(1024, 1, (second,)), 4.0) == [
            do.Write(TRANSFER, 1, 1024, (second,))
        ]
        assert transfer.handle(WriteFinished(), 5.0) == [written(1, 1024, 976, 2000)]
        assert transfer.handle(events.Accepted(), 6.0) == [do.Finish(TRANSFER)]
        assert states(transfer) == [ALLOC, SENDING, AWAITING_RESUME, SENDING, DONE]
        assert transfer.chunks == [1024, 976]
        assert transfer.resumes == 1
        assert transfer.is_settled
        assert transfer.story() == (
            "ALLOC at 0.000s",
            "SENDING at 2.000s",
            "AWAITING_RESUME at 3.000s",
            "SENDING at 4.000s",
            "DONE at 6.000s",
        )

    def test_500_tokens_need_no_resume(self) -> None:
        """Fewer tokens than the grant holds: only those are written."""
        transfer = self.offered(TokensReady(500, 500))
        assert transfer.handle(events.Granted(0, 0, (run_of(0, 1024),)), 1.0) == [
            do.Write(TRANSFER, 0, 0, (Extent(0, 500),))
        ]
        assert transfer.handle(WriteFinished(), 2.0) == [written(0, 0, 500, 500)]
        transfer.handle(events.Accepted(), 3.0)
        assert states(transfer) == [ALLOC, SENDING, DONE]
        assert transfer.resumes == 0

    def test_an_early_resume_waits(self) -> None:
        """It changes nothing while the first grant is written; then the state passes on at once."""
        transfer = self.offered(TokensReady(20, 20))
        transfer.handle(events.Granted(0, 0, (Extent(0, 8),)), 1.0)
        assert transfer.handle(events.Resumed(8, 1, (Extent(8, 16),)), 2.0) == []
        assert transfer.handle(events.Resumed(16, 2, (Extent(16, 24),)), 2.0) == []
        assert transfer.state is SENDING
        assert transfer.handle(WriteFinished(), 3.0) == [
            written(0, 0, 8, 20),
            do.Write(TRANSFER, 1, 8, (Extent(8, 16),)),
        ]
        assert transfer.history[-2:] == [(AWAITING_RESUME, 3.0), (SENDING, 3.0)]

    def test_resume_at_any_token(self) -> None:
        """Grants end and begin in the middle of blocks, and skip through several extents."""
        transfer = self.offered(TokensReady(13, 13))
        transfer.handle(events.Granted(0, 0, (Extent(3, 6), Extent(9, 11))), 1.0)
        assert transfer.handle(WriteFinished(), 2.0) == [written(0, 0, 5, 13)]
        assert transfer.handle(events.Resumed(5, 1, (Extent(11, 21),)), 3.0) == [
            do.Write(TRANSFER, 1, 5, (Extent(11, 19),))
        ]

    def test_a_stream_writes_what_there_is(self) -> None:
        """Tokens are written as they become ready, also across the extents of one grant."""
        transfer = self.offered()
        extents = (Extent(0, 4), Extent(8, 12))
        assert transfer.handle(events.Granted(0, 0, extents), 1.0) == []
        assert transfer.handle(TokensReady(3, None), 2.0) == [
            do.Write(TRANSFER, 0, 0, (Extent(0, 3),))
        ]
        assert transfer.handle(TokensReady(6, None), 2.0) == []
        assert transfer.handle(WriteFinished(), 3.0) == [
            written(0, 0, 3, None),
            do.Write(TRANSFER, 0, 3, (Extent(3, 4), Extent(8, 10))),
        ]
        assert transfer.handle(WriteFinished(), 4.0) == [written(0, 3, 3, None)]
        assert transfer.handle(TokensReady(7, 7), 5.0) == [
            do.SendFrame(frames.Announce(TRANSFER, 7, b"")),
            do.Write(TRANSFER, 0, 6, (Extent(10, 11),)),
        ]
        assert transfer.handle(WriteFinished(), 6.0) == [written(0, 6, 1, 7)]
        assert transfer.chunks == [7]

    def test_a_stream_that_ends_at_the_border_of_a_grant(self) -> None:
        """Nothing is left to write: an empty chunk says so, and no resume is needed."""
        transfer = self.offered(TokensReady(8, None))
        transfer.handle(events.Granted(0, 0, (Extent(0, 8),)), 1.0)
        assert transfer.handle(WriteFinished(), 2.0) == [written(0, 0, 8, None)]
        assert transfer.state is AWAITING_RESUME
        assert transfer.handle(TokensReady(8, 8), 3.0) == [
            do.SendFrame(frames.Announce(TRANSFER, 8, b"")),
            written(0, 8, 0, 8),
        ]
        assert transfer.handle(events.Resumed(8, 1, (Extent(8, 16),)), 4.0) == []
        assert transfer.handle(events.Accepted(), 5.0) == [do.Finish(TRANSFER)]
        assert transfer.chunks == [8]

    def test_zero_tokens(self) -> None:
        """An empty tensor is a transfer like any other, without a write."""
        transfer = self.offered(TokensReady(0, 0, b"meta"))
        assert transfer.handle(events.Granted(0, 0, ()), 1.0) == [written(0, 0, 0, 0)]
        assert transfer.handle(events.Accepted(), 2.0) == [do.Finish(TRANSFER)]
        assert transfer.chunks == []

    def test_a_plane_that_carries_notes_tells_of_the_chunk(self) -> None:
        """No frame does, and the state passes on as ever."""
        transfer = self.offered(TokensReady(20, 20))
        transfer.handle(events.Granted(0, 0, (Extent(0, 8),)), 1.0)
        note = frames.Written(TRANSFER, 0, 0, 8, 20, b"sum", "tcp")
        assert transfer.note(b"sum", "tcp") == note
        assert transfer.handle(WriteFinished(b"sum", "tcp"), 2.0) == []
        assert transfer.state is AWAITING_RESUME
        assert transfer.handle(events.Resumed(8, 1, (Extent(8, 20),)), 3.0) == [
            do.Write(TRANSFER, 1, 8, (Extent(8, 20),))
        ]
        assert transfer.handle(WriteFinished(), 4.0) == [written(1, 8, 12, 20)]
        assert transfer.chunks == [8, 12]

    def test_answers_to_a_note_come_before_the_planes_own(self) -> None:
        """The receiver may resume, and accept, before this side knows that its write is over."""
        transfer = self.offered(TokensReady(12, 12))
        transfer.handle(events.Granted(0, 0, (Extent(0, 8),)), 1.0)
        transfer.note(b"", "tcp")
        assert transfer.handle(events.Resumed(8, 1, (Extent(8, 16),)), 2.0) == []
        assert transfer.handle(WriteFinished(), 3.0) == [
            do.Write(TRANSFER, 1, 8, (Extent(8, 12),)),
        ]
        transfer.note(b"", "tcp")
        assert transfer.handle(events.Accepted(), 4.0) == [do.Finish(TRANSFER)]
        assert transfer.state is DONE
        assert (transfer.transferred_tokens, transfer.chunks) == (12, [8, 4])
        assert is_settled(transfer)
        assert transfer.handle(WriteFinished(), 5.0) == []
        assert transfer.chunks == [8, 4]

    def test_an_acceptance_before_the_last_note(self) -> None:
        """Of a chunk that is not the last, or without a note, it is a lie."""
        for total, has_note in ((12, True), (8, False)):
            transfer = self.offered(TokensReady(total, total))
            transfer.handle(events.Granted(0, 0, (Extent(0, 8),)), 1.0)
            if has_note:
                transfer.note(b"", "tcp")
            with pytest.raises(ProtocolViolation, match="accepted after 0 of"):
                transfer.handle(events.Accepted(), 2.0)
            assert transfer.transferred_tokens == 0

    def test_a_length_that_was_not_known_yet_when_the_note_was_written(self) -> None:
        """An empty chunk says behind it that nothing follows."""
        transfer = self.offered(TokensReady(8, None))
        transfer.handle(events.Granted(0, 0, (Extent(0, 8),)), 1.0)
        assert transfer.note(b"", "") == frames.Written(TRANSFER, 0, 0, 8, None)
        assert transfer.handle(TokensReady(8, 8), 2.0) == [
            do.SendFrame(frames.Announce(TRANSFER, 8, b""))
        ]
        assert transfer.handle(WriteFinished(), 3.0) == [written(0, 8, 0, 8)]
        assert transfer.handle(events.Accepted(), 4.0) == [do.Finish(TRANSFER)]

    def test_metadata_that_comes_later_is_announced(self) -> None:
        """And what was told already is not told again."""
        transfer = self.offered(TokensReady(0, 5))
        assert transfer.handle(TokensReady(5, 5, b"meta"), 1.0) == [
            do.SendFrame(frames.Announce(TRANSFER, 5, b"meta"))
        ]
        assert transfer.handle(TokensReady(5, 5), 2.0) == []

    def test_giving_up_while_a_write_runs(self) -> None:
        """The peer hears at once that it failed, and later that the write has drained."""
        transfer = self.offered(TokensReady(20, 20))
        transfer.handle(events.Granted(0, 0, (Extent(0, 8),)), 1.0)
        assert transfer.handle(events.Failed(FAILURE), 2.0) == [
            do.SendFrame(frames.Abort(TRANSFER, *FAILURE, drained=False)),
            do.Fail(1, FAILURE),
        ]
        assert not is_settled(transfer)
        assert transfer.handle(WriteFinished(), 3.0) == [do.SendFrame(frames.AbortAck(TRANSFER))]
        assert is_settled(transfer)
        assert transfer.failure == FAILURE

    @pytest.mark.parametrize("granted", [False, True])
    def test_giving_up_while_no_write_runs(self, granted: bool) -> None:
        """One frame says both: it is over, and nothing can land."""
        transfer = self.offered(TokensReady(0, 20))
        if granted:
            transfer.handle(events.Granted(0, 0, (Extent(0, 8),)), 1.0)
        assert transfer.handle(events.Failed(FAILURE), 2.0) == [
            do.SendFrame(frames.Abort(TRANSFER, *FAILURE, drained=True)),
            do.Fail(1, FAILURE),
        ]
        assert transfer.is_settled

    def test_the_peer_gives_up_while_a_write_runs(self) -> None:
        """The acknowledgement waits for the end of the write: drained, not "abort seen"."""
        transfer = self.offered(TokensReady(20, 20))
        transfer.handle(events.Granted(0, 0, (Extent(0, 8),)), 1.0)
        assert transfer.handle(events.Aborted(FAILURE, False), 2.0) == [do.Fail(1, FAILURE)]
        assert transfer.handle(events.Aborted(FAILURE, False), 2.0) == []
        assert transfer.handle(WriteFinished(), 3.0) == [do.SendFrame(frames.AbortAck(TRANSFER))]

    def test_a_write_fails(self) -> None:
        """It is over at once; acknowledged only when the plane says that nothing can land."""
        failure = Failure(Reason.PLANE, "broken")
        transfer = self.offered(TokensReady(20, 20))
        transfer.handle(events.Granted(0, 0, (Extent(0, 8),)), 1.0)
        assert transfer.handle(events.WriteFailed(failure), 2.0) == [
            do.SendFrame(frames.Abort(TRANSFER, *failure, drained=False)),
            do.Fail(1, failure),
            do.Quiesce(TRANSFER),
        ]
        assert not transfer.is_settled
        assert transfer.handle(events.Drained(), 3.0) == [do.SendFrame(frames.AbortAck(TRANSFER))]
        assert is_settled(transfer)

    @pytest.mark.parametrize(
        "grant",
        [
            events.Granted(1, 0, (Extent(0, 8),)),
            events.Granted(0, 1, (Extent(0, 8),)),
            events.Granted(0, 0, (Extent(8, 0),)),
            events.Granted(0, 0, (Extent(0, 8), Extent(4, 12))),
            events.Granted(0, 0, (Extent(8, 16), Extent(0, 8))),
            events.Granted(0, 0, (Extent(0, 0),)),
            events.Granted(0, 0, ()),
        ],
        ids=["start", "sequence", "backwards", "overlap", "descending", "empty extent", "nothing"],
    )
    def test_a_grant_that_cannot_be(self, grant: events.Granted) -> None:
        """Writes follow extents blindly, so extents that make no sense are refused."""
        transfer = self.offered(TokensReady(20, 20))
        with pytest.raises(ProtocolViolation):
            transfer.handle(grant, 1.0)
        assert transfer.granted_tokens == 0
