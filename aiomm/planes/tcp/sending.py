"""The sender's end of data connections: from a tensor's memory to the socket, without a copy."""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import socket
from collections import deque
from collections.abc import Iterator, Sequence

from ...errors import PlaneUnavailable
from ..base import GrantKey, RemoteArena, Run
from ..copying import Copies, CopyThread, check_runs
from .wire import (
    GREETING,
    MAX_RUNS,
    Offer,
    Status,
    encode_header,
    encode_preamble,
    parse_greeting,
)

__all__ = ["TcpArena", "connect"]

CONNECT_SECONDS = 5.0
LOST_SECONDS = 30
"""After so long without a sign of life from the receiver's kernel a connection is lost."""
MAX_SEND_NBYTES = 1 << 20
"""At most so many bytes go to the kernel at once; about 0.3 ms on the loop thread."""
MAX_BUFFERS = 512
"""Buffers of one `sendmsg`; Linux takes up to 1024."""
PACK_NBYTES = 1 << 20
"""Rows that are not dense are packed before they are sent, at most so many bytes at a time."""
PACK_INLINE_NBYTES = 1 << 17

STATUS_TEXTS = {
    Status.NOT_PERMITTED: "the receiver has not granted these bytes",
    Status.REVOKED: "the receiver has withdrawn the grant",
}


class TcpArena(RemoteArena):
    """A receiver's arena behind one data connection, which is made anew after it was lost."""

    def __init__(self, offer: Offer, connection: DataConnection, thread: CopyThread) -> None:
        self._offer = offer
        self._connection = connection
        self._connecting = asyncio.Lock()
        self._copies = Copies(thread)
        self._is_closed = False

    async def write(self, grant: GrantKey, runs: Sequence[Run]) -> None:
        """Send `runs`; return once the receiver says that every byte has landed.

        Raises:
            PlaneUnavailable: the receiver refuses the write, or the connection was lost.
        """
        check_runs(runs, self._connection.arena_nbytes)
        full = [run for run in runs if run.nbytes]
        for start in range(0, len(full), MAX_RUNS):
            connection = await self._connected()
            await connection.write(grant, full[start : start + MAX_RUNS], self._copies)

    async def quiesce(self) -> None:
        """Return at once: a failed write's connection is closed, or its bytes were counted.

        What is still under way inside the network is the receiver's to throw away; its
        `revoke` always can.
        """
        await self._copies.drain()

    async def aclose(self) -> None:
        """Close the connection; running writes fail."""
        self._is_closed = True
        self._connection.lose("detached")
        async with self._connecting:
            # Perhaps it was being made anew.
            self._connection.lose("detached")
        await self._copies.aclose()

    async def _connected(self) -> DataConnection:
        async with self._connecting:
            if self._connection.ended.is_set() and not self._is_closed:
                self._connection = await connect(self._offer)
        return self._connection


class DataConnection:
    """One connection: headers and bytes go out in turn, statuses come back in that order."""

    def __init__(self, connection: socket.socket, arena_nbytes: int) -> None:
        self.arena_nbytes = arena_nbytes
        self._socket = connection
        self._loop = asyncio.get_running_loop()
        self._turn = asyncio.Lock()
        self._unanswered: deque[asyncio.Future[Status]] = deque()
        self._writable: asyncio.Future[None] | None = None
        self.ended = asyncio.Event()
        """Set when nothing can be written any more."""
        self._why = ""
        self._packed: memoryview | None = None
        self._loop.add_reader(connection.fileno(), self._hear)

    async def write(self, grant: GrantKey, runs: Sequence[Run], copies: Copies) -> None:
        """Send one header and its bytes, then wait for their status."""
        answer: asyncio.Future[Status] = self._loop.create_future()
        async with self._turn:
            self._check()
            self._unanswered.append(answer)
            try:
                await self._send_runs(encode_header(grant, runs), runs, copies)
            except OSError as exc:
                self.lose(f"connection lost: {exc}")
            except BaseException as exc:
                # The receiver waits for bytes that will not come; nothing can follow them.
                self.lose(f"a write was broken off: {exc!r}")
                raise
        status = await answer
        if status is not Status.LANDED:
            raise PlaneUnavailable(f"tcp: {STATUS_TEXTS[status]}")

    def lose(self, why: str) -> None:
        """Close the connection and fail every write that waits on it. Idempotent."""
        if self.ended.is_set():
            return
        self.ended.set()
        self._why = why
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_writer(self._socket.fileno())
        self._socket.close()
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        for answer in self._unanswered:
            if not answer.done():
                answer.set_exception(PlaneUnavailable(f"tcp: {why}"))
                # A write that was broken off raises its own error and never asks for this.
                answer.exception()

    def _check(self) -> None:
        if self.ended.is_set():
            raise PlaneUnavailable(f"tcp: {self._why}")

    def _hear(self) -> None:
        """Take statuses from the socket."""
        try:
            received = self._socket.recv(4096)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as exc:
            self.lose(f"connection lost: {exc}")
            return
        if not received:
            self.lose("the receiver has closed the connection or died")
            return
        try:
            for number in received:
                self._answer(Status(number))
        except (ValueError, IndexError):
            self.lose(f"the receiver answers nonsense: {received[:16]!r}")

    def _answer(self, status: Status) -> None:
        answer = self._unanswered.popleft()
        if not answer.done():
            answer.set_result(status)

    async def _send_runs(self, header: bytes, runs: Sequence[Run], copies: Copies) -> None:
        """Send dense rows from where they are, and others from a buffer packed piece by piece."""
        buffers = [memoryview(header)]
        used = 0
        for run in runs:
            dense = run.rows.view(run.first, run.count)
            if dense is not None:
                buffers.append(dense)
                continue
            packed = self._room_for(run)
            for piece in _pieces(run, len(packed)):
                if used + piece.nbytes > len(packed):
                    await self._send(buffers)
                    buffers, used = [], 0
                target = packed[used : used + piece.nbytes]
                await _pack(piece, target, copies)
                buffers.append(target)
                used += piece.nbytes
        await self._send(buffers)

    def _room_for(self, run: Run) -> memoryview:
        nbytes = max(PACK_NBYTES, run.rows.row_nbytes)
        if self._packed is None or len(self._packed) < nbytes:
            self._packed = memoryview(bytearray(nbytes))
        return self._packed

    async def _send(self, buffers: list[memoryview]) -> None:
        """Send every byte of `buffers`, as many at a time as the kernel takes."""
        queue = deque(_bounded(buffers))
        while queue:
            self._check()
            group = _group(queue)
            try:
                sent = self._socket.sendmsg(group)
            except (BlockingIOError, InterruptedError):
                await self._until_writable()
                continue
            _drop(queue, sent)
            if queue:
                # The receiver may be as fast as we are: let others have the loop, too.
                await asyncio.sleep(0)

    async def _until_writable(self) -> None:
        self._writable = self._loop.create_future()
        self._loop.add_writer(self._socket.fileno(), _wake, self._writable)
        try:
            await self._writable
        finally:
            if not self.ended.is_set():
                self._loop.remove_writer(self._socket.fileno())


async def connect(offer: Offer) -> DataConnection:
    """Connect to the receiver behind `offer` and show its key.

    Raises:
        PlaneUnavailable: nobody answers there, or not as a receiver that accepts the key.
    """
    where = f"{offer.host} port {offer.port}"
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            connection = await _connect_any(offer)
            try:
                greeting = await _exchange(connection, encode_preamble(offer))
                return DataConnection(connection, parse_greeting(greeting))
            except BaseException:
                connection.close()
                raise
    except TimeoutError as exc:
        raise PlaneUnavailable(f"tcp: {where} is silent for {CONNECT_SECONDS} s") from exc
    except OSError as exc:
        raise PlaneUnavailable(f"tcp: {where} cannot be reached: {exc}") from exc


async def _exchange(connection: socket.socket, preamble: bytes) -> bytes:
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(connection, preamble)
    greeting = b""
    while len(greeting) < GREETING.size:
        received = await loop.sock_recv(connection, GREETING.size - len(greeting))
        if not received:
            raise PlaneUnavailable("tcp: the receiver refuses this process's key")
        greeting += received
    return greeting


async def _connect_any(offer: Offer) -> socket.socket:
    """Try the addresses of the offer's host in their order."""
    error: OSError = OSError(f"no address for {offer.host!r}")
    for family, address in await _addresses(offer.host, offer.port):
        connection = socket.socket(family, socket.SOCK_STREAM)
        try:
            connection.setblocking(False)
            _configure(connection)
            await asyncio.get_running_loop().sock_connect(connection, address)
            return connection
        except OSError as exc:
            connection.close()
            error = exc
        except BaseException:
            connection.close()
            raise
    raise error


async def _addresses(host: str, port: int) -> list[tuple[int, tuple[str, int]]]:
    """Resolve `host`; one that is a number needs neither name server nor thread."""
    try:
        version = ipaddress.ip_address(host).version
    except ValueError:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return [(family, (str(address[0]), port)) for family, _, _, _, address in found]
    return [(socket.AF_INET6 if version == 6 else socket.AF_INET, (host, port))]


def _configure(connection: socket.socket) -> None:
    """Send at once, and notice within half a minute that the other host is gone."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_USER_TIMEOUT", LOST_SECONDS * 1000),
        ("TCP_KEEPIDLE", LOST_SECONDS // 2),
        ("TCP_KEEPINTVL", LOST_SECONDS // 6),
    ):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _pieces(run: Run, max_nbytes: int) -> Iterator[Run]:
    """Cut `run` into runs of at most `max_nbytes`."""
    step = max(1, max_nbytes // run.rows.row_nbytes)
    for done in range(0, run.count, step):
        count = min(step, run.count - done)
        yield Run(run.rows, run.first + done, count, run.offset + done * run.rows.row_nbytes)


async def _pack(run: Run, target: memoryview, copies: Copies) -> None:
    copy = functools.partial(run.rows.copy_into, target, run.first, run.count)
    if run.nbytes <= PACK_INLINE_NBYTES and run.rows.device == "cpu":
        copy()
    else:
        await copies.run(copy)


def _bounded(buffers: Sequence[memoryview]) -> Iterator[memoryview]:
    """Cut `buffers` so that none is longer than one call may send."""
    for buffer in buffers:
        for start in range(0, len(buffer), MAX_SEND_NBYTES):
            yield buffer[start : start + MAX_SEND_NBYTES]


def _group(queue: deque[memoryview]) -> list[memoryview]:
    """Return the first buffers of `queue` that one call may send together."""
    group: list[memoryview] = []
    nbytes = 0
    for buffer in queue:
        if nbytes >= MAX_SEND_NBYTES or len(group) == MAX_BUFFERS:
            break
        group.append(buffer)
        nbytes += len(buffer)
    return group


def _drop(queue: deque[memoryview], nbytes: int) -> None:
    """Take `nbytes` bytes from the front of `queue`."""
    while nbytes:
        first = queue.popleft()
        if nbytes < len(first):
            queue.appendleft(first[nbytes:])
            return
        nbytes -= len(first)


def _wake(writable: asyncio.Future[None]) -> None:
    if not writable.done():
        writable.set_result(None)
