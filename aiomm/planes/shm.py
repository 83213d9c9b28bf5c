"""The plane of one host: the sender copies straight into the receiver's pool.

The receiver's arena is a memfd without a name. It is handed over a Unix socket, together
with proof of who asks: the kernel's word on the peer's user, and a secret of the offer. The
socket's name is random and abstract, so a killed exporter leaves nothing behind, and the
connection's end tells the sender that its receiver is gone.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import secrets
import socket
import struct
import sys
from collections.abc import Sequence
from functools import partial
from typing import Annotated, ClassVar, cast

import msgspec
from msgspec import Meta

from ..buffers.arena import Arena
from ..buffers.shm import MemfdArena, map_peer
from ..errors import PlaneUnavailable
from .base import Export, GrantKey, Plane, RemoteArena, Run
from .copying import Copies, CopyThread, check_runs

__all__ = ["ShmPlane"]

logger = logging.getLogger(__name__)

INLINE_NBYTES = 1 << 20
"""Up to here a write is copied on the loop thread: it takes less than the hand-over."""
HANDSHAKE_SECONDS = 5.0
MAX_STRANGERS = 64
BACKLOG = 1024
SECRET_NBYTES = 16
ACCEPTED = b"\x01"
REFUSED = "the receiver refuses this process (another user, or a void offer) or has just ended"


class _Offer(msgspec.Struct, frozen=True, array_like=True, tag="shm"):
    name: Annotated[bytes, Meta(min_length=16, max_length=16)]
    secret: Annotated[bytes, Meta(min_length=SECRET_NBYTES, max_length=SECRET_NBYTES)]
    nbytes: Annotated[int, Meta(ge=1)]


class ShmPlane(Plane):
    """Writes into memory that the receiver shares with the processes of its user."""

    name: ClassVar[str] = "shm"

    def __init__(self) -> None:
        self._thread = CopyThread(self.name)

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
        try:
            await export.listen()
        except OSError as exc:
            raise PlaneUnavailable(f"shm: cannot listen: {exc}") from exc
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
            decoded = msgspec.msgpack.decode(offer, type=_Offer)
        except (msgspec.MsgspecError, RecursionError) as exc:
            raise PlaneUnavailable(f"shm: not an offer: {exc}") from exc
        connection, descriptor = await _redeem(decoded)
        copies = Copies(self._thread)
        try:
            memory = await copies.run(partial(_map, descriptor, decoded.nbytes))
        except BaseException:
            connection.close()
            await copies.aclose()
            raise
        return _ShmArena(memory, connection, copies)


class _ShmExport(Export):
    def __init__(self, arena: MemfdArena) -> None:
        self.arena = arena
        self.secrets: dict[int, bytes] = {}
        """What each sender must show."""
        self.strangers: dict[_Handover, None] = {}
        """Connections that have not shown a secret yet, oldest first."""
        self.connections: set[_Handover] = set()
        self.user = os.geteuid()
        self.is_closed = False
        self._name = secrets.token_bytes(16)
        self._server: asyncio.Server | None = None

    async def listen(self) -> None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            listener.bind(b"\0" + self._name)
            self._server = await asyncio.get_running_loop().create_unix_server(
                lambda: _Handover(self), sock=listener, backlog=BACKLOG
            )
        except BaseException:
            listener.close()
            raise

    def offer(self, peer: int) -> bytes:
        secret = self.secrets.setdefault(peer, secrets.token_bytes(SECRET_NBYTES))
        return msgspec.msgpack.encode(_Offer(self._name, secret, self.arena.nbytes))

    def forget(self, peer: int) -> None:
        self.secrets.pop(peer, None)
        for connection in list(self.connections):
            if connection.peer == peer:
                connection.abort()

    async def aclose(self) -> None:
        self.is_closed = True
        self.secrets.clear()
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections):
            connection.abort()
        if self.connections:
            await asyncio.wait([connection.lost for connection in self.connections])
        if self._server is not None:
            await self._server.wait_closed()


class _Handover(asyncio.Protocol):
    """One sender's connection: shows a secret, is handed the arena, stays until its end."""

    def __init__(self, export: _ShmExport) -> None:
        self._export = export
        self._received = b""
        self.peer: int | None = None
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._deadline = asyncio.get_running_loop().call_later(HANDSHAKE_SECONDS, self.abort)
        export = self._export
        export.connections.add(self)
        export.strangers[self] = None
        if len(export.strangers) > MAX_STRANGERS:
            next(iter(export.strangers)).abort()
        try:
            with self._socket() as connection:
                user = _user_of_peer(connection)
        except OSError as exc:  # out of descriptors: whoever it is stays outside
            self._refuse(f"somebody unknown ({exc})")
            return
        if user != export.user:
            self._refuse(f"user {user}")
        elif export.is_closed:
            self.abort()

    def data_received(self, data: bytes) -> None:
        if self.peer is not None:
            self._refuse("a sender that goes on talking")
            return
        self._received += data
        if len(self._received) < SECRET_NBYTES:
            return
        self.peer = self._owner(self._received)
        if self.peer is None:
            self._refuse("a stranger without a secret")
            return
        self._leave_strangers()
        try:
            with self._socket() as connection:
                socket.send_fds(connection, [ACCEPTED], [self._export.arena.fd])
        except OSError as exc:
            self._refuse(f"a sender that cannot be handed the arena ({exc})")

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave_strangers()
        self._export.connections.discard(self)
        if not self.lost.done():
            self.lost.set_result(None)

    def abort(self) -> None:
        self._leave_strangers()
        self._transport.abort()

    def _owner(self, shown: bytes) -> int | None:
        found = None
        for peer, secret in self._export.secrets.items():
            if hmac.compare_digest(secret, shown):
                found = peer
        return found

    def _leave_strangers(self) -> None:
        self._deadline.cancel()
        self._export.strangers.pop(self, None)

    def _refuse(self, whom: str) -> None:
        logger.warning("shm: refused %s", whom)
        self.abort()

    def _socket(self) -> socket.socket:
        descriptor = self._transport.get_extra_info("socket").fileno()
        return socket.fromfd(descriptor, socket.AF_UNIX, socket.SOCK_STREAM)


class _ShmArena(RemoteArena):
    def __init__(self, memory: memoryview, connection: socket.socket, copies: Copies) -> None:
        self._memory = memory
        self._connection = connection
        self._copies = copies
        self.ended = asyncio.Event()
        """Set when nothing can be written any more."""
        self._why = ""
        asyncio.get_running_loop().add_reader(connection.fileno(), self._hear)

    async def write(self, grant: GrantKey, runs: Sequence[Run]) -> None:
        if self.ended.is_set():
            raise PlaneUnavailable(f"shm: {self._why}")
        is_short = check_runs(runs, len(self._memory)) <= INLINE_NBYTES
        if is_short and all(run.rows.device == "cpu" for run in runs):
            self._copy(runs)
        else:
            await self._copies.run(partial(self._copy, runs))

    async def quiesce(self) -> None:
        await self._copies.drain()

    async def aclose(self) -> None:
        self._leave("detached")
        await self._copies.drain()
        # Unmapping takes 0.1 ms per MiB: on the thread, where it holds nobody up.
        if self._memory:
            mapping = [self._memory]
            self._memory = memoryview(b"")
            await self._copies.run(mapping.clear)
        await self._copies.aclose()

    def _copy(self, runs: Sequence[Run]) -> None:
        for run in runs:
            target = self._memory[run.offset : run.offset + run.nbytes]
            run.rows.copy_into(target, run.first, run.count)

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


async def _redeem(offer: _Offer) -> tuple[socket.socket, int]:
    """Show the offer's secret; return the connection and a descriptor of the arena."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(HANDSHAKE_SECONDS):
            await loop.sock_connect(connection, b"\0" + offer.name)
            if _user_of_peer(connection) != os.geteuid():
                raise PlaneUnavailable("shm: the receiver runs as another user")
            await loop.sock_sendall(connection, offer.secret)
            await _readable(connection)
        return connection, _take_descriptor(connection)
    except OSError as exc:
        connection.close()
        raise PlaneUnavailable(f"shm: {_explain(exc)}") from exc
    except BaseException:
        connection.close()
        raise


def _explain(exc: OSError) -> str:
    match exc:
        case ConnectionRefusedError():
            return "no such receiver; it is gone, or in another network namespace or host"
        case ConnectionError():
            return REFUSED
        case TimeoutError():
            return f"the receiver has not answered for {HANDSHAKE_SECONDS} s"
        case _:
            return f"the receiver cannot be reached: {exc}"


def _map(descriptor: int, nbytes: int) -> memoryview:
    """Map the arena, which takes 0.1 ms per MiB, and close the descriptor."""
    try:
        return map_peer(descriptor, nbytes)
    finally:
        os.close(descriptor)


def _take_descriptor(connection: socket.socket) -> int:
    message, descriptors, _, _ = socket.recv_fds(
        connection, len(ACCEPTED), 1, socket.MSG_CMSG_CLOEXEC
    )
    if message != ACCEPTED or len(descriptors) != 1:
        for descriptor in descriptors:
            os.close(descriptor)
        raise PlaneUnavailable(f"shm: {REFUSED}")
    return descriptors[0]


async def _readable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(connection.fileno(), _wake, ready)
    try:
        await ready
    finally:
        loop.remove_reader(connection.fileno())


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


def _user_of_peer(connection: socket.socket) -> int:
    credentials = struct.Struct("3i")
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size)
    _, user, _ = credentials.unpack(packed)
    return int(user)
