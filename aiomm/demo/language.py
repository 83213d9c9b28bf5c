"""The language process: expects every request, compares what arrives, and releases it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

from ..buffers.arrays import load_array_library
from ..errors import AiommError
from ..receiver import Lease, Receiver
from ..types import Schema
from . import content
from .messages import (
    Begin,
    Finished,
    Go,
    Job,
    Message,
    Options,
    Ready,
    Received,
    first_of,
    messages_from_stdin,
    tell,
)

__all__ = ["receive_all"]


class Comparison:
    """Knows what must have arrived for each number, byte by byte."""

    def __init__(self, options: Options) -> None:
        self.schema = content.schema_of(options.hidden)
        self._options = options

    def __call__(
        self, number: int, tensors: Mapping[str, Any], metadata: Mapping[str, Any]
    ) -> tuple[str | None, tuple[int, ...]]:
        """Return where the tensors differ, if they do, and no next tokens. Blocks."""
        options = self._options
        return content.difference(tensors, number, options.tokens, options.hidden), ()


class SmallModel:
    """The language model that goes with the vision tower. Blocks until it is built."""

    def __init__(self) -> None:
        from .. import vision

        self.schema: Schema = vision.SCHEMA
        self._vision = vision
        self._model = vision.small_qwen()

    def __call__(
        self, number: int, tensors: Mapping[str, Any], metadata: Mapping[str, Any]
    ) -> tuple[str | None, tuple[int, ...]]:
        """Compare the digest of every byte with the sender's, and go on from there. Blocks."""
        tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
        digest = self._vision.digest(tensors)
        if digest != metadata["sha256"]:
            return f"SHA-256 is {digest}, sent was {metadata['sha256']}", ()
        return None, tuple(self._vision.next_tokens(self._model, tensors))


async def receive_all() -> None:
    """Receive the requests that the command asks for; end early when the command is gone."""
    async with aclosing(messages_from_stdin()) as messages:
        begin = await first_of(messages, Begin)
        options = begin.options
        check = await asyncio.to_thread(_build, options)
        baseline = _memory_mb("VmRSS")
        async with _receiver(begin, check.schema) as receiver:
            tell(Ready(receiver.address))
            await first_of(messages, Go)
            began = time.perf_counter()
            async with asyncio.TaskGroup() as group:
                work = group.create_task(_serve_all(receiver, check, options))
                watch = group.create_task(_end_with(messages, work))
                work.add_done_callback(lambda _: watch.cancel())
            seconds = time.perf_counter() - began
        tell(Finished(seconds, baseline, _memory_mb("VmHWM")))


def _receiver(begin: Begin, schema: Schema) -> Receiver:
    options = begin.options
    return Receiver(
        schema,
        bind="tcp://127.0.0.1:*" if options.bind == "receiver" else None,
        connect=begin.address or (),
        device=options.device,
        planes=options.plane,
        control=options.control,
        blocks=options.pool_blocks,
        block_size=options.block_size,
        default_blocks=options.default_blocks,
        timeout=options.timeout,
        max_waiting=max(4096, options.concurrency),
    )


async def _end_with(messages: AsyncIterator[Message], work: asyncio.Task[None]) -> None:
    async for _ in messages:
        pass
    work.cancel()


async def _serve_all(receiver: Receiver, check: Comparison | SmallModel, options: Options) -> None:
    admission = asyncio.Semaphore(options.concurrency)
    async with asyncio.TaskGroup() as requests:
        for number in range(options.requests):
            await admission.acquire()
            request = requests.create_task(_serve(receiver, check, number))
            request.add_done_callback(lambda _: admission.release())


def _build(options: Options) -> Comparison | SmallModel:
    load_array_library()  # part of every language process, so of the baseline
    return Comparison(options) if options.image is None else SmallModel()


async def _serve(receiver: Receiver, check: Comparison | SmallModel, number: int) -> None:
    request_id = f"req-{number + 1}"
    try:
        tell(Job(number, receiver.expect(request_id).to_json()))
        async with receiver.receive(request_id) as lease:
            tensors = dict(lease)
            difference, tokens = await asyncio.to_thread(check, number, tensors, lease.metadata)
        tell(_received(number, lease, difference, tokens))
    except AiommError as exc:
        error = f"{type(exc).__name__}: {exc}"
        tell(Received(number=number, request_id=request_id, error=error))


def _received(
    number: int, lease: Lease, difference: str | None, tokens: tuple[int, ...]
) -> Received:
    stats = lease.stats
    return Received(
        number=number,
        request_id=lease.request_id,
        difference=difference,
        total_tokens=lease.num_tokens,
        nbytes=stats.nbytes,
        buffered_chunks=stats.buffered_chunks,
        resumes=stats.resumes,
        block_indices=stats.block_indices,
        start_offset=stats.start_offsets,
        states=stats.states,
        seconds=stats.seconds,
        view=lease.is_view,
        next_tokens=tokens,
    )


def _memory_mb(name: str) -> float:
    """Return a figure of the kernel's on this process: VmRSS (now) or VmHWM (at most)."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) / 1024
    return 0.0
