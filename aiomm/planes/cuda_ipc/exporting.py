"""The receiver's end: hands the pool's handle out, and knows who may still have it open."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
from functools import partial

import msgspec

from ...buffers.cuda import CudaArena
from ...errors import PlaneUnavailable
from ...gpu.memory import DeviceMemory
from ...gpu.runtime import GpuError, explained
from ...processes import ProcessWatch, peer_pidfd
from ..base import Export
from ..handover import Desk, Visitor
from .wire import CLOSED, EPOCH_NBYTES, RETIRE, CudaIpcOffer

__all__ = ["CudaExport", "exported_here"]

logger = logging.getLogger(__name__)

RETIRE_SECONDS = 3.0
"""How long closing waits for senders to close the pool. They may hold their loops."""

_process = (os.getpid(), secrets.token_bytes(EPOCH_NBYTES))
_exports: dict[bytes, CudaExport] = {}
"""What this process exports, by epoch."""


class CudaExport(Export):
    """One pool, exported once. The constructor blocks.

    `revoke` always returns False: only a sender's word or its death can tell.

    Raises:
        PlaneUnavailable: CUDA cannot share it, and why.
    """

    def __init__(self, arena: CudaArena) -> None:
        self._memory: list[DeviceMemory] = [arena.memory]
        """Empty when closed."""
        self._epoch = secrets.token_bytes(EPOCH_NBYTES)
        self._importers: dict[Visitor, _Importer] = {}
        self._locals: dict[socket.socket, int] = {}
        """Our ends of the connections with senders of this process, and their links."""
        self._desk = Desk("cuda_ipc", self._hand, self._heard)
        try:
            device = arena.runtime.devices()[arena.ordinal]
            if device.why_no_ipc:
                raise PlaneUnavailable(f"cuda_ipc: {arena.device}: {device.why_no_ipc}")
            self._uuid = device.uuid
            self._handle = arena.runtime.export(arena.ordinal, self.memory.address)
            self._nbytes = self.memory.nbytes
        except GpuError as exc:
            raise explained(arena.ordinal, exc) from exc

    @property
    def memory(self) -> DeviceMemory:
        """The pool's, which is not freed before this is closed."""
        return self._memory[0]

    async def open(self) -> None:
        """Begin to hand it out.

        Raises:
            PlaneUnavailable: no socket can be made.
        """
        await self._desk.open()
        _exports[self._epoch] = self

    def offer(self, link: int) -> bytes:
        """Return where the sender on `link` gets the handle; the same each time."""
        invitation = self._desk.invite(link)
        offer = CudaIpcOffer(invitation, _own_process(), self._epoch, self._uuid, self._nbytes)
        return msgspec.msgpack.encode(offer)

    def forget(self, link: int) -> None:
        """Void the sender's secret, and ask it to close the pool if it is still there."""
        self._desk.door.void(link)
        for visitor, importer in self._importers.items():
            if importer.link == link:
                visitor.say(RETIRE)
        for ours, its_link in list(self._locals.items()):
            if its_link == link:
                self._part(ours)

    def visit(self, secret: bytes) -> socket.socket:
        """Return a connection for a sender in this very process, which ends when it must.

        It needs no handle, and refers to the memory, which is not freed before.

        Raises:
            PlaneUnavailable: no sender has such a secret.
        """
        link = self._desk.door.owner_of(secret)
        if link is None:
            raise PlaneUnavailable("cuda_ipc: the receiver, in this process, has forgotten us")
        ours, theirs = socket.socketpair(type=socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._locals[ours] = link
        asyncio.get_running_loop().add_reader(ours.fileno(), self._part, ours)
        return theirs

    async def aclose(self) -> None:
        """Have every sender close the pool; what one of them keeps open is never freed."""
        if _exports.pop(self._epoch, None) is None:
            return
        self._desk.refuse_more()
        for ours in list(self._locals):
            self._part(ours)
        for visitor in self._importers:
            visitor.say(RETIRE)
        gone = [importer.gone for importer in self._importers.values()]
        if gone:
            await asyncio.wait(gone, timeout=RETIRE_SECONDS)
        for importer in [each for each in self._importers.values() if not each.gone.done()]:
            logger.warning("! cuda_ipc: %s has not closed the pool, which is not freed", importer)
            self.memory.leak()
            importer.end()
        self._memory.clear()
        await self._desk.aclose()

    def _part(self, ours: socket.socket) -> None:
        """End the connection with a sender of this process."""
        if self._locals.pop(ours, None) is not None:
            asyncio.get_running_loop().remove_reader(ours.fileno())
            ours.close()

    def _hand(self, visitor: Visitor) -> tuple[bytes, list[int]]:
        assert visitor.link is not None
        with visitor.socket() as connection:
            pidfd = peer_pidfd(connection)
        importer = _Importer(visitor.link, pidfd)
        self._importers[visitor] = importer
        importer.gone.add_done_callback(lambda _: self._importers.pop(visitor, None))
        visitor.lost.add_done_callback(partial(self._left, importer))
        return self._handle, []

    def _heard(self, visitor: Visitor, said: bytes) -> None:
        if said == CLOSED:
            self._importers[visitor].end()
        visitor.abort()

    def _left(self, importer: _Importer, _: asyncio.Future[None]) -> None:
        """Go on waiting for its death, unless it has said that it has closed the pool."""
        if not importer.gone.done():
            logger.debug("! cuda_ipc: %s left without closing the pool", importer)


class _Importer:
    """A process that may have the pool open: until it says that it has not, or is dead."""

    def __init__(self, link: int, pidfd: int | None) -> None:
        self.link = link
        loop = asyncio.get_running_loop()
        self.gone: asyncio.Future[None] = loop.create_future()
        self._watch = None if pidfd is None else ProcessWatch(loop, pidfd, self.end)

    def end(self) -> None:
        """It is gone. Idempotent."""
        if self._watch is not None:
            self._watch.close()
        if not self.gone.done():
            self.gone.set_result(None)

    def __str__(self) -> str:
        return f"the sender on link {self.link}"


def exported_here(offer: CudaIpcOffer) -> CudaExport | None:
    """Return the export behind an offer if this very process has made it.

    Raises:
        PlaneUnavailable: it has, and has closed it.
    """
    if offer.process != _own_process():
        return None
    export = _exports.get(offer.epoch)
    if export is None:
        raise PlaneUnavailable("cuda_ipc: the receiver, in this process, has closed its pool")
    return export


def _own_process() -> bytes:
    """Return what names this process; a forked child is another one."""
    global _process
    if _process[0] != os.getpid():
        _process = os.getpid(), secrets.token_bytes(EPOCH_NBYTES)
    return _process[1]
