"""The control channel between processes of one host: a Unix stream that proves deaths.

The socket has an abstract name, so there is no file and nothing is left after a crash. An
abstract name has no permissions either: the kernel tells each side the other's user, and only
the own one is let in.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import secrets
import socket
from collections.abc import Sequence
from typing import ClassVar

from ..errors import PoolClosed
from ..processes import ProcessWatch, peer_credentials, peer_pidfd
from .base import Channel, Handler, Peer, check_packet
from .delivery import Delivery
from .packet_stream import PacketStream

__all__ = ["ANY_UNIX_ADDRESS", "UnixChannel", "UnixPeer"]

logger = logging.getLogger("aiomm.control")

ANY_UNIX_ADDRESS = "unix://"
"""Bind to a new name that nobody can guess."""
PREFIX = "unix://@"
MAX_NAME_NBYTES = 107
BACKLOG = 4096
ACCEPTS_PER_TURN = 64
ACCEPT_PAUSE = 0.1
LOOKS_AT_THE_DEAD = 64
"""Turns of the loop in which what a dead process had sent is still read; a child of it that
holds the connection could go on for ever."""
OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class UnixPeer:
    """One connection. Opaque to everybody but its channel.

    A peer goes open -> lost -> dead, or is forgotten at any point; it never goes back.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, delivery: Delivery, *, known: bool) -> None:
        self._loop = loop
        self._delivery = delivery
        self._is_known = known
        self._is_lost = False
        self._is_forgotten = False
        self._stream: PacketStream | None = None
        self._watch: ProcessWatch | None = None
        self._looks_left = LOOKS_AT_THE_DEAD
        self.pid = 0

    def __repr__(self) -> str:
        return f"<peer of process {self.pid}>"

    @property
    def is_over(self) -> bool:
        """Whether nothing of this peer is open any more."""
        return self._stream is None and self._watch is None

    def open(self, connection: socket.socket, limit_nbytes: int) -> None:
        """Use `connection` if the same user is at its other end."""
        credentials = peer_credentials(connection)
        self.pid = credentials.pid
        if credentials.uid != os.geteuid():
            connection.close()
            logger.warning("x connection with user %d refused", credentials.uid)
            self.lose_soon(f"it belongs to user {credentials.uid}")
            return
        self._stream = PacketStream(self._loop, connection, self, limit_nbytes=limit_nbytes)
        pidfd = peer_pidfd(connection)
        if pidfd is not None:
            self._watch = ProcessWatch(self._loop, pidfd, self._process_died)

    def lose_soon(self, cause: str) -> None:
        """Report a loss found while the caller of `connect` does not know the peer yet."""
        self._loop.call_soon(self.stream_ended, cause)

    def write(self, packet: bytes) -> bool:
        """Send one packet; return False if it is dropped."""
        return self._stream is not None and self._stream.write(packet)

    def forget(self) -> None:
        """Close everything and call nothing back. Idempotent."""
        self._is_forgotten = True
        self._close_stream()
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    def packets_received(self, packets: Sequence[bytes]) -> None:
        """Deliver packets."""
        self._is_known = True
        self._delivery.packets(self, packets)

    def stream_ended(self, cause: str) -> None:
        """Report the loss once, to a handler that knows this peer."""
        self._close_stream()
        if self._is_forgotten or self._is_lost:
            return
        self._is_lost = True
        if self._is_known:
            self._delivery.lost(self, cause)
        else:
            self.forget()

    def _process_died(self) -> None:
        self._watch = None
        self._bury()

    def _bury(self) -> None:
        """Report loss and death, after what the process had sent before it died."""
        if self._is_forgotten:
            return
        if self._stream is not None and self._stream.unread_nbytes() and self._looks_left:
            self._looks_left -= 1
            self._loop.call_soon(self._bury)
            return
        self.stream_ended("its process died")
        if not self._is_forgotten:
            self.forget()
            self._delivery.died(self)

    def _close_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


class UnixChannel(Channel):
    """Packets over abstract Unix stream sockets, for processes of one user on one host.

    The end of a peer's process is proven by its pidfd, also when a child of it keeps the
    connection open, and never claimed for a process that is merely stopped. A process that has
    left its pid namespace behind shows only as lost.

    Args:
        bind: `unix://` for a new name, `unix://@name`, or None not to listen.
        limit_nbytes: how much may wait for a peer that does not read; past it packets drop.

    Raises:
        ValueError: the address is malformed.
    """

    waits_for_listener: ClassVar[bool] = False
    proves_death: ClassVar[bool] = True

    def __init__(
        self, bind: str | None = ANY_UNIX_ADDRESS, *, limit_nbytes: int = 1024 * 1024
    ) -> None:
        if bind == ANY_UNIX_ADDRESS:
            bind = f"{PREFIX}aiomm-{secrets.token_hex(16)}"
        self._bind = None if bind is None else _socket_name(bind)
        self._bind_address = bind
        self._limit_nbytes = limit_nbytes
        self._loop: asyncio.AbstractEventLoop | None = None
        self._delivery: Delivery | None = None
        self._listener: socket.socket | None = None
        self._accept_pause: asyncio.TimerHandle | None = None
        self._peers: set[UnixPeer] = set()
        self._is_closed = False

    async def start(self, handler: Handler) -> None:
        """Bind, if an address was given, and begin to deliver."""
        if self._loop is not None or self._is_closed:
            raise RuntimeError("a channel starts once")
        self._loop = asyncio.get_running_loop()
        self._delivery = Delivery(self, handler)
        if self._bind is not None:
            self._listener = _listen(self._bind)
            self.address = self._bind_address
            self._loop.add_reader(self._listener.fileno(), self._accept)

    def connect(self, address: str) -> Peer:
        """Connect to `address`. If nobody listens there, the peer is lost, soon."""
        name = _socket_name(address)
        loop, delivery = self._running()
        peer = self._new_peer(loop, delivery, known=True)
        connection = None
        try:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            connection.connect(name)  # on this host it stands at once, or never
            peer.open(connection, self._limit_nbytes)
        except OSError as exc:
            if connection is not None:
                connection.close()
            peer.lose_soon(f"cannot connect to {address}: {exc}")
        return peer

    def send(self, peer: Peer, packet: bytes) -> bool:
        """Hand one packet to `peer`'s queue without ever blocking."""
        check_packet(packet)
        return isinstance(peer, UnixPeer) and peer.write(packet)

    def disconnect(self, peer: Peer) -> None:
        """Forget `peer` and close its connection."""
        if isinstance(peer, UnixPeer):
            peer.forget()
            self._peers.discard(peer)

    async def aclose(self) -> None:
        """Close every connection. What the kernel has taken still reaches the peers."""
        self._is_closed = True
        if self._accept_pause is not None:
            self._accept_pause.cancel()
        if self._listener is not None and self._loop is not None:
            self._loop.remove_reader(self._listener.fileno())
            self._listener.close()
            self._listener = None
        for peer in self._peers:
            peer.forget()
        self._peers.clear()

    def _running(self) -> tuple[asyncio.AbstractEventLoop, Delivery]:
        if self._is_closed:
            raise PoolClosed("the control channel is closed")
        if self._loop is None or self._delivery is None:
            raise RuntimeError("the control channel has not been started")
        return self._loop, self._delivery

    def _new_peer(
        self, loop: asyncio.AbstractEventLoop, delivery: Delivery, *, known: bool
    ) -> UnixPeer:
        self._peers = {other for other in self._peers if not other.is_over}
        peer = UnixPeer(loop, delivery, known=known)
        self._peers.add(peer)
        return peer

    def _accept(self) -> None:
        loop, delivery = self._running()
        for _ in range(ACCEPTS_PER_TURN):
            if self._listener is None:
                return
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as exc:
                self._pause_accepting(loop, exc)
                return
            connection.setblocking(False)
            self._new_peer(loop, delivery, known=False).open(connection, self._limit_nbytes)

    def _pause_accepting(self, loop: asyncio.AbstractEventLoop, error: OSError) -> None:
        """Wait a moment: the listener stays readable, and the loop would spin on it."""
        if error.errno not in OUT_OF_RESOURCES:
            raise error
        logger.warning("x cannot take connections for now: %s", error)
        if self._listener is not None:
            loop.remove_reader(self._listener.fileno())
            self._accept_pause = loop.call_later(ACCEPT_PAUSE, self._resume_accepting)

    def _resume_accepting(self) -> None:
        if self._listener is not None and self._loop is not None:
            self._loop.add_reader(self._listener.fileno(), self._accept)


def _socket_name(address: str) -> bytes:
    """Return the kernel's spelling of an abstract address: a zero byte, then the name."""
    name = address.removeprefix(PREFIX)
    if name == address or not name or "\0" in name or len(name.encode()) > MAX_NAME_NBYTES:
        raise ValueError(f"a Unix address is {PREFIX}name, not {address!r}")
    return b"\0" + name.encode()


def _listen(name: bytes) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        listener.bind(name)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener
