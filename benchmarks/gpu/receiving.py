"""A child with a receiver, which compares what arrives with its seed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Self

import aiomm
from aiomm.buffers.cuda import CudaArena
from benchmarks.gpu.actor import Actor
from benchmarks.gpu.arenas import POISON
from benchmarks.gpu.content import contents, difference, schema_of
from benchmarks.gpu.tensors import SlowRead

__all__ = ["ReceiverActor"]

BIND = "tcp://127.0.0.1:*"
SHAPE = ("blocks", "block_size", "default_blocks", "max_peers", "strict")
"""Settings of the child that are the receiver's."""


class ReceiverActor(Actor):
    """A receiver."""

    endpoint: aiomm.Receiver

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.fields = settings["fields"]
        self.slow: SlowRead | None = None
        self.stop_busy: Callable[[], None] | None = None

    @classmethod
    async def begin(cls, settings: dict[str, Any]) -> Self:
        """Return one that has started."""
        actor = cls(settings)
        pool = settings.get("pool", f"cuda:{actor.device}")
        schema = schema_of(actor.fields)
        shape = {name: settings[name] for name in SHAPE if name in settings}
        actor.endpoint = aiomm.Receiver(
            schema, bind=BIND, device=pool, planes=settings.get("planes", "cuda_ipc"), **shape
        )
        if pool != "cpu":
            actor.tensors.check_health(actor.device)
        await actor.endpoint.start()
        return actor

    async def aclose(self) -> None:
        """Close."""
        if self.stop_busy is not None:
            self.stop_busy()
        await self.endpoint.aclose()

    def do_expect(self, request_id: str) -> str:
        """Return the ticket of a request."""
        return self.endpoint.expect(request_id, timeout=60).to_json()

    async def do_receive(self, request_id: str, seed: int) -> dict[str, Any]:
        """Receive a request and compare it."""
        async with self.endpoint.receive(request_id, timeout=60) as lease:
            arrived = time.monotonic_ns()
            wrong = await asyncio.to_thread(self._difference, lease, seed)
            place = {name: str(getattr(lease[name], "device", "cpu")) for name in lease}
            return {
                "arrived": arrived,
                "wrong": wrong,
                "is_view": lease.is_view,
                "plane": lease.stats.plane,
                "places": place,
                "kind": type(next(iter(lease.values()))).__module__.partition(".")[0],
            }

    async def do_receive_timed(self, request_id: str) -> float:
        """Receive a request; return the seconds since it was sent."""
        async with self.endpoint.receive(request_id, timeout=60) as lease:
            arrived = time.monotonic_ns()
            return float(arrived - lease.metadata["began"]) / 1e9

    async def do_fail(self, request_id: str) -> dict[str, Any]:
        """Receive a request that does not come; return what is raised, and when."""
        try:
            lease = await self.endpoint.receive(request_id, timeout=60)
        except aiomm.AiommError as exc:
            return {"kind": type(exc).__name__, "message": str(exc), "at": time.monotonic_ns()}
        lease.release()
        return {"kind": "", "message": "it came", "at": time.monotonic_ns()}

    def do_cancel(self, request_id: str) -> None:
        """Give a request up."""
        self.endpoint.cancel(request_id)

    def do_metrics(self) -> dict[str, int]:
        """Return the figures of the moment."""
        return self.endpoint.metrics()

    async def do_read_slowly(self, request_id: str, delay: float) -> dict[str, bool]:
        """Receive, begin to read on a busy stream, and release at once."""
        lease = await self.endpoint.receive(request_id, timeout=60)
        self.slow = self.tensors.read_late(lease["x"], self.device, delay)
        lease.release(self.slow.stream)
        leased = self.endpoint.metrics()["blocks_leased"] > 0
        return {"leased": leased, "is_over": self.slow.is_over()}

    def do_slow_is_over(self) -> bool:
        """Whether the slow reader is done."""
        assert self.slow is not None
        return self.slow.is_over()

    def do_slow_difference(self, seed: int, num_tokens: int) -> str:
        """Return how what the slow reader has read differs from a request."""
        assert self.slow is not None
        return difference(self.slow.content(), contents(self.fields, seed, num_tokens)["x"])

    def do_poison(self) -> None:
        """Fill the pool, which nobody may write to now."""
        self.tensors.fill(self._whole(), POISON)

    def do_poisoned(self) -> str:
        """Return what of the pool has changed since."""
        nbytes = self._arena().nbytes
        return difference(self.tensors.content(self._whole()), bytes([POISON]) * nbytes)

    def do_busy(self, *, on: bool) -> None:
        """Keep the GPU busy, or no longer."""
        if on:
            self.stop_busy = self.tensors.busy(self.device)
        elif self.stop_busy is not None:
            self.stop_busy()
            self.stop_busy = None

    def _difference(self, lease: aiomm.Lease, seed: int) -> str:
        expected = contents(self.fields, seed, lease.num_tokens)
        for name, array in lease.items():
            wrong = difference(self.tensors.content(array), expected[name])
            if wrong:
                return f"{name}: {wrong}"
        return ""

    def _arena(self) -> CudaArena:
        arena = self.endpoint._driver.memory.arena
        assert isinstance(arena, CudaArena)
        return arena

    def _whole(self) -> Any:
        memory = self._arena().memory
        nbytes = self._arena().nbytes
        return self.runtime.flat_array(memory.device, memory.address, nbytes, memory)
