"""The sender's driver: attaches planes, runs writes, and tells the user how transfers end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import ClassVar, NamedTuple

from ..buffers.checksum import digests_of_rows, new_digest
from ..buffers.tensors import TokenRows
from ..config import SenderSettings
from ..errors import AiommError, Failure, PlaneUnavailable, Reason, error_from
from ..gpu.choice import gpu_runtime, is_in_use
from ..planes.base import GrantKey, Plane, Run
from ..protocol.commands import (
    Command,
    Fail,
    Finish,
    Greet,
    Part,
    ProbeResult,
    Quiesce,
    Serve,
    Tell,
    Write,
)
from ..protocol.frames import Hello, specs_of
from ..protocol.sending import SendEndpoint
from ..protocol.session import Timing
from ..types import Extent, Schema, TransferId
from .base import Driver, new_epoch
from .checksums import AT_ONCE_NBYTES, Checksums, Chunk
from .routes import Route, find_route

__all__ = ["SendDriver", "Watcher"]

logger = logging.getLogger("aiomm.sender")

CAUSE_DELAY = 0.1
"""Seconds that a failed write waits for the word of what broke it."""


class Watcher(NamedTuple):
    """Whoever wants to know how a transfer goes on: two functions of its own."""

    changed: Callable[[], None]
    """The transfer has entered another state."""
    ended: Callable[[AiommError | None, Route | None], None]
    """The transfer is over; the error is None if everything was accepted."""


class _RouteKey(NamedTuple):
    """Tensors of a GPU may go another way than those of the host."""

    peer: int
    is_of_gpu: bool


class SendDriver(Driver[SendEndpoint]):
    """Runs one :class:`SendEndpoint`.

    Args:
        schema: of the tensors.
        planes: in order of preference.
    """

    listens: ClassVar[bool] = False
    settings: SenderSettings

    def __init__(
        self,
        schema: Schema,
        settings: SenderSettings,
        bind: str | None,
        planes: Sequence[Plane],
        name: str,
    ) -> None:
        super().__init__(settings, bind, name)
        if settings.checksum:
            new_digest()  # an ImportError now, not at the first write
        self.planes = planes
        self.endpoint = SendEndpoint(
            new_epoch(),
            schema,
            Hello("sender", name, specs_of(schema)),
            timing=Timing.for_timeout(settings.peer_timeout),
            max_peers=settings.max_peers,
            max_waiting=settings.max_waiting,
        )
        self._checksums = Checksums()
        self.sources: dict[int, Mapping[str, TokenRows]] = {}
        """The tensors of each transfer, until it is settled."""
        self.watchers: dict[int, Watcher] = {}
        self.offers: dict[str, tuple[Mapping[str, TokenRows], Callable[[], Watcher]]] = {}
        """The tensors of each standing offer, and who watches a transfer that begins."""
        self._hellos: dict[int, Hello] = {}
        """What each receiver said."""
        self._routes: dict[_RouteKey, asyncio.Task[Route]] = {}
        self._standing: dict[_RouteKey, Route] = {}
        """The routes that were found."""
        self._searching: dict[int, asyncio.Lock] = {}
        """For each receiver: one search at a time, since they share a probe slot."""
        self._detachments: set[asyncio.Task[None]] = set()
        self._probes: dict[tuple[int, str], asyncio.Future[bool]] = {}
        self._ends: dict[int, asyncio.Event] = {}
        """Set when a transfer ends whose write has failed."""
        self._used: dict[int, Route] = {}
        """The route each transfer was written over."""

    async def set_up(self) -> None:
        """Load what leads to CUDA, if it is in use: at the first tensor it would hold the loop."""
        if is_in_use():
            with suppress(PlaneUnavailable):  # tensors of a GPU will say so, if any come
                await asyncio.to_thread(gpu_runtime)

    async def tear_down(self) -> None:
        """Detach from every receiver."""
        for peer in {key.peer for key in self._routes}:
            self._detach(peer)
        await asyncio.gather(*self._detachments)
        await self._checksums.aclose()

    def unfinished(self) -> list[int]:
        """Return all transfers that are watched."""
        return list(self.watchers)

    def give_up(self, number: int, failure: Failure) -> None:
        """Fail one transfer."""
        self.endpoint.fail(number, failure, self.now())

    async def drain(self) -> None:
        """Return when no write runs any more that matters to anybody.

        One whose transfer was accepted only waits for the plane's own answer. It must not take
        the receiver's farewell for a break, and connect anew.
        """
        while not self.has_drained():
            await self.next_pump()
        for task in self._tasks:
            task.cancel()

    def has_drained(self) -> bool:
        """Whether no write can land any more."""
        return not self.endpoint.num_live

    def execute(self, command: Command) -> None:
        """Carry out one command of the sender's."""
        match command:
            case Write():
                if not self._write_at_once(command):
                    self.spawn(self._write(command), f"write {command.transfer}")
            case Quiesce(transfer):
                self.spawn(self._quiesce(transfer), f"quiesce {transfer}")
            case Serve(transfer):
                rows, watch = self.offers[transfer.request_id]
                self.sources[transfer.generation] = rows
                self.watchers[transfer.generation] = watch()
            case Tell(transfer):
                if transfer.generation in self.watchers:
                    self.watchers[transfer.generation].changed()
            case Finish(transfer):
                self._ended(transfer.generation, None)
            case Fail(generation, failure, story):
                logger.info("x transfer #%d failed: %s: %s", generation, *failure)
                self._ended(
                    generation, error_from(failure, story=story, is_closing=self.is_closing)
                )
            case Greet(peer, hello):
                self._find_route(peer, hello)
            case ProbeResult(peer, plane, matched):
                answer = self._probes.pop((peer, plane), None)
                if answer is not None and not answer.done():
                    answer.set_result(matched)
            case _:
                raise AssertionError(f"not a sender's command: {command}")

    def parted(self, command: Part) -> None:
        """Detach from a receiver that is gone for good."""
        for key in [key for key in self._probes if key[0] == command.peer]:
            self._probes.pop(key).cancel()
        self._detach(command.peer)

    # Routes.

    def _find_route(self, peer: int, hello: Hello) -> None:
        if hello.role == "receiver":
            self._hellos[peer] = hello
            self._searching[peer] = asyncio.Lock()
            self._search(_RouteKey(peer, False), hello)

    def _search(self, key: _RouteKey, hello: Hello) -> asyncio.Task[Route]:
        """Begin to look for a plane that reaches a receiver."""
        peer, searching = key.peer, self._searching[key.peer]

        def probe(plane: str, nonce: bytes) -> asyncio.Future[bool]:
            answer: asyncio.Future[bool] = self.loop.create_future()
            self._probes[peer, plane] = answer
            answer.add_done_callback(partial(self._probed, (peer, plane)))
            self.endpoint.probe(peer, plane, nonce)
            self.pump()
            return answer

        async def search() -> Route:
            async with searching:
                strict = self.settings.strict
                return await find_route(hello, self.planes, strict=strict, probe=probe)

        task = self.loop.create_task(search(), name=f"{self.name} route to {hello.name}")
        task.add_done_callback(partial(self._searched, key))
        self._routes[key] = task
        return task

    def _probed(self, key: tuple[int, str], answer: asyncio.Future[bool]) -> None:
        if self._probes.get(key) is answer:  # cancelled, perhaps when the peer was gone already
            del self._probes[key]

    def _searched(self, key: _RouteKey, task: asyncio.Task[Route]) -> None:
        is_found = not task.cancelled() and task.exception() is None
        if is_found and self._routes.get(key) is task:
            self._standing[key] = task.result()

    def _detach(self, peer: int) -> None:
        """Begin to detach from a receiver. Nothing cancels it, so that nothing stays mapped."""
        self._hellos.pop(peer, None)
        self._searching.pop(peer, None)
        for key in [key for key in self._routes if key.peer == peer]:
            route = self._routes.pop(key)
            self._standing.pop(key, None)
            detachment = self.loop.create_task(_detached(route), name=f"{self.name} detach")
            self._detachments.add(detachment)
            detachment.add_done_callback(self._detachments.discard)

    async def _route_of(self, generation: int) -> Route:
        """Return the route of a transfer's receiver; the search is shared by all transfers."""
        key = self._route_key(generation)
        hello = self._hellos.get(key.peer)
        if hello is None:
            raise PlaneUnavailable("the receiver is gone")
        task = self._routes.get(key)
        if task is None or (task.done() and (task.cancelled() or task.exception())):
            task = self._search(key, hello)  # what was wrong then may be over
        if task.done():
            return task.result()
        await asyncio.wait([task])
        if task.cancelled():
            raise PlaneUnavailable("the receiver left before a plane was found")
        return task.result()

    def _route_key(self, generation: int) -> _RouteKey:
        """Return which route a transfer takes: a pool on the host is reached by one for all."""
        peer = self.endpoint.peer_of(generation)
        hello = self._hellos.get(peer)
        if hello is None or hello.pool_device == "cpu":
            return _RouteKey(peer, False)
        rows = self.sources.get(generation, {}).values()
        return _RouteKey(peer, any(each.device != "cpu" for each in rows))

    # Writes.

    def _write_at_once(self, command: Write) -> bool:
        """Carry a short write out now; False if a task has to do it."""
        generation = command.transfer.generation
        route = self._standing.get(self._route_key(generation))
        if route is None or generation not in self.watchers:
            return False
        self._used[generation] = route
        grant = GrantKey(route.link, generation, command.sequence)
        try:
            runs = runs_of(self.sources[generation], route, command.start, command.extents)
            if self.settings.checksum and sum(run.nbytes for run in runs) > AT_ONCE_NBYTES:
                return False
            if not route.arena.write_at_once(grant, runs):
                return False
            checksum = b""
            if self.settings.checksum:
                checksum = self._checksums.at_once(self._chunk_of(command, route))
        except Exception:  # the task will meet it again, and knows what to do
            return False
        self.endpoint.write_finished(generation, self.now(), checksum, route.plane)
        self._let_go(generation)
        return True

    async def _write(self, command: Write) -> None:
        generation, checksum, plane = command.transfer.generation, b"", ""
        try:
            route = self._used[generation] = await self._route_of(generation)
            if generation in self.watchers:  # it has not failed while a plane was looked for
                runs = runs_of(self.sources[generation], route, command.start, command.extents)
                grant = GrantKey(route.link, generation, command.sequence)
                if self.settings.checksum:
                    checksum = await self._checksums.by_threads(self._chunk_of(command, route))
                plane = route.plane
                if route.arena.carries_notes:
                    note = partial(self.endpoint.note, generation, checksum, plane)
                    await route.arena.write_and_note(grant, runs, note)
                else:
                    await route.arena.write(grant, runs)
        except Exception as exc:  # whatever a plane raises fails this transfer and no other
            await self._end_of(generation)
            self.endpoint.write_failed(generation, _failure_of(exc), self.now())
        else:
            self.endpoint.write_finished(generation, self.now(), checksum, plane)
        self.pump()
        self._let_go(generation)

    def _chunk_of(self, command: Write, route: Route) -> Chunk:
        rows = self.sources[command.transfer.generation]
        count = sum(extent.num_tokens for extent in command.extents)
        return Chunk(route.layout.schema, count, partial(digests_of_rows, rows, command.start))

    async def _end_of(self, generation: int) -> None:
        """Return when the transfer has ended, or soon.

        What breaks a write is often the peer's death or its abort, and the word of that comes
        another way: it says more than the plane can.
        """
        if generation in self.watchers:
            self._ends[generation] = asyncio.Event()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ends[generation].wait(), CAUSE_DELAY)
            del self._ends[generation]

    async def _quiesce(self, transfer: TransferId) -> None:
        """Wait until the failed write cannot land. If that fails, it is never called drained."""
        route = self._used.get(transfer.generation)
        if route is not None:
            await route.arena.quiesce()
        self.endpoint.drained(transfer.generation, self.now())
        self.pump()
        self._let_go(transfer.generation)

    def _let_go(self, generation: int) -> None:
        """Drop the tensors of a transfer that is over and has no write left."""
        if not self.endpoint.has(generation):
            self.sources.pop(generation, None)
            self._used.pop(generation, None)

    def _ended(self, generation: int, error: AiommError | None) -> None:
        if generation in self._ends:
            self._ends[generation].set()
        watcher = self.watchers.pop(generation, None)
        if watcher is not None:
            watcher.ended(error, self._used.get(generation))
        self._let_go(generation)


def runs_of(
    rows: Mapping[str, TokenRows], route: Route, start: int, extents: tuple[Extent, ...]
) -> list[Run]:
    """Return what has to be copied where, for tokens from `start` on into `extents`."""
    runs = []
    for name, each in rows.items():
        first = start
        for extent in extents:
            offset = route.layout.field_range(name, extent).start
            runs.append(Run(each, first, extent.num_tokens, offset))
            first += extent.num_tokens
    return runs


def _failure_of(exc: Exception) -> Failure:
    if isinstance(exc, AiommError):
        return Failure(exc.reason, exc.message)
    logger.error("! a write failed in an unforeseen way", exc_info=exc)
    return Failure(Reason.PLANE, f"writing failed: {type(exc).__name__}: {exc}")


async def _detached(task: asyncio.Task[Route]) -> None:
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled() and task.exception() is None:
        await task.result().arena.aclose()
