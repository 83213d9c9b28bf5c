"""Bugs that others have shipped, or that we nearly did, to plant into the protocol.

Each takes pytest's `monkeypatch` and breaks one thing. A simulation that does not find them all
would not be worth its seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import msgspec
import pytest

from aiomm.errors import Failure, Reason
from aiomm.protocol import commands as do
from aiomm.protocol import endpoint, events, frames
from aiomm.protocol.endpoint import Endpoint
from aiomm.protocol.receive_transfer import ReceiveTransfer
from aiomm.protocol.receiving import ReceiveEndpoint
from aiomm.protocol.send_transfer import SendTransfer
from aiomm.protocol.sending import SendEndpoint
from aiomm.protocol.session import NEVER, Session
from aiomm.protocol.states import State
from aiomm.types import Extent, part_of

Plant: TypeAlias = Callable[[pytest.MonkeyPatch], None]


def free_at_abort_without_quarantine(patch: pytest.MonkeyPatch) -> None:
    """The receiver believes that nothing can land after it has given up."""
    patch.setattr(ReceiveTransfer, "_may_be_written", lambda self: False)


def acknowledge_abort_while_writing(patch: pytest.MonkeyPatch) -> None:
    """AbortAck says "abort seen", not "drained"."""

    def acknowledge(self: SendTransfer) -> list[Any]:
        owes, self._owes_ack = self._owes_ack, False
        return [do.SendFrame(frames.AbortAck(self.id))] if owes else []

    patch.setattr(SendTransfer, "_acknowledge_abort", acknowledge)


def never_acknowledge_abort(patch: pytest.MonkeyPatch) -> None:
    """Quarantined blocks never come back."""
    patch.setattr(SendTransfer, "_acknowledge_abort", lambda self: [])


def claim_to_be_drained(patch: pytest.MonkeyPatch) -> None:
    """A sender that gives up says `drained` while its write runs."""
    original = SendTransfer._fail

    def fail(self: SendTransfer, failure: Failure, now: float) -> list[Any]:
        return [
            do.SendFrame(msgspec.structs.replace(command.frame, drained=True))
            if isinstance(command, do.SendFrame) and isinstance(command.frame, frames.Abort)
            else command
            for command in original(self, failure, now)
        ]

    patch.setattr(SendTransfer, "_fail", fail)


def take_silence_for_death(patch: pytest.MonkeyPatch) -> None:
    """A peer that does not answer counts as one that can write nothing."""
    original = ReceiveEndpoint._peer_lost

    def lost(
        self: ReceiveEndpoint, session: Session, failure: Failure, proven: bool, now: float
    ) -> None:
        original(self, session, failure, True, now)

    patch.setattr(ReceiveEndpoint, "_peer_lost", lost)


def ignore_generation(patch: pytest.MonkeyPatch) -> None:
    """A late frame is applied to whatever transfer has its request id now."""
    original = ReceiveEndpoint._frame_event

    def frame_event(
        self: ReceiveEndpoint, session: Session, transfer: Any, event: Any, now: float
    ) -> None:
        for peer, each in list(self._by_transfer):
            if peer == session.peer_epoch and each.request_id == transfer.request_id:
                transfer = each
        original(self, session, transfer, event, now)

    patch.setattr(ReceiveEndpoint, "_frame_event", frame_event)


def apply_stale_epochs(patch: pytest.MonkeyPatch) -> None:
    """Frames for an earlier life of this process are taken for its own."""

    def of_another_life(self: Endpoint, path: Any, packet: frames.Packet) -> None:
        if packet.source_epoch in self.sessions:
            session = self.sessions[packet.source_epoch]
            for frame in session.receive(packet, session._last_heard):
                self._frame_received(session, frame, session._last_heard)

    patch.setattr(Endpoint, "_of_another_life", of_another_life)


def never_resend(patch: pytest.MonkeyPatch) -> None:
    """Every frame is sent once."""
    original = Session._sequenced

    def sequenced(self: Session, now: float) -> list[tuple[int, frames.Frame]]:
        self._resend_at = NEVER
        chosen = original(self, now)
        self._resend_at = NEVER
        return chosen

    patch.setattr(Session, "_sequenced", sequenced)


def send_aborts_once(patch: pytest.MonkeyPatch) -> None:
    """An Abort is said, not sent: nobody asks whether it has arrived."""
    original = Session.send

    def send(self: Session, frame: frames.Frame) -> None:
        if isinstance(frame, frames.Abort):
            self.say(frame)
        else:
            original(self, frame)

    def unsequenced(self: Session, frame: frames.Frame) -> list[frames.Frame]:
        return [frame] if isinstance(frame, frames.Abort | frames.Goodbye) else []

    patch.setattr(Session, "send", send)
    patch.setattr(Session, "_unsequenced", unsequenced)


def take_frames_as_they_come(patch: pytest.MonkeyPatch) -> None:
    """Repeated frames are applied again, and in whatever order they arrive."""

    def receive(self: Session, packet: frames.Packet, now: float) -> list[frames.Frame]:
        self.heard(now)
        self._settle(packet.acknowledged, now)
        if packet.sequence == 0:
            return self._unsequenced(packet.frame)
        self._acknowledge_at = now
        self._delivered = max(self._delivered, packet.sequence)
        return [packet.frame]

    patch.setattr(Session, "receive", receive)


def turn_away_with_a_farewell(patch: pytest.MonkeyPatch) -> None:
    """Whoever is not known is told what only the last word of a life may say."""

    def unknown(self: Endpoint, path: Any, packet: frames.Packet, now: float) -> None:
        goodbye = frames.Goodbye(Reason.PEER_LOST, "no session with this peer")
        answer = frames.Packet(1, self.epoch, packet.source_epoch, 0, 0, goodbye)
        self._do([do.Transmit(path, frames.encode(answer))])

    patch.setattr(Endpoint, "_unknown_peer", unknown)


def begin_dead_lives_again(patch: pytest.MonkeyPatch) -> None:
    """What a dead sender sent is served when it arrives after the news of its death."""
    original = Endpoint._part

    def part(self: Endpoint, peer: int, failure: Failure, now: float) -> None:
        session = self.sessions.get(peer)
        original(self, peer, failure, now)
        del self._ended[peer]
        if session is not None:
            self.sessions[peer] = session

    patch.setattr(endpoint.Endpoint, "_part", part)


def hold_and_wait(patch: pytest.MonkeyPatch) -> None:
    """A half-received request keeps its blocks while it waits for more."""

    def refused(self: ReceiveTransfer) -> list[Any]:
        self.reservation = None
        if self.state is not State.AWAITING_RESUME:
            return []
        return self._reserve(self._rest(), claimed=True)

    patch.setattr(ReceiveTransfer, "_refused", refused)


def release_while_copying(patch: pytest.MonkeyPatch) -> None:
    """Blocks are freed when the copy out of them begins."""
    original = ReceiveTransfer._release

    def refused(self: ReceiveTransfer) -> list[Any]:
        self.reservation = None
        if self.state is not State.AWAITING_RESUME:
            return []
        move_out = do.MoveOut(self.number, self._landed(), self.total)
        released = original(self)
        self._is_copying = True
        return [move_out, *released]

    patch.setattr(ReceiveTransfer, "_refused", refused)


def free_before_the_copy_has_ended(patch: pytest.MonkeyPatch) -> None:
    """A failure frees blocks that our own copy still reads."""
    original = ReceiveTransfer._release

    def release(self: ReceiveTransfer) -> list[Any]:
        was_copying, self._is_copying = self._is_copying, False
        commands = original(self)
        self._is_copying = was_copying
        return commands

    patch.setattr(ReceiveTransfer, "_release", release)


def reserve_twice(patch: pytest.MonkeyPatch) -> None:
    """Reservations that were replaced meanwhile are carried out all the same."""
    patch.setattr(ReceiveEndpoint, "_is_void", Endpoint._is_void)


def never_unreserve(patch: pytest.MonkeyPatch) -> None:
    """A request that is over keeps its place, or its soft hold."""

    def unreserve(self: ReceiveTransfer) -> list[Any]:
        self.reservation = None
        return []

    patch.setattr(ReceiveTransfer, "_unreserve", unreserve)


def free_what_is_written_meanwhile(patch: pytest.MonkeyPatch) -> None:
    """When chunks are out of the pool, blocks go back that were granted in the meantime."""
    original = ReceiveTransfer._moved_out

    def moved_out(self: ReceiveTransfer) -> list[Any]:
        self._leaving_allocations = len(self._allocations)
        return original(self)

    patch.setattr(ReceiveTransfer, "_moved_out", moved_out)


def move_out_twice(patch: pytest.MonkeyPatch) -> None:
    """Chunks that are on their way out are moved out again, with what has landed since."""
    original = ReceiveTransfer._refused

    def refused(self: ReceiveTransfer) -> list[Any]:
        self._is_copying = False
        return original(self)

    patch.setattr(ReceiveTransfer, "_refused", refused)


def keep_blocks_granted_too_late(patch: pytest.MonkeyPatch) -> None:
    """Blocks that come when the request is over are nobody's."""
    original = ReceiveTransfer._reserved

    def reserved(self: ReceiveTransfer, allocation: Any, extends: bool, now: float) -> list[Any]:
        return [] if self.state.is_terminal else original(self, allocation, extends, now)

    patch.setattr(ReceiveTransfer, "_reserved", reserved)


def write_past_the_extents(patch: pytest.MonkeyPatch) -> None:
    """The last extent of a write is one token too long."""
    original = part_of

    def first(extents: tuple[Extent, ...], skip: int, count: int) -> tuple[Extent, ...]:
        chosen = original(extents, skip, count)
        if not chosen:
            return chosen
        return (*chosen[:-1], Extent(chosen[-1].start, chosen[-1].stop + 1))

    patch.setattr("aiomm.protocol.send_transfer.part_of", first)


def write_from_the_lowest_block(patch: pytest.MonkeyPatch) -> None:
    """A grant with holes is written as if it were one run (`min(block_indices)`)."""
    original = SendTransfer._granted

    def granted(self: SendTransfer, event: Any, now: float) -> list[Any]:
        if event.extents:
            start = event.extents[0].start
            stop = start + sum(extent.num_tokens for extent in event.extents)
            event = type(event)(event.start, event.sequence, (Extent(start, stop),))
        return original(self, event, now)

    patch.setattr(SendTransfer, "_granted", granted)


def resume_from_the_beginning(patch: pytest.MonkeyPatch) -> None:
    """A resumed write forgets how many tokens have been transferred."""
    original = SendTransfer._write_next

    def write_next(self: SendTransfer) -> list[Any]:
        return [
            do.Write(each.transfer, each.sequence, 0, each.extents)
            if isinstance(each, do.Write)
            else each
            for each in original(self)
        ]

    patch.setattr(SendTransfer, "_write_next", write_next)


def resume_without_a_write(patch: pytest.MonkeyPatch) -> None:
    """A resume changes the state and starts nothing."""
    original = SendTransfer._granted

    def granted(self: SendTransfer, event: Any, now: float) -> list[Any]:
        commands = original(self, event, now)
        if isinstance(event, events.Resumed):
            self._writing = 0
            return []
        return commands

    patch.setattr(SendTransfer, "_granted", granted)


def forget_the_deadline(patch: pytest.MonkeyPatch) -> None:
    """The receiver's timeout never starts counting."""
    patch.setattr(ReceiveEndpoint, "_set_deadline", lambda self, at, number: None)


def finish_when_written(patch: pytest.MonkeyPatch) -> None:
    """The sender reports success when the last write has ended, not when it was accepted."""
    original = SendTransfer._write_finished

    def write_finished(self: SendTransfer, event: events.WriteFinished, now: float) -> list[Any]:
        commands = original(self, event, now)
        if self._sealed and not self.state.is_terminal:
            commands += self._accepted(now)
        return commands

    patch.setattr(SendTransfer, "_write_finished", write_finished)


def keep_transfers_of_the_lost(patch: pytest.MonkeyPatch) -> None:
    """The encoder never notices that the language side died."""
    patch.setattr(SendEndpoint, "_peer_lost", lambda self, session, failure, proven, now: None)


def ignore_older_generations(patch: pytest.MonkeyPatch) -> None:
    """A transfer that is offered after a younger one is taken for a repetition."""
    original = ReceiveEndpoint._offered
    latest: dict[tuple[int, int], int] = {}

    def offered(self: ReceiveEndpoint, session: Session, offer: Any, now: float) -> None:
        pair, generation = (self.epoch, session.peer_epoch), offer.transfer.generation
        if generation > latest.get(pair, 0):
            latest[pair] = generation
            original(self, session, offer, now)

    patch.setattr(ReceiveEndpoint, "_offered", offered)


BUGS: tuple[Plant, ...] = (
    free_at_abort_without_quarantine,
    acknowledge_abort_while_writing,
    never_acknowledge_abort,
    claim_to_be_drained,
    take_silence_for_death,
    ignore_generation,
    apply_stale_epochs,
    never_resend,
    send_aborts_once,
    take_frames_as_they_come,
    turn_away_with_a_farewell,
    begin_dead_lives_again,
    hold_and_wait,
    release_while_copying,
    free_before_the_copy_has_ended,
    reserve_twice,
    never_unreserve,
    free_what_is_written_meanwhile,
    move_out_twice,
    keep_blocks_granted_too_late,
    write_past_the_extents,
    write_from_the_lowest_block,
    resume_from_the_beginning,
    resume_without_a_write,
    forget_the_deadline,
    finish_when_written,
    keep_transfers_of_the_lost,
    ignore_older_generations,
)
