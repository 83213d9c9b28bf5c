"""A child with a sender, whose requests are made of a seed."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable
from typing import Any, Self

import aiomm
from aiomm.planes.registry import make_planes
from benchmarks.gpu.actor import Actor
from benchmarks.gpu.content import contents, schema_of
from benchmarks.gpu.repeating import Repeating
from benchmarks.gpu.tensors import Late

__all__ = ["SenderActor"]


class SenderActor(Actor):
    """A sender."""

    endpoint: aiomm.Sender

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.fields = settings["fields"]
        self.schema = schema_of(self.fields)
        self.transfers: dict[str, aiomm.Transfer] = {}
        self.late: dict[str, Callable[[], float]] = {}
        self._sources: dict[int, Any] = {}
        self._plain: Callable[[int], float] | None = None
        self.repeating: Repeating | None = None

    @classmethod
    async def begin(cls, settings: dict[str, Any]) -> Self:
        """Return one that has started, in a process that uses CUDA."""
        actor = cls(settings)
        actor.tensors.check_health(actor.device)
        actor.endpoint = actor.new_endpoint()
        await actor.endpoint.start()
        return actor

    async def aclose(self) -> None:
        """Close."""
        await self.endpoint.aclose()

    def new_endpoint(self) -> aiomm.Sender:
        """Return a sender over the planes of the settings."""
        spec = self.settings.get("planes", "cuda_ipc")
        if not self.settings.get("repeats"):
            return aiomm.Sender(self.schema, planes=spec)
        self.repeating = Repeating(make_planes(spec)[0])
        return aiomm.Sender(self.schema, planes=[self.repeating])

    async def do_send(
        self, ticket: str, seed: int, num_tokens: int, source: str = "cuda", device: int = 0
    ) -> dict[str, Any]:
        """Send one request; `registered` tensors are of the GPU, and told to the planes."""
        if source != "registered":
            tensors = self._tensors(seed, num_tokens, source, device)
            return _told(await self.endpoint.send(ticket, tensors, timeout=60))
        tensors = self._tensors(seed, num_tokens, "cuda", device)
        await self._register(tensors)
        sent = _told(await self.endpoint.send(ticket, tensors, timeout=60))
        for tensor in tensors.values():
            await self.endpoint.unregister(tensor)
        return sent

    async def do_send_anew(self, ticket: str, seed: int, num_tokens: int) -> dict[str, Any]:
        """Send one request with a sender of its own, and close that."""
        async with self.new_endpoint() as endpoint:
            tensors = self._tensors(seed, num_tokens, "cuda", self.device)
            return _told(await endpoint.send(ticket, tensors, timeout=60))

    async def do_send_late(
        self, ticket: str, seed: int, num_tokens: int, delay: float, by: str
    ) -> dict[str, Any]:
        """Send what a busy stream has still to make.

        Args:
            by: how the sender learns of the stream: `argument`, or `current`.
        """
        late = self._late(seed, num_tokens, delay)
        tensors = {name: each.tensor for name, each in late.items()}
        (stream,) = {id(each.stream): each.stream for each in late.values()}.values()
        began = min(each.began for each in late.values())
        transfer = self.endpoint.claim(ticket, num_tokens=num_tokens, timeout=60)
        if by == "argument":
            transfer.send(tensors, stream=stream)
        else:
            with self.tensors.use_stream(stream):
                transfer.send(tensors)
        await transfer
        delays = await asyncio.to_thread(lambda: [each.delay() for each in late.values()])
        return {"began": began, "delay": max(delays)}

    # Speed.

    async def do_send_timed(self, ticket: str, num_tokens: int) -> float:
        """Send rows that are there; the receiver is told when. Return what a plain copy takes."""
        nbytes = num_tokens * self.schema.token_nbytes
        if num_tokens not in self._sources:
            self._sources = {num_tokens: self._tensors(1, num_tokens, "cuda", self.device)}
            self._plain = self.tensors.plain_copy(self.device, nbytes)
            if self.settings.get("registers"):
                await self._register(self._sources[num_tokens])
        assert self._plain is not None
        plain = self._plain(nbytes)
        transfer = self.endpoint.claim(ticket, num_tokens=num_tokens)
        await _left_alloc(transfer)
        began = time.monotonic_ns()
        transfer.send(self._sources[num_tokens], metadata={"began": began})
        await transfer
        return plain

    # A long queue of copies.

    async def do_send_repeatedly(
        self, ticket: str, seed: int, num_tokens: int, repeats: int
    ) -> dict[str, Any]:
        """Send one request, each byte of it many times."""
        assert self.repeating is not None
        self.repeating.repeats = repeats
        try:
            return await self.do_send(ticket, seed, num_tokens)
        finally:
            self.repeating.repeats = 1

    # Cancelling.

    async def do_send_and_cancel(
        self, ticket: str, seed: int, num_tokens: int, moment: str, delay: float
    ) -> dict[str, str]:
        """Begin to send, and cancel; return how the transfer has ended, and where it was then.

        Args:
            moment: `before` the tensors are given, at `once`, after so many `turns 3` of the loop,
                so many after the grant (`sending 3`), after so many `seconds 0.01`, or by
                cancelling the `await`.
            delay: of the tensors; 0 for tensors that are there.
        """
        kind, _, number = moment.partition(" ")
        if delay:
            late = self._late(seed, num_tokens, delay)
            tensors = {name: each.tensor for name, each in late.items()}
            (stream,) = {id(each.stream): each.stream for each in late.values()}.values()
            self.late = {name: each.delay for name, each in late.items()}
            del late
        else:
            tensors, stream = self._tensors(seed, num_tokens, "cuda", self.device), None
        transfer = self.endpoint.claim(ticket, num_tokens=num_tokens, timeout=60)
        if kind != "before":
            transfer.send(tensors, stream=stream)
        del tensors
        if kind == "sending":
            await _left_alloc(transfer)
        if kind in ("turns", "sending"):
            for _ in range(int(number)):
                await asyncio.sleep(0)
        elif kind == "seconds":
            await asyncio.sleep(float(number))
        state = str(transfer.state)
        return {"end": await _cancelled(transfer, by_await=kind == "await"), "state": state}

    def do_allocated(self) -> int:
        """Return the bytes of all tensors that somebody still keeps."""
        gc.collect()
        return self.tensors.allocated_nbytes(self.device)

    def do_ready(self) -> bool:
        """Return when the late tensors are made. It holds the loop, as any encoder may."""
        return all(delay() for delay in self.late.values())

    async def _register(self, tensors: dict[str, Any]) -> None:
        for tensor in tensors.values():
            await self.endpoint.register(tensor)

    def _tensors(self, seed: int, num_tokens: int, source: str, device: int) -> dict[str, Any]:
        return {
            name: self.tensors.make(
                source, device, content, field.dtype, (num_tokens, *field.shape)
            )
            for (name, field), content in zip(
                self.schema.items(), contents(self.fields, seed, num_tokens).values(), strict=True
            )
        }

    def _late(self, seed: int, num_tokens: int, delay: float) -> dict[str, Late]:
        """Return the tensors of a schema with one field, which are made later."""
        ((name, field),) = self.schema.items()
        content = contents(self.fields, seed, num_tokens)[name]
        shape = (num_tokens, *field.shape)
        return {name: self.tensors.late(self.device, content, field.dtype, shape, delay)}


async def _left_alloc(transfer: aiomm.Transfer) -> None:
    """Return when it has its grant."""
    async for state in transfer.events():
        if state is not aiomm.State.ALLOC:
            return


async def _cancelled(transfer: aiomm.Transfer, *, by_await: bool) -> str:
    """Cancel a transfer, or the wait for it; return how it has ended."""
    waiting = asyncio.ensure_future(_ended(transfer))
    if by_await:
        await asyncio.sleep(0)
        waiting.cancel()
    else:
        transfer.cancel()
    await asyncio.wait([waiting])
    return await _ended(transfer)


async def _ended(transfer: aiomm.Transfer) -> str:
    try:
        await transfer
    except aiomm.AiommError as exc:
        return type(exc).__name__
    return "Done"


def _told(stats: aiomm.TransferStats) -> dict[str, Any]:
    return {
        "plane": stats.plane,
        "refused": list(stats.refused_planes),
        "chunks": list(stats.buffered_chunks),
        "done": time.monotonic_ns(),
    }
