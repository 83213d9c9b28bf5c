"""A safetensors file in /dev/shm, whose name goes over a pipe: as vLLM's example connector does.

The receiver maps the file: who reads the tensor first waits for its pages (`first read`).
"""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path

import torch

from .base import Adapter, Far, Near, needs

NAME_NBYTES = 4096


class FileFar(Far):
    """Loads the file, and removes it afterwards."""

    async def open(self) -> str:
        """Make the pipe."""
        where = str(Path(self.setting.scratch, "names"))
        os.mkfifo(where)
        self._where = where
        return where

    async def connect(self) -> None:
        """Wait for the near side."""
        self._pipe = os.open(self._where, os.O_RDONLY)

    async def receive(self, nbytes: int) -> torch.Tensor:
        """Read a name and load what it names."""
        from safetensors.torch import load_file

        self._name = os.read(self._pipe, NAME_NBYTES).decode()
        return load_file(self._name)["rows"]

    async def finish(self) -> None:
        """Remove the file."""
        os.unlink(self._name)


class FileNear(Near):
    """Saves the file."""

    async def open(self, where: str) -> None:
        """Open the pipe."""
        self._pipe = os.open(where, os.O_WRONLY)
        self._numbers = count()

    async def send(self, rows: torch.Tensor) -> None:
        """Save a file and send its name."""
        from safetensors.torch import save_file

        name = str(Path(self.setting.scratch, f"{next(self._numbers)}.safetensors"))
        save_file({"rows": rows}, name)
        os.write(self._pipe, name.encode())


PATHS = {"safetensors file": Adapter(FileFar, FileNear, needs("safetensors", "safetensors"))}
