"""A `multiprocessing.connection` over a Unix socket, received into memory that is there."""

from __future__ import annotations

from multiprocessing.connection import Client, Listener
from pathlib import Path

import torch

from .base import ROW_NBYTES, Adapter, Far, Near, bytes_of, landing


class ConnectionFar(Far):
    """Accepts and receives."""

    async def open(self) -> str:
        """Listen."""
        self._target = landing(self.setting.largest)
        self._memory = bytes_of(self._target)
        where = str(Path(self.setting.scratch, "connection"))
        self._listener = Listener(where, "AF_UNIX")
        return where

    async def connect(self) -> None:
        """Wait for the near side."""
        self._connection = self._listener.accept()

    async def receive(self, nbytes: int) -> torch.Tensor:
        """Receive one message."""
        taken = self._connection.recv_bytes_into(self._memory)
        return self._target[: taken // ROW_NBYTES]

    async def close(self) -> None:
        """Close both."""
        self._connection.close()
        self._listener.close()


class ConnectionNear(Near):
    """Connects and sends."""

    async def open(self, where: str) -> None:
        """Connect."""
        self._connection = Client(where, "AF_UNIX")

    async def send(self, rows: torch.Tensor) -> None:
        """Send one message."""
        self._connection.send_bytes(bytes_of(rows))

    async def close(self) -> None:
        """Close it."""
        self._connection.close()


PATHS = {"multiprocessing connection": Adapter(ConnectionFar, ConnectionNear)}
