"""The child of :mod:`tests.processes`: `python -m tests.children ROLE LOOP SETTINGS`.

It does what each line of its standard input says (a JSON object with "do") and reports on its
standard output. A sender's next write can be told to go wrong, by a `fault`:

* `stall`: it copies the first half, reports `halfway`, and waits for ever
* `mute`: it copies everything, reports `landed`, and never tells the receiver
* `stop`: it reports `halfway` from within the copying, and stops its whole process there; when
  the process is continued, the write goes on and reports `late` at its end
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

import aiomm
from aiomm.buffers.tensors import TokenRows
from aiomm.planes.base import Export, GrantKey, Plane, RemoteArena, Run
from aiomm.planes.registry import make_planes
from tests.processes import SCHEMA, pattern


def report(name: str, **values: object) -> None:
    """Tell the test one thing, at once."""
    line = json.dumps({"report": name, **values}) + "\n"
    os.write(sys.stdout.fileno(), line.encode())


class FaultyPlane(Plane):
    """Another plane, and what goes wrong in its next write."""

    def __init__(self, inner: Plane) -> None:
        self.inner = inner
        self.name = inner.name  # type: ignore[misc]
        self.fault = ""

    def writes_into(self, device: str) -> bool:
        """Say what the inner plane says."""
        return self.inner.writes_into(device)

    def unusable(self) -> str | None:
        """Say what the inner plane says."""
        return self.inner.unusable()

    async def export(self, arena: Any) -> Export:
        """Open the arena as the inner plane does."""
        return await self.inner.export(arena)

    async def attach(self, offer: bytes) -> RemoteArena:
        """Attach as the inner plane does."""
        return FaultyArena(self, await self.inner.attach(offer))


class FaultyArena(RemoteArena):
    """What a sender writes through."""

    def __init__(self, plane: FaultyPlane, inner: RemoteArena) -> None:
        self.plane = plane
        self.inner = inner

    async def write(self, grant: GrantKey, runs: Sequence[Run]) -> None:
        """Write, with the fault that is due; the probe of a handshake has none."""
        fault, is_probe = self.plane.fault, grant.generation == 0
        if is_probe or not fault:
            await self.inner.write(grant, runs)
            return
        self.plane.fault = ""
        if fault == "stop":
            await self.write_and_stop(grant, runs)
            return
        count = 2 if fault == "stall" else 1
        await self.inner.write(grant, [replace(run, count=run.count // count) for run in runs])
        report("halfway" if fault == "stall" else "landed")
        await asyncio.Event().wait()

    async def write_and_stop(self, grant: GrantKey, runs: Sequence[Run]) -> None:
        """Write, and stop the process in the middle of the first run."""
        stopping = StoppingRows(runs[0].rows, runs[0].first + runs[0].count)
        error = None
        try:
            await self.inner.write(grant, [replace(runs[0], rows=stopping), *runs[1:]])
        except aiomm.PlaneUnavailable as exc:
            error = exc.message
            raise
        finally:
            report("late", error=error)

    async def quiesce(self) -> None:
        """Wait as the inner plane does."""
        await self.inner.quiesce()

    async def aclose(self) -> None:
        """Detach."""
        await self.inner.aclose()


class StoppingRows(TokenRows):
    """Rows whose copying stops the process when half of the last piece is done."""

    def __init__(self, rows: TokenRows, stop: int) -> None:
        super().__init__(rows.name, rows.field, rows.tensor, rows._source)
        self.stop = stop

    def view(self, first: int, count: int) -> None:
        """Have every plane copy, rather than read where the rows are."""

    def copy_into(self, target: memoryview, first: int, count: int) -> None:
        """Copy as ordinary rows do, and stop in between."""
        half, rows = count // 2, pattern_rows(self)
        middle = half * self.row_nbytes
        rows.copy_into(target[:middle], first, half)
        if first + count == self.stop:
            report("halfway")
            # To this thread: else it might go on while another one takes the signal.
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        rows.copy_into(target[middle:], first + half, count - half)


def pattern_rows(rows: TokenRows) -> TokenRows:
    """Return the ordinary rows that `rows` hide."""
    return TokenRows(rows.name, rows.field, rows.tensor, rows._source)


class Actor:
    """What both kinds of child can be told."""

    endpoint: aiomm.Sender | aiomm.Receiver

    def __init__(self) -> None:
        self.tasks: set[asyncio.Task[None]] = set()

    def background(self, request_id: str, awaitable: Any) -> None:
        """Await something beside the commands, and report how it ends."""
        task = asyncio.get_running_loop().create_task(self.report_end(request_id, awaitable))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def report_end(self, request_id: str, awaitable: Any) -> None:
        """Report the result, or the error by its type."""
        try:
            values = self.result(request_id, await awaitable)
        except aiomm.AiommError as exc:
            values = {"error": type(exc).__name__, "message": str(exc), "at": time.monotonic()}
        report("ended", request_id=request_id, **values)

    def result(self, request_id: str, result: Any) -> dict[str, Any]:
        """Return what to report of a success."""
        raise NotImplementedError

    def do_block(self, seconds: float) -> None:
        """Hold the loop, as an encoder does."""
        time.sleep(seconds)
        report("unblocked")

    def do_where(self) -> None:
        """Report where the endpoint listens."""
        report("address", address=self.endpoint.address)

    def do_fork(self) -> None:
        """Leave a child of ours behind that lives until the test kills it."""
        child = os.fork()
        if child == 0:
            while True:
                signal.pause()
        report("forked", pid=child)

    def do_leave(self) -> None:
        """Leave the loop without closing anything."""
        raise asyncio.CancelledError


class SenderActor(Actor):
    """A sender that does what it is told."""

    endpoint: aiomm.Sender

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.planes = [FaultyPlane(plane) for plane in make_planes(settings.pop("planes", "auto"))]
        self.endpoint = aiomm.Sender(SCHEMA, planes=self.planes, **settings)
        self.transfers: dict[str, aiomm.Transfer] = {}

    def do_claim(self, ticket: str, num_tokens: int | None = None, timeout: float = 60) -> None:
        """Claim, and report every state from SENDING on."""
        transfer = self.endpoint.claim(ticket, num_tokens=num_tokens, timeout=timeout)
        self.transfers[transfer.request_id] = transfer
        self.background(transfer.request_id, self.followed(transfer))

    async def followed(self, transfer: aiomm.Transfer) -> aiomm.TransferStats:
        """Report the states of a transfer; return what it returns."""
        async for state in transfer.events():
            report("state", request_id=transfer.request_id, state=str(state))
        return await transfer

    def do_give(self, request_id: str, seed: int, num_tokens: int, fault: str = "") -> None:
        """Give the tensors of a claimed request; `fault` befalls the write."""
        self.do_fault(fault)
        self.transfers[request_id].send(pattern(seed, num_tokens))

    def do_send(
        self,
        ticket: str,
        seed: int,
        num_tokens: int,
        fault: str = "",
        timeout: float = 60,
        to: str | None = None,
    ) -> None:
        """Claim and send in one."""
        self.do_fault(fault)
        tensors = pattern(seed, num_tokens)
        request_id = json.loads(ticket)["request_id"] if ticket.startswith("{") else ticket
        self.background(request_id, self.endpoint.send(ticket, tensors, to=to, timeout=timeout))

    def do_offer(self, request_id: str, seed: int, num_tokens: int) -> None:
        """Offer, and report the ticket."""
        offered = self.endpoint.offer(request_id, pattern(seed, num_tokens))
        report("ticket", ticket=offered.to_json())

    def do_fault(self, fault: str) -> None:
        """Have the next write go wrong."""
        for plane in self.planes:
            plane.fault = fault

    def do_cancel(self, request_id: str) -> None:
        """Give a claimed request up."""
        self.transfers[request_id].cancel("told to")

    def result(self, request_id: str, result: Any) -> dict[str, Any]:
        """Return the plane, those that were refused, and the chunks."""
        return {
            "plane": result.plane,
            "refused": list(result.refused_planes),
            "chunks": list(result.buffered_chunks),
            "error": None,
        }


class ReceiverActor(Actor):
    """A receiver that does what it is told."""

    endpoint: aiomm.Receiver

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        sys.modules["torch"] = None  # type: ignore[assignment]  # numpy is there much sooner
        self.endpoint = aiomm.Receiver(SCHEMA, **settings)

    def do_expect(self, request_id: str, timeout: float = 60, is_dropped: bool = False) -> None:
        """Expect and receive; report the ticket, and later the end."""
        ticket = self.endpoint.expect(request_id, timeout=timeout)
        report("ticket", ticket=ticket.to_json())
        if is_dropped:
            task = asyncio.ensure_future(self.receive_and_drop(request_id))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        else:
            self.background(request_id, self.endpoint.receive(request_id))

    async def receive_and_drop(self, request_id: str) -> None:
        """Receive, and never release."""
        await self.endpoint.receive(request_id)
        report("dropped")

    def result(self, request_id: str, result: Any) -> dict[str, Any]:
        """Return what has arrived, and let go of it."""
        with result:
            received = {name: result[name].tobytes() for name in result}
        seed = int.from_bytes(received["ids"][:4], "little") // 1_000_000
        is_right = received == pattern(seed, result.num_tokens)
        return {"num_tokens": result.num_tokens, "is_right": is_right, "error": None}


async def obey(actor: SenderActor | ReceiverActor) -> None:
    """Do what standard input says until it ends; then close."""
    commands = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    await actor.endpoint.start()
    report("ready", address=actor.endpoint.address)
    while line := await commands.readline():
        arguments = json.loads(line)
        do = arguments.pop("do")
        if do == "close":
            break
        try:
            getattr(actor, f"do_{do}")(**arguments)
        except aiomm.AiommError as exc:
            report("raised", error=type(exc).__name__, message=str(exc))
        except asyncio.CancelledError:
            return
    await actor.endpoint.aclose()
    if actor.tasks:
        await asyncio.wait(actor.tasks)
    report("closed")


async def main(role: str, settings: str) -> None:
    """Play one role."""
    given = json.loads(settings)
    await obey(SenderActor(given) if role == "sender" else ReceiverActor(given))


if __name__ == "__main__":
    role, loop, settings = sys.argv[1:]
    if loop == "uvloop":
        import uvloop

        uvloop.run(main(role, settings))
    else:
        asyncio.run(main(role, settings))
