"""`aiomm send`: files out, one after the other, whole or by fields."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from ..errors import AiommError, IncompatibleSchema
from ..protocol.states import State
from ..sender import Sender, Transfer
from ..types import Schema, TransferStats
from .endpoint import EndpointOptions
from .files import (
    Outgoing,
    check_header,
    field_option,
    read_fields,
    read_whole,
    request_id_of,
)
from .receiving import REMAINING
from .running import Exit, Unusable

__all__ = ["SendOptions", "send_files"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SendOptions:
    """What `aiomm send` is asked to do."""

    endpoint: EndpointOptions
    request_id: str | None
    schema: Schema | None
    """The fields asked for, or None: whole, and by fields if the receiver has fields."""


async def send_files(paths: Sequence[Path], options: SendOptions, *, errors: Console) -> Exit:
    """Send every file; stop at the first that fails.

    Raises:
        Unusable: this side cannot be started, or a file cannot be sent; none was, if it could be
            known at the start.
    """
    request_ids = [options.request_id or request_id_of(path) for path in paths]
    twice = {one for one in request_ids if request_ids.count(one) > 1}
    if twice:
        raise Unusable(f"several files would have the request id {', '.join(sorted(twice))}")
    for path in paths:
        await asyncio.to_thread(_check, path, options.schema)
    async with _Outbox(options, errors) as outbox:
        for index, path in enumerate(paths):
            try:
                await outbox.send(path, request_ids[index], remaining=len(paths) - index - 1)
            except AiommError as exc:
                errors.print(
                    f"[red]{escape(path.name)}: {type(exc).__name__}:[/red] {escape(exc.message)}",
                    soft_wrap=True,
                    highlight=False,
                )
                return Exit.FAILED
    return Exit.OK


def _check(path: Path, schema: Schema | None) -> None:
    """Raise Unusable if the file cannot be sent, before anybody is asked to receive it."""
    if schema is None:
        check_header(path)
    else:
        read_fields(path, schema)


class _Outbox(AsyncExitStack):
    """Sends files to one address, by a Sender for each schema they turn out to have."""

    def __init__(self, options: SendOptions, errors: Console) -> None:
        super().__init__()
        self._options = options
        self._errors = errors
        self._senders: dict[Schema, Sender] = {}
        self._goes_by_fields = False

    async def send(self, path: Path, request_id: str, *, remaining: int) -> None:
        """Send one file: whole, or by fields if that is what the receiver has.

        Raises:
            AiommError: it was not received.
            Unusable: it cannot be sent in the way that the receiver asks for.
        """
        schema = self._options.schema
        if schema is None and not self._goes_by_fields:
            outgoing = await asyncio.to_thread(read_whole, path)
            try:
                await self._move(path, outgoing, request_id, remaining)
                return
            except IncompatibleSchema as exc:
                if self._options.endpoint.connect is None:  # the receiver has turned away already
                    raise IncompatibleSchema(f"{exc.message}; {await _hint(path)}") from exc
                self._goes_by_fields = True
                self._errors.print("the receiver has fields: the file's tensors are sent as such")
        outgoing = await asyncio.to_thread(read_fields, path, schema)
        await self._move(path, outgoing, request_id, remaining)

    async def _move(self, path: Path, outgoing: Outgoing, request_id: str, remaining: int) -> None:
        sender = await self._sender(outgoing.schema)
        transfer = sender.claim(
            request_id, to=self._options.endpoint.connect, num_tokens=outgoing.num_tokens
        )
        transfer.send(outgoing.tensors, metadata={**outgoing.metadata, REMAINING: remaining})
        nbytes = outgoing.num_tokens * outgoing.schema.token_nbytes
        try:
            await _show(transfer, nbytes, outgoing.schema.token_nbytes, self._errors)
            stats = await transfer
        finally:
            transfer.cancel("the sending command was interrupted")
        self._errors.print(_told(path, stats), soft_wrap=True, highlight=False)

    async def _sender(self, schema: Schema) -> Sender:
        sender = self._senders.get(schema)
        if sender is None:
            endpoint = self._options.endpoint
            sender = await self.enter_async_context(endpoint.opened(Sender, schema))
            self._senders[schema] = sender
            if endpoint.connect is None:
                told = f"a receiver may connect to {escape(str(sender.address))}"
                self._errors.print(told, soft_wrap=True, highlight=False)
        return sender


async def _show(transfer: Transfer, nbytes: int, token_nbytes: int, errors: Console) -> None:
    """Show the transfer on its way, until it is over, or whole and only to be accepted."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Progress(
        *columns, console=errors, transient=True, disable=not errors.is_terminal
    ) as progress:
        task = progress.add_task("waiting for the receiver", total=nbytes)
        async with aclosing(transfer.events()) as states:  # type: ignore[type-var]
            async for state in states:
                if state is not State.ALLOC:
                    progress.update(
                        task,
                        description=escape(f"{transfer.request_id} {state}"),
                        completed=transfer.transferred_tokens * token_nbytes,
                    )


def _told(path: Path, stats: TransferStats) -> str:
    granted = next((at for state, at in stats.states if state == State.SENDING), 0.0)
    seconds = stats.seconds - granted
    speed = f" ({stats.nbytes / seconds / 1e9:.2f} GB/s)" if seconds else ""
    took = f"{seconds * 1e3:.0f} ms{speed}"
    chunks = f" in {len(stats.buffered_chunks)} chunks" if stats.resumes else ""
    return (
        f"sent {escape(path.name)} as {escape(stats.request_id)}: {stats.nbytes / 1e6:.1f} MB"
        f"{chunks} over {stats.plane or 'no plane'}, {took}"
    )


async def _hint(path: Path) -> str:
    """Say how to send the file by fields."""
    try:
        outgoing = await asyncio.to_thread(read_fields, path)
    except Unusable as exc:
        return f"and by fields it cannot go: {exc}"
    options = " ".join(field_option(name, field) for name, field in outgoing.schema.items())
    return f"by fields it would go with {options}"
