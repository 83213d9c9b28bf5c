"""One data connection of a sender: from a tensor's memory to the socket, without a copy."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from ...errors import PlaneUnavailable
from ..base import GrantKey, Run
from ..copying import Copies, part_of, pieces_of
from .packing import Packing
from .wire import ANSWER, Answer, Status, encode_header, encode_note, parse_answers

__all__ = ["DataConnection", "Write"]

MAX_SEND_NBYTES = 1 << 20
"""At most so many bytes go to the kernel at once: 0.2 ms of the loop's time, 2.6 ms in one of a
hundred. With 256 KiB a transfer of 8 MiB and more takes a third longer, with 4 MiB no less."""
MAX_BUFFERS = 512
"""Buffers of one `sendmsg`; Linux takes up to 1024."""
ABORT = struct.pack("ii", 1, 0)
"""For SO_LINGER: what the kernel has not sent yet is thrown away."""


class Write:
    """What one header announces, and how it stands."""

    def __init__(
        self,
        number: int,
        grant: GrantKey,
        runs: Sequence[Run],
        note: Callable[[], bytes] | None = None,
    ) -> None:
        self.number = number
        self.grant = grant
        self.runs = runs
        self.note = note
        self.nbytes = sum(run.nbytes for run in runs)
        self.landed = 0
        """Bytes that need not be sent again."""
        self.status = Status.UNFINISHED

    def hear(self, answer: Answer) -> None:
        """Take the receiver's word.

        Raises:
            PlaneUnavailable: it cannot be true.
        """
        is_all = answer.landed == self.nbytes
        if answer.landed > self.nbytes or (answer.status is Status.LANDED and not is_all):
            raise PlaneUnavailable(f"tcp: the receiver answers nonsense: {answer}")
        self.landed, self.status = answer.landed, answer.status

    def rest(self) -> tuple[list[Run], int]:
        """Return the runs that have not landed, and how much of their first row has."""
        landed = self.landed
        for index, run in enumerate(self.runs):
            if landed < run.nbytes:
                rows, skipped = divmod(landed, run.rows.row_nbytes)
                return [part_of(run, rows, run.count - rows), *self.runs[index + 1 :]], skipped
            landed -= run.nbytes
        return [], 0


class DataConnection:
    """One connection: headers and bytes go out in turn, answers come back in that order."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._loop = asyncio.get_running_loop()
        self._turn = asyncio.Lock()
        self._waiting: dict[int, tuple[Write, asyncio.Future[None]]] = {}
        self._heard = b""
        self._outgoing: deque[memoryview] = deque()
        self._note: Callable[[], bytes] | None = None
        """Makes what follows the last of them."""
        self._sent: asyncio.Future[None] | None = None
        """Done when nothing is left of `_outgoing`."""
        self.error: OSError | PlaneUnavailable | None = None
        """Why nothing can be written any more; an OSError does not hold for the next one."""
        self.packing = Packing()
        self._loop.add_reader(connection.fileno(), self._hear)

    @property
    def has_ended(self) -> bool:
        """Whether nothing can be written any more."""
        return self.error is not None

    async def carry(self, write: Write, copies: Copies) -> None:
        """Send what is left of `write`; return once it is answered, or the connection broken.

        Raises:
            PlaneUnavailable: no other connection would help.
        """
        answered: asyncio.Future[None] = self._loop.create_future()
        async with self._turn:
            if self.has_ended:
                return
            self._waiting[write.number] = write, answered
            try:
                await self._send_write(write, copies)
            except OSError as exc:
                self.lose(exc)
            except BaseException as exc:
                # The receiver waits for bytes that will not come; nothing can follow them.
                self.lose(ConnectionAbortedError(f"a write was broken off: {exc!r}"))
                raise
        await answered
        if write.status is Status.UNFINISHED and isinstance(self.error, PlaneUnavailable):
            raise PlaneUnavailable(self.error.message)

    def lose(self, error: OSError | PlaneUnavailable) -> None:
        """Close the connection and wake every write that waits on it. Idempotent."""
        if self.has_ended:
            return
        self.error = error
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_writer(self._socket.fileno())
        if self._waiting:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
        self._socket.close()
        if self._sent is not None:
            _wake(self._sent)
        for _, answered in self._waiting.values():
            _wake(answered)

    def _hear(self) -> None:
        """Take answers from the socket."""
        try:
            received = self._socket.recv(1 << 16)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as exc:
            self.lose(exc)
            return
        if not received:
            self.lose(ConnectionResetError("the receiver has closed the connection or died"))
            return
        self._heard += received
        whole = len(self._heard) - len(self._heard) % ANSWER.size
        try:
            for answer in parse_answers(self._heard[:whole]):
                self._answer(answer)
        except PlaneUnavailable as exc:
            self.lose(exc)
        self._heard = self._heard[whole:]

    def _answer(self, answer: Answer) -> None:
        if answer.number not in self._waiting or answer.status is Status.UNFINISHED:
            raise PlaneUnavailable(f"tcp: the receiver answers nonsense: {answer}")
        write, answered = self._waiting[answer.number]
        write.hear(answer)
        del self._waiting[answer.number]
        _wake(answered)

    async def _send_write(self, write: Write, copies: Copies) -> None:
        """Send dense rows from where they are, and others from a buffer packed piece by piece."""
        names = (write.grant, write.runs, write.number, write.landed)
        buffers = [memoryview(encode_header(*names, has_note=write.note is not None))]
        used = 0
        runs, skipped = write.rest()
        for run in runs:
            dense = run.rows.view(run.first, run.count)
            if dense is not None:
                buffers.append(dense[skipped:])
                skipped = 0
                continue
            packed = await self.packing.room_for(run, copies)
            for piece in pieces_of(run, len(packed)):
                if used + piece.nbytes > len(packed):
                    await self._send(buffers)
                    buffers, used = [], 0
                target = packed[used : used + piece.nbytes]
                await self.packing.pack(piece, target, copies)
                buffers.append(target[skipped:])
                used += piece.nbytes
                skipped = 0
        await self._send(buffers, write.note)

    async def _send(
        self, buffers: list[memoryview], note: Callable[[], bytes] | None = None
    ) -> None:
        """Send every byte of `buffers`, and the note behind the last one.

        Raises:
            OSError: the connection has ended.
        """
        self._outgoing = deque(_bounded(buffers))
        self._note = note
        self._send_some()
        if self._outgoing and not self.has_ended:
            self._sent = self._loop.create_future()
            self._loop.add_writer(self._socket.fileno(), self._send_some)
            try:
                await self._sent
            finally:
                if not self.has_ended:
                    self._loop.remove_writer(self._socket.fileno())
        if self.has_ended:
            raise ConnectionAbortedError(str(self.error))

    def _send_some(self) -> None:
        """Send as many bytes as the kernel takes and one turn of the loop may.

        A note is made for the call that takes the last bytes. If the kernel leaves some of them,
        they may be other ones by the next call, and so may the note.
        """
        group = _group(self._outgoing)
        note = None
        if self._note is not None and len(group) == len(self._outgoing):
            note = memoryview(encode_note(self._note()))
        try:
            sent = self._socket.sendmsg(group if note is None else [*group, note])
        except (BlockingIOError, InterruptedError):
            return
        except OSError as exc:
            self.lose(exc)
            return
        if note is not None and sent >= (nbytes := sum(map(len, group))):
            self._note = None
            self._outgoing = deque([note])
            sent -= nbytes
        _drop(self._outgoing, sent)
        if not self._outgoing and self._sent is not None:
            _wake(self._sent)


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


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
