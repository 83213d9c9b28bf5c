"""An asyncio scheduler around Receiver: admission, deadlines, and clients that give up.

    python examples/custom_scheduler.py

Both sides live in this one process; the encoder is a stand-in that takes the time it is told.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import torch

import aiomm

SCHEMA = aiomm.Schema(input_embeddings=aiomm.Field("bfloat16", 512), fill_ids=aiomm.Field("int32"))
FOREVER = 3600.0


@dataclass
class Request:
    """What a client asks for, with what the stand-in encoder needs to know."""

    request_id: str
    num_tokens: int = 500
    deadline: float = 20.0
    """Seconds from arrival to result, waiting for admission included."""
    encode_seconds: float = 0.01
    encoding: asyncio.Event = field(default_factory=asyncio.Event)


class Scheduler:
    """Admits at most `limit` requests at a time; the others wait and hold no memory."""

    def __init__(
        self,
        receiver: aiomm.Receiver,
        dispatch: Callable[[aiomm.Ticket, Request], object],
        limit: int,
    ) -> None:
        self._receiver = receiver
        self._dispatch = dispatch
        self._admission = asyncio.Semaphore(limit)

    async def run(self, request: Request) -> str:
        """Return "done" or "deadline"; cancelling this coroutine gives the request up."""
        try:
            async with asyncio.timeout(request.deadline), self._admission:
                ticket = self._receiver.expect(request.request_id, timeout=request.deadline)
                self._dispatch(ticket, request)
                async with self._receiver.receive(request.request_id) as lease:
                    prefill(lease)
        except TimeoutError:  # ours, or aiomm.TransferTimeout: one deadline, whoever notices it
            return "deadline"
        return "done"


def prefill(lease: aiomm.Lease) -> None:
    """Stand in for the language model: read every embedding, and find what run_tower made."""
    embeddings = torch.as_tensor(lease["input_embeddings"])
    assert embeddings.eq(lease.num_tokens).all()


async def run_tower(request: Request) -> dict[str, torch.Tensor]:
    """Stand in for a vision tower."""
    await asyncio.sleep(request.encode_seconds)
    count = request.num_tokens
    embeddings = torch.full((count, 512), count, dtype=torch.bfloat16)
    return {"input_embeddings": embeddings, "fill_ids": torch.arange(count, dtype=torch.int32)}


async def encode(sender: aiomm.Sender, ticket: aiomm.Ticket, request: Request) -> None:
    """Be the encoder: claim, run the tower, send; stop at once when the request is given up."""
    transfer = sender.claim(ticket)
    tower = asyncio.create_task(run_tower(request))
    transfer.add_done_callback(lambda _: tower.cancel())
    request.encoding.set()
    await asyncio.wait([tower])
    if not tower.cancelled():
        transfer.send(tower.result())
    with suppress(aiomm.AiommError):  # the scheduler knows; it cancelled, or waited too long
        await transfer


async def serve(limit: int = 4) -> None:
    """Run twenty requests, one too slow for its deadline, and one whose client hangs up."""
    slow = Request("slow", deadline=0.3, encode_seconds=FOREVER)
    abandoned = Request("abandoned", encode_seconds=FOREVER)
    ordinary = [Request(f"ordinary-{number}", 128 * (number + 1)) for number in range(20)]
    async with (
        aiomm.Receiver(SCHEMA, bind="tcp://127.0.0.1:*", blocks=32) as receiver,
        aiomm.Sender(SCHEMA) as sender,
        asyncio.TaskGroup() as encoders,
    ):

        def dispatch(ticket: aiomm.Ticket, request: Request) -> None:
            encoders.create_task(encode(sender, ticket, request))

        scheduler = Scheduler(receiver, dispatch, limit)
        tasks = [
            asyncio.create_task(scheduler.run(request)) for request in (abandoned, slow, *ordinary)
        ]
        await abandoned.encoding.wait()
        tasks[0].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        await scheduler.run(Request("last"))  # behind every acknowledgement of what was given up
        print(receiver)  # its repr counts the blocks: all are free
    outcomes = Counter(
        type(one).__name__ if isinstance(one, BaseException) else one for one in results
    )
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())))


if __name__ == "__main__":
    asyncio.run(serve())
