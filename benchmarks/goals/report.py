"""What is printed, and what is saved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from benchmarks.latency import options_given

from .figures import Figures
from .goal import Goal

FOOTER = "The instructions of the protocol core for one transfer: tests/protocol/test_cost.py."


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What a run has measured, and where."""

    machine: Mapping[str, str]
    """With the date."""
    figures: Figures


class Saved(msgspec.Struct, frozen=True, kw_only=True):
    """The same, and what it is worth."""

    command: str
    machine: Mapping[str, str]
    peers: str | None
    """The file of their figures, None if there was none."""
    goals: Sequence[Goal]
    figures: Figures


def table(goals: Sequence[Goal]) -> Iterator[str]:
    """Yield the lines of a table for people."""
    width = max(len(goal.what) for goal in goals)
    yield f"{'what':<{width}} {'measured':>9} {'quartiles':>15}  {'goal':<37} {'':<7}"
    for goal in goals:
        quartiles = " to ".join(_number(each) for each in goal.quartiles or ())
        line = (
            f"{goal.what:<{width}} {_number(goal.figure):>9} {quartiles:>15}  "
            f"{_wanted(goal):<37} {goal.verdict:<7} {goal.note}"
        )
        yield line.rstrip()


def footer(goals: Sequence[Goal], peers: Path, *, are_peers_there: bool) -> Iterator[str]:
    """Yield what else there is to say."""
    count = Counter(goal.verdict for goal in goals)
    skipped = f", {count['skipped']} not measured" if count["skipped"] else ""
    yield f"{count['met']} goals met, {count['missed']} missed{skipped}."
    if not are_peers_there:
        yield f"{peers} is absent: nothing is compared with what one would pick instead."
    yield FOOTER


def save(path: Path, measured: Measured, goals: Sequence[Goal], peers: Path | None) -> None:
    """Write a run as JSON; whoever stops it in the middle leaves what was saved before.

    Raises:
        OSError: the file cannot be written.
    """
    saved = Saved(
        command=options_given(),
        machine=measured.machine,
        peers=None if peers is None else str(peers),
        goals=goals,
        figures=measured.figures,
    )
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_bytes(msgspec.json.format(msgspec.json.encode(saved), indent=1) + b"\n")
    unfinished.replace(path)


def measured_in(path: Path) -> Measured:
    """Read what a run that was saved has measured.

    Raises:
        ValueError: it is something else.
        OSError: it cannot be read.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Measured)
    except (msgspec.MsgspecError, UnicodeError) as exc:
        raise ValueError(f"{path}: {exc}") from exc


def _wanted(goal: Goal) -> str:
    if goal.value is None:
        return goal.unit
    value = f"{goal.value:,.0f}" if goal.value >= 100 else f"{goal.value:g}"
    return f"{goal.bound} {value} {goal.unit}"


def _number(figure: float | None) -> str:
    if figure is None:
        return ""
    return f"{figure:,.0f}" if figure >= 100 else f"{figure:.2f}"
