"""What no way goes below: one memmove into shared memory, and that plus a byte each way.

`memcpy` ends its clock when the memmove in the near process returns. `memcpy + ack` goes on until
the far process has the byte that tells it; the byte that answers counts only as CPU time.
"""

from __future__ import annotations

import ctypes
import mmap
import time
from pathlib import Path

import torch

from .base import ROW_NBYTES, Adapter, Bell, Far, Near, Setting


def shared(setting: Setting) -> torch.Tensor:
    """Map the memory of both processes, with its pages there."""
    with Path(setting.scratch, "memory").open("a+b") as file:
        file.truncate(setting.largest)
        memory = mmap.mmap(file.fileno(), setting.largest)
    rows = torch.frombuffer(memory, dtype=torch.uint8).view(-1, ROW_NBYTES)
    rows.fill_(255)
    return rows


class SharedFar(Far):
    """Waits for the byte and answers it."""

    async def open(self) -> str:
        """Map and listen."""
        self._target = shared(self.setting)
        self._bell = Bell(self.setting)
        self._bell.listen()
        return ""

    async def connect(self) -> None:
        """Wait for the near side."""
        self._bell.accept()

    async def receive(self, nbytes: int) -> torch.Tensor:
        """Wait for the byte."""
        self._bell.wait()
        return self._target[: nbytes // ROW_NBYTES]

    async def finish(self) -> None:
        """Answer it."""
        self._bell.ring()


class SharedNear(Near):
    """Copies, tells, and waits for the answer."""

    async def open(self, where: str) -> None:
        """Map and connect."""
        self._target = shared(self.setting)
        self._bell = Bell(self.setting)
        self._bell.dial()

    async def send(self, rows: torch.Tensor) -> int | None:
        """Copy, then tell."""
        ctypes.memmove(self._target.data_ptr(), rows.data_ptr(), rows.nbytes)
        self._bell.ring()
        self._bell.wait()
        return None


class MemcpyNear(SharedNear):
    """Copies; that the far process is told is not counted."""

    async def send(self, rows: torch.Tensor) -> int | None:
        """Copy; return when that was done."""
        ctypes.memmove(self._target.data_ptr(), rows.data_ptr(), rows.nbytes)
        ended = time.monotonic_ns()
        self._bell.ring()
        self._bell.wait()
        return ended


MEMCPY, FLOOR = "memcpy", "memcpy + ack"
PATHS = {MEMCPY: Adapter(SharedFar, MemcpyNear), FLOOR: Adapter(SharedFar, SharedNear)}
