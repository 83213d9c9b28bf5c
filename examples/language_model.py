"""The language-model process: receives a photo's embeddings and predicts what comes next.

    python examples/language_model.py

It prints a ticket, one line of JSON; give that to encoder.py in another terminal.
"""

from __future__ import annotations

import argparse
import asyncio

import torch

import aiomm
from aiomm import vision


async def answer(bind: str, request_id: str = "photo-1") -> bool:
    """Serve one request; return whether the tensors arrived as they were sent, bit for bit."""
    model = await asyncio.to_thread(vision.small_qwen)
    async with aiomm.Receiver(vision.SCHEMA, bind=bind, blocks=16, block_size=128) as receiver:
        ticket = receiver.expect(request_id, timeout=60)  # returns at once, memory or not
        print(ticket.to_json(), flush=True)
        async with receiver.receive(request_id) as lease:
            tensors = {name: torch.as_tensor(lease[name]) for name in vision.SCHEMA}
            identical: bool = vision.digest(tensors) == lease.metadata["sha256"]
            tokens = await asyncio.to_thread(vision.next_tokens, model, tensors)
            print(f"received {lease.num_tokens} tokens of {lease.metadata['photo']}")
            print(f"in chunks of {', '.join(map(str, lease.buffered_chunks))}")
        # Here the blocks are back in the pool.
    print(f"next token ids: {tokens}")
    print("bit-identical" if identical else "NOT identical to what was sent")
    return identical


def main() -> None:
    """Parse the command line and serve one request."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--bind", default="tcp://127.0.0.1:*", help="where to listen")
    arguments = parser.parse_args()
    raise SystemExit(0 if asyncio.run(answer(arguments.bind)) else 1)


if __name__ == "__main__":
    main()
