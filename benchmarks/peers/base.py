"""What an adapter does: a far side that receives, a near side that sends, why it is absent.

Both sides are coroutines only because aiomm's are; the others block their process.
"""

from __future__ import annotations

import ctypes
import random
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

ROW_NBYTES = 1 << 16
PAGE_NBYTES = 4096


class Setting(NamedTuple):
    """What both sides of a pair are told."""

    path: str
    """The adapter's name."""
    scratch: str
    """A folder in shared memory for sockets and files, removed after the run."""
    sizes: tuple[int, ...]
    """Bytes of every tensor that will be moved: whole rows."""

    @property
    def largest(self) -> int:
        """Bytes of the largest."""
        return max(self.sizes)


class Far(ABC):
    """The side that receives."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    async def open(self) -> str:
        """Begin to listen; return where the near side finds it."""
        return ""

    async def connect(self) -> None:  # noqa: B027
        """Wait for the near side, which has been started by now."""

    async def prepare(self, nbytes: int) -> str:
        """Do what is done before a transfer, off the clock; return what the near side needs."""
        return ""

    @abstractmethod
    async def receive(self, nbytes: int) -> torch.Tensor:
        """Wait for the bytes and return a tensor of them, usable by now: the clock ends."""

    async def finish(self) -> None:  # noqa: B027
        """Give back what the last tensor held, off the clock; its CPU time counts."""

    async def close(self) -> None:  # noqa: B027
        """End."""


class Near(ABC):
    """The side that sends.

    Args:
        setting: as the far side has it.
        sources: the tensor of each size, `[rows, 65536]` of uint8; they stay where they are.
    """

    runs_on_the_loop = False
    """It needs its event loop to go on between two transfers."""

    def __init__(self, setting: Setting, sources: Mapping[int, torch.Tensor]) -> None:
        self.setting = setting
        self.sources = sources

    async def open(self, where: str) -> None:  # noqa: B027
        """Connect to the far side."""

    def fresh(self, source: torch.Tensor) -> torch.Tensor:
        """Return the tensor to send, if sending one changes it; nothing of this counts."""
        return source

    async def prepare(self, ticket: str, nbytes: int) -> None:  # noqa: B027
        """Do what is done before there is a tensor, off the clock; its CPU time counts."""

    @abstractmethod
    async def send(self, rows: torch.Tensor) -> int | None:
        """Send; the clock has begun. Return its end only if that is here, not at the far side."""

    async def close(self) -> None:  # noqa: B027
        """End."""


class Adapter(NamedTuple):
    """One way to move a tensor."""

    far: Callable[[Setting], Far]
    near: Callable[[Setting, Mapping[int, torch.Tensor]], Near]
    missing: Callable[[], str] = lambda: ""
    """Says why it cannot take part, as far as that shows without trying."""


class Bell:
    """One byte over a Unix socket tells the other process."""

    def __init__(self, setting: Setting) -> None:
        self._address = str(Path(setting.scratch, "bell"))

    def listen(self) -> None:
        """Let the other side dial."""
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(self._address)
        self._server.listen()

    def accept(self) -> None:
        """Wait until it has."""
        self.socket, _ = self._server.accept()

    def dial(self) -> None:
        """Connect to the side that listens."""
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(self._address)

    def ring(self) -> None:
        """Send the byte."""
        self.socket.sendall(b"\0")

    def wait(self) -> None:
        """Block until it comes.

        Raises:
            ConnectionError: the other side has ended.
        """
        if not self.socket.recv(1):
            raise ConnectionError("the other side has ended")


def needs(module: str, package: str) -> Callable[[], str]:
    """Return a check that says that a package is not installed, if its module is not there."""
    return lambda: "" if find_spec(module) else f"{package} is not installed"


def content(nbytes: int) -> torch.Tensor:
    """Return the tensor of a size: the same in every process, no row like another."""
    some = torch.frombuffer(bytearray(random.Random(nbytes).randbytes(1 << 20)), dtype=torch.uint8)
    rows = some.repeat(-(-nbytes // some.numel()))[:nbytes].clone().view(-1, ROW_NBYTES)
    rows[:, :8].view(torch.int64)[:, 0] = torch.arange(len(rows))
    return rows


def stamp(rows: torch.Tensor, number: int) -> None:
    """Write the number of the transfer into the first and the last row."""
    for row in (rows[0], rows[-1]):
        row[8:16].view(torch.int64)[0] = number


def stamps(rows: torch.Tensor) -> list[int]:
    """Return what is stamped on a tensor that has come."""
    return [int(row[8:16].clone().view(torch.int64)[0]) for row in (rows[0], rows[-1])]


def landing(nbytes: int) -> torch.Tensor:
    """Return memory for rows to come, whose pages are there by now."""
    return torch.full((nbytes // ROW_NBYTES, ROW_NBYTES), 255, dtype=torch.uint8)


def bytes_of(rows: torch.Tensor) -> memoryview:
    """Return a view of a dense tensor's memory, which must outlive it."""
    whole = (ctypes.c_char * rows.nbytes).from_address(rows.data_ptr())
    return memoryview(whole).cast("B")
