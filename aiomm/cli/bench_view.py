"""The benchmark for a person: how far it is, where it was measured, and one row for each size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..bench.messages import Copied, Left, Message
from ..bench.plan import SPARSE_SECONDS, Plan
from ..bench.results import Results, Row, machine

__all__ = ["BenchProgress", "machine_line", "show_results"]


class BenchProgress(Progress):
    """Counts the steps that were taken."""

    def __init__(self, plan: Plan, console: Console) -> None:
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            auto_refresh=False,  # a thread that wakes up would be in what is measured
            disable=not console.is_terminal,
        )
        total = sum(1 for _ in plan.steps())
        self._task = self.add_task("starting two processes", total=total)

    def heard(self, message: Message) -> None:
        """Take what one of the processes said; they say it between two rounds."""
        if isinstance(message, Copied | Left):
            self.update(self._task, advance=1, description="measuring")
            self.refresh()


def machine_line(facts: Mapping[str, Any]) -> str:
    """Return the machine in one line."""
    return (
        f"{facts['cpu']}, {facts['processors']} processors, {facts['kernel']}, "
        f"Python {facts['python']}"
    )


def show_results(results: Results, console: Console) -> None:
    """Print where and what was measured, and a row for each size and kind of arrival."""
    for name, line in _explanations(results):
        console.print(f"[bold]{name}[/bold]: {escape(line)}", soft_wrap=True, highlight=False)
    console.print(_table(results))


def _explanations(results: Results) -> list[tuple[str, str]]:
    plan = results.plan
    extras = [plan.device]
    if plan.resume:
        extras.append("half of the tokens granted at first, the rest by a resume")
    if plan.checksum:
        extras.append("with checksums")
    least, most = (round(seconds * 1e3) for seconds in SPARSE_SECONDS)
    back = "back to back: the next starts when the last is done"
    sparse = f"sparse: one every {least} to {most} ms, sizes and paths mixed at random"
    told = {"back to back": back, "sparse": sparse}
    arrival = "; ".join(told[each] for each in plan.arrivals)
    clock = "granted before; from send() to the return of the receiver's await"
    if plan.concurrency > 1:
        arrival = f"{plan.concurrency} transfers at a time, each claimed when the last is done"
        clock = "from the first claim to the last arrival, divided by the number of transfers"
    return [
        ("machine", machine_line(machine())),
        ("plane", f"{results.plane} ({', '.join(extras)})"),
        ("arrival", arrival),
        ("aiomm", f"{clock}; medians of {plan.rounds} rounds"),
        (
            "floor",
            "one memcpy of the same bytes; + ack: and one byte to the other process and back",
        ),
    ]


def _table(results: Results) -> Table:
    is_rate = results.plan.concurrency > 1
    table = Table(box=SIMPLE_HEAD, padding=0)
    table.add_column("size", no_wrap=True)
    table.add_column("arrival", no_wrap=True)
    columns = ["memcpy\nus", "+ ack\nus", "aiomm\nus", "quartiles\nus", "times\nmemcpy"]
    for column in (*columns, "times\n+ ack", "GB/s", *(["per\nsecond"] if is_rate else [])):
        table.add_column(column, justify="right", no_wrap=True)
    rows = results.rows()
    size = ""
    for nbytes, arrival in sorted(dict.fromkeys((row.nbytes, row.arrival) for row in rows)):
        cells = _cells([row for row in rows if (row.nbytes, row.arrival) == (nbytes, arrival)])
        table.add_row(cells[0] if cells[0] != size else "", *cells[1 : None if is_rate else -1])
        size = cells[0]
    return table


def _cells(rows: Sequence[Row]) -> list[str]:
    copied, acknowledged, moved = rows
    low, high = map(_figure, moved.quartiles_us)
    return [
        moved.size,
        moved.arrival,
        _figure(copied.median_us),
        _figure(acknowledged.median_us),
        f"[bold]{_figure(moved.median_us)}[/bold]",
        f"{low}-{high}",
        f"{moved.times_memcpy:.2f}",
        f"{moved.times_floor:.2f}",
        f"{moved.gb_per_second:.3g}",
        f"{moved.per_second:,.0f}",
    ]


def _figure(microseconds: float) -> str:
    return f"{microseconds:,.0f}" if microseconds >= 100 else f"{microseconds:.1f}"
