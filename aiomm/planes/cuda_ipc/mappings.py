"""Pools of other processes, as they are open in this one: once for each of its GPUs.

All senders of a process share what is open. CUDA counts nothing here that could be relied on, so
this does: the first one opens, the last one closes.
"""

from __future__ import annotations

import os
import threading

from ...gpu.memory import DeviceMemory
from ...gpu.runtime import GpuError, GpuRuntime, explained
from .wire import CudaIpcOffer

__all__ = ["Pool"]


class _Mapping:
    """One pool on one GPU, and how many use it. The lock is held while CUDA opens or closes."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.address = 0
        self.num_holders = 0


_mappings: dict[tuple[int, bytes, int], _Mapping] = {}
"""By process, since none of them survives a fork, epoch and device. They are few, and stay."""


class Pool:
    """A receiver's pool, as one sender reaches it.

    Args:
        runtime: of this process.
        offer: the receiver's.
        handle: what opens it.
        local: its memory, if it is this very process's, which nothing has to open.
    """

    def __init__(
        self,
        runtime: GpuRuntime,
        offer: CudaIpcOffer,
        *,
        handle: bytes = b"",
        local: DeviceMemory | None = None,
    ) -> None:
        self.runtime = runtime
        self.nbytes = offer.nbytes
        self._epoch = offer.epoch
        self._handle = handle
        self._local = local
        self._addresses: dict[int, int] = {}

    def address(self, device: int) -> int | None:
        """Return where `device` reaches the pool; None while it is not open there."""
        return self._addresses.get(device) if self._local is None else self._local.address

    def open(self, device: int) -> None:
        """Open it for copies by `device`. Idempotent. Blocks.

        Raises:
            PlaneUnavailable: CUDA refuses, and why.
        """
        if self.address(device) is not None:
            return
        mapping = _mappings.setdefault((os.getpid(), self._epoch, device), _Mapping())
        with mapping.lock:
            if not mapping.num_holders:
                try:
                    mapping.address = self.runtime.open(device, self._handle)
                except GpuError as exc:
                    raise explained(device, exc) from exc
            mapping.num_holders += 1
            self._addresses[device] = mapping.address

    def close(self) -> None:
        """Let go of it; no copy of this sender's may be under way. Idempotent. Blocks.

        Raises:
            PlaneUnavailable: CUDA fails; what is open may stay so until the process ends.
        """
        self._local = None
        while self._addresses:
            device, address = self._addresses.popitem()
            mapping = _mappings[os.getpid(), self._epoch, device]
            with mapping.lock:
                mapping.num_holders -= 1
                if mapping.num_holders:
                    continue
                try:
                    self.runtime.close(device, address)
                except GpuError as exc:
                    raise explained(device, exc) from exc
