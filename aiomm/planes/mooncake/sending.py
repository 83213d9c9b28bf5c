"""The sender's end: it makes tensors ready in registered memory and says where they are.

Rows that lie in registered memory are read from where they are. All others are copied, piece by
piece, into the slots of :mod:`.staging`, while the pieces before them are being read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple, cast

from ...buffers.memcpy import copy_bytes
from ...errors import PlaneUnavailable, ProtocolError
from ...gpu.lanes import finished
from ...gpu.runtime import GpuError, explained
from ..base import GrantKey, RemoteArena, Run
from ..copying import STRIDED_NBYTES, check_runs
from .outlet import Outlet
from .staging import SLOT_NBYTES, Slot
from .wire import (
    ANSWER,
    MAX_PIECES,
    Greeting,
    MooncakeOffer,
    Piece,
    Status,
    encode_parcel,
    encode_preamble,
    keep_watch,
    parse_greeting,
)

__all__ = ["MooncakeArena", "OrderConnection", "connect", "greeted"]

CONNECT_SECONDS = 5.0
DIRECT_NBYTES = 16 << 20
"""Registered memory is read in pieces of at most so many bytes."""
INLINE_NBYTES, INLINE_COPIES = 1 << 20, 64
"""Up to here a slot is filled on the loop thread."""

STATUS_TEXTS = {
    Status.NOT_PERMITTED: "the receiver has not granted these bytes",
    Status.REVOKED: "the receiver has withdrawn the grant",
    Status.FAILED: "the receiver could not read from this process; its engine does not say why",
}


class SlotFill(NamedTuple):
    """Bytes that go into a slot and from there to the arena's bytes from `offset` on."""

    copy_into: Callable[[memoryview], None]
    nbytes: int
    offset: int
    is_dense: bool


class MooncakeArena(RemoteArena):
    """A receiver's arena behind one connection, which is made anew after it was lost."""

    carries_notes: ClassVar[bool] = True

    def __init__(
        self,
        offer: MooncakeOffer,
        connection: OrderConnection,
        outlet: Outlet,
        let_go: Callable[[], Awaitable[None]],
    ) -> None:
        self._offer = offer
        self._connection = connection
        self._outlet = outlet
        self._let_go = let_go
        self._connecting = asyncio.Lock()
        self._writes: set[asyncio.Task[None]] = set()
        self._is_closed = False

    async def write(self, grant: GrantKey, runs: Sequence[Run]) -> None:
        """Have the receiver read `runs`; return once it says that every byte has landed.

        Raises:
            PlaneUnavailable: the receiver refuses the write, cannot read, or is gone.
        """
        await self.write_and_note(grant, runs, _no_note)

    async def write_and_note(
        self, grant: GrantKey, runs: Sequence[Run], note: Callable[[], bytes]
    ) -> None:
        """Have the receiver read `runs`, and take a note; return once it says that it has.

        Raises:
            PlaneUnavailable: the receiver refuses the write, cannot read, or is gone.
        """
        check_runs(runs, self._connection.arena_nbytes)
        full = [run for run in runs if run.nbytes]
        write = asyncio.get_running_loop().create_task(self._write(grant, full, note))
        self._writes.add(write)
        write.add_done_callback(self._ended)
        await asyncio.shield(write)

    async def quiesce(self) -> None:
        """Wait until the receiver has answered for every write, cancelled ones too.

        Of a connection that was lost it knows by itself what is still being read.
        """
        while self._writes:
            await asyncio.wait(self._writes)

    async def aclose(self) -> None:
        """Close the connection; running writes fail."""
        is_first, self._is_closed = not self._is_closed, True
        self._connection.lose("detached")
        async with self._connecting:
            # Perhaps it was being made anew.
            self._connection.lose("detached")
        await self.quiesce()
        if is_first:
            await self._let_go()

    def _ended(self, write: asyncio.Task[None]) -> None:
        self._writes.discard(write)
        if not write.cancelled():
            write.exception()  # a write that was cancelled by its caller is asked by nobody

    async def _connected(self) -> OrderConnection:
        async with self._connecting:
            if self._connection.has_ended and not self._is_closed:
                self._connection = await greeted(
                    await connect(self._offer), self._offer, self._outlet.session
                )
        return self._connection

    async def _write(self, grant: GrantKey, runs: Sequence[Run], note: Callable[[], bytes]) -> None:
        connection = await self._connected()
        is_registered = self._outlet.is_registered
        await _ready(run for run in runs if _direct(run, is_registered))
        direct = list(_grouped(_direct_pieces(runs, is_registered)))
        parcels = list(_parcels(_slot_fills(runs, is_registered)))
        if not direct and len(parcels) == 1:  # out of its slot no change of the rows is read
            await self._order(connection, grant, direct, parcels, note)
            return
        await self._order(connection, grant, direct, parcels, _no_note)
        if made := note():
            await _landed([connection.order(grant, (), made)])

    async def _order(
        self,
        connection: OrderConnection,
        grant: GrantKey,
        direct: Sequence[Sequence[Piece]],
        parcels: Sequence[Sequence[SlotFill]],
        note: Callable[[], bytes],
    ) -> None:
        """Have everything read, the parcels with the note; return once all of it has landed."""
        answers: list[asyncio.Future[Status]] = []
        try:
            answers += [connection.order(grant, pieces) for pieces in direct]
            for parcel in parcels:
                if any(answer.done() and _error(answer) is not None for answer in answers):
                    break
                answers.append(await self._stage(connection, grant, parcel, note))
        finally:
            # Also after an error: what is ordered may be read from.
            if answers:
                await asyncio.wait(answers)
        await _landed(answers)

    async def _stage(
        self,
        connection: OrderConnection,
        grant: GrantKey,
        parcel: Sequence[SlotFill],
        note: Callable[[], bytes],
    ) -> asyncio.Future[Status]:
        """Copy one parcel into a slot, which is free again when the receiver has answered."""
        staging = self._outlet.staging
        slot = await staging.take()
        try:
            fill = partial(_fill, slot, parcel)
            if _is_quick(parcel):
                fill()
            else:
                await self._outlet.copies.run(fill)
            answer = connection.order(grant, _pieces(slot, parcel), note())
        except BaseException:
            staging.give(slot)
            raise
        answer.add_done_callback(lambda _: staging.give(slot))
        return answer


class OrderConnection(asyncio.Protocol):
    """The connection to one receiver: parcels go out, answers come in."""

    def __init__(self) -> None:
        self.arena_nbytes = 0
        self._loop = asyncio.get_running_loop()
        self.greeting: asyncio.Future[Greeting] = self._loop.create_future()
        self.has_ended = False
        """Nothing can be ordered any more."""
        self._why = ""
        self._received = bytearray()
        self._number = 0
        self._unanswered: dict[int, asyncio.Future[Status]] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Note the way out."""
        self._transport = cast("asyncio.Transport", transport)
        keep_watch(transport)

    @property
    def own_host(self) -> str:
        """This end's address, as it leads to the receiver."""
        return str(self._transport.get_extra_info("sockname")[0]).partition("%")[0]

    def say(self, octets: bytes) -> None:
        """Send something that is short."""
        self._transport.write(octets)

    def order(
        self, grant: GrantKey, pieces: Sequence[Piece], note: bytes = b""
    ) -> asyncio.Future[Status]:
        """Have the receiver read `pieces`. Their memory must stay until the answer is there.

        Raises:
            PlaneUnavailable: the connection has ended.
        """
        if self.has_ended:
            raise PlaneUnavailable(f"mooncake: {self._why}")
        self._number = (self._number + 1) % 2**32
        answer: asyncio.Future[Status] = self._loop.create_future()
        self._unanswered[self._number] = answer
        self.say(encode_parcel(self._number, grant, pieces, note))
        return answer

    def data_received(self, received: bytes) -> None:
        """Take the greeting and answers apart."""
        self._received += received
        try:
            if not self.greeting.done():
                self._take_greeting()
            if self.greeting.done():
                self._take_answers()
        except (ProtocolError, ValueError, KeyError) as exc:
            self.lose(f"the receiver answers nonsense: {exc}")

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail what waits for an answer."""
        died = "the receiver has closed the connection or died"
        self.lose(died if exc is None else f"the connection to the receiver was lost: {exc}")

    def lose(self, why: str) -> None:
        """Close the connection and fail every write that waits on it. Idempotent."""
        if self.has_ended:
            return
        self.has_ended, self._why = True, why
        self._transport.abort()
        waiting: list[asyncio.Future[Any]] = [self.greeting, *self._unanswered.values()]
        self._unanswered.clear()
        for answer in waiting:
            if not answer.done():
                answer.set_exception(PlaneUnavailable(f"mooncake: {why}"))
                answer.exception()  # not every one of them is asked for

    def _take_greeting(self) -> None:
        with memoryview(self._received) as received:
            greeting = parse_greeting(received)
        if greeting is not None:
            self._received.clear()
            self.arena_nbytes = greeting.arena_nbytes
            self.greeting.set_result(greeting)

    def _take_answers(self) -> None:
        used = len(self._received) // ANSWER.size * ANSWER.size
        with memoryview(self._received)[:used] as received:
            answers = list(ANSWER.iter_unpack(received))
        del self._received[:used]
        for number, status in answers:
            self._unanswered.pop(number).set_result(Status(status))


async def connect(offer: MooncakeOffer) -> OrderConnection:
    """Connect to the receiver behind `offer`.

    Raises:
        PlaneUnavailable: nobody answers there.
    """
    where = f"{offer.host} port {offer.port}"
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            _, connection = await loop.create_connection(OrderConnection, offer.host, offer.port)
    except TimeoutError as exc:
        raise PlaneUnavailable(f"mooncake: {where} is silent for {CONNECT_SECONDS} s") from exc
    except OSError as exc:
        raise PlaneUnavailable(f"mooncake: {where} cannot be reached: {exc}") from exc
    return connection


async def greeted(
    connection: OrderConnection, offer: MooncakeOffer, session: str
) -> OrderConnection:
    """Show the offer's key, and return the connection once the receiver reaches our engine.

    Raises:
        PlaneUnavailable: it does not, or refuses the key.
    """
    connection.say(encode_preamble(offer, session))
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            greeting = await connection.greeting
    except TimeoutError as exc:
        connection.lose("no greeting")
        raise PlaneUnavailable(f"mooncake: no greeting within {CONNECT_SECONDS} s") from exc
    except PlaneUnavailable as exc:
        message = "mooncake: the receiver refuses this process's key, or has just ended"
        raise PlaneUnavailable(message) from exc
    except BaseException:
        connection.lose("given up")
        raise
    if not greeting.is_reached:
        connection.lose("not reached")
        raise PlaneUnavailable(f"mooncake: the receiver cannot reach this process at {session}")
    return connection


# What of the runs is read from where it is, and what has to be copied.


def _direct(run: Run, is_registered: Callable[[int, int], bool]) -> int | None:
    """Return where the rows lie, on the host or a GPU, if they can be read from there."""
    address, on_device = run.rows.address(run.first), run.rows.on_device
    if on_device is not None:
        address = on_device.address + run.first * on_device.row_nbytes
    return address if address is not None and is_registered(address, run.nbytes) else None


async def _ready(runs: Iterable[Run]) -> None:
    """Return when whoever makes the rows on a GPU has made them.

    Raises:
        PlaneUnavailable: CUDA has failed.
    """
    on_device = [run.rows.on_device for run in runs if run.rows.on_device is not None]
    for rows in dict.fromkeys(on_device):
        try:
            await finished(rows.ready)
        except GpuError as exc:
            raise explained(rows.device, exc) from exc


def _direct_pieces(
    runs: Sequence[Run], is_registered: Callable[[int, int], bool]
) -> Iterator[Piece]:
    for run in runs:
        if (address := _direct(run, is_registered)) is not None:
            for start in range(0, run.nbytes, DIRECT_NBYTES):
                nbytes = min(DIRECT_NBYTES, run.nbytes - start)
                yield Piece(address + start, run.offset + start, nbytes)


def _grouped(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    group: list[Piece] = []
    for piece in pieces:
        group.append(piece)
        if len(group) == MAX_PIECES:
            yield group
            group = []
    if group:
        yield group


def _slot_fills(
    runs: Sequence[Run], is_registered: Callable[[int, int], bool]
) -> Iterator[SlotFill]:
    """Cut what is not registered into pieces that fit into a slot each."""
    for run in runs:
        if _direct(run, is_registered) is not None:
            continue
        dense = run.rows.view(run.first, run.count)
        if dense is not None:
            yield from _dense_fills(dense, run.rows.address(run.first), run.offset)
        elif run.rows.row_nbytes <= SLOT_NBYTES:
            yield from _packed_fills(run)
        else:
            yield from _split_fills(run)


def _dense_fills(dense: memoryview, address: int | None, offset: int) -> Iterator[SlotFill]:
    for start in range(0, len(dense), SLOT_NBYTES):
        part = dense[start : start + SLOT_NBYTES]
        at = None if address is None else address + start
        yield SlotFill(partial(_copy_dense, part, at), len(part), offset + start, is_dense=True)


def _copy_dense(source: memoryview, address: int | None, target: memoryview) -> None:
    copy_bytes(target, source, address)


def _packed_fills(run: Run) -> Iterator[SlotFill]:
    row = run.rows.row_nbytes
    step = SLOT_NBYTES // row
    for done in range(0, run.count, step):
        count = min(step, run.count - done)
        pack = partial(_pack, run, run.first + done, count)
        yield SlotFill(pack, count * row, run.offset + done * row, is_dense=False)


def _pack(run: Run, first: int, count: int, target: memoryview) -> None:
    run.rows.copy_into(target, first, count)


def _split_fills(run: Run) -> Iterator[SlotFill]:
    """Rows longer than a slot that are not dense: each is packed once, when its turn comes."""
    row = run.rows.row_nbytes
    for index in range(run.count):
        packed: list[memoryview] = []
        for start in range(0, row, SLOT_NBYTES):
            nbytes = min(SLOT_NBYTES, row - start)
            split = partial(_split, run, run.first + index, packed, start)
            yield SlotFill(split, nbytes, run.offset + index * row + start, is_dense=False)


def _split(run: Run, index: int, packed: list[memoryview], start: int, target: memoryview) -> None:
    if not packed:
        packed.append(memoryview(bytearray(run.rows.row_nbytes)))
        run.rows.copy_into(packed[0], index, 1)
    copy_bytes(target, packed[0][start : start + len(target)])


def _parcels(fills: Iterator[SlotFill]) -> Iterator[list[SlotFill]]:
    """Put those together that share a slot."""
    parcel: list[SlotFill] = []
    nbytes = 0
    for fill in fills:
        if parcel and (nbytes + fill.nbytes > SLOT_NBYTES or len(parcel) == MAX_PIECES):
            yield parcel
            parcel, nbytes = [], 0
        parcel.append(fill)
        nbytes += fill.nbytes
    if parcel:
        yield parcel


def _is_quick(parcel: Sequence[SlotFill]) -> bool:
    """Whether to fill a slot so takes less than a hand-over to a thread."""
    nbytes = sum(fill.nbytes for fill in parcel)
    limit = INLINE_NBYTES if all(fill.is_dense for fill in parcel) else STRIDED_NBYTES
    return nbytes <= limit and len(parcel) <= INLINE_COPIES


def _fill(slot: Slot, parcel: Sequence[SlotFill]) -> None:
    start = 0
    for fill in parcel:
        fill.copy_into(slot.memory[start : start + fill.nbytes])
        start += fill.nbytes


def _pieces(slot: Slot, parcel: Sequence[SlotFill]) -> list[Piece]:
    """Say where each of them stands."""
    pieces = []
    address = slot.address
    for fill in parcel:
        pieces.append(Piece(address, fill.offset, fill.nbytes))
        address += fill.nbytes
    return pieces


def _no_note() -> bytes:
    return b""


async def _landed(answers: Sequence[asyncio.Future[Status]]) -> None:
    """Return once every parcel was answered and has landed."""
    if answers:
        await asyncio.wait(answers)
    for answer in answers:
        if error := _error(answer):
            raise error


def _error(answer: asyncio.Future[Status]) -> BaseException | None:
    """Return what is wrong with a parcel that was answered."""
    if (error := answer.exception()) is not None:
        return error
    status = answer.result()
    if status is Status.LANDED:
        return None
    return PlaneUnavailable(f"mooncake: {STATUS_TEXTS[status]}")
