"""The plane that works everywhere: bytes over a TCP connection, received into the pool.

Neither side is encrypted. The key that a sender must show travels in the Hello, so it is as
secret as the control channel.
"""

from __future__ import annotations

from typing import ClassVar, Self

from ...buffers.arena import Arena
from ...errors import PlaneUnavailable
from ..base import Export, Place, Plane, RemoteArena
from ..copying import CopyThread
from .receiving import TcpExport
from .sending import TcpArena, connect
from .wire import decode_offer

__all__ = ["TcpPlane"]

WILDCARDS = frozenset({"", "*", "0.0.0.0", "::"})


class TcpPlane(Plane):
    """Writes over TCP, on one host or between two.

    Args:
        bind: the receiver's address to listen on; loopback unless told otherwise.
        port: the port to listen on; 0 takes any free one.
        advertise: the host name or address that senders are told; `bind` unless given.

    Raises:
        ValueError: `bind` is a wildcard, and `advertise` does not say what senders shall use.
    """

    name: ClassVar[str] = "tcp"

    def __init__(
        self, *, bind: str = "127.0.0.1", port: int = 0, advertise: str | None = None
    ) -> None:
        if advertise is None and bind in WILDCARDS:
            raise ValueError(f"bind={bind!r} needs advertise=, the address that senders reach")
        self._bind = "0.0.0.0" if bind in ("", "*") else bind
        self._port = port
        self._advertise = bind if advertise is None else advertise
        self._thread = CopyThread(self.name)

    @classmethod
    def at(cls, place: Place, *, by_name: bool) -> Self:
        """Listen where the control channel does, and tell senders what it tells them."""
        return cls(bind=place.bind, advertise=place.advertise)

    async def export(self, arena: Arena) -> Export:
        """Listen for senders that write into `arena`, which must be host memory.

        Raises:
            PlaneUnavailable: the address cannot be bound, or the arena is on another device.
        """
        if arena.device != "cpu":
            raise PlaneUnavailable(f"tcp: receives into host memory, not into {arena.device}")
        export = TcpExport(arena, self._advertise)
        await export.listen(self._bind, self._port)
        return export

    async def attach(self, offer: bytes) -> RemoteArena:
        """Connect to the receiver behind `offer`.

        Raises:
            PlaneUnavailable: it cannot be reached within 5 s, or refuses the offer's key.
        """
        decoded = decode_offer(offer)
        return TcpArena(decoded, await connect(decoded), self._thread)
