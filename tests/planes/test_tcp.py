"""The TCP plane passes the contract, and lets nobody write what was not granted."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import msgspec
import pytest
import torch

from aiomm.buffers.arena import Arena, HostArena
from aiomm.buffers.layout import ByteRange
from aiomm.buffers.tensors import TokenRows
from aiomm.errors import PlaneUnavailable
from aiomm.planes import door
from aiomm.planes.base import MAX_NOTE_NBYTES, GrantKey, Place, Plane, Run
from aiomm.planes.copying import Copies, CopyThreads
from aiomm.planes.tcp import TcpPlane, connecting, progress, receiving, sending, sockets, wire
from aiomm.planes.tcp import connection as connection_module
from aiomm.planes.tcp.wire import Status

from .contract import (
    ARENA_NBYTES,
    BACKGROUND,
    GRANT,
    LINK,
    Link,
    NotesContract,
    bytes_of,
    expected_content,
    random_rows,
    strided_rows,
    whole,
)


class ByHand:
    """A sender made of a plain socket, which may stop at any byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.resumed: list[wire.Answer] = []
        """How the writes stand that an earlier connection has begun."""

    @classmethod
    async def connect(cls, link: Link) -> ByHand:
        """Connect without a word."""
        offer = wire.decode_offer(link.export.offer(LINK))
        return cls(*await asyncio.open_connection(offer.host, offer.port))

    @classmethod
    async def admitted(cls, link: Link, attachment: int = 0, oldest: int = 0) -> ByHand:
        """Connect and show the key."""
        by_hand = await cls.connect(link)
        offer = wire.decode_offer(link.export.offer(LINK))
        by_hand.writer.write(wire.encode_preamble(offer, attachment, oldest))
        greeting = wire.parse_greeting(await by_hand.reader.readexactly(wire.GREETING.size))
        assert greeting.arena_nbytes == link.arena.nbytes
        by_hand.resumed = [await by_hand.answer() for _ in range(greeting.num_answers)]
        return by_hand

    async def answer(self) -> wire.Answer:
        """Return the next answer."""
        (answer,) = wire.parse_answers(await self.reader.readexactly(wire.ANSWER.size))
        return answer

    async def status(self) -> Status:
        """Return the status in the next answer."""
        return (await self.answer()).status

    async def is_cut_off(self) -> bool:
        """Wait for the end of the connection."""
        try:
            return await self.reader.read() == b""
        except ConnectionResetError:
            return True

    async def aclose(self) -> None:
        """Hang up."""
        self.writer.close()
        try:
            await self.writer.wait_closed()
        except ConnectionError:
            return


def header(
    *pieces: tuple[int, int],
    grant: GrantKey = GRANT,
    number: int = 0,
    landed: int = 0,
    has_note: bool = False,
) -> bytes:
    """Return a header for `pieces` of offset and length, valid or not."""
    names = (number, landed, grant.generation, grant.sequence)
    packed = wire.HEADER.pack(wire.HEADER_MAGIC, len(pieces), has_note, *names)
    return packed + b"".join(wire.PIECE.pack(*piece) for piece in pieces)


class WatchedArena(HostArena):
    """An arena that tells when a plane was given a piece of it to write to."""

    def __init__(self, nbytes: int) -> None:
        super().__init__(nbytes)
        self.touched = asyncio.Event()

    def view(self, offset: int, nbytes: int) -> memoryview:
        # The bytes are in place when the callback that asks for memory has ended.
        asyncio.get_running_loop().call_soon(self.touched.set)
        return super().view(offset, nbytes)


async def until_received(link: Link, nbytes: int) -> None:
    """Wait until the first `nbytes` bytes of the arena have all changed."""
    assert isinstance(link.arena, WatchedArena)
    first_bytes = HostArena.view(link.arena, 0, nbytes)
    while BACKGROUND in bytes(first_bytes):
        link.arena.touched.clear()
        await link.arena.touched.wait()


@asynccontextmanager
async def impostor(greeting: bytes, answer: bytes = b"") -> AsyncIterator[bytes]:
    """Listen as something that is no receiver, and yield an offer that leads there."""

    has_spoken = asyncio.Event()

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(wire.PREAMBLE.size)
        writer.write(greeting)
        if answer:
            await reader.readexactly(wire.HEADER.size)
            writer.write(answer)
        with suppress(ConnectionError):
            await reader.read(1 << 16 if greeting else 0)
        writer.close()
        has_spoken.set()

    server = await asyncio.start_server(speak, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    yield msgspec.msgpack.encode(wire.TcpOffer("127.0.0.1", port, LINK, bytes(16)))
    await has_spoken.wait()
    server.close()
    await server.wait_closed()


class TestTcpPlane(NotesContract):
    def make_plane(self) -> Plane:
        return TcpPlane()

    def make_arena(self, nbytes: int) -> Arena:
        return WatchedArena(nbytes)

    # -- what is granted ----------------------------------------------------------------

    @pytest.mark.parametrize(
        "granted",
        [
            [],
            [ByteRange(0, 63)],
            [ByteRange(1, 64)],
            [ByteRange(0, 32), ByteRange(33, 64)],
            [ByteRange(64, 4096)],
        ],
    )
    async def test_refuses_what_is_not_granted(self, link: Link, granted: list[ByteRange]) -> None:
        link.export.permit(GRANT, granted)
        with pytest.raises(PlaneUnavailable, match="not granted"):
            await link.remote.write(GRANT, [whole(random_rows(4, 16), 0)])
        assert link.content() == expected_content(ARENA_NBYTES)

    async def test_one_bad_run_spoils_the_write(self, link: Link) -> None:
        tensor = random_rows(4, 16)
        link.export.permit(GRANT, [ByteRange(0, 64)])
        with pytest.raises(PlaneUnavailable, match="not granted"):
            await link.remote.write(GRANT, [whole(tensor, 0), whole(tensor, 64)])
        assert link.content() == expected_content(ARENA_NBYTES)

    async def test_adjacent_ranges_are_one(self, link: Link) -> None:
        tensor = random_rows(4, 16)
        link.export.permit(GRANT, [ByteRange(32, 64), ByteRange(0, 32)])
        await link.remote.write(GRANT, [whole(tensor, 0)])
        assert link.content() == expected_content(ARENA_NBYTES, (0, tensor))

    @pytest.mark.parametrize("field", ["link", "generation", "sequence"])
    async def test_a_grant_is_good_for_itself_only(self, link: Link, field: str) -> None:
        link.export.permit(GRANT._replace(**{field: 99}), [ByteRange(0, 64)])
        with pytest.raises(PlaneUnavailable, match="not granted"):
            await link.remote.write(GRANT, [whole(random_rows(4, 16), 0)])

    async def test_the_key_says_who_writes_not_the_sender(self, link: Link) -> None:
        other = GRANT._replace(link=LINK + 1)
        link.export.permit(other, [ByteRange(0, 64)])
        with pytest.raises(PlaneUnavailable, match="not granted"):
            await link.remote.write(other, [whole(random_rows(4, 16), 0)])

    async def test_a_revoked_grant_is_refused(self, link: Link) -> None:
        tensor = random_rows(4, 16)
        await link.write([whole(tensor, 0)])
        assert link.export.revoke(GRANT) is True
        with pytest.raises(PlaneUnavailable, match="not granted"):
            await link.remote.write(GRANT, [whole(tensor, 64)])
        assert link.content() == expected_content(ARENA_NBYTES, (0, tensor))

    async def test_a_grant_told_again_disturbs_no_write(self, link: Link) -> None:
        by_hand = await ByHand.admitted(link)
        link.export.permit(GRANT, [ByteRange(0, 64)])
        by_hand.writer.write(header((0, 64)) + bytes(32))
        await until_received(link, 32)
        link.export.permit(GRANT, [ByteRange(0, 64)])
        by_hand.writer.write(bytes(32))
        assert await by_hand.status() is Status.LANDED
        await by_hand.aclose()

    @pytest.mark.parametrize("nbytes", [200, 1 << 19])
    async def test_a_grant_revoked_half_way_lets_nothing_more_in(
        self, link: Link, nbytes: int
    ) -> None:
        by_hand = await ByHand.admitted(link)
        link.export.permit(GRANT, [ByteRange(0, nbytes)])
        half = nbytes // 2
        by_hand.writer.write(header((0, nbytes)) + bytes(half))
        await until_received(link, half)
        assert link.export.revoke(GRANT) is True
        before = link.content()
        by_hand.writer.write(bytes(half))
        assert await by_hand.status() is Status.REVOKED
        assert link.content() == before
        # The connection is still in step.
        link.export.permit(GRANT, [ByteRange(half, nbytes)])
        by_hand.writer.write(header((half, half)) + b"\x01" * half)
        assert await by_hand.status() is Status.LANDED
        assert link.content()[half:nbytes] == b"\x01" * half
        await by_hand.aclose()

    async def test_a_sender_is_told_that_its_grant_was_withdrawn(self) -> None:
        link = await self.open_link(32 << 20)
        write = asyncio.create_task(link.write([whole(torch.zeros(8192, 1024), 0)]))
        await until_received(link, 1024)
        link.export.revoke(GRANT)
        with pytest.raises(PlaneUnavailable, match="withdrawn"):
            await write
        await link.remote.quiesce()
        tensor = random_rows(4, 16)
        await link.write([whole(tensor, 0)], GRANT._replace(sequence=2))
        assert link.content()[:64] == bytes_of(tensor)
        await link.aclose()

    # -- one byte at a time -------------------------------------------------------------

    async def test_every_cut_of_the_stream_is_understood(self, link: Link) -> None:
        by_hand = await ByHand.connect(link)
        offer = wire.decode_offer(link.export.offer(LINK))
        link.export.permit(GRANT, [ByteRange(0, 64)])
        heard, spoken = self.listen(link), header((0, 5), (32, 0), (10, 3), has_note=True)
        spoken += b"12345abc" + wire.encode_note(b"note")
        for byte in wire.encode_preamble(offer) + spoken:
            by_hand.writer.write(bytes([byte]))
            await asyncio.sleep(0)
        await by_hand.reader.readexactly(wire.GREETING.size)
        assert await by_hand.status() is Status.LANDED
        assert link.content()[:13] == b"12345" + bytes([BACKGROUND]) * 5 + b"abc"
        assert heard == [(b"note", link.content())]
        await by_hand.aclose()

    async def test_many_small_writes_in_one_packet(self, link: Link) -> None:
        by_hand = await ByHand.admitted(link)
        link.export.permit(GRANT, [ByteRange(0, 5000)])
        notes: list[bytes] = []
        batches: list[int] = []

        def noted(_: int, together: Sequence[bytes]) -> None:
            notes.extend(together)
            batches.append(len(together))

        link.export.noted = noted
        names = [f"{index}".encode() for index in range(5000)]
        stream = b"".join(
            header((index, 1), has_note=True)
            + bytes([index % 251])
            + wire.encode_note(names[index])
            for index in range(5000)
        )
        by_hand.writer.write(stream)
        for _ in range(5000):
            assert await by_hand.status() is Status.LANDED
        assert notes == names
        assert max(batches) == receiving.MAX_TOLD
        assert link.content()[:5000] == bytes(index % 251 for index in range(5000))
        await by_hand.aclose()

    # -- strangers and broken peers -----------------------------------------------------

    @pytest.mark.parametrize(
        "spoken",
        [
            b"GET / HTTP/1.1\r\n\r\n",
            b"\x16\x03\x01",
            b"x",
            b"\0" * 200_000,
            b"aiommT01" + bytes(24),
        ],
    )
    async def test_foreign_traffic_is_cut_off(
        self, link: Link, spoken: bytes, caplog: pytest.LogCaptureFixture
    ) -> None:
        stranger = await ByHand.connect(link)
        stranger.writer.write(spoken)
        assert await stranger.is_cut_off()
        assert "foreign traffic" in caplog.text
        await stranger.aclose()
        await link.write([whole(random_rows(4, 16), 0)])

    async def test_misbehaviour_is_warned_of_once(
        self, link: Link, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.WARNING)
        for _ in range(3):
            stranger = await ByHand.connect(link)
            stranger.writer.write(b"hello")
            assert await stranger.is_cut_off()
            await stranger.aclose()
        assert caplog.text.count("foreign traffic") == 1

    async def test_a_wrong_key_is_refused(self, link: Link) -> None:
        offer = wire.decode_offer(link.export.offer(LINK))
        for number, key in ((LINK, bytes(16)), (LINK + 1, offer.key), (LINK + 1, bytes(16))):
            wrong = msgspec.msgpack.encode(wire.TcpOffer(offer.host, offer.port, number, key))
            with pytest.raises(PlaneUnavailable, match="refuses"):
                await link.plane.attach(wrong)

    async def test_a_silent_stranger_is_cut_off_in_time(
        self, link: Link, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(door, "HANDSHAKE_SECONDS", 0.02)
        stranger = await ByHand.connect(link)
        assert await stranger.is_cut_off()
        await stranger.aclose()

    async def test_silent_strangers_are_bounded(self, link: Link) -> None:
        strangers = [await ByHand.connect(link) for _ in range(door.MAX_STRANGERS + 4)]
        for stranger in strangers[:4]:
            assert await stranger.is_cut_off()
        second = await link.plane.attach(link.export.offer(LINK))
        await second.aclose()
        for stranger in strangers:
            await stranger.aclose()

    @pytest.mark.parametrize(
        "spoken",
        [
            bytes(wire.HEADER.size),
            b"\xff" * 100,
            header(),
            wire.HEADER.pack(wire.HEADER_MAGIC, wire.MAX_RUNS + 1, False, 0, 0, 1, 1),
            header((0, 0), has_note=True) + wire.NOTE.pack(MAX_NOTE_NBYTES + 1),
            header((0, ARENA_NBYTES + 1)),
            header((0, 2**64 - 1)),
            header((0, ARENA_NBYTES), (0, 1)),
        ],
    )
    async def test_a_malformed_header_costs_only_its_connection(
        self, link: Link, spoken: bytes
    ) -> None:
        link.export.permit(GRANT, [ByteRange(0, ARENA_NBYTES)])
        by_hand = await ByHand.admitted(link)
        by_hand.writer.write(spoken)
        assert await by_hand.is_cut_off()
        await by_hand.aclose()
        assert link.content() == expected_content(ARENA_NBYTES)
        await link.write([whole(random_rows(4, 16), 0)])

    @pytest.mark.parametrize("offset", [ARENA_NBYTES, ARENA_NBYTES - 1, 2**64 - 1])
    async def test_a_header_beyond_the_arena_is_refused(self, link: Link, offset: int) -> None:
        link.export.permit(GRANT, [ByteRange(0, ARENA_NBYTES)])
        by_hand = await ByHand.admitted(link)
        by_hand.writer.write(header((offset, 2)) + b"ab")
        assert await by_hand.status() is Status.NOT_PERMITTED
        await by_hand.aclose()
        assert link.content() == expected_content(ARENA_NBYTES)

    async def test_a_sender_that_reads_no_status_is_read_no_more(self, link: Link) -> None:
        assert isinstance(link.export, receiving.TcpExport)
        connection, transport = receiving.Connection(link.export), RecordingTransport()
        connection.connection_made(transport)
        connection.pause_writing()
        assert transport.calls == ["pause_reading"]
        connection.resume_writing()
        assert transport.calls == ["pause_reading", "resume_reading"]
        connection.connection_lost(None)

    # -- notes --------------------------------------------------------------------------

    async def test_nothing_is_read_while_a_turn_cannot_tell_all_that_has_ended(
        self, link: Link, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(receiving, "MAX_TOLD", 2)
        heard = self.listen(link)
        assert isinstance(link.export, receiving.TcpExport)
        link.export.permit(GRANT, [ByteRange(0, 64)])
        connection, transport = receiving.Connection(link.export), RecordingTransport()
        connection.connection_made(transport)
        offer = wire.decode_offer(link.export.offer(LINK))
        spoken = wire.encode_preamble(offer) + b"".join(
            header((index, 1), number=index, has_note=True) + b"x" + wire.encode_note(b"note")
            for index in range(5)
        )
        connection.get_buffer(-1)[: len(spoken)] = spoken
        connection.buffer_updated(len(spoken))
        assert len(heard) == 2
        assert transport.calls == ["pause_reading"]
        connection.pause_writing()
        connection.resume_writing()
        assert transport.calls == ["pause_reading"]
        await asyncio.sleep(0)
        assert len(heard) == 4
        assert transport.calls == ["pause_reading"]
        await asyncio.sleep(0)
        assert len(heard) == 5
        assert transport.calls == ["pause_reading", "resume_reading"]
        answers = transport.written[1:]
        assert [len(each) // wire.ANSWER.size for each in answers] == [2, 2, 1]
        connection.connection_lost(None)

    async def test_a_connection_that_was_cut_off_tells_no_more(
        self, link: Link, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whoever is connected next hears of those writes as unfinished, and ends them."""
        monkeypatch.setattr(receiving, "MAX_TOLD", 1)
        assert isinstance(link.export, receiving.TcpExport)
        export, notes = link.export, list[bytes]()
        cut = asyncio.Event()

        def noted(_: int, together: Sequence[bytes]) -> None:
            notes.extend(together)
            if not cut.is_set():
                cut.set()
                next(each for each in export.door.callers if each.attached == (LINK, 0)).abort()

        export.noted = noted
        export.permit(GRANT, [ByteRange(0, 64)])
        names = [b"0", b"1", b"2"]
        headers = [partial(header, (n, 1), number=n, has_note=True) for n in range(3)]
        behind = [wire.encode_note(name) for name in names]
        older = await ByHand.admitted(link)
        older.writer.write(b"".join(headers[n]() + b"x" + behind[n] for n in range(3)))
        await cut.wait()
        assert await older.is_cut_off()
        await older.aclose()
        assert notes == [b"0"]
        newer = await ByHand.admitted(link)
        assert newer.resumed == [
            (0, Status.LANDED, 1),
            (1, Status.UNFINISHED, 1),
            (2, Status.UNFINISHED, 1),
        ]
        newer.writer.write(headers[1](landed=1) + behind[1] + headers[2](landed=1) + behind[2])
        assert [await newer.status() for _ in range(2)] == [Status.LANDED] * 2
        assert notes == names
        await newer.aclose()

    async def test_a_note_is_made_anew_if_the_kernel_has_left_some_bytes(self) -> None:
        """And not any more once it has taken all of them, and only a part of the note."""
        near, far = socket.socketpair()
        near.setblocking(False)
        connection, row = connection_module.DataConnection(near), random_rows(1, 100)
        head, made = wire.HEADER.size + wire.PIECE.size, list[int]()
        limits = [head, 99, 0, 1 + wire.NOTE.size, 2, 100]

        class Narrow:
            """A socket that takes so many bytes and no more."""

            def sendmsg(self, buffers: Sequence[memoryview]) -> int:
                return near.send(b"".join(buffers)[: limits.pop(0)])

            def __getattr__(self, name: str) -> Any:
                return getattr(near, name)

        connection._socket = Narrow()  # type: ignore[assignment]
        write = connection_module.Write(0, GRANT, [whole(row, 0)], lambda: note())

        def note() -> bytes:
            made.append(len(limits))
            return f"note {len(made)}".encode()

        carried = asyncio.ensure_future(connection.carry(write, Copies(CopyThreads("test"))))
        expected = wire.encode_note(b"note 4")
        received = b""
        while len(received) < head + 100 + len(expected):
            received += await asyncio.to_thread(far.recv, 1000)
        assert received[head:] == bytes_of(row) + expected
        assert made == [6, 5, 4, 3]
        far.sendall(wire.encode_answer(wire.Answer(0, Status.LANDED, 100)))
        await carried
        connection.lose(PlaneUnavailable("the end"))
        far.close()

    # -- progress, by hand --------------------------------------------------------------

    async def test_memory_has_one_owner(self, link: Link) -> None:
        """An older connection may still be open here, after its host was cut off."""
        link.export.permit(GRANT, [ByteRange(0, 64)])
        older = await ByHand.admitted(link, attachment=5)
        older.writer.write(header((0, 64), number=3) + b"\x01" * 32)
        await until_received(link, 32)
        stranger = await ByHand.admitted(link, attachment=6)
        newer = await ByHand.admitted(link, attachment=5, oldest=3)
        assert newer.resumed == [wire.Answer(3, Status.UNFINISHED, 32)]
        older.writer.write(b"\x02" * 32)
        assert await older.is_cut_off()
        assert link.content()[:64] == b"\x01" * 32 + bytes([BACKGROUND]) * 32
        newer.writer.write(header((0, 64), number=3, landed=32) + b"\x03" * 32)
        assert await newer.answer() == (3, Status.LANDED, 64)
        assert link.content()[:64] == b"\x01" * 32 + b"\x03" * 32
        stranger.writer.write(header((0, 1)) + b"\x04")
        assert await stranger.status() is Status.LANDED
        for each in (older, newer, stranger):
            await each.aclose()

    @pytest.mark.parametrize(
        "spoken",
        [
            header((0, 64), number=3, landed=31),
            header((0, 64), number=3, landed=33),
            header((0, 63), number=3, landed=32),
            header((64, 64), number=3, landed=32),
            header((0, 64), number=4, landed=32),
            header((0, 64), number=4, landed=2**64 - 1),
        ],
    )
    async def test_a_write_goes_on_nowhere_else(self, link: Link, spoken: bytes) -> None:
        link.export.permit(GRANT, [ByteRange(0, 128)])
        older = await ByHand.admitted(link)
        older.writer.write(header((0, 64), number=3) + b"\x01" * 32)
        await until_received(link, 32)
        await older.aclose()
        newer = await ByHand.admitted(link)
        newer.writer.write(spoken + b"\x02" * 64)
        assert await newer.is_cut_off()
        assert link.content()[32:] == bytes([BACKGROUND]) * (ARENA_NBYTES - 32)
        await newer.aclose()

    async def test_a_write_may_begin_anew(self, link: Link) -> None:
        link.export.permit(GRANT, [ByteRange(0, 64)])
        older = await ByHand.admitted(link)
        older.writer.write(header((0, 64), number=3) + b"\x01" * 32)
        await until_received(link, 32)
        await older.aclose()
        newer = await ByHand.admitted(link)
        newer.writer.write(header((0, 64), number=3) + b"\x02" * 64)
        assert await newer.answer() == (3, Status.LANDED, 64)
        assert link.content()[:64] == b"\x02" * 64
        await newer.aclose()

    async def test_how_writes_have_ended_is_told_until_the_sender_knows(self, link: Link) -> None:
        link.export.permit(GRANT, [ByteRange(0, 64)])
        older = await ByHand.admitted(link)
        second = header((64, 1), number=1) + b"x"
        older.writer.write(header((0, 1)) + b"x" + second + header((1, 1), number=2) + b"x")
        told = [await older.answer() for _ in range(3)]
        assert [answer.status for answer in told] == [0, Status.NOT_PERMITTED, 0]
        await older.aclose()
        for oldest in (0, 1, 3):
            newer = await ByHand.admitted(link, oldest=oldest)
            assert newer.resumed == told[oldest:]
            await newer.aclose()

    async def test_what_is_kept_of_broken_writes_is_bounded(self, link: Link) -> None:
        assert isinstance(link.export, receiving.TcpExport)
        link.export.permit(GRANT, [ByteRange(0, 64)])
        for number in range(progress.MAX_UNFINISHED + 2):
            by_hand = await ByHand.admitted(link)
            assert len(by_hand.resumed) == min(number, progress.MAX_UNFINISHED)
            link.export.arena.view(0, 1)[:] = bytes([BACKGROUND])
            by_hand.writer.write(header((0, 2), number=number) + b"x")
            await until_received(link, 1)
            await by_hand.aclose()
        by_hand = await ByHand.admitted(link)
        for number in range(100, 100 + progress.MAX_ENDED + 2):
            by_hand.writer.write(header((0, 1), number=number) + b"x")
            await by_hand.answer()
        await by_hand.aclose()
        by_hand = await ByHand.admitted(link, oldest=100)
        assert len(by_hand.resumed) == progress.MAX_ENDED
        await by_hand.aclose()
        for attachment in range(1, progress.MAX_ATTACHMENTS + 1):
            await (await ByHand.admitted(link, attachment)).aclose()
        assert len(link.export.attachments._attachments[LINK]) == progress.MAX_ATTACHMENTS
        link.export.forget(LINK)
        assert not link.export.attachments._attachments

    # -- lost connections ---------------------------------------------------------------

    async def test_a_lost_connection_is_made_anew_and_its_writes_go_on(self) -> None:
        link = await self.open_link(32 << 20)
        assert isinstance(link.export, receiving.TcpExport)
        tensor = torch.zeros(8192, 1024)
        write = asyncio.create_task(link.write([whole(tensor, 0)]))
        await until_received(link, 1024)
        for connection in link.export.door.callers:
            connection.abort()
        await write
        assert link.content() == bytes_of(tensor)
        await link.aclose()

    async def test_a_receiver_that_cannot_be_reached_again(self, link: Link) -> None:
        await link.export.aclose()
        for _ in range(2):
            with pytest.raises(PlaneUnavailable):
                await link.remote.write(GRANT, [whole(random_rows(4, 16), 0)])

    async def test_rows_that_fail_break_off_the_write_and_no_later_one(self, link: Link) -> None:
        def fail(target: memoryview, first: int, count: int) -> None:
            raise RuntimeError("on demand")

        tensor = strided_rows(4, 16)
        run = whole(tensor, 0)
        failing = TokenRows("rows", run.rows.field, tensor, run.rows._source._replace(copy=fail))
        link.export.permit(GRANT, [ByteRange(0, 64)])
        with pytest.raises(RuntimeError, match="on demand"):
            await link.remote.write(GRANT, [Run(failing, 0, 4, 0)])
        await link.remote.quiesce()
        await link.write([run])
        assert link.content() == expected_content(ARENA_NBYTES, (0, tensor))

    @pytest.mark.parametrize(
        "answer",
        [
            wire.ANSWER.pack(0, 7, 64),
            wire.ANSWER.pack(0, Status.LANDED, 63),
            wire.ANSWER.pack(0, Status.REVOKED, 65),
            wire.ANSWER.pack(0, Status.UNFINISHED, 32),
            wire.ANSWER.pack(1, Status.LANDED, 64),
            wire.ANSWER.pack(0, Status.REVOKED, 0) * 2,
        ],
    )
    async def test_a_receiver_that_answers_nonsense_is_left(self, answer: bytes) -> None:
        async with impostor(wire.encode_greeting(4096, []), answer) as offer:
            remote = await TcpPlane().attach(offer)
            with pytest.raises(PlaneUnavailable, match=r"nonsense|withdrawn"):
                await remote.write(GRANT, [whole(random_rows(4, 16), 0)])
            await remote.aclose()

    @pytest.mark.parametrize(
        "greeting",
        [
            b"220 smtp.example.org ESMTP ready\r\n",
            wire.GREETING.pack(wire.MAGIC, True, 4096, wire.MAX_ANSWERS + 1),
            wire.GREETING.pack(b"aiommT01", True, 4096, 0),
        ],
    )
    async def test_a_listener_of_something_else_is_unavailable(self, greeting: bytes) -> None:
        async with impostor(greeting) as offer:
            with pytest.raises(PlaneUnavailable, match="no receiver"):
                await TcpPlane().attach(offer)

    async def test_a_listener_that_hangs_up_is_unavailable(self) -> None:
        async with impostor(b"") as offer:
            with pytest.raises(PlaneUnavailable, match="cannot be reached: closed"):
                await TcpPlane().attach(offer)

    async def test_a_listener_that_is_silent_is_unavailable(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(connecting, "CONNECT_SECONDS", 0.02)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            offer = msgspec.msgpack.encode(wire.TcpOffer("127.0.0.1", port, LINK, bytes(16)))
            with pytest.raises(PlaneUnavailable, match="silent"):
                await TcpPlane().attach(offer)

    # -- addresses ----------------------------------------------------------------------

    async def test_a_taken_port_is_unavailable(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            plane = TcpPlane(port=listener.getsockname()[1])
            with pytest.raises(PlaneUnavailable, match="cannot listen"):
                await plane.export(HostArena(4096))

    WILDCARDS = ("", "*", "0.0.0.0", "::", "0:0::0", "::ffff:0.0.0.0")

    @pytest.mark.parametrize("wildcard", WILDCARDS)
    def test_a_wildcard_is_never_advertised(self, wildcard: str) -> None:
        with pytest.raises(ValueError, match="senders reach"):
            TcpPlane(bind=wildcard)
        with pytest.raises(ValueError, match="senders reach"):
            TcpPlane(bind="127.0.0.1", advertise=wildcard)
        with pytest.raises(ValueError, match="senders reach"):
            TcpPlane.at(Place(wildcard, wildcard), by_name=True)

    @pytest.mark.parametrize("wildcard", WILDCARDS)
    async def test_the_offer_names_the_advertised_address(self, wildcard: str) -> None:
        arena = HostArena(4096)
        export = await TcpPlane.at(Place(wildcard, "host-7"), by_name=True).export(arena)
        assert wire.decode_offer(export.offer(LINK)).host == "host-7"
        await export.aclose()
        arena.close()

    async def test_a_name_of_both_families_has_one_port(self) -> None:
        listening = await sockets.listeners("localhost", 0)
        assert len({each.getsockname()[1] for each in listening}) == 1
        families = {family for family, _ in await sockets.resolve("localhost", 1)}
        assert {each.family for each in listening} == families
        for each in listening:
            each.close()

    async def test_an_address_of_a_name_where_somebody_else_listens_is_passed_by(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of both families one may be another program's, or not reachable at all."""
        arena = HostArena(4096)
        export = await TcpPlane(bind="127.0.0.1", advertise="both.example").export(arena)
        offer = wire.decode_offer(export.offer(LINK))
        async with impostor(b"220 smtp.example.org ESMTP ready\r\n") as other:
            places = [("127.0.0.1", wire.decode_offer(other).port), ("127.0.0.1", offer.port)]

            async def resolve(host: str, port: int) -> list[sockets.SocketAddress]:
                assert (host, port) == ("both.example", offer.port)
                return [sockets.SocketAddress(socket.AF_INET, place) for place in places]

            monkeypatch.setattr(sending, "resolve", resolve)
            remote = await TcpPlane().attach(export.offer(LINK))
            await remote.aclose()
        await export.aclose()
        arena.close()

    async def test_both_ends_notice_when_the_other_host_is_gone(self, link: Link) -> None:
        assert isinstance(link.export, receiving.TcpExport)
        (accepted,) = link.export.door.callers
        end = accepted._transport.get_extra_info("socket")
        assert isinstance(link.remote, sending.TcpArena)
        for each in (end, link.remote._connection._socket):
            assert each.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert each.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
            assert each.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 15
            assert each.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 5
            assert each.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000
            try:
                longest = each.getsockopt(socket.IPPROTO_TCP, sockets.TCP_RTO_MAX_MS)
            except OSError:  # before Linux 6.15
                continue
            assert longest == 1000

    async def test_within_one_host_little_is_held_in_between(self, link: Link) -> None:
        assert isinstance(link.remote, sending.TcpArena)
        end = link.remote._connection._socket
        held = end.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        assert held == 2 * sockets.LOCAL_SEND_NBYTES

    @pytest.mark.parametrize(
        ("bind", "advertise"),
        [
            ("::1", None),
            ("::", "::1"),
            ("::", "127.0.0.1"),
            ("*", "::1"),
            ("*", "127.0.0.1"),
            ("", "127.0.0.1"),
            ("0.0.0.0", "127.0.0.2"),
            ("127.0.0.1", "localhost"),
            ("localhost", None),
        ],
    )
    async def test_addresses(self, bind: str, advertise: str | None) -> None:
        plane = TcpPlane(bind=bind, advertise=advertise)
        arena = HostArena(4096)
        export = await plane.export(arena)
        remote = await plane.attach(export.offer(LINK))
        tensor = random_rows(4, 16)
        link = Link(plane, arena, export, remote)
        await link.write([whole(tensor, 0)])
        assert link.content()[:64] == bytes_of(tensor)
        await link.aclose()


class RecordingTransport(asyncio.Transport):
    """A transport that only remembers what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.written: list[bytes] = []

    def is_closing(self) -> bool:
        return False

    def write(self, octets: bytes | bytearray | memoryview) -> None:
        self.written.append(bytes(octets))

    def pause_reading(self) -> None:
        self.calls.append("pause_reading")

    def resume_reading(self) -> None:
        self.calls.append("resume_reading")
