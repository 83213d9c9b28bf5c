"""A plane within one process, with faults on demand: for the tests of whoever uses aiomm.

::

    faults = Faults(stall_at=2)
    plane = MemoryPlane(faults=faults)
    ...
    await faults.stalled.wait()     # the second write has begun
    faults.release()                # let it go on
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from msgspec.structs import replace

from ..buffers.arena import Arena, HostArena
from ..buffers.layout import ByteRange
from ..errors import PlaneUnavailable
from .base import Export, GrantKey, Plane, RemoteArena, Run
from .copying import check_runs
from .permits import Permits

__all__ = ["Faults", "MemoryPlane"]

_exports: dict[bytes, _MemoryExport] = {}
"""What is exported in this process, by the token in its offer."""


@dataclass
class Faults:
    """What goes wrong with which write of a :class:`MemoryPlane`.

    Writes are counted from 1 over all attachments of the plane. The probe, by which a sender
    tries the plane at the handshake, neither counts nor fails. May be changed at any time.
    """

    delay: float = 0.0
    """Seconds that every write takes."""
    fail_at: int | None = None
    """The write that fails before its first byte."""
    short_at: int | None = None
    """The write that copies the first half of its rows and then fails."""
    late_at: int | None = None
    """The write that fails at once, and whose bytes land when :meth:`RemoteArena.quiesce` is
    awaited: not a byte earlier, and after that none."""
    corrupt_at: int | None = None
    """The write whose first byte arrives changed, and that nobody notices without a checksum."""
    stall_at: int | None = None
    """The write that waits for :meth:`release` before its first byte."""
    num_writes: int = 0
    """Writes begun so far."""
    stalled: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the write named by `stall_at` has begun to wait."""
    _released: asyncio.Event = field(default_factory=asyncio.Event, repr=False)

    def release(self) -> None:
        """Let the stalled write go on, or never stall if it has not come yet."""
        self._released.set()

    async def hold(self, number: int) -> None:
        """Keep write `number` waiting for as long as it shall."""
        if number == self.stall_at:
            self.stalled.set()
            await self._released.wait()
        if self.delay:
            await asyncio.sleep(self.delay)


class MemoryPlane(Plane):
    """Copies between a sender and a receiver in the same process. For tests.

    It checks grants as strictly as `tcp` does when a write begins; like `shm` it cannot stop
    one that has begun.

    Args:
        faults: what shall go wrong; nothing by default.
    """

    name: ClassVar[str] = "memory"

    def __init__(self, *, faults: Faults | None = None) -> None:
        self.faults = Faults() if faults is None else faults

    async def export(self, arena: Arena) -> Export:
        """Open `arena` to senders in this process.

        Raises:
            PlaneUnavailable: it is not host memory.
        """
        if not isinstance(arena, HostArena):
            raise PlaneUnavailable(f"memory: writes into host memory, not into {arena.device}")
        return _MemoryExport(arena)

    async def attach(self, offer: bytes) -> RemoteArena:
        """Reach the arena behind `offer`.

        Raises:
            PlaneUnavailable: it is exported by another process, or by nobody any more.
        """
        export = _exports.get(offer[:_TOKEN_NBYTES])
        if export is None:
            raise PlaneUnavailable("memory: no such arena in this process")
        link = int.from_bytes(offer[_TOKEN_NBYTES:], "big")
        if link not in export.links:
            raise PlaneUnavailable("memory: the receiver knows no such sender")
        return _MemoryArena(export, link, self.faults)


_TOKEN_NBYTES = 16


class _MemoryExport(Export):
    def __init__(self, arena: HostArena) -> None:
        self.arena = arena
        self.links: set[int] = set()
        self.permits = Permits()
        self._token = secrets.token_bytes(_TOKEN_NBYTES)
        _exports[self._token] = self

    @property
    def is_closed(self) -> bool:
        return self._token not in _exports

    def offer(self, link: int) -> bytes:
        self.links.add(link)
        return self._token + link.to_bytes(8, "big")

    def permit(self, grant: GrantKey, ranges: Sequence[ByteRange]) -> None:
        self.permits.add(grant, ranges)

    def revoke(self, grant: GrantKey) -> bool:
        self.permits.withdraw(grant)
        return False

    def forget(self, link: int) -> None:
        self.links.discard(link)
        self.permits.withdraw_all(link)

    async def aclose(self) -> None:
        _exports.pop(self._token, None)


class _MemoryArena(RemoteArena):
    def __init__(self, export: _MemoryExport, link: int, faults: Faults) -> None:
        self._export = export
        self._link = link
        self._faults = faults
        self._late: list[Run] = []
        self._is_closed = False

    async def write(self, grant: GrantKey, runs: Sequence[Run]) -> None:
        self._check_open()
        check_runs(runs, self._export.arena.nbytes)
        full = [run for run in runs if run.nbytes]
        permit = self._export.permits.get(grant._replace(link=self._link))
        if full and not (permit and all(permit.covers(run.offset, run.nbytes) for run in full)):
            raise PlaneUnavailable("memory: the receiver has not granted these bytes")
        if grant.is_probe:
            self._copy(full)
            return
        self._faults.num_writes += 1
        await self._write_with_faults(self._faults.num_writes, full)

    async def quiesce(self) -> None:
        late, self._late = self._late, []
        if not self._export.is_closed:
            self._copy(late)

    async def aclose(self) -> None:
        self._is_closed = True

    async def _write_with_faults(self, number: int, runs: list[Run]) -> None:
        faults = self._faults
        await faults.hold(number)
        self._check_open()
        if number == faults.fail_at:
            raise PlaneUnavailable(f"memory: write {number} fails on demand")
        if number == faults.late_at:
            self._late += runs
            raise PlaneUnavailable(f"memory: write {number} fails on demand, and lands late")
        if number == faults.short_at:
            self._copy([replace(run, count=run.count // 2) for run in runs])
            raise PlaneUnavailable(f"memory: write {number} is short on demand")
        self._copy(runs)
        if number == faults.corrupt_at and runs:
            self._export.arena.view(runs[0].offset, 1)[0] ^= 1

    def _check_open(self) -> None:
        if self._is_closed:
            raise PlaneUnavailable("memory: detached")
        if self._export.is_closed or self._link not in self._export.links:
            raise PlaneUnavailable("memory: the receiver has closed its arena or forgotten us")

    def _copy(self, runs: Sequence[Run]) -> None:
        for run in runs:
            target = self._export.arena.view(run.offset, run.nbytes)
            run.rows.copy_into(target, run.first, run.count)
