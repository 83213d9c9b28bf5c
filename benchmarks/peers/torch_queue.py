"""A queue of torch.multiprocessing: tensors go as descriptors of shared memory.

Sending one moves it into shared memory, which is a copy the first time; so each transfer has a
tensor of its own that is not there yet, as an encoder's output is not. The receiver maps it: who
reads it first waits for every page (`first read`).
"""

from __future__ import annotations

import ctypes
import io
import multiprocessing
import pickle
from multiprocessing import context, resource_sharer
from multiprocessing.reduction import ForkingPickler
from typing import Any, cast

import torch
import torch.multiprocessing

from .base import Adapter, Far, Near

KEY = b"benchmarks.peers"
"""Lets both processes have each other's descriptors."""


class Handing:
    """Stands for the child that is being spawned, to which alone a queue may be given.

    Here both processes run already; the descriptors go the way that tensors' go.
    """

    def duplicate_for_child(self, descriptor: int) -> int:
        """Nothing is inherited."""
        return descriptor

    def DupFd(self, descriptor: int) -> Any:  # noqa: N802
        """Return what is a descriptor again in the process that unpickles it."""
        return resource_sharer.DupFd(descriptor)


class QueueFar(Far):
    """Makes the queue and gets from it."""

    async def open(self) -> str:
        """Return the queue, pickled."""
        multiprocessing.current_process().authkey = KEY
        self._queue = torch.multiprocessing.get_context("spawn").Queue()
        pickled = io.BytesIO()
        context.set_spawning_popen(cast("Any", Handing()))
        ForkingPickler(pickled, pickle.HIGHEST_PROTOCOL).dump(self._queue)
        context.set_spawning_popen(None)
        return pickled.getvalue().hex()

    async def receive(self, nbytes: int) -> torch.Tensor:
        """Get one tensor."""
        return cast("torch.Tensor", self._queue.get())


class QueueNear(Near):
    """Puts into the queue."""

    async def open(self, where: str) -> None:
        """Take the queue over."""
        multiprocessing.current_process().authkey = KEY
        self._queue = pickle.loads(bytes.fromhex(where))

    def fresh(self, source: torch.Tensor) -> torch.Tensor:
        """Return a copy on the heap."""
        rows = torch.empty_like(source)
        ctypes.memmove(rows.data_ptr(), source.data_ptr(), source.nbytes)
        return rows

    async def send(self, rows: torch.Tensor) -> None:
        """Put it; a thread of the queue pickles it, and copies it thereby."""
        self._queue.put(rows)


PATHS = {"torch queue": Adapter(QueueFar, QueueNear)}
