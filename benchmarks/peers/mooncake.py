"""Mooncake's `transfer_sync_write` over TCP on 127.0.0.1, out of and into registered memory.

The receiver is told by one byte over a socket, since nothing else tells it. The call
spins until its two threads, one on either side, are done: on two cores one of the three waits for
a turn of the scheduler now and then, which shows as 3 ms.
"""

from __future__ import annotations

from typing import Any

import torch

from aiomm.planes.mooncake.library import load, why_unusable

from .base import ROW_NBYTES, Adapter, Bell, Far, Near, landing

HOST = "127.0.0.1"


def engine_here() -> Any:
    """Start an engine of Mooncake's own, told by its environment what ours is told."""
    engine = load(HOST).TransferEngine()
    if engine.initialize(HOST, "P2PHANDSHAKE", "tcp", "") != 0:
        raise RuntimeError("the engine does not start")
    return engine


def register(engine: Any, rows: torch.Tensor) -> None:
    """Give the engine a tensor's memory."""
    if engine.register_memory(rows.data_ptr(), rows.nbytes) != 0:
        raise RuntimeError("the engine does not take the memory")


class MooncakeFar(Far):
    """Has the memory."""

    async def open(self) -> str:
        """Register it; return the engine's name and the address."""
        self._target = landing(self.setting.largest)
        self._engine = engine_here()
        register(self._engine, self._target)
        self._bell = Bell(self.setting)
        self._bell.listen()
        return f"{HOST}:{self._engine.get_rpc_port()} {self._target.data_ptr()}"

    async def connect(self) -> None:
        """Wait for the near side."""
        self._bell.accept()

    async def receive(self, nbytes: int) -> torch.Tensor:
        """Wait for the byte."""
        self._bell.wait()
        return self._target[: nbytes // ROW_NBYTES]


class MooncakeNear(Near):
    """Writes into the memory of the far side."""

    async def open(self, where: str) -> None:
        """Register the sources."""
        self._peer, _, target = where.partition(" ")
        self._target = int(target)
        self._engine = engine_here()
        for source in self.sources.values():
            register(self._engine, source)
        self._bell = Bell(self.setting)
        self._bell.dial()

    async def send(self, rows: torch.Tensor) -> None:
        """Write, then tell."""
        written = self._engine.transfer_sync_write(
            self._peer, rows.data_ptr(), self._target, rows.nbytes
        )
        if written != 0:
            raise RuntimeError(f"the write failed: {written}")
        self._bell.ring()


PATHS = {"mooncake sync write": Adapter(MooncakeFar, MooncakeNear, lambda: why_unusable() or "")}
