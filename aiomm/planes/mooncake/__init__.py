"""The plane of other hosts with RDMA: bytes move by Mooncake's Transfer Engine.

The sender makes tensors ready in registered memory, and the receiver reads them straight into
its pool, as far as it has granted that: so it knows itself when nothing can land any more.

The engine authenticates nobody and encrypts nothing. It listens on two ports of every interface,
and whoever reaches them can read and write all registered memory: the sender's staging slots
and registered tensors, and over RDMA the receiver's pool. It is for networks that are trusted.
Which process may have which bytes of the pool is checked on a connection of the plane's own.
"""

from __future__ import annotations

import ipaddress
import os
from functools import partial
from typing import ClassVar, Self

from ...buffers.arena import Arena, HostArena
from ...buffers.cuda import CudaArena
from ...buffers.tensors import Memory
from ...errors import PlaneUnavailable
from ..base import Export, Place, Plane, RemoteArena
from ..copying import Copies, CopyThreads
from .engine import PEER_TO_PEER, engine_at
from .library import has_rdma, is_cuda_build, uses_tcp, why_unusable
from .outlet import Outlets
from .reads import target_in
from .receiving import MooncakeExport
from .sending import MooncakeArena, connect, greeted
from .wire import decode_offer

__all__ = ["MooncakePlane"]

NO_CUDA = "this build of the engine reads memory of the host only"
METADATA_VARIABLE = "AIOMM_MOONCAKE_METADATA"
STAGING_NBYTES = 64 << 20


class MooncakePlane(Plane):
    """Reads from senders' memory by RDMA, or over TCP where there is no RDMA.

    Args:
        bind: the receiver's address to listen on for orders; the engine takes all interfaces.
        advertise: the address that peers are told; `bind` unless given.
        by_name: use it without RDMA, too.
        metadata: `P2PHANDSHAKE`, or the `http://` or `etcd://` URL of a metadata server; without
            it, what `AIOMM_MOONCAKE_METADATA` says, else `P2PHANDSHAKE`.
        staging_nbytes: registered memory that a sender copies other tensors through.
    """

    name: ClassVar[str] = "mooncake"

    def __init__(
        self,
        *,
        bind: str = "127.0.0.1",
        advertise: str | None = None,
        by_name: bool = True,
        metadata: str | None = None,
        staging_nbytes: int = STAGING_NBYTES,
    ) -> None:
        self._bind = "0.0.0.0" if bind in ("", "*") else bind
        self._advertise = bind if advertise is None else advertise
        self._by_name = by_name
        self._metadata = metadata or os.environ.get(METADATA_VARIABLE) or PEER_TO_PEER
        self._threads = CopyThreads(self.name)
        self._outlets = Outlets(self._threads, self._metadata, staging_nbytes)

    @classmethod
    def at(cls, place: Place, *, by_name: bool) -> Self:
        """Listen where the control channel does, and tell peers what it tells them."""
        return cls(bind=place.bind, advertise=place.advertise, by_name=by_name)

    def writes_into(self, device: str) -> bool:
        """Whether it is the host, or a GPU and the engine's build with CUDA is installed."""
        return device == "cpu" or is_cuda_build()

    def unusable(self) -> str | None:
        """Say that there is no RDMA here and nobody has asked for it by name, or what is missing.

        What only the import of the engine shows is told by :meth:`export` and :meth:`attach`.
        """
        if not (self._by_name or has_rdma()):
            return "there is no RDMA device here, and over TCP it is slower than the plane tcp"
        return why_unusable()

    async def export(self, arena: Arena) -> Export:
        """Open `arena`, of the host or with the engine's CUDA build of a GPU, to senders' orders.

        Raises:
            PlaneUnavailable: there is no engine here, or no address to listen on.
        """
        if not isinstance(arena, HostArena | CudaArena) or not self.writes_into(arena.device):
            raise PlaneUnavailable(f"mooncake: {NO_CUDA}, so not into that of {arena.device}")
        self._check_usable()
        copies = Copies(self._threads)
        memory: tuple[int, int] | None = None
        try:
            engine = await copies.run(partial(engine_at, self._advertise, self._metadata))
            if isinstance(arena, CudaArena) or not uses_tcp():
                memory = target_in(arena, 0, arena.nbytes)[:2]
                await copies.run(partial(engine.register, *memory))
        except BaseException:
            await copies.aclose()
            raise
        engine.reads.hold()
        export = MooncakeExport(arena, engine, copies, memory, self._advertise)
        try:
            await export.listen(self._bind)
        except BaseException:
            await export.aclose()
            raise
        return export

    async def attach(self, offer: bytes) -> RemoteArena:
        """Connect to the receiver behind `offer`, which then tries to reach this process.

        Raises:
            PlaneUnavailable: one of them does not reach the other, or there is no engine here.
        """
        decoded = decode_offer(offer)
        self._check_usable()
        connection = await connect(decoded)
        host = self._own_host(connection.own_host)
        try:
            outlet = await self._outlets.hold(host)
        except BaseException:
            connection.lose("no engine here")
            raise
        let_go = partial(self._outlets.let_go, host)
        try:
            await greeted(connection, decoded, outlet.session)
        except BaseException:
            await let_go()
            raise
        return MooncakeArena(decoded, connection, outlet, let_go)

    async def register(self, memory: Memory) -> None:
        """Let receivers read `memory` from where it is, until :meth:`unregister`.

        Raises:
            PlaneUnavailable: the engine refuses it, as its build without CUDA does with a GPU's.
        """
        if not self.writes_into(memory.device):
            raise PlaneUnavailable(f"mooncake: {NO_CUDA}, so not that of {memory.device}")
        await self._outlets.register(memory)

    async def unregister(self, memory: Memory) -> None:
        """Take back :meth:`register`."""
        await self._outlets.unregister(memory)

    def _check_usable(self) -> None:
        reason = self.unusable()
        if reason is not None:
            raise PlaneUnavailable(f"mooncake: {reason}")

    def _own_host(self, towards_receiver: str) -> str:
        """Return how the receiver reaches this host: as the user says, unless that is loopback."""
        return towards_receiver if _is_loopback(self._advertise) else self._advertise


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
