"""The plane of one host: the sender copies straight into the receiver's pool.

The receiver's arena is a memfd without a name, which :mod:`.handover` hands to senders of the
same user. The end of the connection tells a sender that its receiver is gone.
"""

from __future__ import annotations

import asyncio
import math
import os
import socket
import sys
import threading
from collections.abc import Sequence
from functools import partial
from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta

from ..buffers.arena import Arena
from ..buffers.memcpy import Memcpy, SharedCopies, address_of, copy_memory, copy_with_gil
from ..buffers.shm import MemfdArena, map_peer
from ..errors import PlaneUnavailable
from ..gpu.pinning import Pin
from .base import Export, GrantKey, Plane, RemoteArena, Run
from .copying import (
    MAX_THREADS,
    STRIDED_NBYTES,
    Copies,
    CopyThreads,
    LoopCopies,
    check_runs,
    is_dense,
)
from .handover import Desk, Invitation, collect

__all__ = ["ShmPlane"]

ACCEPTED = b"\x01"


class _ShmOffer(msgspec.Struct, frozen=True, array_like=True, tag="shm"):
    invitation: Invitation
    nbytes: Annotated[int, Meta(ge=1)]


class ShmPlane(Plane):
    """Writes into memory that the receiver shares with the processes of its user.

    Args:
        copy_threads: at most so many threads share a copy of more than 4 MiB (8 MiB on fewer
            than four processors), and never more than there are processors. One thread copies
            at half the rate of two, or less.

    Raises:
        ValueError: `copy_threads` is less than 1.
    """

    name: ClassVar[str] = "shm"

    def __init__(self, copy_threads: int = MAX_THREADS) -> None:
        if copy_threads < 1:
            raise ValueError(f"copy_threads must be at least 1, got {copy_threads}")
        self._threads = CopyThreads(self.name, copy_threads)
        self._loop_copies = LoopCopies()

    def unusable(self) -> str | None:
        """Say that this is not Linux, where memfd, abstract sockets and seals exist."""
        return None if sys.platform == "linux" else f"needs Linux, this is {sys.platform}"

    async def export(self, arena: Arena) -> Export:
        """Open `arena`, which must be a :class:`~aiomm.buffers.shm.MemfdArena`.

        Raises:
            PlaneUnavailable: it is another kind of arena, or no socket can be made.
        """
        reason = self.unusable()
        if reason is not None:
            raise PlaneUnavailable(f"shm: {reason}")
        if not isinstance(arena, MemfdArena):
            raise PlaneUnavailable(f"shm: needs a MemfdArena, got {type(arena).__name__}")
        export = _ShmExport(arena)
        await export.desk.open()
        return export

    async def attach(self, offer: bytes) -> RemoteArena:
        """Map the arena behind `offer`.

        Raises:
            PlaneUnavailable: the receiver is on another host or in another network
                namespace, runs as another user, refuses the offer's secret, or is gone.
        """
        reason = self.unusable()
        if reason is not None:
            raise PlaneUnavailable(f"shm: {reason}")
        try:
            decoded = msgspec.msgpack.decode(offer, type=_ShmOffer)
        except (msgspec.MsgspecError, RecursionError) as exc:
            raise PlaneUnavailable(f"shm: not an offer: {exc}") from exc
        connection, _, descriptors = await collect(self.name, decoded.invitation, len(ACCEPTED), 1)
        copies = Copies(self._threads, self._loop_copies)
        try:
            memory = await copies.run(partial(_map, descriptors[0], decoded.nbytes))
        except BaseException:
            connection.close()
            await copies.aclose()
            raise
        return _ShmArena(memory, connection, copies, self._loop_copies)


class _ShmExport(Export):
    def __init__(self, arena: MemfdArena) -> None:
        self.arena = arena
        self.desk = Desk("shm", lambda _: (ACCEPTED, [self.arena.fd]))

    def offer(self, link: int) -> bytes:
        return msgspec.msgpack.encode(_ShmOffer(self.desk.invite(link), self.arena.nbytes))

    def forget(self, link: int) -> None:
        self.desk.forget(link)

    async def aclose(self) -> None:
        await self.desk.aclose()


class _ShmArena(RemoteArena):
    def __init__(
        self,
        memory: memoryview,
        connection: socket.socket,
        copies: Copies,
        loop_copies: LoopCopies,
    ) -> None:
        self._memory = memory
        self._address = address_of(memory)
        self._connection = connection
        self._copies = copies
        self._loop_copies = loop_copies
        """All attachments': together they have so much of a turn of the loop."""
        self._pin: Pin | None = None
        """Made when the first tensor of a GPU comes."""
        self._pin_lock = threading.Lock()
        self.ended = asyncio.Event()
        """Set when nothing can be written any more."""
        self._why = ""
        asyncio.get_running_loop().add_reader(connection.fileno(), self._hear)

    def write_at_once(self, grant: GrantKey, runs: Sequence[Run]) -> bool:
        if self.ended.is_set():
            return False
        nbytes = self._nbytes_on_loop(runs)
        if self._copies.is_long(nbytes):
            return False
        if nbytes > STRIDED_NBYTES and not all(map(is_dense, runs)):
            return False  # that may take several times as long
        if not self._loop_copies.time.is_left():
            return False
        for run in runs:
            self._copy(run, copy_with_gil)  # to get the GIL back could take longer than it takes
        return True

    async def write(self, grant: GrantKey, runs: Sequence[Run]) -> None:
        if self.ended.is_set():
            raise PlaneUnavailable(f"shm: {self._why}")
        nbytes = self._nbytes_on_loop(runs)
        if not self._copies.is_long(nbytes):
            await self._loop_copies.copy(self._copy, runs)
        elif nbytes == math.inf:
            await self._copies.run(partial(self._copy_all, runs))
        elif all(map(is_dense, runs)):
            copies = SharedCopies(map(self._dense, runs), (runs, self._memory))
            await self._copies.share(copies, probes=True)
        else:
            await self._copies.share_out(self._copy, runs)

    async def quiesce(self) -> None:
        await self._copies.drain()

    def _nbytes_on_loop(self, runs: Sequence[Run]) -> float:
        """Return how much the loop's thread would copy; tensors of a GPU are never for it."""
        nbytes = check_runs(runs, len(self._memory))
        for run in runs:
            if run.rows.device != "cpu":
                return math.inf
        return nbytes

    async def aclose(self) -> None:
        self._leave("detached")
        await self._loop_copies.drain()
        await self._copies.drain()
        # Unmapping takes 0.1 ms per MiB: on the thread, where it holds nobody up.
        if self._memory:
            mapping, pin = [self._memory], self._pin
            self._memory, self._pin = memoryview(b""), None
            if pin is not None:
                await self._copies.run(pin.release)
            await self._copies.run(mapping.clear)
        await self._copies.aclose()

    def _copy_all(self, runs: Sequence[Run]) -> None:
        for run in runs:
            self._copy(run)

    def _dense(self, run: Run) -> tuple[int, int, int]:
        """Return the addresses to and from which a dense run is copied, and its bytes."""
        source = run.rows.address(run.first)
        assert source is not None
        return self._address + run.offset, source, run.nbytes

    def _copy(self, run: Run, copy: Memcpy = copy_memory) -> None:
        if not self._memory:  # it waited for its turn until the end
            raise PlaneUnavailable(f"shm: {self._why}")
        if is_dense(run):
            copy(*self._dense(run))
            return
        rows = run.rows
        on_device = rows.on_device
        if on_device is not None:
            with self._pin_lock:
                if self._pin is None:
                    self._pin = Pin(on_device.runtime, on_device.device, self._memory)
        target = self._memory[run.offset : run.offset + run.nbytes]
        rows.copy_into(target, run.first, run.count)

    def _hear(self) -> None:
        """The exporter has nothing to say, so whatever is heard is the end."""
        self._leave("the receiver has closed its arena or died")

    def _leave(self, why: str) -> None:
        if self.ended.is_set():
            return
        self.ended.set()
        self._why = why
        asyncio.get_running_loop().remove_reader(self._connection.fileno())
        self._connection.close()


def _map(descriptor: int, nbytes: int) -> memoryview:
    """Map the arena, which takes 0.1 ms per MiB, and close the descriptor."""
    try:
        return map_peer(descriptor, nbytes)
    finally:
        os.close(descriptor)
