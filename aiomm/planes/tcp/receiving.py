"""The receiver's end of data connections: bytes go from the socket straight into the arena."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

import msgspec

from ...buffers.arena import HostArena
from ...buffers.layout import ByteRange
from ...errors import PlaneUnavailable, ProtocolError
from ..base import Export, GrantKey
from ..door import Caller, Door
from ..permits import Permits
from .progress import Attachment, Attachments, Incoming
from .sockets import listeners
from .wire import (
    MAX_HEADER_NBYTES,
    NOTE,
    PREAMBLE,
    REFUSAL,
    Status,
    TcpOffer,
    encode_answer,
    encode_greeting,
    parse_header,
    parse_note,
    parse_preamble,
)

__all__ = ["TcpExport"]

MAX_RECEIVE_NBYTES = 1 << 18
"""At most so many bytes are taken from a socket at once. uvloop reads up to 32 times in one turn
while the sender keeps up: that is 4 ms of the loop's time with this, and was 6 ms and more with
2 MiB. How fast bytes arrive does not depend on it, from 128 KiB to 2 MiB."""
MAX_TOLD = 64
"""Writes whose end is told in one turn: what a receiver does about one takes 20 us."""
HEAD_NBYTES = (1 << 16) + 4096
"""Bytes read in search of a header. A write of up to 64 KiB arrives whole, for one copy of it;
of a longer one only what lies behind its header is copied."""


class TcpExport(Export):
    """One arena, open to senders that show their key."""

    def __init__(self, arena: HostArena, advertise: str) -> None:
        self.arena = arena
        self.door: Door[Connection] = Door("tcp")
        self.permits = Permits()
        self.attachments = Attachments()
        self._advertise = advertise
        self._servers: list[asyncio.Server] = []
        self._scratch: memoryview | None = None

    async def listen(self, host: str, port: int) -> None:
        """Start to listen.

        Raises:
            PlaneUnavailable: the address cannot be bound.
        """
        loop = asyncio.get_running_loop()
        try:
            for listening in await listeners(host, port):
                self._port: int = listening.getsockname()[1]
                server = await loop.create_server(lambda: Connection(self), sock=listening)
                self._servers.append(server)
        except OSError as exc:
            raise PlaneUnavailable(f"tcp: cannot listen on {host} port {port}: {exc}") from exc

    def offer(self, link: int) -> bytes:
        """Return address and key for the sender on `link`; the same each time."""
        offer = TcpOffer(self._advertise, self._port, link, self.door.secret_of(link))
        return msgspec.msgpack.encode(offer)

    def permit(self, grant: GrantKey, ranges: Sequence[ByteRange]) -> None:
        """Let writes under `grant` touch `ranges`, and nothing else."""
        self.permits.add(grant, ranges)

    def revoke(self, grant: GrantKey) -> bool:
        """Withdraw `grant`: what still arrives of it is thrown away, also half way."""
        self.permits.withdraw(grant)
        return True

    def forget(self, link: int) -> None:
        """Void the key and grants of `link` and close its connections."""
        self.permits.withdraw_all(link)
        self.attachments.forget(link)
        self.door.forget(link)

    async def aclose(self) -> None:
        """Stop listening and close every connection. Idempotent."""
        self.permits.withdraw_all()
        self.attachments.clear()
        for server in self._servers:
            server.close()
        await self.door.aclose()
        for server in self._servers:
            await server.wait_closed()

    def supersede(self, newer: Connection) -> None:
        """Cut off whatever else writes for the attachment of `newer`: memory has one owner."""
        for connection in list(self.door.callers):
            if connection is not newer and connection.attached == newer.attached:
                connection.abort()

    def scratch(self) -> memoryview:
        """Return memory whose content nobody reads, made when it is first needed."""
        if self._scratch is None:
            self._scratch = memoryview(bytearray(1 << 18))
        return self._scratch


class Connection(Caller, asyncio.BufferedProtocol):
    """One data connection. The event loop reads into whatever `get_buffer` returns."""

    def __init__(self, export: TcpExport) -> None:
        super().__init__(export.door)
        self.attached: tuple[int, int] | None = None
        """The link and the sender's attachment, once the key was shown."""
        self._export = export
        self._head = memoryview(bytearray(max(HEAD_NBYTES, MAX_HEADER_NBYTES)))
        self._filled = 0
        self._attachment = Attachment()
        self._incoming: Incoming | None = None
        self._ended: deque[Incoming] = deque()
        """Those that are whole, and that nobody was told of."""
        self._is_choked = False

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return the arena's bytes that come next, or room for a header."""
        if self._incoming is not None and not self._incoming.is_complete:
            return self._target(self._incoming)
        return self._head[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """Go on after `nbytes` bytes were put where :meth:`get_buffer` said."""
        if self._transport.is_closing():
            return
        incoming = self._incoming
        if incoming is not None and not incoming.is_complete:
            incoming.advance(nbytes)
            self._end_without_note()
            self._tell()
            return
        self._filled += nbytes
        try:
            self._consume()
        except ProtocolError as exc:
            self.complain(exc.message)
            self.abort()
        self._tell()

    def pause_writing(self) -> None:
        """Read nothing from a sender that does not read its statuses."""
        self._is_choked = True
        self._hold_back()

    def resume_writing(self) -> None:
        """Go on reading."""
        self._is_choked = False
        self._hold_back()

    def abort(self) -> None:
        """Close at once: nothing more lands. A write may go on over another connection."""
        self._incoming = None
        super().abort()

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
            take = self._take_note if self._incoming.is_complete else self._land
            return take(self._incoming, received)
        if self.link is None:
            return self._admit(received)
        header = parse_header(received, self._export.arena.nbytes)
        if header is None:
            return 0
        grant = GrantKey(self.link, header.generation, header.sequence)
        self._incoming = self._attachment.begin(header, self._export.permits.get(grant))
        self._end_without_note()
        return header.nbytes

    def _admit(self, received: memoryview) -> int:
        preamble = parse_preamble(received)
        if preamble is None:
            return 0
        if not self._door.knows(preamble.link, preamble.key):
            self._refuse()
            return PREAMBLE.size
        self.let_in(preamble.link)
        self.attached = (preamble.link, preamble.attachment)
        self._export.supersede(self)
        self._attachment = self._export.attachments.get(*self.attached)
        answers = self._attachment.resume(preamble.oldest)
        self._transport.write(encode_greeting(self._export.arena.nbytes, answers))
        return PREAMBLE.size

    def _refuse(self) -> None:
        self.complain("wrong key")
        self._transport.write(REFUSAL)
        self._transport.close()

    def _land(self, incoming: Incoming, received: memoryview) -> int:
        if not received:
            return 0
        target = self._target(incoming)
        nbytes = min(len(received), len(target))
        target[:nbytes] = received[:nbytes]
        incoming.advance(nbytes)
        self._end_without_note()
        return nbytes

    def _take_note(self, incoming: Incoming, received: memoryview) -> int:
        note = parse_note(received)
        if note is None:
            return 0
        incoming.note = note
        self._end(incoming)
        return NOTE.size + len(note)

    def _target(self, incoming: Incoming) -> memoryview:
        """Return the arena's memory for the next bytes, or other if they may not land."""
        place = incoming.place(MAX_RECEIVE_NBYTES)
        if incoming.status is Status.LANDED:
            return self._export.arena.view(*place)
        return self._export.scratch()[: place.nbytes]

    def _end_without_note(self) -> None:
        incoming = self._incoming
        if incoming is not None and incoming.is_complete and not incoming.has_note:
            self._end(incoming)

    def _end(self, incoming: Incoming) -> None:
        self._incoming = None
        self._ended.append(incoming)

    def _tell(self) -> None:
        """Tell the receiver of writes that have ended, and then the sender: so many in a turn."""
        if self._transport.is_closing():
            return  # whoever is connected next hears of them as unfinished
        answers: list[bytes] = []
        notes: list[bytes] = []
        while self._ended and len(answers) < MAX_TOLD:
            incoming = self._ended.popleft()
            answer = self._attachment.end(incoming)
            answers.append(encode_answer(answer))
            if incoming.note and answer.status is Status.LANDED:
                notes.append(incoming.note)
        if self._ended:
            asyncio.get_running_loop().call_soon(self._tell)
        self._hold_back()
        if notes:
            assert self.link is not None
            self._export.noted(self.link, notes)
        if answers:
            self._transport.write(b"".join(answers))

    def _hold_back(self) -> None:
        """Read nothing while the sender does not, or while more has ended than a turn can tell."""
        self.hold_back(self._is_choked or bool(self._ended))
