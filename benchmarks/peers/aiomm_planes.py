"""aiomm itself: a transfer that was claimed and granted before there was a tensor.

The clock runs from `send()` to the return of the receiver's `await`, with the tensor taken out of
the lease. CPU time includes the ticket, the claim and the grant.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import cast

import torch

import aiomm

from .base import ROW_NBYTES, Adapter, Far, Near, Setting

BLOCK_SIZE = 16
SCHEMA = aiomm.Schema(rows=aiomm.Field("uint8", ROW_NBYTES))


def plane_of(setting: Setting) -> str:
    """Return the plane in the name of a path."""
    return setting.path.removeprefix("aiomm ")


class AiommFar(Far):
    """A receiver."""

    async def open(self) -> str:
        """Start it, with room for two of the largest."""
        tokens = self.setting.largest // ROW_NBYTES
        self._receiver = aiomm.Receiver(
            SCHEMA,
            bind="tcp://127.0.0.1:*",
            planes=plane_of(self.setting),
            blocks=2 * -(-tokens // BLOCK_SIZE),
            block_size=BLOCK_SIZE,
        )
        self._numbers = count()
        await self._receiver.start()
        return ""

    async def prepare(self, nbytes: int) -> str:
        """Expect a request and return its ticket."""
        self._request_id = str(next(self._numbers))
        return self._receiver.expect(self._request_id).to_json()

    async def receive(self, nbytes: int) -> torch.Tensor:
        """Wait for it."""
        self._lease = await self._receiver.receive(self._request_id)
        return cast("torch.Tensor", self._lease["rows"])

    async def finish(self) -> None:
        """Give the blocks back."""
        if not self._lease.is_view or self._lease.stats.plane != plane_of(self.setting):
            raise RuntimeError(f"not received in place over its plane: {self._lease!r}")
        self._lease.release()

    async def close(self) -> None:
        """Close it."""
        await self._receiver.aclose()


class AiommNear(Near):
    """A sender."""

    runs_on_the_loop = True

    def __init__(self, setting: Setting, sources: Mapping[int, torch.Tensor]) -> None:
        super().__init__(setting, sources)
        self._sender = aiomm.Sender(SCHEMA, planes=plane_of(setting))

    async def prepare(self, ticket: str, nbytes: int) -> None:
        """Claim, and wait for the grant."""
        self._transfer = self._sender.claim(ticket, num_tokens=nbytes // ROW_NBYTES)
        async for state in self._transfer.events():
            if state is not aiomm.State.ALLOC:
                break

    async def send(self, rows: torch.Tensor) -> None:
        """Give the tensor, and wait until the receiver has it."""
        self._transfer.send({"rows": rows})
        await self._transfer

    async def close(self) -> None:
        """Close it."""
        await self._sender.aclose()


PATHS = {f"aiomm {plane}": Adapter(AiommFar, AiommNear) for plane in ("shm", "tcp")}
