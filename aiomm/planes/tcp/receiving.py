"""The receiver's end of data connections: bytes go from the socket straight into the arena."""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
from collections.abc import Sequence
from typing import cast

import msgspec

from ...buffers.arena import Arena
from ...buffers.layout import ByteRange
from ...errors import PlaneUnavailable, ProtocolError
from ..base import Export, GrantKey
from ..permits import Permit, Permits
from .wire import (
    GREETING,
    KEY_NBYTES,
    MAGIC,
    MAX_HEADER_NBYTES,
    PREAMBLE,
    STATUS,
    Header,
    Offer,
    Status,
    parse_header,
    parse_preamble,
)

__all__ = ["TcpExport"]

logger = logging.getLogger(__name__)

HANDSHAKE_SECONDS = 5.0
MAX_STRANGERS = 64
"""Connections without a key; one more, and the oldest of them is closed."""
MAX_RECEIVE_NBYTES = 1 << 21
"""At most so many bytes are taken from a socket at once; about 0.5 ms on the loop thread."""
HEAD_NBYTES = 1 << 16
"""Bytes read in search of a header. A small write arrives whole, for one copy of it; of a
long one only what lies behind its header is copied."""


class TcpExport(Export):
    """One arena, open to senders that show their key."""

    def __init__(self, arena: Arena, advertise: str) -> None:
        self.arena = arena
        self.connections: set[Connection] = set()
        self.strangers: dict[Connection, None] = {}
        """Connections that have not shown a key yet, oldest first."""
        self.permits = Permits()
        self.is_closed = False
        self._advertise = advertise
        self._keys: dict[int, bytes] = {}
        self._scratch: memoryview | None = None
        self._has_warned = False

    async def listen(self, host: str, port: int) -> None:
        """Start to listen.

        Raises:
            PlaneUnavailable: the address cannot be bound.
        """
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(lambda: Connection(self), host, port)
        except OSError as exc:
            raise PlaneUnavailable(f"tcp: cannot listen on {host} port {port}: {exc}") from exc
        self._port: int = self._server.sockets[0].getsockname()[1]

    def offer(self, peer: int) -> bytes:
        """Return address and key for the sender with epoch `peer`; the same each time."""
        key = self._keys.setdefault(peer, secrets.token_bytes(KEY_NBYTES))
        return msgspec.msgpack.encode(Offer(self._advertise, self._port, peer, key))

    def permit(self, grant: GrantKey, ranges: Sequence[ByteRange]) -> None:
        """Let writes under `grant` touch `ranges`, and nothing else."""
        self.permits.add(grant, ranges)

    def revoke(self, grant: GrantKey) -> bool:
        """Withdraw `grant`: what still arrives of it is thrown away, also half way."""
        self.permits.withdraw(grant)
        return True

    def forget(self, peer: int) -> None:
        """Void the key and grants of `peer` and close its connections."""
        self._keys.pop(peer, None)
        self.permits.withdraw_all(peer)
        for connection in list(self.connections):
            if connection.peer == peer:
                connection.abort()

    async def aclose(self) -> None:
        """Stop listening and close every connection. Idempotent."""
        self.is_closed = True
        self._keys.clear()
        self.permits.withdraw_all()
        self._server.close()
        for connection in list(self.connections):
            connection.abort()
        if self.connections:
            await asyncio.wait([connection.lost for connection in self.connections])
        await self._server.wait_closed()

    def knows(self, peer: int, key: bytes) -> bool:
        """Whether `key` is the key of `peer`; takes the same time for every wrong key."""
        return hmac.compare_digest(self._keys.get(peer, bytes(KEY_NBYTES + 1)), key)

    def scratch(self) -> memoryview:
        """Return memory whose content nobody reads, made when it is first needed."""
        if self._scratch is None:
            self._scratch = memoryview(bytearray(1 << 18))
        return self._scratch

    def complain(self, address: object, about: str) -> None:
        """Log a misbehaving peer: the first one as a warning, the rest for debugging."""
        level = logging.DEBUG if self._has_warned else logging.WARNING
        self._has_warned = True
        logger.log(level, "tcp: closed the connection from %s: %s", address, about)


class Incoming:
    """One announced write: where its next bytes belong, and how it ends."""

    def __init__(self, header: Header, permit: Permit | None) -> None:
        self._pieces = header.pieces
        self._index = 0
        self._done = 0
        self._permit = permit
        if permit is not None and not all(permit.covers(*piece) for piece in header.pieces):
            self._permit = None
        self._skip_finished()

    @property
    def is_complete(self) -> bool:
        """Whether every announced byte has been taken from the socket."""
        return self._index == len(self._pieces)

    @property
    def status(self) -> Status:
        """What to tell the sender, once the write is complete."""
        if self._permit is None:
            return Status.NOT_PERMITTED
        return Status.REVOKED if self._permit.is_withdrawn else Status.LANDED

    def target(self, export: TcpExport) -> memoryview:
        """Return memory for the next bytes. It asks the permit anew every time."""
        piece = self._pieces[self._index]
        nbytes = min(piece.nbytes - self._done, MAX_RECEIVE_NBYTES)
        if self.status is Status.LANDED:
            return export.arena.view(piece.offset + self._done, nbytes)
        return export.scratch()[:nbytes]

    def advance(self, nbytes: int) -> None:
        """Count bytes that are in place."""
        self._done += nbytes
        self._skip_finished()

    def _skip_finished(self) -> None:
        while not self.is_complete and self._done == self._pieces[self._index].nbytes:
            self._index += 1
            self._done = 0


class Connection(asyncio.BufferedProtocol):
    """One data connection. The event loop reads into whatever `get_buffer` returns."""

    def __init__(self, export: TcpExport) -> None:
        self.peer: int | None = None
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._export = export
        self._head = memoryview(bytearray(max(HEAD_NBYTES, MAX_HEADER_NBYTES)))
        self._filled = 0
        self._incoming: Incoming | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the deadline of the key."""
        self._transport = cast("asyncio.Transport", transport)
        self._deadline = asyncio.get_running_loop().call_later(HANDSHAKE_SECONDS, self.abort)
        strangers = self._export.strangers
        strangers[self] = None
        self._export.connections.add(self)
        if len(strangers) > MAX_STRANGERS:
            next(iter(strangers)).abort()
        if self._export.is_closed:
            self.abort()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return the arena's bytes that come next, or room for a header."""
        if self._incoming is not None:
            return self._incoming.target(self._export)
        return self._head[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """Go on after `nbytes` bytes were put where :meth:`get_buffer` said."""
        if self._incoming is not None:
            self._incoming.advance(nbytes)
            self._end_if_complete()
            return
        self._filled += nbytes
        try:
            self._consume()
        except ProtocolError as exc:
            self._export.complain(self._transport.get_extra_info("peername"), exc.message)
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Leave the export; a write that was half way stays half way."""
        self._leave_strangers()
        self._export.connections.discard(self)
        if not self.lost.done():
            self.lost.set_result(None)

    def pause_writing(self) -> None:
        """Read nothing from a sender that does not read its statuses."""
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        """Go on reading."""
        self._transport.resume_reading()

    def abort(self) -> None:
        """Close at once."""
        self._leave_strangers()
        self._transport.abort()

    def _consume(self) -> None:
        """Take apart what was read in search of a header."""
        start = 0
        while (used := self._take(self._head[start : self._filled])) > 0:
            start += used
        left = self._filled - start
        if start and left:
            self._head[:left] = self._head[start : self._filled].tobytes()
        self._filled = left

    def _take(self, received: memoryview) -> int:
        """Use the first bytes of `received` and return how many; 0 when more are needed."""
        if self._incoming is not None:
            return self._land(received)
        if self.peer is None:
            return self._admit(received)
        header = parse_header(received, self._export.arena.nbytes)
        if header is None:
            return 0
        grant = GrantKey(self.peer, header.generation, header.sequence)
        self._incoming = Incoming(header, self._export.permits.get(grant))
        self._end_if_complete()
        return header.nbytes

    def _admit(self, received: memoryview) -> int:
        preamble = parse_preamble(received)
        if preamble is None:
            return 0
        peer, key = preamble
        if not self._export.knows(peer, key):
            raise ProtocolError("wrong key")
        self.peer = peer
        self._leave_strangers()
        self._transport.write(GREETING.pack(MAGIC, self._export.arena.nbytes))
        return PREAMBLE.size

    def _land(self, received: memoryview) -> int:
        assert self._incoming is not None
        if not received:
            return 0
        target = self._incoming.target(self._export)
        nbytes = min(len(received), len(target))
        target[:nbytes] = received[:nbytes]
        self._incoming.advance(nbytes)
        self._end_if_complete()
        return nbytes

    def _end_if_complete(self) -> None:
        if self._incoming is not None and self._incoming.is_complete:
            self._transport.write(STATUS.pack(self._incoming.status))
            self._incoming = None

    def _leave_strangers(self) -> None:
        self._deadline.cancel()
        self._export.strangers.pop(self, None)
