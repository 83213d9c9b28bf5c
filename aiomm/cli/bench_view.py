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
from ..bench.plan import AIOMM, AIOMM_BUSY, SPARSE_SECONDS, Busy, Plan, Process
from ..bench.results import Results, Row, machine

__all__ = ["BenchProgress", "machine_line", "show_results"]

WORDS = ("size", "arrival")
"""The columns that hold no figures."""
BUSY: Mapping[Busy, str] = {
    "encoder": "in the encoder process",
    "language": "in the language process",
    "both": "one in each process",
}


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
        f"Python {facts['python']}, {facts['copies']} copies"
    )


def show_results(results: Results, console: Console) -> None:
    """Print what was measured and where, a row for each size and arrival, and the heartbeat."""
    for name, line in _explanations(results):
        console.print(f"[bold]{name}[/bold]: {escape(line)}", soft_wrap=True, highlight=False)
    console.print(_table(results))
    if results.plan.heartbeat:
        for process in ("encoder", "language"):
            line = _held_line(results, process)
            console.print(f"[bold]loop held[/bold]: {line}", soft_wrap=True, highlight=False)


def _held_line(results: Results, process: Process) -> str:
    """Say for how long the loop of a process was held, quiet and busy."""
    processor, wall = map(_milliseconds, results.longest_ms(process, AIOMM))
    quiet = f"{processor} of processor time in a turn, beats of 1 ms up to {wall} apart"
    if not results.plan.busy:
        return f"{process} at most {quiet}"
    processor, wall = map(_milliseconds, results.longest_ms(process, AIOMM_BUSY))
    return f"{process} at most {quiet}; busy at most {processor}, up to {wall} apart"


def _explanations(results: Results) -> list[tuple[str, str]]:
    plan = results.plan
    extras = [plan.device]
    if plan.resume:
        extras.append("half of the tokens granted at first, the rest by a resume")
    if plan.stream:
        extras.append("a pool of a quarter of each size, through which its transfers stream")
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
    busy = ""
    if plan.busy:
        keeps = f"which keeps the GIL for {plan.switch_interval * 1e3:g} ms"
        busy = f"the same while a thread spins in pure Python, {BUSY[plan.busy]}, {keeps}"
    return [
        ("machine", machine_line(machine())),
        ("plane", f"{results.plane} ({', '.join(extras)})"),
        ("arrival", arrival),
        ("aiomm", f"{clock}; medians of {plan.rounds} rounds"),
        *([("busy", busy)] if busy else []),
        (
            "floor",
            "one memcpy of the same bytes; + ack: and one byte to the other process and back",
        ),
    ]


def _table(results: Results) -> Table:
    rows = results.rows()
    keys = sorted(dict.fromkeys((row.nbytes, row.arrival) for row in rows))
    lines = [
        _cells(results.plan, [row for row in rows if (row.nbytes, row.arrival) == key])
        for key in keys
    ]
    table = Table(box=SIMPLE_HEAD, padding=0)
    for column in lines[0]:
        table.add_column(column, justify="left" if column in WORDS else "right", no_wrap=True)
    size = ""
    for cells in lines:
        told = cells | {"size": ""} if cells["size"] == size else cells
        table.add_row(*told.values())
        size = cells["size"]
    return table


def _cells(plan: Plan, rows: Sequence[Row]) -> dict[str, str]:
    """Return a line of the table, by column; the rows are those of the plan's paths."""
    copied, acknowledged, moved, *busy = rows
    low, high = map(_figure, moved.quartiles_us)
    cells = {
        "size": moved.size,
        "arrival": moved.arrival,
        "memcpy\nus": _figure(copied.median_us),
        "+ ack\nus": _figure(acknowledged.median_us),
        "aiomm\nus": f"[bold]{_figure(moved.median_us)}[/bold]",
        "quartiles\nus": f"{low}-{high}",
        "times\nmemcpy": f"{moved.times_memcpy:.2f}",
        "times\n+ ack": f"{moved.times_floor:.2f}",
        "GB/s": f"{moved.gb_per_second:.3g}",
    }
    if plan.concurrency > 1:
        cells["per\nsecond"] = f"{moved.per_second:,.0f}"
    if len(plan.arrivals) == 1 or plan.concurrency > 1:
        del cells["arrival"]  # it is told above
    for row in busy:
        cells["busy\nus"] = _figure(row.median_us)
        cells["times\nquiet"] = f"{row.median_us / moved.median_us:.2f}"
    return cells


def _figure(microseconds: float) -> str:
    return f"{microseconds:,.0f}" if microseconds >= 100 else f"{microseconds:.1f}"


def _milliseconds(milliseconds: float) -> str:
    return f"{milliseconds:.0f} ms" if milliseconds >= 10 else f"{milliseconds:.1f} ms"
