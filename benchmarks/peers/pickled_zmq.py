"""A dict with the tensor, pickled, over a PUSH and a PULL socket of pyzmq (TCP on 127.0.0.1).

What `send_pyobj` makes of a tensor. SGLang's default back end pickles only what describes the
tensor and sends its bytes as a frame, without a copy: `zmq_frames` is nearer to that.
"""

from __future__ import annotations

import pickle
from typing import cast

import torch
import zmq

from .base import Adapter, Far, Near


class PickleFar(Far):
    """Pulls and unpickles."""

    async def open(self) -> str:
        """Bind to any port."""
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
        port: int = self._socket.bind_to_random_port("tcp://127.0.0.1")
        return f"tcp://127.0.0.1:{port}"

    async def receive(self, nbytes: int) -> torch.Tensor:
        """Receive one message, and make objects of it."""
        message = pickle.loads(self._socket.recv())
        return cast("torch.Tensor", message["rows"])

    async def close(self) -> None:
        """Close the socket."""
        self._socket.close(linger=0)


class PickleNear(Near):
    """Pickles and pushes."""

    async def open(self, where: str) -> None:
        """Connect."""
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
        self._socket.connect(where)

    async def send(self, rows: torch.Tensor) -> None:
        """Send one message."""
        message = pickle.dumps({"rows": rows}, protocol=pickle.HIGHEST_PROTOCOL)
        self._socket.send(message, copy=False)

    async def close(self) -> None:
        """Close the socket."""
        self._socket.close(linger=0)


PATHS = {"pickle over pyzmq": Adapter(PickleFar, PickleNear)}
