"""The plane that works everywhere: bytes over a TCP connection, received into the pool.

Neither side is encrypted. The key that a sender must show travels in the Hello, so it is as
secret as the control channel.
"""

from __future__ import annotations

from typing import ClassVar, Self

from ...buffers.arena import Arena, HostArena
from ...errors import PlaneUnavailable
from ..base import Export, Place, Plane, RemoteArena
from ..copying import CopyThreads
from .receiving import TcpExport
from .sending import TcpArena
from .sockets import is_wildcard
from .wire import decode_offer

__all__ = ["TcpPlane"]


class TcpPlane(Plane):
    """Writes over TCP, on one host or between two.

    Args:
        bind: the receiver's address to listen on, or a name for it; loopback unless told
            otherwise. `"*"` and `"::"` are all addresses of both families, `"0.0.0.0"` is all
            of IPv4.
        port: the port to listen on; 0 takes any free one.
        advertise: the host name or address that senders are told; `bind` unless given.

    Raises:
        ValueError: no address is left that senders can use: `bind` is a wildcard and
            `advertise` is not given, or is a wildcard itself.
    """

    name: ClassVar[str] = "tcp"

    def __init__(
        self, *, bind: str = "127.0.0.1", port: int = 0, advertise: str | None = None
    ) -> None:
        self._bind = bind
        self._port = port
        self._advertise = bind if advertise is None else advertise
        if is_wildcard(self._advertise):
            raise ValueError(
                f"bind={bind!r}, advertise={advertise!r}: needs an address that senders reach"
            )
        self._threads = CopyThreads(self.name)

    @classmethod
    def at(cls, place: Place, *, by_name: bool) -> Self:
        """Listen where the control channel does, and tell senders what it tells them."""
        return cls(bind=place.bind, advertise=place.advertise)

    async def export(self, arena: Arena) -> Export:
        """Listen for senders that write into `arena`, which must be host memory.

        Raises:
            PlaneUnavailable: the address cannot be bound, or the arena is on another device.
        """
        if not isinstance(arena, HostArena):
            raise PlaneUnavailable(f"tcp: receives into host memory, not into {arena.device}")
        export = TcpExport(arena, self._advertise)
        await export.listen(self._bind, self._port)
        return export

    async def attach(self, offer: bytes) -> RemoteArena:
        """Connect to the receiver behind `offer`.

        Raises:
            PlaneUnavailable: it cannot be reached within 5 s, or refuses the offer's key.
        """
        return await TcpArena.attach(decode_offer(offer), self._threads)
