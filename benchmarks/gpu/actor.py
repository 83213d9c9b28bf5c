"""What every child can be told: how it does, and what it holds."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any, Self

from aiomm.gpu.choice import gpu_runtime
from aiomm.gpu.fake import FakeRuntime
from aiomm.gpu.runtime import GpuRuntime
from benchmarks.gpu.tensors import Tensors, tensors_here

__all__ = ["Actor", "announce", "announce_on"]

_announcements = -1
"""The descriptor on which the other process hears answers, too."""


def announce_on(descriptor: int) -> None:
    """Announce there from now on."""
    global _announcements
    _announcements = descriptor


def announce(event: str) -> None:
    """Tell the other process at once that something has happened, whatever this loop does next."""
    os.write(_announcements, json.dumps({"event": event}).encode() + b"\n")


class Actor:
    """One role. Its commands are its `do_` methods; what they return must be JSON.

    Args:
        settings: of the role; `device` is an ordinal.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.device: int = settings.get("device", 0)

    @classmethod
    async def begin(cls, settings: dict[str, Any]) -> Self:
        """Return one that is ready."""
        return cls(settings)

    async def aclose(self) -> None:
        """Let go of everything."""

    @property
    def runtime(self) -> GpuRuntime:
        """This process's."""
        return gpu_runtime()

    @property
    def tensors(self) -> Tensors:
        """This process's."""
        return tensors_here()

    async def do_health(self) -> None:
        """Allocate, multiply two matrices and look at the result."""
        await asyncio.to_thread(self.tensors.check_health, self.device)

    def do_resources(self) -> dict[str, int]:
        """Return what this process holds, and what is free on its GPU."""
        return {
            "descriptors": len(os.listdir("/proc/self/fd")),
            "threads": len(os.listdir("/proc/self/task")),
            "shared_memory_files": sum(1 for _ in Path("/dev/shm").iterdir()),
            "free_nbytes": self.tensors.free_nbytes(self.device),
        }

    def do_violations(self) -> list[str]:
        """Return what CUDA would not have forgiven, where it is the fake one."""
        runtime = self.runtime
        return runtime.violations if isinstance(runtime, FakeRuntime) else []
