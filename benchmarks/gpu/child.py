"""The far end of :mod:`.peers`: `python -m benchmarks.gpu.child ROLE LIMIT`, told by lines of JSON.

Commands run side by side. When standard input ends, so does this, after its endpoint is closed.
Whatever libraries print goes to standard error.
"""

from __future__ import annotations

import asyncio
import faulthandler
import importlib
import json
import os
import sys
import traceback
from collections.abc import Awaitable
from typing import Any

from benchmarks.gpu.actor import Actor, announce_on
from benchmarks.latency import run

ROLES = {
    "bare": "benchmarks.gpu.bare:Bare",
    "arena": "benchmarks.gpu.arenas:ArenaActor",
    "sender": "benchmarks.gpu.sending:SenderActor",
    "receiver": "benchmarks.gpu.receiving:ReceiverActor",
}
LINE_NBYTES = 1 << 24


class Obedient:
    """Does what it is told, and answers."""

    def __init__(self, role: str, answers: int) -> None:
        self.role = role
        self.answers = answers
        self.actor: Actor | None = None
        self.tasks: set[asyncio.Task[None]] = set()

    async def obey(self) -> None:
        """Do what standard input says until it ends; then close."""
        commands = asyncio.StreamReader(limit=LINE_NBYTES)
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
        while line := await commands.readline():
            task = loop.create_task(self.answer(json.loads(line)))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        if self.actor is not None:
            await self.actor.aclose()
        for task in self.tasks:
            task.cancel()

    async def answer(self, command: dict[str, Any]) -> None:
        """Do one thing, and say what has come of it."""
        said: dict[str, Any] = {"id": command["id"]}
        try:
            said["result"] = await self.do(command["do"], command["arguments"])
        except Exception as exc:
            traceback.print_exc()
            said |= {"error": type(exc).__name__, "message": str(exc)}
        octets = memoryview(json.dumps(said).encode() + b"\n")
        while octets:
            octets = octets[os.write(self.answers, octets) :]

    async def do(self, name: str, arguments: dict[str, Any]) -> Any:
        """Return what the actor returns."""
        if name == "begin":
            module, _, attribute = ROLES[self.role].partition(":")
            kind: type[Actor] = getattr(importlib.import_module(module), attribute)
            self.actor = await kind.begin(arguments["settings"])
            return None
        result = getattr(self.actor, f"do_{name}")(**arguments)
        return await result if isinstance(result, Awaitable) else result


def main() -> None:
    """Play one role."""
    role, limit = sys.argv[1:]
    faulthandler.dump_traceback_later(float(limit), exit=True)
    answers = os.dup(1)
    os.dup2(2, 1)
    announce_on(answers)
    run(Obedient(role, answers).obey())


if __name__ == "__main__":
    main()
