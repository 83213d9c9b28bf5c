"""NIXL over UCX, which copies from process to process here (CMA), into registered memory.

Without its progress threads, each of which would keep a core busy; so the far side looks every
millisecond whether the agent has something to do, and is told by one byte over a socket.
"""

from __future__ import annotations

import importlib
import select
from importlib.util import find_spec
from typing import Any

import torch

from .base import ROW_NBYTES, Adapter, Bell, Far, Near, landing

PACKAGES = ("nixl", "nixl_cu12", "nixl_cu13")
FAR_NAME = "far"
PROGRESS_SECONDS = 0.001


def missing() -> str:
    """Say that no build of it is installed."""
    return "" if any(map(find_spec, PACKAGES)) else "nixl-cu12 (with numpy) is not installed"


def agent_here(name: str) -> Any:
    """Start an agent."""
    package = next(filter(find_spec, reversed(PACKAGES)))
    library = importlib.import_module(f"{package}._api")
    settings = library.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
    return library.nixl_agent(name, settings)


class NixlFar(Far):
    """Has the memory."""

    async def open(self) -> str:
        """Register it; return the agent's metadata and the address."""
        self._target = landing(self.setting.largest)
        self._agent = agent_here(FAR_NAME)
        memory = (self._target.data_ptr(), self._target.nbytes, 0, "")
        self._agent.register_memory([memory], "DRAM")
        self._bell = Bell(self.setting)
        self._bell.listen()
        return f"{self._agent.get_agent_metadata().hex()} {self._target.data_ptr()}"

    async def connect(self) -> None:
        """Wait for the near side."""
        self._bell.accept()

    async def receive(self, nbytes: int) -> torch.Tensor:
        """Wait for the byte; let the agent go on meanwhile."""
        while not select.select([self._bell.socket], [], [], PROGRESS_SECONDS)[0]:
            self._agent.get_new_notifs()
        self._bell.wait()
        return self._target[: nbytes // ROW_NBYTES]


class NixlNear(Near):
    """Writes into the memory of the far side."""

    async def open(self, where: str) -> None:
        """Register the sources."""
        metadata, _, target = where.partition(" ")
        self._target = int(target)
        self._agent = agent_here("near")
        memory = [(each.data_ptr(), each.nbytes, 0, "") for each in self.sources.values()]
        self._agent.register_memory(memory, "DRAM")
        self._agent.add_remote_agent(bytes.fromhex(metadata))
        self._bell = Bell(self.setting)
        self._bell.dial()

    async def send(self, rows: torch.Tensor) -> None:
        """Write, ask until it is done, then tell."""
        agent = self._agent
        here = agent.get_xfer_descs([(rows.data_ptr(), rows.nbytes, 0)], "DRAM")
        there = agent.get_xfer_descs([(self._target, rows.nbytes, 0)], "DRAM")
        handle = agent.initialize_xfer("WRITE", here, there, FAR_NAME)
        state = agent.transfer(handle)
        while state == "PROC":
            state = agent.check_xfer_state(handle)
        if state != "DONE":
            raise RuntimeError(f"the write failed: {state}")
        self._bell.ring()
        agent.release_xfer_handle(handle)


PATHS = {"nixl": Adapter(NixlFar, NixlNear, missing)}
