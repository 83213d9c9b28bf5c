"""The receiver's end: it reads what senders have ready for it, as far as it has granted that.

That the receiver reads, rather than the sender writes, is what makes withdrawn grants safe: the
receiver itself knows when nothing can land any more, whatever becomes of the sender.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection, Sequence
from functools import partial
from typing import TypeAlias

import msgspec

from ...buffers.arena import HostArena
from ...buffers.cuda import CudaArena
from ...buffers.layout import ByteRange
from ...errors import PlaneUnavailable, ProtocolError
from ..base import Export, GrantKey
from ..copying import Copies
from ..door import Caller, Door
from ..permits import Permit, Permits
from .engine import SharedEngine
from .reads import Target, target_in
from .wire import (
    ANSWER,
    GREETING,
    MAGIC,
    MooncakeOffer,
    Parcel,
    Preamble,
    Status,
    keep_watch,
    parse_parcel,
    parse_preamble,
)

__all__ = ["MooncakeExport"]

CLOSING_SECONDS = 5.0
"""How long closing waits for reads. The engine ends them after 2 s without progress."""
MAX_READS = 4
"""Reads of one connection at once, as many as the engine has lanes to a peer. More would wait
there, where nothing ends them while a cut off peer is connected to anew."""
MAX_PARCELS = 64
"""With so many parcels waiting, a connection is not read from until there are fewer."""


Reading: TypeAlias = "asyncio.Future[bool]"


class MooncakeExport(Export):
    """One arena, into which this process reads for senders that show their key.

    `revoke` returns False while a read of the grant runs, which is one of :meth:`landing`.

    Args:
        engine: held for this export already.
        memory: the registered address and bytes of the arena, if it is registered.
    """

    def __init__(
        self,
        arena: HostArena | CudaArena,
        engine: SharedEngine,
        copies: Copies,
        memory: tuple[int, int] | None,
        advertise: str,
    ) -> None:
        self.arena = arena
        self.engine = engine
        self.door: Door[Connection] = Door("mooncake")
        self.permits = Permits()
        self._copies = copies
        self._memory = memory
        self._advertise = advertise
        self._reads: dict[GrantKey, set[Reading]] = {}

    async def listen(self, host: str) -> None:
        """Start to listen.

        Raises:
            PlaneUnavailable: the address cannot be bound.
        """
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(lambda: Connection(self), host, 0)
        except OSError as exc:
            raise PlaneUnavailable(f"mooncake: cannot listen on {host}: {exc}") from exc
        self._port: int = self._server.sockets[0].getsockname()[1]

    def offer(self, link: int) -> bytes:
        """Return address and key for the sender on `link`; the same each time."""
        offer = MooncakeOffer(self._advertise, self._port, link, self.door.secret_of(link))
        return msgspec.msgpack.encode(offer)

    def permit(self, grant: GrantKey, ranges: Sequence[ByteRange]) -> None:
        """Read for `grant` into `ranges`, and nowhere else."""
        self.permits.add(grant, ranges)

    def revoke(self, grant: GrantKey) -> bool:
        """Begin no more reads for `grant`; True if none runs."""
        self.permits.withdraw(grant)
        return grant not in self._reads

    def landing(self, grant: GrantKey) -> Collection[Reading]:
        """Return the reads that run for `grant`."""
        return tuple(self._reads.get(grant, ()))

    def forget(self, link: int) -> None:
        """Void the key and grants of `link` and close its connections."""
        self.permits.withdraw_all(link)
        self.door.forget(link)

    async def aclose(self) -> None:
        """Stop listening, close every connection, and wait for the reads. Idempotent."""
        is_first = not self.door.is_shut
        self.permits.withdraw_all()
        self._server.close()
        await self.door.aclose()
        await self._server.wait_closed()
        if not is_first:
            return
        if running := [read for reads in self._reads.values() for read in reads]:
            # One that never ends keeps the arena's memory mapped, and does no other harm.
            await asyncio.wait(running, timeout=CLOSING_SECONDS)
        if self._memory is not None:
            await self._copies.run(partial(self.engine.unregister, *self._memory))
        self.engine.reads.let_go()
        await self._copies.aclose()

    def read(self, grant: GrantKey, session: str, source: int, target: Target) -> Reading:
        """Begin a read for `grant`."""
        read = self.engine.reads.start(session, source, target)
        self._reads.setdefault(grant, set()).add(read)
        read.add_done_callback(partial(self._ended, grant))
        return read

    def _ended(self, grant: GrantKey, read: Reading) -> None:
        reads = self._reads[grant]
        reads.discard(read)
        if not reads:
            del self._reads[grant]


class Incoming:
    """One parcel: which of its pieces come next, and how it ends."""

    def __init__(self, parcel: Parcel, grant: GrantKey, permit: Permit | None) -> None:
        self.number = parcel.number
        self.note = parcel.note
        self.grant = grant
        self.num_reads = 0
        self._pieces = deque(parcel.pieces)
        self._permit = permit
        self._has_failed = False
        if permit is not None and not all(permit.covers(*piece[1:]) for piece in parcel.pieces):
            self._permit = None

    @property
    def status(self) -> Status:
        """What to tell the sender, once the parcel is over."""
        if self._permit is None:
            return Status.NOT_PERMITTED
        if self._permit.is_withdrawn:
            return Status.REVOKED
        return Status.FAILED if self._has_failed else Status.LANDED

    @property
    def has_more(self) -> bool:
        """Whether another piece is to be read."""
        return bool(self._pieces) and self.status is Status.LANDED

    @property
    def is_over(self) -> bool:
        """Whether nothing of it runs, or will."""
        return not self.num_reads and not self.has_more

    def begin(self, export: MooncakeExport, session: str) -> Reading:
        """Begin to read the next piece."""
        piece = self._pieces.popleft()
        self.num_reads += 1
        target = target_in(export.arena, piece.offset, piece.nbytes)
        return export.read(self.grant, session, piece.source, target)

    def ended(self, read: Reading) -> None:
        """Count a read that has ended."""
        self.num_reads -= 1
        if not read.result():
            self.fail()

    def fail(self) -> None:
        """Read no more of it."""
        self._has_failed = True


class Connection(Caller, asyncio.Protocol):
    """One sender's connection: parcels come in, answers go out."""

    def __init__(self, export: MooncakeExport) -> None:
        super().__init__(export.door)
        self._export = export
        self._received = bytearray()
        self._session = ""
        self._contact: asyncio.Task[None] | None = None
        self._is_greeted = False
        self._parcels: deque[Incoming] = deque()
        self._num_reads = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin as a stranger, and notice when the other host is cut off."""
        keep_watch(transport)
        super().connection_made(transport)

    def data_received(self, received: bytes) -> None:
        """Take apart what has come."""
        self._received += received
        try:
            while used := self._take(memoryview(self._received)):
                del self._received[:used]
        except ProtocolError as exc:
            self.complain(exc.message)
            self.abort()
            return
        self._read_on()

    def connection_lost(self, exc: Exception | None) -> None:
        """Leave the export; reads that run end by themselves, and tell nobody."""
        self._parcels.clear()
        if self._contact is not None:
            self._contact.cancel()
        super().connection_lost(exc)

    def _take(self, received: memoryview) -> int:
        """Use the first bytes of `received` and return how many; 0 when more are needed."""
        with received:
            if not received:
                return 0
            if self.link is None:
                preamble = parse_preamble(received)
                if preamble is not None:
                    self._admit(preamble)
                return 0 if preamble is None else preamble.nbytes
            if not self._is_greeted:
                raise ProtocolError("a parcel before the greeting")
            parcel = parse_parcel(received, self._export.arena.nbytes)
            if parcel is None:
                return 0
            grant = GrantKey(self.link, parcel.generation, parcel.sequence)
            self._parcels.append(Incoming(parcel, grant, self._export.permits.get(grant)))
            return parcel.nbytes

    def _admit(self, preamble: Preamble) -> None:
        if not self._door.knows(preamble.link, preamble.key):
            raise ProtocolError("wrong key")
        self.let_in(preamble.link)
        self._session = preamble.session
        self._contact = asyncio.get_running_loop().create_task(self._greet())

    async def _greet(self) -> None:
        """Try whether the sender's engine is reached from here, and tell."""
        is_reached = await self._export.engine.contact(self._session)
        nbytes = self._export.arena.nbytes
        self._transport.write(GREETING.pack(MAGIC, is_reached, nbytes))
        self._is_greeted = is_reached
        if not is_reached:
            self._transport.close()

    def _read_on(self) -> None:
        """Begin as many reads as may run, and tell of the parcels that are over."""
        answers, notes = [], []
        for incoming in list(self._parcels):
            while incoming.has_more and self._num_reads < MAX_READS:
                self._num_reads += 1
                read = incoming.begin(self._export, self._session)
                read.add_done_callback(partial(self._ended, incoming))
            if incoming.is_over:
                self._parcels.remove(incoming)
                answers.append(ANSWER.pack(incoming.number, incoming.status))
                if incoming.note and incoming.status is Status.LANDED:
                    notes.append(incoming.note)
            if self._num_reads == MAX_READS:
                break
        if notes:
            assert self.link is not None
            self._export.noted(self.link, notes)
        if answers:
            self._transport.write(b"".join(answers))
        self.hold_back(len(self._parcels) >= MAX_PARCELS)

    def _ended(self, incoming: Incoming, read: Reading) -> None:
        self._num_reads -= 1
        incoming.ended(read)
        if incoming.status is Status.FAILED:
            # What else this sender has ready would fail in the same way, after seconds each.
            for other in self._parcels:
                other.fail()
        if not self._transport.is_closing():
            self._read_on()
