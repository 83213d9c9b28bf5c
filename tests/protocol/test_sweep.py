"""Both halves of a transfer in every situation against every event, judged by oracles.

The oracles were written by hand. In a cell: the next state; `+` same state, with commands; `.` same
state, nothing to do; `!` a violation of the protocol; `x` cannot happen (only a peer's frame can
come at any time; a driver answers what it was asked).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from aiomm.protocol import commands as do
from aiomm.protocol import events
from aiomm.protocol.events import ReceiveEvent, SendEvent
from aiomm.protocol.receive_transfer import ReceiveTransfer
from aiomm.protocol.send_transfer import SendTransfer
from aiomm.protocol.states import State
from aiomm.protocol.transfer import ProtocolViolation
from aiomm.types import Extent

from .parts import BLOCK, FAILURE, TRANSFER, allocation

FIRST, SECOND = allocation(0, 1), allocation(5, 6)


def sender(*happened: SendEvent) -> SendTransfer:
    """Return a sender's transfer that was offered, after what happened."""
    transfer = SendTransfer(TRANSFER, 0.0)
    transfer.offer(b"", 0, 30.0)
    for event in happened:
        transfer.handle(event, 1.0)
    return transfer


def receiver(*happened: ReceiveEvent) -> ReceiveTransfer:
    """Return a receiver's transfer that was expected, after what happened."""
    transfer = ReceiveTransfer(1, 2 * BLOCK, 0.0)
    transfer.expect()
    for event in happened:
        transfer.handle(event, 1.0)
    return transfer


def judged(
    handle: Callable[[], Sequence[do.TransferCommand]], transfer: SendTransfer | ReceiveTransfer
) -> str:
    """Do it, and return the cell of the oracle that would describe what happened."""
    before = len(transfer.history)
    try:
        commands = handle()
    except ProtocolViolation:
        assert len(transfer.history) == before
        return "!"
    if len(transfer.history) > before:
        return transfer.state
    return "+" if commands else "."


def cells(oracle: str) -> list[tuple[str, str, str]]:
    """Return situation, event and expectation of each cell that can happen."""
    head, *rows = (line.split() for line in oracle.strip().splitlines())
    return [
        (row[0], event, cell)
        for row in rows
        for event, cell in zip(head, row[1:], strict=True)
        if cell != "x"
    ]


# The sender: 20 tokens unless said otherwise, and grants of 8.

ALL_READY = events.TokensReady(20, 20)
GRANT = events.Granted(0, 0, FIRST.extents)
RESUME = events.Resumed(8, 1, SECOND.extents)

SEND_SITUATIONS: dict[str, tuple[SendEvent, ...]] = {
    "alloc": (ALL_READY,),
    "writing": (ALL_READY, GRANT),
    "starved": (events.TokensReady(4, None), GRANT, events.WriteFinished()),
    "sealed": (events.TokensReady(8, 8), GRANT, events.WriteFinished()),
    "awaiting": (ALL_READY, GRANT, events.WriteFinished()),
    "early": (ALL_READY, GRANT, RESUME),
    "done": (events.TokensReady(8, 8), GRANT, events.WriteFinished(), events.Accepted()),
    "failed": (ALL_READY, events.Failed(FAILURE)),
    "failed-writing": (ALL_READY, GRANT, events.Failed(FAILURE)),
}
SEND_ORACLE = """
                Granted Resumed Accepted Failed Aborted Drained Ready Finished        WriteFailed
alloc           SENDING !       !        FAILED FAILED  .       .     x               x
writing         !       .       !        FAILED FAILED  x       .     AWAITING_RESUME FAILED
starved         !       .       !        FAILED FAILED  .       +     x               x
sealed          !       .       DONE     FAILED FAILED  .       .     x               x
awaiting        !       SENDING !        FAILED FAILED  .       .     x               x
early           !       .       !        FAILED FAILED  x       .     SENDING         FAILED
done            .       .       .        .      +       .       .     x               x
failed          .       .       .        .      +       .       .     x               x
failed-writing  .       .       .        .      .       +       .     +               +
"""


def send_event(name: str, transfer: SendTransfer) -> SendEvent:
    """Return the event of that name that fits, if any does."""
    sequence = len(transfer.chunks) if transfer.granted_tokens else 0
    sequence = transfer.granted_tokens // 8
    happenings: dict[str, SendEvent] = {
        "Granted": events.Granted(transfer.granted_tokens, sequence, (Extent(40, 48),)),
        "Resumed": events.Resumed(transfer.granted_tokens, sequence, (Extent(40, 48),)),
        "Accepted": events.Accepted(),
        "Failed": events.Failed(FAILURE),
        "Aborted": events.Aborted(FAILURE, False),
        "Drained": events.Drained(),
        "Ready": events.TokensReady(20, 20) if transfer.total is None else ALL_READY,
        "Finished": events.WriteFinished(),
        "WriteFailed": events.WriteFailed(FAILURE),
    }
    if transfer.total == 8:
        happenings["Ready"] = events.TokensReady(8, 8)
    return happenings[name]


@pytest.mark.parametrize(("situation", "event", "expected"), cells(SEND_ORACLE))
def test_the_sender_in_every_situation(situation: str, event: str, expected: str) -> None:
    """The sender's half does what its oracle says, and nothing else."""
    transfer = sender(*SEND_SITUATIONS[situation])
    happening = send_event(event, transfer)
    assert judged(lambda: transfer.handle(happening, 2.0), transfer) == expected


# The receiver: 8 tokens by default, of a sender that does not know its length at first.

CLAIMED = events.Claimed(TRANSFER, None, b"")
TOLD = events.Announced(20, b"")
FULL = events.Written(0, 0, 8, None)
QUEUED = (CLAIMED, events.Reserved(FIRST), FULL, events.Refused(), events.MovedOut())

RECEIVE_SITUATIONS: dict[str, tuple[ReceiveEvent, ...]] = {
    "expected": (),
    "claimed": (CLAIMED,),
    "sending": (CLAIMED, events.Reserved(FIRST)),
    "early": (CLAIMED, events.Reserved(FIRST), TOLD, events.Reserved(allocation(5, 6, 7))),
    "asking": (CLAIMED, events.Reserved(FIRST), FULL),
    "moving": (CLAIMED, events.Reserved(FIRST), FULL, events.Refused()),
    "moving-two": (
        CLAIMED,
        events.Reserved(FIRST),
        FULL,
        events.Refused(),
        events.Reserved(SECOND),
    ),
    "queued": QUEUED,
    "joining": (*QUEUED, events.Reserved(SECOND), events.Written(1, 8, 4, 12)),
    "ending": (
        CLAIMED,
        events.Reserved(FIRST),
        FULL,
        events.Refused(),
        events.Written(0, 8, 0, 8),
    ),
    "done": (CLAIMED, events.Reserved(FIRST), events.Written(0, 0, 8, 8)),
    "verifying": (CLAIMED, events.Reserved(FIRST), events.Written(0, 0, 4, None, b"sum")),
    "failed": (CLAIMED, events.Failed(FAILURE)),
    "quarantined": (CLAIMED, events.Reserved(FIRST), events.Failed(FAILURE)),
    "failed-moving": (
        CLAIMED,
        events.Reserved(FIRST),
        FULL,
        events.Refused(),
        events.Failed(FAILURE),
    ),
}
# `Abort`: the sender may still write; `Drop`: it gives up and has drained.
RECEIVE_ORACLE = """
              Claimed Announced Reserved Refused Written Sum Moved Joined Failed Abort  Drop Drained
expected      +       x         x        x       x       x   x     x      FAILED x      x x
claimed       x       +         SENDING  x       !       x   x     x      FAILED FAILED FAILED .
sending       x       +         x        .       .       x   x     x      FAILED FAILED FAILED .
early         x       .         x        .       .       x   x     x      FAILED FAILED FAILED .
verifying     x       +         x        .       .       .   x     x      FAILED FAILED FAILED .
asking        x       +         SENDING  +       !       x   x     x      FAILED FAILED FAILED .
moving        x       +         SENDING  x       !       x   +     x      FAILED FAILED FAILED .
moving-two    x       +         x        x       .       x   +     x      FAILED FAILED FAILED .
queued        x       +         SENDING  x       !       x   x     x      FAILED FAILED FAILED .
joining       x       !         +        x       !       x   x     DONE   FAILED FAILED FAILED .
ending        x       !         +        x       !       x   +     x      FAILED FAILED FAILED .
done          x       .         +        .       .       x   x     x      .      .      . .
failed        x       .         +        .       .       .   x     x      .      .      . .
quarantined   x       .         +        .       .       .   x     x      .      .      + +
failed-moving x       .         +        .       .       .   +     x      .      .      . .
"""


def receive_event(name: str, transfer: ReceiveTransfer, *, verifies: bool = False) -> ReceiveEvent:
    """Return the event of that name; `Written` tells of the next four tokens."""
    sequence = max(0, len(transfer.grants) - 1) if transfer.transferred_tokens >= 8 else 0
    happenings: dict[str, ReceiveEvent] = {
        "Claimed": CLAIMED,
        "Announced": TOLD,
        "Reserved": events.Reserved(allocation(10, 11)),
        "Refused": events.Refused(),
        "Written": events.Written(
            sequence, transfer.transferred_tokens + 4 * verifies, 4, transfer.total
        ),
        "Sum": events.Verified(matches=True),
        "Moved": events.MovedOut(),
        "Joined": events.Joined(),
        "Failed": events.Failed(FAILURE),
        "Abort": events.Aborted(FAILURE, False),
        "Drop": events.Aborted(FAILURE, True),
        "Drained": events.Drained(),
    }
    return happenings[name]


@pytest.mark.parametrize(("situation", "event", "expected"), cells(RECEIVE_ORACLE))
def test_the_receiver_in_every_situation(situation: str, event: str, expected: str) -> None:
    """The receiver's half does what its oracle says, and nothing else."""
    transfer = receiver(*RECEIVE_SITUATIONS[situation])
    happening = receive_event(event, transfer, verifies=situation == "verifying")
    assert judged(lambda: transfer.handle(happening, 2.0), transfer) == expected


@pytest.mark.parametrize("situation", RECEIVE_SITUATIONS)
@pytest.mark.parametrize("event", ["Failed", "Abort", "Drop", "Drained"])
def test_no_block_is_lost_or_freed_twice(situation: str, event: str) -> None:
    """Whatever ends a request, wherever it stands, each of its blocks comes back exactly once."""
    transfer = ReceiveTransfer(1, 2 * BLOCK, 0.0)
    given: list[int] = []
    back: list[int] = []

    def feed(happening: ReceiveEvent) -> None:
        if isinstance(happening, events.Reserved):
            given.extend(happening.allocation.block_indices)
        for command in transfer.handle(happening, 1.0):
            if isinstance(command, do.Release | do.Deliver):
                back.extend(b for each in command.allocations for b in each.block_indices)

    transfer.expect()
    for each in RECEIVE_SITUATIONS[situation]:
        feed(each)
    feed(receive_event(event, transfer))
    copies: list[ReceiveEvent] = (
        [events.MovedOut()] if "moving" in situation or situation == "ending" else []
    )
    copies += [events.Joined()] if situation == "joining" else []
    for ending in (events.Failed(FAILURE), *copies, events.Drained(), events.Drained()):
        feed(ending)
    assert transfer.state in (State.DONE, State.FAILED)
    assert transfer.is_settled
    assert sorted(back) == sorted(given)
