"""`aiomm recv`: whatever arrives becomes a file."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from rich.console import Console
from rich.markup import escape

from ..errors import AiommError
from ..receiver import Lease, Receiver
from ..types import Schema
from .endpoint import EndpointOptions
from .files import OWN_PREFIX, WHOLE_FILE, save
from .running import Exit, Unusable

__all__ = ["REMAINING", "ReceiveOptions", "receive_files"]

REMAINING = f"{OWN_PREFIX}remaining"
"""Metadata key: files that the sending command has still to send."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiveOptions:
    """What `aiomm recv` is asked to do."""

    endpoint: EndpointOptions
    schema: Schema | None
    """The fields asked for, or None for whole files."""
    out: Path
    count: int | None
    """How many transfers to wait for, failed ones included."""


@dataclass(frozen=True, slots=True)
class _Failed:
    request_id: str
    error: AiommError


_Outcomes: TypeAlias = asyncio.Queue[Lease | _Failed]


async def receive_files(options: ReceiveOptions, *, console: Console, errors: Console) -> Exit:
    """Write what arrives into the folder, until there is nothing more to wait for.

    Args:
        options: what to do.
        console: is told the path of every file, one per line.
        errors: is told everything else.

    Raises:
        Unusable: there can be no such folder, or this side cannot be started.
    """
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise Unusable(f"--out {options.out}: {exc.strerror}") from exc
    outcomes: _Outcomes = asyncio.Queue()
    connect = options.endpoint.connect
    async with options.endpoint.opened(
        Receiver,
        options.schema or WHOLE_FILE,
        connect=connect or (),
        on_failure=lambda *failure: outcomes.put_nowait(_Failed(*failure)),
    ) as receiver:
        where = f"from {connect}" if connect else f"at {receiver.address}"
        errors.print(f"receiving {escape(where)}", soft_wrap=True, highlight=False)
        arrivals = asyncio.create_task(_gather_arrivals(receiver, outcomes))
        try:
            return await _keep(outcomes, options, console, errors)
        finally:
            arrivals.cancel()
            while not outcomes.empty():
                left = outcomes.get_nowait()
                if isinstance(left, Lease):
                    left.release()


async def _gather_arrivals(receiver: Receiver, outcomes: _Outcomes) -> None:
    """Put every lease into the queue of outcomes, until the receiver is closed."""
    async for lease in receiver:
        outcomes.put_nowait(lease)


async def _keep(
    outcomes: _Outcomes, options: ReceiveOptions, console: Console, errors: Console
) -> Exit:
    code, num_over = Exit.OK, 0
    while options.count is None or num_over < options.count:
        outcome = await outcomes.get()
        num_over += 1
        if isinstance(outcome, _Failed):
            name = type(outcome.error).__name__
            _complain(errors, outcome.request_id, f"{name}: {outcome.error.message}")
            code, is_last = Exit.FAILED, True
        else:
            is_last = outcome.metadata.get(REMAINING, 1) == 0
            if not await _save(outcome, options.out, console, errors):
                code = Exit.FAILED
        if options.endpoint.connect and options.count is None and is_last:
            break
    return code


async def _save(lease: Lease, folder: Path, console: Console, errors: Console) -> bool:
    """Write one file and give its blocks back; return whether it is there."""
    saving = asyncio.create_task(asyncio.to_thread(save, lease, folder))
    with lease:
        try:
            await asyncio.wait([saving])
        except asyncio.CancelledError:
            await asyncio.wait([saving])  # it reads the blocks: they must not go back before
            raise
        finally:
            error = saving.exception()
    if isinstance(error, Unusable | OSError):
        _complain(errors, lease.request_id, str(error))
        return False
    chunks = f" in {len(lease.buffered_chunks)} chunks" if len(lease.buffered_chunks) > 1 else ""
    nbytes, seconds = lease.stats.nbytes, lease.stats.seconds
    errors.print(
        f"received {escape(lease.request_id)}: {nbytes / 1e6:.1f} MB{chunks} over "
        f"{lease.stats.plane or 'no plane'}, {seconds * 1e3:.0f} ms",
        soft_wrap=True,
        highlight=False,
    )
    console.print(escape(str(saving.result())), soft_wrap=True, highlight=False)
    return True


def _complain(errors: Console, request_id: str, message: str) -> None:
    errors.print(
        f"[red]{escape(request_id)}:[/red] {escape(message)}", soft_wrap=True, highlight=False
    )
