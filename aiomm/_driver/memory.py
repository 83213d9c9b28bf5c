"""A receiver's memory: the pool's, on its device, and what else its planes and results need."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import TypeAlias

from ..buffers.arena import Arena, HostArena
from ..buffers.arrays import load_array_library
from ..buffers.cuda import CudaArena, DeviceJoinedTensors
from ..buffers.layout import ByteRange, Layout
from ..buffers.received import JoinedTensors, PoolTensors
from ..buffers.shm import MemfdArena
from ..buffers.spare import SpareMemory
from ..errors import PlaneUnavailable
from ..gpu.pinning import Pin
from ..planes.base import Plane
from ..planes.copying import Copies
from ..types import Extent

__all__ = ["Joined", "Memory"]

logger = logging.getLogger("aiomm.receiver")

Joined: TypeAlias = JoinedTensors | DeviceJoinedTensors
"""Where chunks go that are moved out of the pool: memory of the pool's device."""


class Memory:
    """Made by :meth:`open`, of which everything that takes long runs on a thread.

    Args:
        layout: of the pool.
        device: where it lies: `"cpu"`, or a GPU such as `"cuda:0"`.
        name: the receiver's, for logs.
        max_spare_nbytes: kept of results that are gone.
    """

    arena: Arena
    tensors: PoolTensors

    def __init__(self, layout: Layout, device: str, name: str, max_spare_nbytes: int) -> None:
        self.device = device
        self.staging: HostArena | None = None
        """Where planes write that do not reach the pool's device; laid out as the pool is."""
        self._layout = layout
        self._name = name
        self._pin: Pin | None = None
        self._spare = SpareMemory(max_spare_nbytes)
        self._is_closed = False

    async def open(self, copies: Copies, planes: Sequence[Plane]) -> None:
        """Make it, faulted in.

        Raises:
            PlaneUnavailable: there is no such device, or not so much memory.
            ImportError: there is no library for the tensors.
        """
        await copies.run(partial(self._make, planes))

    async def aclose(self, copies: Copies) -> None:
        """Give it back, as far as no lease holds it. No copy may run. Idempotent."""
        if not self._is_closed:
            self._is_closed = True
            await copies.run(self._give_back)

    @property
    def spare_nbytes(self) -> int:
        """Bytes that are kept of results that are gone."""
        return self._spare.nbytes

    def joined(self, num_tokens: int | None) -> Joined:
        """Return memory for so many tokens outside the pool, or for as many as come."""
        if self.device == "cpu":
            return JoinedTensors(self._layout.schema, num_tokens, self._spare)
        return DeviceJoinedTensors(self._layout.schema, num_tokens)

    def upload(self, source: Arena | None, extents: Sequence[Extent]) -> None:
        """Copy tokens into the pool from where their plane has put them. Blocks.

        Raises:
            PlaneUnavailable: that is no staging, or CUDA has failed.
        """
        if not isinstance(self.arena, CudaArena) or not isinstance(source, HostArena):
            raise PlaneUnavailable("the chunk came over no plane that this receiver has")
        self.arena.upload(source, self._ranges(extents))

    def _ranges(self, extents: Sequence[Extent]) -> list[ByteRange]:
        schema = self._layout.schema
        return [self._layout.field_range(name, extent) for name in schema for extent in extents]

    def _make(self, planes: Sequence[Plane]) -> None:
        load_array_library()
        if self.device == "cpu":
            self.arena = self._host_arena()
        else:
            self.arena = CudaArena(self._layout.nbytes, self.device)
        self.tensors = PoolTensors(self._layout, self.arena)
        if isinstance(self.arena, CudaArena) and self._is_staging_needed(planes):
            self.staging = self._host_arena()
            self._pin = self.arena.pin(self.staging)

    def _is_staging_needed(self, planes: Sequence[Plane]) -> bool:
        return not all(plane.writes_into(self.device) for plane in planes)

    def _host_arena(self) -> HostArena:
        """Shared memory where there is some, since any sender may turn out to be on this host."""
        try:
            return MemfdArena(self._layout.nbytes)
        except PlaneUnavailable as exc:
            logger.warning("! %s has no shared memory: %s", self._name, exc)
            return HostArena(self._layout.nbytes)

    def _give_back(self) -> None:
        self._spare.close()
        self.__dict__.pop("tensors", None)  # what leases still hold stays, and nothing else
        if self._pin is not None:
            self._pin.release()
        for arena in (self.staging, getattr(self, "arena", None)):
            if arena is not None:
                arena.close()
