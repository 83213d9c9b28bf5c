"""The demo for a person: what runs, how far it is, and the life of each transfer."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..demo.messages import Message, Options, Received
from ..demo.report import Report, Travelled

__all__ = ["DemoProgress", "show_report"]

MAX_LIVES = 4
"""Of more transfers than these a table says enough."""
MAX_ROWS = 20
MAX_CHUNKS = 8
MAX_STATES = 2 * MAX_CHUNKS


class DemoProgress(Progress):
    """Counts the requests that have arrived."""

    def __init__(self, options: Options, console: Console) -> None:
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self.add_task("starting two processes", total=options.requests)

    def heard(self, message: Message) -> None:
        """Take what one of the processes said."""
        if isinstance(message, Received):
            self.advance(self._task)
            self.update(self._task, description="compared")


def show_report(report: Report, console: Console) -> None:
    """Print what was moved and how, and whether every byte arrived."""
    console.print(_header(report))
    transfers = report.transfers
    if len(transfers) <= MAX_LIVES:
        for transfer in transfers:
            console.print(_life(transfer))
    else:
        console.print(_table(transfers))
    console.print(_verdict(report), soft_wrap=True, highlight=False)


def _header(report: Report) -> Panel:
    options = report.options
    what = (
        f"{options.image}"
        if options.image
        else f"{options.tokens} tokens x (bfloat16[{options.hidden}] + int32 + int32[3])"
    )
    who = "the encoder" if options.bind == "sender" else "the language side"
    knows = "tells" if options.announce else "does not know"
    lines = (
        f"{options.requests} request(s) of {escape(what)}",
        f"the encoder {knows} the length when it claims",
        f"plane [bold]{report.plane or 'none'}[/bold]; {who} listens at {report.address}",
        f"pool of {options.pool_blocks} blocks x {options.block_size} tokens on {options.device}, "
        f"{options.default_blocks} blocks by default",
    )
    return Panel("\n".join(lines), title="aiomm demo", title_align="left", expand=False)


def _life(transfer: Travelled) -> RenderableType:
    sent, received = transfer.sent, transfer.received
    states = Table("sender", "at", "receiver", "at", box=None, padding=(0, 2, 0, 0))
    count = max(len(sent.states), len(received.states))
    for index in range(count):
        if MAX_STATES < index < count - 1:
            continue
        if index == MAX_STATES < count - 1:
            states.add_row("...", "", f"{count - 1 - index} more", "")
            continue
        states.add_row(*_state(sent.states, index), *_state(received.states, index))
    grants = Table("grant", "blocks", "start offset", "tokens", box=None, padding=(0, 2, 0, 0))
    chunks = zip(
        received.block_indices, received.start_offset, received.buffered_chunks, strict=False
    )
    for index, (blocks, start, tokens) in enumerate(chunks):
        if index == MAX_CHUNKS:
            grants.add_row("...", f"{received.resumes + 1 - index} more", "", "")
            break
        name = f"resume {index}" if index else "first"
        grants.add_row(name, _runs(blocks), str(start), str(tokens))
    parts: list[RenderableType] = [states, grants, _summary(transfer)]
    if received.next_tokens:
        tokens_told = ", ".join(map(str, received.next_tokens))
        parts.append(f"{escape(sent.note)}; next token ids: {tokens_told}")
    return Panel(Group(*parts), title=escape(received.request_id), title_align="left", expand=False)


def _state(states: Sequence[tuple[str, float]], index: int) -> tuple[str, str]:
    if index >= len(states):
        return "", ""
    state, at = states[index]
    return state, f"{at * 1e3:.2f} ms"


def _runs(blocks: Sequence[int]) -> str:
    """Return block indices as runs, in the order in which the free list held them."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][1] + 1:
            runs[-1][1] = block
        else:
            runs.append([block, block])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)


def _summary(transfer: Travelled) -> str:
    received = transfer.received
    if transfer.error:
        return f"[red]{escape(transfer.error)}[/red]"
    kind = "a view of the pool" if received.view else "joined outside the pool"
    return (
        f"{received.total_tokens} tokens, {received.nbytes / 1e6:.1f} MB in "
        f"{len(received.buffered_chunks)} chunk(s), {received.resumes} resume(s), {kind}; "
        f"{transfer.sent.plane} at {transfer.gbps:.3g} GB/s"
        + "".join(f"\nnot over {escape(reason)}" for reason in transfer.sent.refused_planes)
    )


def _table(transfers: Sequence[Travelled]) -> Table:
    table = Table("request", "tokens", "chunks", "resumes", "tensors", "ms", "GB/s", "outcome")
    slowest = sorted(transfers, key=lambda each: -each.received.seconds)
    shown = [each for each in slowest if each.error] + [each for each in slowest if not each.error]
    for each in shown[:MAX_ROWS]:
        received = each.received
        table.add_row(
            escape(received.request_id),
            str(received.total_tokens),
            str(len(received.buffered_chunks)),
            str(received.resumes),
            "view" if received.view else "joined",
            f"{received.seconds * 1e3:.1f}",
            f"{each.gbps:.3g}",
            f"[red]{escape(each.error)}[/red]" if each.error else "equal",
        )
    if len(shown) > MAX_ROWS:
        table.caption = f"the slowest {MAX_ROWS} of {len(shown)}"
    return table


def _verdict(report: Report) -> str:
    failed = [each for each in report.transfers if each.error]
    nbytes = sum(each.received.nbytes for each in report.transfers)
    count = len(report.transfers)
    told = f"{count - len(failed)} of {count} requests, {nbytes / 1e6:.1f} MB"
    seconds = report.finished.seconds
    if not failed:
        return f"[green]verified: every byte equal[/green] ({told} in {seconds:.2f} s)"
    first = failed[0]
    name, error = escape(first.received.request_id), escape(first.error or "")
    return f"[red]not verified[/red]: {told}; {name}: {error}"
