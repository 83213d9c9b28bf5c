"""The encoder process: claims each ticket before it knows the length, encodes, and sends."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..buffers.arrays import load_array_library
from ..errors import AiommError
from ..protocol.states import State
from ..sender import Sender, Transfer
from ..types import Schema
from . import content
from .messages import Begin, Job, Options, Ready, Sent, first_of, messages_from_stdin, tell

if TYPE_CHECKING:
    import torch

__all__ = ["encode_all"]


class Imaginary:
    """An encoder of no picture: makes tensors whose every byte the language side knows."""

    def __init__(self, options: Options) -> None:
        self.schema = content.schema_of(options.hidden)
        self._options = options
        self.num_tokens: int | None = options.tokens
        """The length, as far as it is known before encoding."""
        self.note = ""

    def __call__(self, number: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return the tensors and the metadata of request `number`. Blocks."""
        options = self._options
        tensors = content.make(number, options.tokens, options.hidden)
        return content.on_device(tensors, options.device), {}


class Photographic:
    """A vision tower, run over one photograph. Blocks until the model is built."""

    def __init__(self, photo: Path, device: str) -> None:
        from .. import vision

        self.schema: Schema = vision.SCHEMA
        self.num_tokens: int | None = None
        self.note = ""
        self._photo = photo
        self._device = device
        self._vision = vision
        self._model = vision.small_qwen()

    def __call__(self, number: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return the tensors of the photograph, and their digest. Blocks."""
        tensors = self._vision.encode(self._model, self._photo)
        self.note = f"{self._photo.name}: {len(tensors['fill_ids'])} tokens"
        metadata = {"photo": self._photo.name, "sha256": self._vision.digest(tensors)}
        return content.on_device(tensors, self._device), metadata


async def encode_all() -> None:
    """Serve every job that comes over stdin, then end."""
    async with aclosing(messages_from_stdin()) as messages:
        options = (await first_of(messages, Begin)).options
        encoder = await asyncio.to_thread(_build, options)
        async with _sender(options, encoder.schema) as sender, asyncio.TaskGroup() as jobs:
            tell(Ready(sender.address))
            async for message in messages:
                assert isinstance(message, Job)
                jobs.create_task(_serve(sender, encoder, options, message))


def _sender(options: Options, schema: Schema) -> Sender:
    return Sender(
        schema,
        bind="tcp://127.0.0.1:*" if options.bind == "sender" else None,
        planes=options.plane,
        control=options.control,
        timeout=options.timeout,
        max_waiting=max(4096, options.concurrency),
    )


def _build(options: Options) -> Imaginary | Photographic:
    load_array_library()  # now, and not while the first request is timed
    return (
        Imaginary(options)
        if options.image is None
        else Photographic(Path(options.image), options.device)
    )


async def _serve(
    sender: Sender, encoder: Imaginary | Photographic, options: Options, job: Job
) -> None:
    try:
        sent = await _send(sender, encoder, options, job)
    except AiommError as exc:
        sent = Sent(number=job.number, error=f"{type(exc).__name__}: {exc}")
    tell(sent)


async def _send(
    sender: Sender, encoder: Imaginary | Photographic, options: Options, job: Job
) -> Sent:
    encoded = None
    if options.announce and encoder.num_tokens is None:
        encoded = await asyncio.to_thread(encoder, job.number)
        num_tokens = len(next(iter(encoded[0].values())))
    else:
        num_tokens = encoder.num_tokens or 0
    transfer = sender.claim(job.ticket, num_tokens=num_tokens if options.announce else None)
    await _granted(transfer)
    if encoded is None:
        try:
            encoded = await asyncio.to_thread(encoder, job.number)
        except Exception as exc:
            transfer.cancel(f"the encoder failed: {exc}")
            raise
    tensors, metadata = encoded
    began = time.perf_counter()
    if not transfer.done():
        transfer.send(tensors, metadata=metadata)
    stats = await transfer
    return Sent(
        number=job.number,
        sending_seconds=time.perf_counter() - began,
        states=stats.states,
        plane=stats.plane,
        refused_planes=stats.refused_planes,
        note=encoder.note,
    )


async def _granted(transfer: Transfer) -> None:
    """Wait for the grant, as if encoding took longer than the round trip; it mostly does."""
    async with aclosing(transfer.events()) as states:  # type: ignore[type-var]
        async for state in states:
            if state is not State.ALLOC:
                return
