"""The control channel over ZeroMQ: TCP and `ipc://`, either side first, any number of peers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import uuid
from dataclasses import replace
from typing import ClassVar

import zmq
from zmq.utils import z85

from ..errors import PoolClosed
from .address import Address, IpcAddress, TcpAddress, parse_address, require_allowed
from .base import Channel, Handler, Peer, check_packet
from .curve import Authenticator, Complaints, secure_client, secure_server
from .delivery import Delivery
from .event_socket import EventSocket
from .keys import KeyPair, Keys
from .private_path import PathClaim
from .sockets import ChannelSocket, DealerSocket, Limits, PumpFactory, RouterSocket, ZmqPeer

__all__ = ["Limits", "ZmqChannel"]

MAX_NAME_NBYTES = 200
MAX_SOCKETS = 16 * 1024
HEARTBEAT_MS = 100, 2700
"""How often a silent peer's ZeroMQ is asked for a sign of life, and how long it may take."""
LOOPBACK_HEARTBEAT_MS = 5000, 15000
"""On this host, where a tunnel to another may begin, whose far end can vanish without a word."""
CONNECT_TIMEOUT_MS = 400
CLOSE_SECONDS = 2.0

_open_contexts: set[zmq.Context[zmq.Socket[bytes]]] = set()
"""Kept alive: a context that the garbage collector meets beside its sockets would wait for them
for ever, in whatever thread it meets it. At exit pyzmq ends those that were never closed."""


class ZmqChannel(Channel):
    """A ROUTER where peers connect to this endpoint, and a DEALER for each peer it connects to.

    A peer that connected is known from its first packet on. The loss of a peer shows as the end
    of its connection, or as 2.7 s without an answer of its ZeroMQ thread (on this host 15 s: a
    tunnel to another may begin here). A process whose loop hangs is not noticed here: the
    session's own pings are for that.

    Args:
        bind: `tcp://host:port` (port 0 or `*`: any free one), `ipc://path` (in a directory of
            this user alone, made if missing), or None not to listen.
        keys: with them every TCP address speaks CURVE, and only known peers get in.
        insecure: allow addresses off this host without keys, where anybody who reaches them can
            talk.
        advertise: the host in this channel's address; empty: what `bind` says, or for a wildcard
            the address that leads out of this host.
        name: the readable half of the identity, for logs.
        limits: what a peer that does not read may pile up.

    Raises:
        ValueError: the address is malformed, or leaves this host without keys or `insecure`.
    """

    shows_disconnect: ClassVar[bool] = False

    def __init__(
        self,
        bind: str | None,
        *,
        keys: Keys | None = None,
        insecure: bool = False,
        advertise: str = "",
        name: str,
        limits: Limits | None = None,
    ) -> None:
        if not 0 < len(name.encode()) <= MAX_NAME_NBYTES or name[0] == "\0":
            raise ValueError(f"a name has 1 to {MAX_NAME_NBYTES} bytes, not {name!r}")
        self._keys = keys
        self._insecure = insecure
        self._bind = None if bind is None else self._allowed(bind)
        self._name = name
        self._advertise = advertise
        self._limits = limits or Limits()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._delivery: Delivery | None = None
        self._sockets: set[ChannelSocket] = set()
        self._complaints = Complaints()
        self._authenticator: Authenticator | None = None
        self._claim: PathClaim | None = None
        self._is_closed = False
        self._terminated: asyncio.Future[None] | None = None

    async def start(self, handler: Handler) -> None:
        """Bind, if an address was given, and begin to deliver."""
        if self._loop is not None or self._is_closed:
            raise RuntimeError("a channel starts once")
        self._loop = asyncio.get_running_loop()
        self._delivery = Delivery(self, handler)
        if self._bind is None:
            return
        try:
            await self._listen(self._bind)
        except zmq.ZMQError as exc:
            await self.aclose()
            raise OSError(exc.errno, exc.strerror, str(self._bind)) from exc
        except OSError:
            await self.aclose()
            raise

    def connect(self, address: str) -> Peer:
        """Begin to connect to `address`; wait for a listener there as long as it takes."""
        loop, context, delivery = self._running()
        parsed = self._allowed(address)
        server = self._key_of(parsed)
        identity = f"{self._name}:{uuid.uuid4().hex}".encode()
        dealer = None
        try:
            dealer = DealerSocket(loop, context, delivery, self._limits, identity)
            _set_transport_options(dealer.zmq_socket, parsed)
            if server is not None:
                secure_client(dealer.zmq_socket, *server)
            dealer.begin(self.pump_factory)
            dealer.zmq_socket.connect(parsed.endpoint())
        except zmq.ZMQError as exc:
            if dealer is not None:
                dealer.close()
            raise ValueError(f"ZeroMQ does not connect to {address}: {exc}") from exc
        self._sockets = {other for other in self._sockets if not other.is_closed} | {dealer}
        return dealer.peer

    def check(self, address: str) -> None:
        """Raise ValueError unless :meth:`connect` would take `address`."""
        self._key_of(self._allowed(address))

    def told(self, address: str) -> str:
        """Return `address`, one of this channel, with the key that proves who listens there."""
        if self._keys is None or not address.startswith("tcp:"):
            return address
        parsed = parse_address(address)
        assert isinstance(parsed, TcpAddress)
        return str(replace(parsed, key=z85.decode(self._keys.own.public).hex()))

    def send(self, peer: Peer, packet: bytes) -> bool:
        """Hand one packet to `peer`'s queue without ever blocking."""
        check_packet(packet)
        if self._is_closed or not isinstance(peer, ZmqPeer) or not peer.is_alive:
            return False
        return peer.socket.send(peer, packet)

    def disconnect(self, peer: Peer) -> None:
        """Forget `peer`. If it connected to us, its connection stays, but nothing of it counts."""
        if isinstance(peer, ZmqPeer) and not self._is_closed:
            peer.socket.forget(peer)

    async def aclose(self) -> None:
        """Close everything; a quarter of a second at most, for what was handed over to leave."""
        if not self._is_closed:
            self._is_closed = True
            self._close_sockets()
        if self._terminated is not None:
            await asyncio.wait([self._terminated], timeout=CLOSE_SECONDS)

    @property
    def pump_factory(self) -> PumpFactory:
        """What drives the sockets of this channel."""
        return EventSocket

    def make_router(
        self,
        loop: asyncio.AbstractEventLoop,
        context: zmq.Context[zmq.Socket[bytes]],
        delivery: Delivery,
    ) -> RouterSocket:
        """Return the socket that listens, not bound yet."""
        return RouterSocket(loop, context, delivery, self._limits, self._complaints)

    async def _listen(self, bind: Address) -> None:
        if isinstance(bind, IpcAddress):
            self._claim = PathClaim(bind.path)
        elif not bind.is_any:
            # ZeroMQ binds to addresses only, and would look names up in its own thread.
            bind = await _resolved(bind)
        loop, context, delivery = self._running()
        router = self.make_router(loop, context, delivery)
        self._sockets.add(router)
        _set_transport_options(router.zmq_socket, bind)
        if self._keys is not None and isinstance(bind, TcpAddress):
            self._authenticator = Authenticator(loop, context, self._keys, self._complaints)
            secure_server(router.zmq_socket, self._keys.own)
        router.begin(self.pump_factory)
        router.zmq_socket.bind(bind.endpoint())
        self.address = _real_address(router.zmq_socket, bind, self._advertise)

    def _allowed(self, address: str) -> Address:
        """Read an address that this channel may bind or connect to."""
        parsed = parse_address(address)
        require_allowed(parsed, has_keys=self._keys is not None, insecure=self._insecure)
        return parsed

    def _key_of(self, address: Address) -> tuple[KeyPair, bytes] | None:
        """Return our key pair and the public key of whoever listens at `address`."""
        if isinstance(address, IpcAddress):
            return None
        if self._keys is None:
            if address.key:
                raise ValueError(
                    f"{address} speaks with keys, and this endpoint has none: set key_file="
                )
            return None
        return self._keys.own, self._keys.key_of(address)

    def _running(
        self,
    ) -> tuple[asyncio.AbstractEventLoop, zmq.Context[zmq.Socket[bytes]], Delivery]:
        if self._is_closed:
            raise PoolClosed("the control channel is closed")
        if self._loop is None or self._delivery is None:
            raise RuntimeError("the control channel has not been started")
        if self._context is None:
            self._context = zmq.Context()
            self._context.set(zmq.MAX_SOCKETS, MAX_SOCKETS)
            _open_contexts.add(self._context)
        return self._loop, self._context, self._delivery

    def _close_sockets(self) -> None:
        for each in self._sockets:
            each.close()
        self._sockets.clear()
        if self._authenticator is not None:
            self._authenticator.close()
        if self._claim is not None:
            self._claim.release()
        if self._context is not None and self._loop is not None:
            self._terminated = _terminate(self._context, self._loop)


def _set_transport_options(socket: zmq.Socket[bytes], address: Address) -> None:
    """Options that depend on where the peers are."""
    if isinstance(address, IpcAddress):
        socket.setsockopt(zmq.IPC_FILTER_UID, os.geteuid())
        return
    if address.is_ipv6:
        socket.setsockopt(zmq.IPV6, 1)
    interval, timeout = LOOPBACK_HEARTBEAT_MS if address.is_loopback else HEARTBEAT_MS
    socket.setsockopt(zmq.HEARTBEAT_IVL, interval)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, timeout)
    socket.setsockopt(zmq.HEARTBEAT_TTL, timeout)
    if not address.is_loopback:
        socket.setsockopt(zmq.CONNECT_TIMEOUT, CONNECT_TIMEOUT_MS)


async def _resolved(address: TcpAddress) -> TcpAddress:
    found = await asyncio.get_running_loop().getaddrinfo(
        address.host, address.port, type=socket.SOCK_STREAM
    )
    return TcpAddress(str(found[0][4][0]), address.port)


def _real_address(socket: zmq.Socket[bytes], bind: Address, advertise: str) -> str:
    if isinstance(bind, IpcAddress):
        return str(bind)
    endpoint = str(socket.get_string(zmq.LAST_ENDPOINT)).rstrip("\0")
    return str(bind.reachable(int(endpoint.rpartition(":")[2]), advertise))


def _terminate(
    context: zmq.Context[zmq.Socket[bytes]], loop: asyncio.AbstractEventLoop
) -> asyncio.Future[None]:
    """End the context beside the loop: it blocks until closed sockets have sent their last."""
    done: asyncio.Future[None] = loop.create_future()

    def run() -> None:
        context.term()
        _open_contexts.discard(context)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(finish)

    def finish() -> None:
        thread.join()
        if not done.done():
            done.set_result(None)

    thread = threading.Thread(target=run, name="aiomm-zmq-close", daemon=True)
    loop.call_soon(thread.start)  # aiozmq closes its sockets in the next turn of the loop
    return done
