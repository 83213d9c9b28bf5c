"""`send` and `recv` of torch.distributed over gloo, in a world of two."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed

from .base import ROW_NBYTES, Adapter, Far, Near, Setting, landing

FAR_RANK, NEAR_RANK = 0, 1
TIMEOUT = timedelta(seconds=30)


def join(setting: Setting, rank: int) -> None:
    """Join the world, which takes both."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{Path(setting.scratch, 'gloo')}",
        rank=rank,
        world_size=2,
        timeout=TIMEOUT,
    )


class GlooFar(Far):
    """Receives into its memory."""

    async def connect(self) -> None:
        """Join."""
        self._target = landing(self.setting.largest)
        join(self.setting, FAR_RANK)

    async def receive(self, nbytes: int) -> torch.Tensor:
        """Receive one tensor, whose length both know."""
        rows = self._target[: nbytes // ROW_NBYTES]
        torch.distributed.recv(rows, src=NEAR_RANK)
        return rows

    async def close(self) -> None:
        """Leave."""
        torch.distributed.destroy_process_group()


class GlooNear(Near):
    """Sends."""

    async def open(self, where: str) -> None:
        """Join."""
        join(self.setting, NEAR_RANK)

    async def send(self, rows: torch.Tensor) -> None:
        """Send one tensor."""
        torch.distributed.send(rows, dst=FAR_RANK)

    async def close(self) -> None:
        """Leave."""
        torch.distributed.destroy_process_group()


def missing() -> str:
    """Say that this torch is built without it."""
    usable = torch.distributed.is_available() and torch.distributed.is_gloo_available()
    return "" if usable else "torch is built without gloo"


PATHS = {"gloo": Adapter(GlooFar, GlooNear, missing)}
