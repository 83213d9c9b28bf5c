"""The sender's end: copies of its GPUs into a pool that another process has."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from ...buffers.memcpy import address_of
from ...errors import PlaneUnavailable
from ...gpu.lanes import Mark, lanes_of
from ...gpu.runtime import Copy, GpuError, explained
from ..base import GrantKey, RemoteArena, Run
from ..copying import Copies, check_runs
from .mappings import Pool
from .wire import CLOSED, RETIRE

__all__ = ["RemotePool"]

logger = logging.getLogger(__name__)

CLOSING_SECONDS = 5.0
"""How long closing waits for copies. One may wait for an encoder that never ends."""
PACK_NBYTES = 4 << 20
"""Rows of the host that are strided, or of unknown address, are packed in pieces of this size."""


class RemotePool(RemoteArena):
    """A receiver's pool, open for this sender until either of them leaves.

    Args:
        pool: not yet opened, or of this process.
        connection: with the receiver; not blocking. It is closed here.
        copies: for what blocks.
    """

    def __init__(self, pool: Pool, connection: socket.socket, copies: Copies) -> None:
        self._pool = pool
        self._connection = connection
        self._copies = copies
        self._loop = asyncio.get_running_loop()
        self._home = 0
        self._why = ""
        """Why nothing can be written any more; empty while it can."""
        self._writes: set[asyncio.Task[None]] = set()
        self._leaving: asyncio.Task[None] | None = None
        self._loop.add_reader(connection.fileno(), self._hear)

    async def open(self, home: int) -> None:
        """Open the pool for copies from the host, which device `home` makes.

        Raises:
            PlaneUnavailable: CUDA refuses.
        """
        self._home = home
        await self._copies.run(partial(self._pool.open, home))

    async def write(self, grant: GrantKey, runs: Sequence[Run]) -> None:
        """Copy `runs` as soon as they are ready; return once every byte is there.

        Raises:
            PlaneUnavailable: the receiver is gone, or CUDA has failed.
        """
        if self._why:
            raise PlaneUnavailable(f"cuda_ipc: {self._why}")
        check_runs(runs, self._pool.nbytes)
        write = self._loop.create_task(self._write([run for run in runs if run.nbytes]))
        self._writes.add(write)
        write.add_done_callback(self._ended)
        await asyncio.shield(write)

    async def quiesce(self) -> None:
        """Return once no copy runs: of one that has ended, nothing lands later."""
        while self._writes:
            await asyncio.wait(self._writes)

    async def aclose(self) -> None:
        """Wait for the copies, close the pool, and tell the receiver that it is closed."""
        await asyncio.shield(self._leave("detached"))

    # Copies.

    async def _write(self, runs: Sequence[Run]) -> None:
        by_device: defaultdict[int, list[Run]] = defaultdict(list)
        host = []
        for run in runs:
            on_device = run.rows.on_device
            if on_device is None:
                host.append(run)
            else:
                by_device[on_device.device].append(run)
        for device, own in by_device.items():
            await self._copy(device, own)
        if host:
            await self._copies.run(partial(self._copy_from_host, host))

    async def _copy(self, device: int, runs: Sequence[Run]) -> None:
        """Copy from one GPU, after whoever makes the tensors there."""
        if self._pool.address(device) is None:
            await self._copies.run(partial(self._pool.open, device))
        base = self._pool.address(device)
        assert base is not None
        ready: dict[Mark, None] = {}
        copies = []
        for run in runs:
            rows = run.rows.on_device
            assert rows is not None
            ready[rows.ready] = None
            source = rows.address + run.first * rows.row_nbytes
            copies.append(Copy(base + run.offset, source, run.nbytes))
        try:
            await lanes_of(self._pool.runtime, device).copy(copies, tuple(ready))
        except GpuError as exc:
            raise explained(device, exc) from exc

    def _copy_from_host(self, runs: Iterable[Run]) -> None:
        """Copy from the host, on a thread: CUDA blocks where memory is not pinned."""
        base = self._pool.address(self._home)
        assert base is not None
        lanes = lanes_of(self._pool.runtime, self._home)
        try:
            for run in runs:
                for target, source in _pieces(run):
                    lanes.copy_now([Copy(base + target, address_of(source), len(source))])
        except GpuError as exc:
            raise explained(self._home, exc) from exc

    def _ended(self, write: asyncio.Task[None]) -> None:
        self._writes.discard(write)
        if not write.cancelled():
            write.exception()  # a write that was cancelled by its caller is asked by nobody

    # The end.

    def _hear(self) -> None:
        """Hear that the pool is about to be freed, or that the receiver is gone."""
        try:
            said = self._connection.recv(len(RETIRE))
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            said = b""
        retires = said == RETIRE
        self._leave("the receiver closes its pool" if retires else "the receiver is gone")

    def _leave(self, why: str) -> asyncio.Task[None]:
        """Begin to close the pool, once."""
        if self._leaving is None:
            self._why = why
            self._loop.remove_reader(self._connection.fileno())
            self._leaving = self._loop.create_task(self._close(), name=f"cuda_ipc: {why}")
        return self._leaving

    async def _close(self) -> None:
        """Close the pool; one that is still written to stays open until this process ends."""
        if self._writes:
            await asyncio.wait(self._writes, timeout=CLOSING_SECONDS)
        try:
            if self._writes:
                raise PlaneUnavailable(f"copies have not ended within {CLOSING_SECONDS} s")
            await self._copies.run(self._pool.close)
        except PlaneUnavailable as exc:
            logger.warning("! cuda_ipc: the pool of a receiver stays open: %s", exc)
        else:
            self._say_closed()
        self._connection.close()
        await self._copies.aclose()

    def _say_closed(self) -> None:
        try:
            self._connection.send(CLOSED)
        except OSError:
            return  # the receiver has left before


def _pieces(run: Run) -> Iterator[tuple[int, memoryview]]:
    """Return an offset in the pool and writable bytes of the host for it, one after the other."""
    dense = run.rows.view(run.first, run.count)
    if dense is not None and not dense.readonly:
        yield run.offset, dense
        return
    row = run.rows.row_nbytes
    step = max(1, PACK_NBYTES // row)
    packed = memoryview(bytearray(min(step, run.count) * row))
    for done in range(0, run.count, step):
        count = min(step, run.count - done)
        run.rows.copy_into(packed[: count * row], run.first + done, count)
        yield run.offset + done * row, packed[: count * row]
