"""Processes that a check starts, tells what to do, and kills: the near end of :mod:`.child`.

One JSON object per line goes in, `{"id": 1, "do": "send", ...}`, and one comes back for each:
`{"id": 1, "result": ...}` or `{"id": 1, "error": "PeerLost", "message": ...}`, in any order.
`{"event": "writing"}` comes without being asked for.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

__all__ = ["Died", "Peer", "Told"]

Answer = Any
"""Whatever JSON can say."""

CLOSING_SECONDS = 15.0
"""How long a child may take to close its endpoint and end."""
TAIL_NBYTES = 4000
LINE_NBYTES = 1 << 24
"""Of one answer at most; raw timings are long."""


class Told(Exception):
    """A child has raised an error.

    Args:
        kind: the name of its class.
        message: what it says.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind
        self.message = message


class Died(Exception):
    """A child has ended before it has answered."""


class Peer:
    """One child process. Made by :meth:`start`."""

    def __init__(self, role: str, process: Process) -> None:
        self.role = role
        self.process = process
        self.stderr = b""
        self._is_killed = False
        self._number = 0
        self._answers: dict[int, asyncio.Future[Answer]] = {}
        self._events: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._tasks = [asyncio.create_task(each) for each in (self._hear(), self._complain())]

    @classmethod
    async def start(
        cls,
        role: str,
        limit: float,
        settings: Mapping[str, object],
        environ: Mapping[str, str],
        prefix: Sequence[str],
    ) -> Peer:
        """Run one, and return when it is ready.

        Args:
            role: see :mod:`.child`.
            limit: seconds after which it ends itself, should nobody else do it.
            settings: of the role.
            environ: variables that it is given on top.
            prefix: the command in which it runs, if it is not to be run alone.

        Raises:
            Told: it cannot do what its settings ask for.
            Died: it has ended.
        """
        arguments = ["-X", "faulthandler", "-m", "benchmarks.gpu.child", role, str(limit)]
        process = await asyncio.create_subprocess_exec(
            *prefix,
            sys.executable,
            *arguments,
            stdin=PIPE,
            stdout=PIPE,
            stderr=PIPE,
            env={**os.environ, **environ},
            limit=LINE_NBYTES,
        )
        peer = cls(role, process)
        try:
            await peer.call("begin", settings=dict(settings))
        except BaseException as exc:
            await peer.abort()
            exc.add_note(peer.tail())
            raise
        return peer

    @property
    def is_alive(self) -> bool:
        """Whether its end has not been noticed yet."""
        return self.process.returncode is None

    def begin(self, do: str, **arguments: object) -> asyncio.Future[Answer]:
        """Give it one command; the future is its answer."""
        assert self.process.stdin is not None
        self._number += 1
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        answer.add_done_callback(_look_at)
        self._answers[self._number] = answer
        line = json.dumps({"id": self._number, "do": do, "arguments": arguments})
        if self._tasks[0].done():
            self._fail()
        else:
            self.process.stdin.write(line.encode() + b"\n")
        return answer

    async def call(self, do: str, **arguments: object) -> Answer:
        """Give it one command, and return its answer.

        Raises:
            Told: it has raised an error.
            Died: it has ended before.
        """
        return await self.begin(do, **arguments)

    async def announced(self, event: str) -> None:
        """Return when it has announced that something has happened."""
        await self._events[event].wait()

    def kill(self) -> int:
        """End it at once; return when, in nanoseconds of the monotonic clock."""
        at = time.monotonic_ns()
        self._is_killed = True
        with suppress(ProcessLookupError):
            self.process.kill()
        return at

    async def close(self) -> None:
        """Have it close its endpoint and end.

        Raises:
            Died: it has not, within 15 seconds, or not well.
        """
        if self._is_killed:
            await self.abort()
            return
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            async with asyncio.timeout(CLOSING_SECONDS):
                status = await self.process.wait()
        except TimeoutError:
            await self.abort(ask=True)
            raise Died(f"the {self.role} has not closed: {self.tail()}") from None
        await asyncio.wait(self._tasks, timeout=1)
        if status:
            raise Died(f"the {self.role} ended with {status}: {self.tail()}")

    async def abort(self, *, ask: bool = False) -> None:
        """End it by its number, and collect what it has said. Idempotent.

        Args:
            ask: let it first say what its threads are doing.
        """
        if self.is_alive and ask:
            with suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGABRT)
            with suppress(TimeoutError):
                async with asyncio.timeout(2):
                    await self.process.wait()
        self.kill()
        await self.process.wait()
        await asyncio.wait(self._tasks, timeout=1)
        for task in self._tasks:
            task.cancel()

    def tail(self) -> str:
        """Return the end of what it has complained of."""
        return self.stderr[-TAIL_NBYTES:].decode(errors="replace").strip()

    async def _hear(self) -> None:
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            said = json.loads(line)
            if "event" in said:
                self._events[said["event"]].set()
                continue
            answer = self._answers.pop(said["id"])
            if answer.done():
                continue
            if "error" in said:
                answer.set_exception(Told(said["error"], said["message"]))
            else:
                answer.set_result(said["result"])
        self._fail()

    def _fail(self) -> None:
        """Fail what nobody will answer."""
        how = "was killed" if self._is_killed else f"died: {self.tail()}"
        while self._answers:
            _, answer = self._answers.popitem()
            if not answer.done():
                answer.set_exception(Died(f"the {self.role} {how}"))

    async def _complain(self) -> None:
        assert self.process.stderr is not None
        while octets := await self.process.stderr.read(1 << 16):
            self.stderr = (self.stderr + octets)[-16 * TAIL_NBYTES :]


def _look_at(answer: asyncio.Future[Answer]) -> None:
    """An answer that no check waits for any more is no unhandled exception."""
    if not answer.cancelled():
        answer.exception()
