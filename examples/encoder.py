"""The encoder process: runs a photo through a vision tower and sends the embeddings.

    python examples/encoder.py TICKET PHOTO

TICKET is the line of JSON that language_model.py prints; PHOTO is any picture.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import aiomm
from aiomm import vision

if TYPE_CHECKING:
    import torch


def run_tower(photo: Path) -> dict[str, torch.Tensor]:
    """Encode the photo; a real worker would have loaded its model at start."""
    return vision.encode(vision.small_qwen(), photo)


async def send_photo(ticket: aiomm.Ticket, photo: Path) -> None:
    """Claim memory on the language side, encode the photo meanwhile, and send the result."""
    async with aiomm.Sender(vision.SCHEMA) as sender:
        transfer = sender.claim(ticket)
        try:
            tensors = await asyncio.to_thread(run_tower, photo)
        except Exception as exc:
            transfer.cancel(f"encoder failed: {exc}")  # the language side knows at once
            raise
        transfer.send(tensors, metadata={"photo": photo.name, "sha256": vision.digest(tensors)})
        stats = await transfer
    print(f"sent {len(tensors['fill_ids'])} tokens of {photo.name}: {stats}")


def main() -> None:
    """Parse the command line and send one photo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "ticket", type=aiomm.Ticket.from_json, help="what language_model.py printed"
    )
    parser.add_argument("photo", type=Path, help="a picture: JPEG, PNG, ...")
    arguments = parser.parse_args()
    asyncio.run(send_photo(arguments.ticket, arguments.photo))


if __name__ == "__main__":
    main()
