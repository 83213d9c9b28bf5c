"""A write over TCP outlives its connection: it goes on where it was, and sends nothing twice."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress

import msgspec
import pytest
import torch

from aiomm.buffers.arena import HostArena
from aiomm.buffers.layout import ByteRange
from aiomm.buffers.tensors import TokenRows
from aiomm.errors import PlaneUnavailable
from aiomm.planes.base import Run
from aiomm.planes.tcp import TcpPlane, connecting, progress, receiving, sending, wire

from .contract import (
    BACKGROUND,
    GRANT,
    LINK,
    Link,
    bytes_of,
    random_rows,
    rows_of,
    strided_rows,
    whole,
)

PREAMBLE = wire.PREAMBLE.size
HEADER = wire.HEADER.size + wire.PIECE.size
"""Of a write of one run."""
NBYTES = 1 << 20
SECOND = GRANT._replace(sequence=2)

pytestmark = [pytest.mark.both_loops, pytest.mark.usefixtures("no_leaks")]


class Cable:
    """Between sender and receiver: counts the bytes, and breaks at those that it is told.

    It breaks by RST, and not before the receiver has taken everything that was let through.
    """

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self.num_up = 0
        """Bytes from the sender that have come through."""
        self.num_down = 0
        self.num_taken = 0
        """Bytes that the receiver has taken from its sockets."""
        self.num_connections = 0
        self.breaks: list[int] = []
        """At so many bytes upwards, ascending."""
        self.answer_breaks: list[int] = []
        """At so many bytes downwards."""
        self.is_up = asyncio.Event()
        """Cleared, and those who connect hear nothing."""
        self.is_up.set()
        self.is_resetting = False
        """Whether everybody who connects is cut off at once."""
        self.changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Connect one more sender with the receiver."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.num_connections += 1
        self.notice()
        ends = [writer]
        try:
            await self.is_up.wait()
            if self.is_resetting:
                return
            far_reader, far_writer = await asyncio.open_connection(self.host, self.port)
            ends.append(far_writer)
            pumps = [
                asyncio.create_task(self._up(reader, far_writer)),
                asyncio.create_task(self._down(far_reader, writer)),
            ]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            for pump in pumps:
                pump.cancel()
            await asyncio.wait(pumps)
        finally:
            for end in ends:
                reset(end)
            self._tasks.discard(task)

    async def _up(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while received := await reader.read(1 << 16):
                is_broken = bool(self.breaks) and self.num_up + len(received) >= self.breaks[0]
                if is_broken:
                    received = received[: self.breaks.pop(0) - self.num_up]
                writer.write(received)
                self.num_up += len(received)
                await self.until(lambda: self.num_taken >= self.num_up)
                if is_broken:
                    return

    async def _down(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while received := await reader.read(1 << 16):
                breaks = self.answer_breaks
                is_broken = bool(breaks) and self.num_down + len(received) >= breaks[0]
                if is_broken:
                    received = received[: breaks.pop(0) - self.num_down]
                writer.write(received)
                self.num_down += len(received)
                if is_broken:
                    return

    def notice(self) -> None:
        """Wake whoever waits for something to change."""
        self.changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Return once `condition` holds."""
        while not condition():
            self.changed.clear()
            await self.changed.wait()

    async def aclose(self) -> None:
        """Let nobody wait any more."""
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)


def reset(end: asyncio.StreamWriter) -> None:
    """Close by RST, unless the other end was faster."""
    if end.transport.is_closing():
        return
    with suppress(OSError):
        end.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
    end.transport.abort()


@asynccontextmanager
async def cabled(
    monkeypatch: pytest.MonkeyPatch, nbytes: int = NBYTES
) -> AsyncIterator[tuple[Link, Cable, asyncio.Server]]:
    """Yield a link that goes through a cable, the cable, and its near end."""
    plane = TcpPlane()
    arena = HostArena(nbytes)
    arena.view(0, nbytes)[:] = bytes([BACKGROUND]) * nbytes
    export = await plane.export(arena)
    offer = wire.decode_offer(export.offer(LINK))
    cable = Cable(offer.host, offer.port)
    take = receiving.Connection.buffer_updated

    def counted(connection: receiving.Connection, taken: int) -> None:
        take(connection, taken)
        cable.num_taken += taken
        cable.notice()

    monkeypatch.setattr(receiving.Connection, "buffer_updated", counted)
    server = await asyncio.start_server(cable.accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    remote = await plane.attach(
        msgspec.msgpack.encode(wire.TcpOffer(offer.host, port, LINK, offer.key))
    )
    link = Link(plane, arena, export, remote)
    try:
        yield link, cable, server
    finally:
        await remote.aclose()
        server.close()
        await cable.aclose()
        await server.wait_closed()
        await link.aclose()


def of_parts(nbytes: int) -> list[Run]:
    """Return runs of `nbytes` bytes together: dense ones, strided ones, and single bytes."""
    third = nbytes // 3000
    dense, strided = random_rows(third, 1000, 1), strided_rows(third, 1000, 2)
    last = random_rows(1, nbytes - 2 * third * 1000, 3)
    return [
        whole(dense, 0),
        Run(rows_of(strided), 0, third // 2, third * 1000),
        Run(rows_of(strided), third // 2, third - third // 2, third * 1000 + third // 2 * 1000),
        whole(last, 2 * third * 1000),
    ]


def content_of(runs: Sequence[Run]) -> bytes:
    """Return the bytes of runs that follow each other."""
    content = bytearray(sum(run.nbytes for run in runs))
    for run in runs:
        target = memoryview(content)[run.offset : run.offset + run.nbytes]
        run.rows.copy_into(target, run.first, run.count)
    return bytes(content)


SOURCES: dict[str, Callable[[int], list[Run]]] = {
    "dense": lambda nbytes: [whole(random_rows(nbytes // 1024, 1024), 0)],
    "strided": lambda nbytes: [whole(strided_rows(nbytes // 1024, 1024), 0)],
    "one row": lambda nbytes: [whole(strided_rows(1, nbytes), 0)],
    "parts": of_parts,
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("landed", [0, 1, 1023, 1024, 345_678, 2 * NBYTES - 1, 2 * NBYTES])
async def test_nothing_that_has_landed_is_sent_again(
    monkeypatch: pytest.MonkeyPatch, source: str, landed: int
) -> None:
    runs = SOURCES[source](2 * NBYTES)
    header = wire.HEADER.size + len(runs) * wire.PIECE.size
    async with cabled(monkeypatch, 2 * NBYTES) as (link, cable, _):
        cable.breaks = [PREAMBLE + header + landed]
        if landed == 2 * NBYTES:  # the write is done, and the sender does not hear of it
            cable.breaks, cable.answer_breaks = [], [wire.GREETING.size + 5]
        await link.write(runs)
        assert link.content() == content_of(runs)
        assert cable.num_connections == 2
        headers = 1 if landed == 2 * NBYTES else 2
        assert cable.num_up == cable.num_taken == 2 * PREAMBLE + headers * header + 2 * NBYTES
        # The connection is in step.
        await link.write([whole(random_rows(4, 16, 9), 0)], SECOND)
        assert link.content()[:64] == bytes_of(random_rows(4, 16, 9))


@pytest.mark.parametrize("at", [1, HEADER - 1])
async def test_a_break_inside_the_header(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    tensor = random_rows(1024, 1024)
    async with cabled(monkeypatch) as (link, cable, _):
        cable.breaks = [PREAMBLE + at]
        await link.write([whole(tensor, 0)])
        assert link.content() == bytes_of(tensor)
        assert cable.num_up == 2 * PREAMBLE + at + HEADER + NBYTES


async def test_a_break_inside_the_preamble_or_the_greeting(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = random_rows(1024, 1024)
    async with cabled(monkeypatch) as (link, cable, _):
        first = PREAMBLE + HEADER + 1000
        cable.breaks = [first, first + 7]
        cable.answer_breaks = [wire.GREETING.size + 3]
        await link.write([whole(tensor, 0)])
        assert link.content() == bytes_of(tensor)
        assert cable.num_connections == 4
        assert cable.num_up == 3 * PREAMBLE + 7 + 2 * HEADER + NBYTES


async def test_many_breaks_in_one_write(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = of_parts(NBYTES)
    async with cabled(monkeypatch) as (link, cable, _):
        cable.breaks = [100_000 * index + 777 for index in range(1, 11)]
        await link.write(runs)
        assert link.content() == content_of(runs)
        header = wire.HEADER.size + len(runs) * wire.PIECE.size
        assert cable.num_up == 11 * (PREAMBLE + header) + NBYTES


async def test_a_break_between_headers_of_one_write(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = random_rows(3000, 16)
    runs = [Run(rows_of(tensor), index, 1, 16 * index) for index in range(3000)]
    async with cabled(monkeypatch) as (link, cable, _):
        cable.breaks = [PREAMBLE + wire.MAX_HEADER_NBYTES + 1024 * 16 + 500, 60_000]
        await link.write(runs)
        assert link.content()[: 3000 * 16] == bytes_of(tensor)
        assert cable.num_connections == 3


@pytest.mark.parametrize("at", [50_000, NBYTES // 2 - 10, NBYTES // 2 + HEADER + 50_000])
async def test_writes_that_share_the_connection(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    half = NBYTES // 2
    first, second = random_rows(512, 1024, 1), strided_rows(512, 1024, 2)
    async with cabled(monkeypatch) as (link, cable, _):
        cable.breaks = [PREAMBLE + HEADER + at, PREAMBLE + HEADER + at + 150_000]
        await asyncio.gather(
            link.write([whole(first, 0)]), link.write([whole(second, half)], SECOND)
        )
        assert link.content() == bytes_of(first) + bytes_of(second)
        assert cable.num_up <= 3 * PREAMBLE + 4 * HEADER + NBYTES
        assert cable.num_connections == 3


async def test_many_small_writes_when_it_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte arrives, and every note once."""
    tensors = [random_rows(4, 256, index) for index in range(500)]
    notes: list[bytes] = []
    async with cabled(monkeypatch) as (link, cable, _):
        link.export.noted = lambda _, together: notes.extend(together)
        cable.breaks = [5_000 + 61_234 * index for index in range(6)]
        cable.answer_breaks = [1_000, 3_001]
        writes = []
        for index, tensor in enumerate(tensors):
            runs, grant = [whole(tensor, 1024 * index)], GRANT._replace(sequence=index)
            link.permit(runs, grant)
            writes.append(link.remote.write_and_note(grant, runs, f"{index}".encode))
        await asyncio.gather(*writes)
        assert link.content()[: 500 * 1024] == b"".join(map(bytes_of, tensors))
        assert sorted(map(int, notes)) == list(range(500))


async def test_no_more_are_on_their_way_than_the_receiver_keeps_the_end_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their answers are lost, and none is written again: its note would come again, too."""
    run, notes = whole(random_rows(1, 8), 0), list[bytes]()
    async with cabled(monkeypatch) as (link, cable, _):
        link.export.noted = lambda _, together: notes.extend(together)
        link.permit([run])
        cable.answer_breaks = [wire.GREETING.size]
        count = 3 * progress.MAX_ENDED
        writes = [
            link.remote.write_and_note(GRANT, [run], f"{index}".encode) for index in range(count)
        ]
        await asyncio.gather(*writes)
        assert cable.num_connections == 2
        assert sorted(map(int, notes)) == list(range(count))


async def test_a_grant_revoked_while_the_connection_is_broken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with cabled(monkeypatch) as (link, cable, _):
        cable.breaks = [PREAMBLE + HEADER + 100_000]
        write = asyncio.create_task(link.write([whole(random_rows(1024, 1024), 0)]))
        await cable.until(lambda: not cable.breaks)
        cable.is_up.clear()
        await cable.until(lambda: cable.num_connections == 2)
        before = link.content()
        link.export.revoke(GRANT)
        cable.is_up.set()
        with pytest.raises(PlaneUnavailable, match="withdrawn"):
            await write
        assert link.content() == before
        assert cable.num_up == 2 * PREAMBLE + HEADER + 100_000
        await link.write([whole(random_rows(4, 16), 0)], SECOND)


async def test_a_grant_told_anew_does_not_revive_a_broken_write(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with cabled(monkeypatch) as (link, cable, _):
        cable.breaks = [PREAMBLE + HEADER + 100_000]
        write = asyncio.create_task(link.write([whole(random_rows(1024, 1024), 0)]))
        await cable.until(lambda: not cable.breaks)
        cable.is_up.clear()
        await cable.until(lambda: cable.num_connections == 2)
        link.export.revoke(GRANT)
        link.export.permit(GRANT, [ByteRange(0, NBYTES)])
        cable.is_up.set()
        with pytest.raises(PlaneUnavailable, match="withdrawn"):
            await write


@pytest.mark.parametrize("way", ["gone", "closed", "forgotten"])
async def test_a_receiver_that_lets_nobody_in_any_more_ends_the_write_at_once(
    monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    async with cabled(monkeypatch) as (link, cable, server):
        cable.breaks = [PREAMBLE + HEADER + 100_000]
        writes = [
            asyncio.create_task(link.write([whole(random_rows(512, 1024), 0)])),
            asyncio.create_task(link.write([whole(random_rows(512, 1024), NBYTES // 2)], SECOND)),
        ]
        await cable.until(lambda: cable.num_taken >= 50_000)
        if way == "gone":
            server.close()
        elif way == "closed":
            await link.export.aclose()
            server.close()
        else:
            link.export.forget(LINK)
        async with asyncio.timeout(10):
            results = await asyncio.gather(*writes, return_exceptions=True)
        for error in results:
            assert isinstance(error, PlaneUnavailable)
            assert "refuses" in str(error) if way == "forgotten" else "nobody listens" in str(error)
        await link.remote.quiesce()


async def test_a_silent_network_is_tried_until_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connecting, "CONNECT_SECONDS", 0.05)
    tensor = random_rows(1024, 1024)
    async with cabled(monkeypatch) as (link, cable, _):
        cable.breaks = [PREAMBLE + HEADER + 100_000]
        write = asyncio.create_task(link.write([whole(tensor, 0)]))
        await cable.until(lambda: not cable.breaks)
        cable.is_up.clear()
        await cable.until(lambda: cable.num_connections >= 4)
        cable.is_up.set()
        await write
        assert link.content() == bytes_of(tensor)


@pytest.mark.parametrize("network", ["silent", "resetting"])
async def test_attempts_in_vain_come_to_an_end(
    monkeypatch: pytest.MonkeyPatch, network: str
) -> None:
    monkeypatch.setattr(connecting, "CONNECT_SECONDS", 0.05)
    monkeypatch.setattr(sending, "LOST_SECONDS", 0.2)
    async with cabled(monkeypatch) as (link, cable, _):
        cable.breaks = [PREAMBLE + HEADER + 100_000]
        run = whole(random_rows(1024, 1024), 0)
        writes = [asyncio.create_task(link.write([run], grant)) for grant in (GRANT, SECOND)]
        await cable.until(lambda: not cable.breaks)
        cable.is_resetting = True
        if network == "silent":
            cable.is_up.clear()
        results = await asyncio.gather(*writes, return_exceptions=True)
        assert all("nothing has landed for 0.2 s" in str(error) for error in results)
        # Nothing of it is held against later writes.
        cable.is_resetting = False
        cable.is_up.set()
        await link.write([run])
        assert link.content() == bytes_of(run.rows.tensor)  # type: ignore[arg-type]


async def test_detaching_ends_a_write_that_waits_for_a_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with cabled(monkeypatch) as (link, cable, _):
        cable.breaks = [PREAMBLE + HEADER + 100_000]
        write = asyncio.create_task(link.write([whole(random_rows(1024, 1024), 0)]))
        await cable.until(lambda: not cable.breaks)
        cable.is_up.clear()
        await cable.until(lambda: cable.num_connections == 2)
        await link.remote.aclose()
        with pytest.raises(PlaneUnavailable, match="detached"):
            await write


async def test_a_cancelled_write_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    half = NBYTES // 2
    tensor = random_rows(512, 1024, 2)
    async with cabled(monkeypatch) as (link, cable, _):
        cable.breaks = [PREAMBLE + HEADER + 100_000]
        doomed = asyncio.create_task(link.write([whole(random_rows(512, 1024), 0)]))
        other = asyncio.create_task(link.write([whole(tensor, half)], SECOND))
        await cable.until(lambda: not cable.breaks)
        doomed.cancel()
        await other
        assert doomed.cancelled()
        assert link.content()[half:] == bytes_of(tensor)
        await link.write([whole(tensor, 0)])
        assert link.content() == bytes_of(tensor) * 2


async def test_rows_that_fail_break_off_their_own_write_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(target: memoryview, first: int, count: int) -> None:
        raise RuntimeError("on demand")

    half = NBYTES // 2
    good, tensor = random_rows(512, 1024, 2), strided_rows(4, 16)
    run = whole(tensor, 0)
    failing = TokenRows("rows", run.rows.field, tensor, run.rows._source._replace(copy=fail))
    async with cabled(monkeypatch) as (link, cable, _):
        writes = [
            link.write([whole(good, 0)]),
            link.write([Run(failing, 0, 4, half)], SECOND),
            link.write([whole(good, half)], SECOND._replace(sequence=3)),
        ]
        results = await asyncio.gather(*writes, return_exceptions=True)
        assert [str(result) for result in results] == ["None", "on demand", "None"]
        assert link.content() == bytes_of(good) * 2
        assert cable.num_connections == 2


async def test_another_receiver_at_the_same_place_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    async with cabled(monkeypatch) as (link, cable, _):
        cable.breaks = [PREAMBLE + HEADER + 100_000]
        write = asyncio.create_task(link.write([whole(random_rows(1024, 1024), 0)]))
        await cable.until(lambda: not cable.breaks)
        other = receiving.TcpExport(HostArena(4096), "127.0.0.1")
        await other.listen("127.0.0.1", 0)
        offer = wire.decode_offer(link.export.offer(LINK))
        other.door._secrets[LINK] = offer.key
        cable.port = wire.decode_offer(other.offer(LINK)).port
        with pytest.raises(PlaneUnavailable, match="another receiver"):
            await write
        await other.aclose()
        other.arena.close()


async def test_an_idle_link_whose_connection_has_gone() -> None:
    plane, tensor = TcpPlane(), torch.arange(100)
    arena = HostArena(NBYTES)
    export = await plane.export(arena)
    link = Link(plane, arena, export, await plane.attach(export.offer(LINK)))
    assert isinstance(export, receiving.TcpExport)
    for connection in export.door.callers:
        connection.abort()
    await link.write([whole(tensor, 0)])
    assert link.content()[:800] == bytes_of(tensor)
    await link.aclose()
