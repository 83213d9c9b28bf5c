"""The tensor's bytes as one frame of pyzmq (a Unix socket), copied where they belong."""

from __future__ import annotations

from pathlib import Path

import torch
import zmq

from .base import ROW_NBYTES, Adapter, Far, Near, bytes_of, landing


class FrameFar(Far):
    """Pulls a frame and copies it into its memory."""

    async def open(self) -> str:
        """Bind."""
        self._target = landing(self.setting.largest)
        self._memory = bytes_of(self._target)
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
        where = f"ipc://{Path(self.setting.scratch, 'frames')}"
        self._socket.bind(where)
        return where

    async def receive(self, nbytes: int) -> torch.Tensor:
        """Receive a frame without a copy, and make that one."""
        frame = self._socket.recv(copy=False)
        self._memory[:nbytes] = frame.buffer
        return self._target[: nbytes // ROW_NBYTES]

    async def close(self) -> None:
        """Close the socket."""
        self._socket.close(linger=0)


class FrameNear(Near):
    """Pushes the memory of the tensor as it is."""

    async def open(self, where: str) -> None:
        """Connect."""
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
        self._socket.connect(where)

    async def send(self, rows: torch.Tensor) -> None:
        """Send one frame without a copy."""
        self._socket.send(bytes_of(rows), copy=False)

    async def close(self) -> None:
        """Close the socket."""
        self._socket.close(linger=0)


PATHS = {"pyzmq frames": Adapter(FrameFar, FrameNear)}
