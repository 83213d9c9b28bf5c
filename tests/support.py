"""What the tests of the public API share: a schema, tensors, pairs of endpoints, and a harness."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, TypeVar

import pytest
import torch

from aiomm import AiommError, Field, Receiver, Schema, Sender, State, Transfer
from aiomm.control.base import Channel, Peer
from aiomm.planes.memory import Faults, MemoryPlane

__all__ = [
    "ANYWHERE",
    "SCHEMA",
    "SMALL_POOL",
    "after_packets",
    "assert_idle",
    "cancelled_at",
    "error_of",
    "faulty_pair",
    "free_blocks",
    "frozen_imports",
    "granted",
    "logged",
    "pair",
    "same",
    "tensors_of",
    "until",
]

_Result = TypeVar("_Result")

ANYWHERE = "tcp://127.0.0.1:0"
"""Bind here in tests."""

SCHEMA = Schema(
    input_embeddings=Field("bfloat16", 64),
    fill_ids=Field("int32"),
    mrope_positions=Field("int32", 3),
)
"""The schema of the README with rows of 144 bytes instead of 7 KiB."""

SMALL_POOL: Mapping[str, Any] = {"blocks": 8, "block_size": 16, "default_blocks": 2}
"""128 tokens in all, 32 by default."""


@pytest.fixture(scope="module", autouse=True)
def frozen_imports() -> Iterator[None]:
    """Take torch's objects out of every later collection: two of 0.1 s for each test.

    A test module that imports it has it.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def tensors_of(num_tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return tensors of `SCHEMA`; another seed gives other values everywhere."""
    random = torch.Generator().manual_seed(seed)
    return {
        "input_embeddings": torch.randn(num_tokens, 64, generator=random).bfloat16(),
        "fill_ids": torch.arange(num_tokens, dtype=torch.int32) + 1000 * seed,
        "mrope_positions": torch.randint(
            -9999, 9999, (num_tokens, 3), dtype=torch.int32, generator=random
        ),
    }


def same(received: Mapping[str, Any], sent: Mapping[str, Any]) -> bool:
    """Whether two sets of tensors have the same names, dtypes, shapes and bits."""
    return received.keys() == sent.keys() and all(
        (received[name].dtype, received[name].shape) == (sent[name].dtype, sent[name].shape)
        and torch.equal(_bits(received[name]), _bits(sent[name]))
        for name in sent
    )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@asynccontextmanager
async def pair(
    schema: Schema = SCHEMA,
    *,
    bind: str = ANYWHERE,
    sender: Mapping[str, Any] | None = None,
    **receiver: Any,
) -> AsyncIterator[tuple[Receiver, Sender]]:
    """Yield a receiver that listens, with a small pool, and a sender; both closed at the end."""
    async with (
        Receiver(schema, bind=bind, **{**SMALL_POOL, "timeout": 20.0, **receiver}) as receiving,
        Sender(schema, **{"timeout": 20.0, **(sender or {})}) as sending,
    ):
        yield receiving, sending


@asynccontextmanager
async def faulty_pair(
    faults: Faults, *, sender: Mapping[str, Any] | None = None, **receiver: Any
) -> AsyncIterator[tuple[Receiver, Sender]]:
    """Yield a :func:`pair` over the memory plane, whose writes go wrong as `faults` says."""
    plane = MemoryPlane(faults=faults)
    sender = {**(sender or {}), "planes": [plane]}
    async with pair(planes=[plane], sender=sender, **receiver) as endpoints:
        yield endpoints


def free_blocks(receiver: Receiver) -> int:
    """Return the blocks that are free now."""
    return receiver.metrics()["blocks_free"]


def assert_idle(receiver: Receiver, sender: Sender) -> None:
    """Check that every block is free and nothing is open on either side."""
    metrics = receiver.metrics()
    busy = {
        name: count
        for name, count in metrics.items()
        if count and name.startswith(("blocks_", "requests_", "bytes_")) and name != "blocks_free"
    }
    assert not busy, metrics
    assert free_blocks(receiver) == receiver.settings.blocks
    assert not sender._driver.endpoint.num_live, sender
    assert not sender._driver.sources
    assert not sender._driver.watchers
    results = receiver._driver.results
    assert not results._waiting
    assert not results._deliveries


async def granted(transfer: Transfer) -> Transfer:
    """Return a claimed transfer once it has its first grant."""
    async for state in transfer.events():
        if state is State.SENDING:
            break
    return transfer


async def error_of(awaitable: Awaitable[object]) -> AiommError:
    """Return the typed error that awaiting ends in."""
    try:
        outcome = await awaitable
    except AiommError as error:
        return error
    raise AssertionError(f"it ended well, with {outcome!r}")


def logged(text: str, *parts: str) -> bool:
    """Whether one line of `text` has all `parts`."""
    return any(all(part in line for part in parts) for line in text.splitlines())


class _Stepped(Awaitable[Any]):
    """Runs a coroutine in the awaiting task, and does something at its `step`-th suspension."""

    def __init__(
        self, coroutine: Coroutine[Any, Any, Any], step: int, act: Callable[[Any], None]
    ) -> None:
        self.coroutine = coroutine
        self.step = step
        self.act = act
        self.steps = 0

    def __await__(self) -> Generator[Any, Any, Any]:
        send, value = self.coroutine.send, None
        while True:
            try:
                waits_for = send(value)
            except StopIteration as stop:
                return stop.value
            if self.steps == self.step:
                self.act(waits_for)
            self.steps += 1
            try:
                send, value = self.coroutine.send, (yield waits_for)
            except BaseException as exc:
                send, value = self.coroutine.throw, exc


async def cancelled_at(
    step: int, coroutine: Coroutine[Any, Any, _Result], *, late: bool = False
) -> _Result | None:
    """Run `coroutine`, cancel it at its `step`-th suspension; None if it was cancelled.

    Args:
        step: counted from 0; if there are fewer, nothing is cancelled.
        coroutine: what to run.
        late: cancel in the moment when what it waits for has come, and before it goes on.
    """

    def act(waits_for: Any) -> None:
        task = asyncio.current_task()
        assert task is not None
        if late and waits_for is not None:
            waits_for.add_done_callback(lambda _: task.cancel())
        else:
            task.cancel()

    async def run() -> _Result:
        return await _Stepped(coroutine, step, act)  # type: ignore[no-any-return]

    task = asyncio.ensure_future(run())
    await asyncio.wait([task])
    return None if task.cancelled() else task.result()


@contextmanager
def after_packets(
    count: int, *endpoints: Receiver | Sender, then: Callable[[], object]
) -> Iterator[None]:
    """Call `then` once, when `count` packets have come to these endpoints together."""
    seen = 0

    def counting(receive: Callable[..., None]) -> Callable[..., None]:
        def received(channel: Channel, peer: Peer, packets: Sequence[bytes]) -> None:
            nonlocal seen
            receive(channel, peer, packets)
            before, seen = seen, seen + len(packets)
            if before < count <= seen:
                then()

        return received

    drivers = [endpoint._driver for endpoint in endpoints]
    for driver in drivers:
        vars(driver)["packets_received"] = counting(driver.packets_received)
    try:
        yield
    finally:
        for driver in drivers:
            del vars(driver)["packets_received"]


async def until(condition: Callable[[], object], owner: object, method: str) -> None:
    """Return when `condition` is true, looking again after every call of `owner.method`."""
    fulfilled = asyncio.Event()
    call = getattr(owner, method)

    def called(*arguments: Any) -> None:
        call(*arguments)
        if condition():
            fulfilled.set()

    vars(owner)[method] = called
    try:
        await fulfilled.wait()
    finally:
        del vars(owner)[method]


@contextmanager
def no_descriptors_left() -> Iterator[None]:
    """Let this process open nothing more until the block ends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
    taken: list[int] = []
    try:
        with suppress(OSError):
            while True:
                taken.append(os.dup(0))
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
