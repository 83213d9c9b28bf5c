"""A plane of one's own: the receiver's memory as a file, into which senders `pwrite`.

    python examples/custom_plane.py

The receiver's arena is a memfd. For each sender the export puts a symbolic link to it into a
directory that only this user can enter; the offer is its path, and without that nobody gets in.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

import torch

import aiomm
from aiomm.buffers.arena import Arena
from aiomm.buffers.shm import SEALS, MemfdArena
from aiomm.planes.base import Export, GrantKey, Plane, RemoteArena, Run
from aiomm.planes.copying import Copies, CopyThreads, check_runs


class FileExport(Export):
    """Receiver's side: a directory with one path to the memory for each sender."""

    def __init__(self, arena: MemfdArena) -> None:
        self._memory = f"/proc/{os.getpid()}/fd/{arena.fd}"
        self._directory = TemporaryDirectory(prefix="aiomm-")  # mode 0700

    def offer(self, link: int) -> bytes:
        """Return the path that the sender on this link, and no other, is to open."""
        path = self._path(link)
        if not path.is_symlink():
            path.symlink_to(self._memory)
        return os.fsencode(path)

    def forget(self, link: int) -> None:
        """Remove the sender's path; it is gone, so nothing of it can write any more."""
        self._path(link).unlink(missing_ok=True)

    async def aclose(self) -> None:
        """Remove the directory."""
        self._directory.cleanup()

    def _path(self, link: int) -> Path:
        return Path(self._directory.name, f"{link:016x}")


class FileArena(RemoteArena):
    """Sender's side: an open descriptor of the receiver's memory."""

    def __init__(self, memory: int, threads: CopyThreads) -> None:
        self._memory = memory
        self._nbytes = os.fstat(memory).st_size
        self._copies = Copies(threads)
        self._is_closed = False

    async def write(self, grant: GrantKey, runs: Sequence[Run]) -> None:
        """Write on a thread, so that the loop is free meanwhile."""
        if self._is_closed:
            raise aiomm.PlaneUnavailable("file: detached")
        check_runs(runs, self._nbytes)
        try:
            await self._copies.run(partial(self._write, runs))
        except OSError as exc:
            raise aiomm.PlaneUnavailable(f"file: {exc}") from exc

    async def quiesce(self) -> None:
        """Return once no `pwrite` runs: what has returned cannot land later."""
        await self._copies.drain()

    async def aclose(self) -> None:
        """Let running writes end, then close the descriptor."""
        self._is_closed = True
        await self._copies.aclose()
        memory, self._memory = self._memory, -1
        if memory >= 0:
            os.close(memory)

    def _write(self, runs: Sequence[Run]) -> None:
        for run in runs:
            rows = run.rows.view(run.first, run.count)
            if rows is None:  # strided, or on a device
                rows = memoryview(bytearray(run.nbytes))
                run.rows.copy_into(rows, run.first, run.count)
            done = 0
            while done < run.nbytes:
                done += os.pwrite(self._memory, rows[done:], run.offset + done)


class FilePlane(Plane):
    """Writes by `pwrite`, between processes of one user on one host."""

    name: ClassVar[str] = "file"

    def __init__(self) -> None:
        self._threads = CopyThreads(self.name)

    async def export(self, arena: Arena) -> Export:
        """Open `arena`, which has to be one that stands behind a descriptor."""
        if not isinstance(arena, MemfdArena):
            raise aiomm.PlaneUnavailable(f"file: needs a memfd, not a {type(arena).__name__}")
        return FileExport(arena)

    async def attach(self, offer: bytes) -> RemoteArena:
        """Open what the link leads to, if it is a sealed memfd and no file of anybody's."""
        try:
            memory = os.open(offer, os.O_WRONLY | os.O_NONBLOCK)
        except (OSError, ValueError) as exc:
            raise aiomm.PlaneUnavailable(f"file: no receiver there: {exc}") from exc
        try:
            if fcntl.fcntl(memory, fcntl.F_GET_SEALS) & SEALS != SEALS:
                raise OSError("its memory may change its size")
            return FileArena(memory, self._threads)
        except OSError as exc:
            os.close(memory)
            raise aiomm.PlaneUnavailable(f"file: not a receiver's arena: {exc}") from exc


async def main() -> None:
    """Send 2000 rows over the plane and compare every byte."""
    schema = aiomm.Schema(rows=aiomm.Field("uint8", 4096))
    rows = torch.randint(256, (2000, 4096), dtype=torch.uint8)
    async with (
        aiomm.Receiver(schema, bind="tcp://127.0.0.1:*", planes=[FilePlane()]) as receiver,
        aiomm.Sender(schema, planes=[FilePlane()]) as sender,
    ):
        transfer = sender.claim(receiver.expect("req-1")).send({"rows": rows})
        async with receiver.receive("req-1") as lease:
            identical = torch.equal(torch.as_tensor(lease["rows"]), rows)
        stats = await transfer
    print(f"plane={stats.plane} tokens={stats.num_tokens} chunks={list(stats.buffered_chunks)}")
    print("bit-identical" if identical else "NOT identical to what was sent")


if __name__ == "__main__":
    asyncio.run(main())
