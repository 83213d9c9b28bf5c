"""The floor: one copy of the same bytes, alone and with one acknowledgement over a Unix socket.

Source and target are larger than any size and are walked through, so that no copy finds its
bytes in the caches only because another one has just been there. It is the same with aiomm: its
source is the same memory, and its pool hands out the blocks that were free for longest.
"""

from __future__ import annotations

import ctypes
import mmap
import socket
import threading
import time
from typing import TYPE_CHECKING, Protocol

from ..gpu.choice import device_ordinal
from .busy import Spinner

if TYPE_CHECKING:
    import torch

__all__ = [
    "STILL",
    "Acknowledger",
    "Copier",
    "Source",
    "acknowledged",
    "copier_on",
    "nanoseconds_of",
]

PAGE_NBYTES = 4096
SIGNAL = b"\0"
STILL = b"\1"
"""Answered only when no thread spins at the other side any more."""


class Source:
    """The memory out of which everything is copied, on the host or a GPU. Blocks to fill it."""

    def __init__(self, nbytes: int, device: str) -> None:
        import torch

        words = torch.arange(nbytes // 8, dtype=torch.int64)  # written, so no page of zeros
        tensor = words.view(torch.uint8)
        self.is_on_gpu = device != "cpu" and torch.cuda.is_available()  # torch knows no fake one
        self.tensor = tensor.to(f"cuda:{device_ordinal(device)}") if self.is_on_gpu else tensor
        self._place = 0

    def next_offset(self, nbytes: int) -> int:
        """Return where the next `nbytes` begin, which were not read for as long as possible."""
        slot_nbytes = -(-nbytes // PAGE_NBYTES) * PAGE_NBYTES
        self._place += 1
        return self._place % (len(self.tensor) // slot_nbytes) * slot_nbytes

    def next_rows(self, num_tokens: int, row_nbytes: int) -> torch.Tensor:
        """Return the next tokens, as views."""
        nbytes = num_tokens * row_nbytes
        start = self.next_offset(nbytes)
        return self.tensor[start : start + nbytes].view(num_tokens, row_nbytes)


class Copier(Protocol):
    """Copies bytes of the source once, into memory of this process."""

    def __call__(self, nbytes: int) -> None:
        """Return when they are there. Blocks."""
        ...


def copier_on(source: Source) -> Copier:
    """Return what copies on the source's device."""
    return DeviceCopier(source) if source.is_on_gpu else HostCopier(source)


class HostCopier:
    """`memmove` into a shared mapping, which is what the pool is too."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._target = mmap.mmap(-1, len(source.tensor))
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._target))
        ctypes.memset(self._address, 1, len(source.tensor))  # its pages exist from now on

    def __call__(self, nbytes: int) -> None:
        """Copy. Blocks, without the GIL."""
        offset = self._source.next_offset(nbytes)
        ctypes.memmove(self._address + offset, self._source.tensor.data_ptr() + offset, nbytes)


class DeviceCopier:
    """A copy within the GPU's memory, waited for."""

    def __init__(self, source: Source) -> None:
        import torch

        self._source = source
        self._target = torch.zeros_like(source.tensor)

    def __call__(self, nbytes: int) -> None:
        """Copy, and wait for the stream. Blocks."""
        import torch

        offset = self._source.next_offset(nbytes)
        piece = slice(offset, offset + nbytes)
        self._target[piece].copy_(self._source.tensor[piece])
        torch.cuda.current_stream(self._target.device).synchronize()


def nanoseconds_of(copy: Copier, nbytes: int, link: socket.socket | None = None) -> int:
    """Time one copy; with a link also the acknowledgement that the other side has heard of it."""
    began = time.monotonic_ns()
    copy(nbytes)
    if link is not None:
        acknowledged(link)
    return time.monotonic_ns() - began


def acknowledged(link: socket.socket, signal: bytes = SIGNAL) -> None:
    """Send one byte and wait for the answer. Blocks.

    Raises:
        EOFError: the other side is gone.
    """
    link.sendall(signal)
    if not link.recv(1):
        raise EOFError("the other side is gone")


class Acknowledger:
    """Answers every byte with a byte, in a thread, until the other side has closed."""

    def __init__(self, link: socket.socket, spinner: Spinner) -> None:
        self._link = link
        self._spinner = spinner
        threading.Thread(target=self._answer, name="acknowledger", daemon=True).start()

    def _answer(self) -> None:
        try:
            while signal := self._link.recv(1):
                if signal == STILL:
                    self._spinner.wait_until_still()
                self._link.sendall(SIGNAL)
        except OSError:
            pass  # the other side is gone, which the command notices
