"""Draws one request as a sequence diagram: the two real endpoints, talking without a network."""

from __future__ import annotations

from collections import deque

from aiomm.buffers.pool import BlockPool
from aiomm.protocol import frames
from aiomm.protocol.commands import Command, Join, Release, Reserve, ReserveRest, Transmit, Write
from aiomm.protocol.endpoint import Endpoint
from aiomm.protocol.events import TokensReady
from aiomm.protocol.frames import Hello, PlaneOffer, specs_of
from aiomm.protocol.receiving import ReceiveEndpoint
from aiomm.protocol.sending import SendEndpoint
from aiomm.protocol.session import Path
from aiomm.types import Field, Schema

SENDER, RECEIVER = 1, 2
KEY = bytes(range(16))
SCHEMA = Schema(input_embeddings=Field("bfloat16", 3584))
FREE_BLOCKS = (15, 16, 17, 18, 19, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4)


class Conversation:
    """Two endpoints over a perfect link, at one moment; every frame and write is written down."""

    def __init__(self) -> None:
        self.pool = BlockPool(64, 128, free_blocks=FREE_BLOCKS)
        fields = specs_of(SCHEMA)
        self.sender = SendEndpoint(SENDER, SCHEMA, Hello("sender", "encoder", fields))
        self.receiver = ReceiveEndpoint(
            RECEIVER,
            SCHEMA,
            Hello("receiver", "language model", fields, pool_tokens=64 * 128, num_probes=1),
            plane_offers=lambda _: (PlaneOffer("shm", b"offer"),),
        )
        self.path = Path(0, "link", "peer")
        self.lines: list[str] = []
        self._writes: deque[Write] = deque()

    def settle(self) -> None:
        """Carry out everything that both endpoints want; writes finish last."""
        while self._turn(self.sender) or self._turn(self.receiver) or self._finish_write():
            pass

    def _turn(self, endpoint: Endpoint) -> bool:
        commands = endpoint.commands(0.0)
        for command in commands:
            self._carry_out(endpoint, command)
        return bool(commands)

    def _carry_out(self, endpoint: Endpoint, command: Command) -> None:
        receiver, pool = self.receiver, self.pool
        match command:
            case Transmit(_, packet):
                self._tell(endpoint, frames.decode(packet).frame)
                target = receiver if endpoint is self.sender else self.sender
                target.packet_received(self.path, packet, 0.0)
            case Write():
                self._writes.append(command)
            case Reserve(number, num_tokens, True):
                allocation = pool.allocate(pool.blocks_for(num_tokens), num_tokens=num_tokens)
                assert allocation is not None
                receiver.reserved(number, allocation, False, 0.0)
            case ReserveRest(number, num_tokens, behind):
                assert behind is not None
                allocation = pool.extend(behind, behind.num_tokens + num_tokens)
                extends = allocation is not None
                if allocation is None:
                    allocation = pool.allocate(pool.blocks_for(num_tokens), num_tokens=num_tokens)
                assert allocation is not None
                receiver.reserved(number, allocation, extends, 0.0)
            case Join(number):
                self.lines.append("Note over R: two runs of blocks, joined by one copy")
                receiver.joined(number, 0.0)
            case Release(_, allocations):
                for allocation in allocations:
                    pool.free(allocation)

    def _finish_write(self) -> bool:
        if not self._writes:
            return False
        write = self._writes.popleft()
        count = sum(extent.num_tokens for extent in write.extents)
        self.lines.append(f"S-)R: tokens {write.start} to {write.start + count - 1} (data plane)")
        self.sender.write_finished(write.transfer.generation, 0.0)
        return True

    def _tell(self, endpoint: Endpoint, frame: frames.Frame) -> None:
        text = _told(frame)
        if text:
            arrow = "S->>R" if endpoint is self.sender else "R->>S"
            self.lines.append(f"{arrow}: {type(frame).__name__}{text}")


def _told(frame: frames.Frame) -> str:
    """Return what the diagram says of a frame; nothing for those that only keep the link."""
    match frame:
        case frames.Hello():
            return ": schema, epoch" + (", plane offers" if frame.planes else "")
        case frames.Offer(_, _, _, total):
            return f": total {'unknown' if total is None else total}"
        case frames.Announce(_, total):
            return f": total {total}"
        case frames.Grant(_, _, start, blocks):
            return f": from token {start}, block_indices {list(blocks)}"
        case frames.Written(_, _, start, count, total):
            return f": {count} tokens from {start}, total {total}"
        case frames.Accepted():
            return ": all is there"
        case _:
            return ""


def to_mermaid() -> str:
    """Return 2000 tokens against a first grant of 1024, as the endpoints really do it."""
    conversation = Conversation()
    number = conversation.receiver.expect("req-1", KEY, 30.0, 0.0)
    conversation.lines.append("Note over R: expect() reserves 8 blocks")
    transfer = conversation.sender.open(
        "req-1", timeout=30.0, now=0.0, path=conversation.path, life=RECEIVER, key=KEY
    )
    conversation.lines.append("Note over S: claim(ticket), while the encoder runs")
    conversation.settle()
    conversation.lines.append("Note over S: send(tensors)")
    conversation.sender.tokens_ready(transfer.id.generation, TokensReady(2000, 2000), 0.0)
    conversation.settle()
    states = [state.value for state, _ in transfer.history]
    assert states == [s.value for s, _ in conversation.receiver.transfer(number).history]
    conversation.lines.append(f"Note over S,R: both passed {', '.join(states)}")
    head = [
        "sequenceDiagram",
        "    participant S as encoder",
        "    participant R as language model",
    ]
    return "\n".join([*head, *(f"    {line}" for line in conversation.lines)])
