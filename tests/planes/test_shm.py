"""The shared-memory plane passes the contract, and hands its arena to nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.resource_tracker import ensure_running

import pytest
import torch

from aiomm.buffers.arena import Arena, HostArena
from aiomm.buffers.memcpy import SharedCopies
from aiomm.buffers.shm import MemfdArena
from aiomm.errors import PlaneUnavailable
from aiomm.planes import copying, door, shm
from aiomm.planes.base import Plane
from aiomm.planes.shm import ShmPlane

from .contract import (
    ARENA_NBYTES,
    GRANT,
    LINK,
    Link,
    PlaneContract,
    bytes_of,
    expected_content,
    random_rows,
    strided_rows,
    whole,
)

NOBODY = 65534


def export_until_killed(pipe: Connection) -> None:
    """Export an arena, tell its offer, and never end."""

    async def run() -> None:
        export = await ShmPlane().export(MemfdArena(ARENA_NBYTES))
        pipe.send(export.offer(LINK))
        await asyncio.Event().wait()

    asyncio.run(run())


def attach_and_write(pipe: Connection) -> None:
    """Attach to the offer from the pipe and write; tell "written" or why not."""

    async def run() -> str:
        user, offer = pipe.recv()
        if user is not None:
            os.setuid(user)
        try:
            remote = await ShmPlane().attach(offer)
        except PlaneUnavailable as exc:
            return str(exc)
        await remote.write(GRANT, [whole(strided_rows(64, 64), 128)])
        await remote.aclose()
        return "written"

    pipe.send(asyncio.run(run()))


async def received(pipe: Connection) -> object:
    """Wait for the next thing from another process, by the readiness of its pipe."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(pipe.fileno(), ready.set)
    await ready.wait()
    loop.remove_reader(pipe.fileno())
    return pipe.recv()


def start_process(target: object) -> tuple[multiprocessing.process.BaseProcess, Connection]:
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=target, args=(theirs,), daemon=True)  # type: ignore[arg-type]
    process.start()
    theirs.close()
    return process, ours


def abstract_name(link: Link) -> bytes:
    assert isinstance(link.export, shm._ShmExport)
    return b"\0" + link.export.desk._name


@pytest.fixture(scope="module", autouse=True)
def resource_tracker() -> None:
    """Start the process that multiprocessing keeps, before anybody looks for leaks."""
    ensure_running()


class TestShmPlane(PlaneContract):
    def make_plane(self) -> Plane:
        return ShmPlane()

    def make_arena(self, nbytes: int) -> Arena:
        return MemfdArena(nbytes)

    async def test_private_memory_cannot_be_exported(self) -> None:
        with pytest.raises(PlaneUnavailable, match="HostArena"):
            await ShmPlane().export(HostArena(4096))

    async def test_is_for_linux(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sys.platform", "darwin")
        plane = ShmPlane()
        assert "darwin" in (plane.unusable() or "")
        with pytest.raises(PlaneUnavailable, match="darwin"):
            await plane.export(HostArena(4096))
        with pytest.raises(PlaneUnavailable, match="darwin"):
            await plane.attach(b"")

    @pytest.mark.parametrize("num_processors", [1, 2, 8])
    async def test_mixes_long_and_short_runs_on_its_threads(
        self, num_processors: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(copying, "num_processors", lambda: num_processors)
        link = await self.open_link(16 << 20)
        long, short, strided = random_rows(13, 1 << 20), random_rows(3, 64), strided_rows(9, 64)
        parts = [(0, strided), (1 << 20, long), (15 << 20, short)]
        await link.write([whole(tensor, offset) for offset, tensor in parts])
        assert link.content() == expected_content(16 << 20, *parts)
        await link.aclose()

    @pytest.mark.parametrize("rows_of", [random_rows, strided_rows])
    async def test_a_long_write_does_not_wait_for_threads_that_are_late(
        self, rows_of: Callable[[int, int], torch.Tensor], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Beside a busy thread it is copied on the loop's, until the others are in time again.

        Of dense rows the loop's thread makes the first piece in any case, and so learns of it.
        """
        link = await self.open_link(16 << 20)
        assert isinstance(link.remote, shm._ShmArena)
        copiers: set[str] = set()

        def noted(copy: Callable[..., None]) -> Callable[..., None]:
            def copy_and_note(*arguments: object) -> None:
                copiers.add(threading.current_thread().name.partition("_")[0])
                copy(*arguments)

            return copy_and_note

        monkeypatch.setattr(link.remote, "_copy", noted(link.remote._copy))
        monkeypatch.setattr(SharedCopies, "run", noted(SharedCopies.run))
        monkeypatch.setattr(copying, "LATE_SECONDS", 20.0)
        link.remote._copies.look_again()  # the attachment itself may have met a busy machine
        await link.remote._copies.drain()
        is_dense = rows_of is random_rows
        for late_seconds, by_threads in (
            (20.0, True),
            (-1.0, not is_dense),
            (-1.0, False),
            (20.0, False),
            (20.0, True),
        ):
            monkeypatch.setattr(copying, "LATE_SECONDS", late_seconds)
            rows = rows_of(16, 1 << 20)
            await link.write([whole(rows, 0)])
            assert link.content() == bytes_of(rows)
            await link.remote._copies.drain()
            assert ("aiomm-shm" in copiers) is by_threads
            copiers.clear()
        await link.aclose()

    async def test_without_a_thread_nothing_long_can_be_copied(self) -> None:
        with pytest.raises(ValueError, match="copy_threads must be at least 1, got 0"):
            ShmPlane(copy_threads=0)

    async def test_a_short_write_is_done_at_once(self, link: Link) -> None:
        parts = [(0, random_rows(3, 64)), (512, strided_rows(9, 64)[:2])]
        runs = [whole(tensor, offset) for offset, tensor in parts]
        assert link.remote.write_at_once(GRANT, runs)
        assert link.content() == expected_content(ARENA_NBYTES, *parts)

    @pytest.mark.parametrize(("num_processors", "longest"), [(1, 8), (3, 8), (4, 4), (16, 4)])
    async def test_what_is_not_short_is_not_done_at_once(
        self, num_processors: int, longest: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Too long, or long and not dense, no time left in this turn, or nothing to write into."""
        monkeypatch.setattr(copying, "num_processors", lambda: num_processors)
        link = await self.open_link(16 << 20)
        long, short = whole(random_rows(longest + 1, 1 << 20), 0), whole(random_rows(2, 16), 0)
        assert not link.remote.write_at_once(GRANT, [long])
        strided = strided_rows(200, 1 << 10)
        assert not link.remote.write_at_once(GRANT, [whole(strided, 0)])
        assert link.remote.write_at_once(GRANT, [whole(strided[:100], 0)])
        await asyncio.sleep(0)  # the next turn of the loop has time anew
        assert link.remote.write_at_once(GRANT, [whole(random_rows(longest, 1 << 20), 0)])
        await asyncio.sleep(0)
        monkeypatch.setattr(copying, "TURN_SECONDS", -1.0)
        assert link.remote.write_at_once(GRANT, [short])
        before = link.content()
        assert not link.remote.write_at_once(GRANT, [whole(random_rows(2, 16), 64)])
        await link.remote.aclose()
        assert not link.remote.write_at_once(GRANT, [short])
        assert link.content() == before
        await link.aclose()

    async def test_all_attachments_share_one_time(
        self, link: Link, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A sender with many receivers holds its loop no longer than one with a single one."""
        second = await link.plane.attach(link.export.offer(LINK))
        await asyncio.sleep(0)
        monkeypatch.setattr(copying, "TURN_SECONDS", -1.0)
        run = whole(random_rows(2, 16), 0)
        assert link.remote.write_at_once(GRANT, [run])
        assert not second.write_at_once(GRANT, [run])
        await second.aclose()

    async def test_another_process_writes(self, link: Link) -> None:
        process, pipe = start_process(attach_and_write)
        pipe.send((None, link.export.offer(LINK)))
        assert await received(pipe) == "written"
        expected = expected_content(ARENA_NBYTES, (128, strided_rows(64, 64)))
        assert link.content() == expected
        process.join()
        process.close()
        pipe.close()

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
    async def test_another_user_is_refused(self, link: Link) -> None:
        process, pipe = start_process(attach_and_write)
        pipe.send((NOBODY, link.export.offer(LINK)))
        assert "another user" in str(await received(pipe))
        process.join()
        process.close()
        pipe.close()

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
    async def test_the_exporter_refuses_another_user_itself(self, link: Link) -> None:
        assert isinstance(link.export, shm._ShmExport)
        link.export.desk.user = NOBODY
        with pytest.raises(PlaneUnavailable, match="refuses"):
            await link.plane.attach(link.export.offer(LINK))

    async def test_the_end_of_a_killed_exporter_is_noticed(self) -> None:
        process, pipe = start_process(export_until_killed)
        offer = await received(pipe)
        assert isinstance(offer, bytes)
        remote = await ShmPlane().attach(offer)
        assert isinstance(remote, shm._ShmArena)
        await remote.write(GRANT, [whole(random_rows(4, 16), 0)])
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        await remote.ended.wait()
        with pytest.raises(PlaneUnavailable, match="died"):
            await remote.write(GRANT, [whole(random_rows(4, 16), 0)])
        await remote.aclose()
        process.join()
        with pytest.raises(PlaneUnavailable, match="no such receiver"):
            await ShmPlane().attach(offer)
        process.close()
        pipe.close()

    async def test_a_write_in_progress_survives_the_end_of_its_receiver(self) -> None:
        link = await self.open_link(32 << 20)
        tensor = random_rows(32, 1 << 20)
        write = asyncio.create_task(link.write([whole(tensor, 0)]))
        await asyncio.sleep(0)
        await link.export.aclose()
        await asyncio.wait_for(asyncio.shield(write), None)
        assert link.content() == bytes_of(tensor)
        await link.aclose()

    async def test_what_a_thread_still_writes_into_stays_mapped(self) -> None:
        """Nobody waits for that write any more, and its receiver is left meanwhile."""
        plane, may_end = ShmPlane(copy_threads=2), threading.Event()
        export = await plane.export(MemfdArena(ARENA_NBYTES))
        remote = await plane.attach(export.offer(LINK))
        assert isinstance(remote, shm._ShmArena)
        remote._copies.start([may_end.wait])
        closing = asyncio.create_task(remote.aclose())
        await asyncio.sleep(0)  # it has come as far as it can
        is_mapped = bool(remote._memory)
        may_end.set()
        await closing
        await export.aclose()
        assert is_mapped
        assert not remote._memory

    @pytest.mark.parametrize(
        "shown", [bytes(16), b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 100_000, bytes(15)]
    )
    async def test_a_stranger_gets_nothing(
        self, link: Link, shown: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(door, "HANDSHAKE_SECONDS", 0.02)
        reader, writer = await self.stranger(link)
        writer.write(shown)
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.close()
        await link.write([whole(random_rows(4, 16), 0)])

    async def test_silent_strangers_are_bounded(self, link: Link) -> None:
        strangers = [await self.stranger(link) for _ in range(door.MAX_STRANGERS + 4)]
        for reader, _ in strangers[:4]:
            assert await reader.read() == b""
        second = await link.plane.attach(link.export.offer(LINK))
        await second.aclose()
        for _, writer in strangers:
            writer.close()

    async def test_a_sender_that_goes_on_talking_is_cut_off(self, link: Link) -> None:
        assert isinstance(link.export, shm._ShmExport)
        offer = link.export.offer(LINK)
        reader, writer = await self.stranger(link)
        writer.write(link.export.desk.door.secret_of(LINK))
        assert await reader.readexactly(1) == shm.ACCEPTED
        writer.write(b"hello?")
        assert await reader.read() == b""
        writer.close()
        assert link.export.offer(LINK) == offer

    async def stranger(self, link: Link) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        connection = socket.socket(socket.AF_UNIX)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, abstract_name(link))
        return await asyncio.open_unix_connection(sock=connection)

    async def test_an_exporter_that_hands_over_something_else_is_unavailable(
        self, link: Link
    ) -> None:
        assert isinstance(link.arena, MemfdArena)
        assert isinstance(link.export, shm._ShmExport)
        with socket.socket() as other:
            link.export.arena = _Impostor(other.fileno(), ARENA_NBYTES)  # type: ignore[assignment]
            with pytest.raises(PlaneUnavailable, match="no memfd"):
                await link.plane.attach(link.export.offer(LINK))


class _Impostor:
    def __init__(self, fd: int, nbytes: int) -> None:
        self.fd = fd
        self.nbytes = nbytes
