"""What is printed, and what is saved."""

from __future__ import annotations

import json
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu.bench import Bench, Outcome, Timing

__all__ = ["print_answers", "print_outcome", "print_timings", "save"]

WIDTH = 100
NAME_WIDTH = 16
UNITS = ((1 << 20, "MiB"), (1 << 10, "KiB"), (1, "B"))


def print_outcome(outcome: Outcome) -> None:
    """Print one line of the table of checks, and more where its detail is long."""
    begin = f"{outcome.name:<{NAME_WIDTH}} {outcome.status:<8} {outcome.seconds:>6.1f} s  "
    lines = [
        piece
        for line in (outcome.detail.splitlines() or [""])
        for piece in textwrap.wrap(line, WIDTH - len(begin)) or [""]
    ]
    print(begin + f"\n{'':<{len(begin)}}".join(lines), flush=True)


def print_timings(timings: Iterable[Timing]) -> None:
    """Print the table of timings."""
    print(f"\n{'check':<14} {'what':<34} {'bytes':>8} {'median us':>11} {'quartiles us':>22} GB/s")
    for row in rows_of(timings):
        low, high = row["quartiles_us"]
        rate = row.get("gb_per_second", "")
        print(
            f"{row['check']:<14} {row['name']:<34} {size_text(row['nbytes']):>8} "
            f"{row['median_us']:>11,} {f'{low:,} to {high:,}':>22} {rate}"
        )


def print_answers(questions: Mapping[str, str], answers: Mapping[str, str]) -> None:
    """Print the open questions, and what is known now."""
    print()
    for letter, question in questions.items():
        answer = answers.get(letter, "not answered in this run")
        text = f"({letter}) {question} {answer}"
        print(textwrap.fill(text, WIDTH, subsequent_indent="    "))


def rows_of(timings: Iterable[Timing]) -> list[dict[str, Any]]:
    """Return medians, quartiles and rates."""
    rows = []
    for check, name, nbytes, seconds, has_rate in timings:
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        row: dict[str, Any] = {
            "check": check,
            "name": name,
            "nbytes": nbytes,
            "median_us": round(median * 1e6, 1),
            "quartiles_us": [round(low * 1e6, 1), round(high * 1e6, 1)],
        }
        if has_rate and median:
            row["gb_per_second"] = round(nbytes / median / 1e9, 1)
        rows.append(row)
    return rows


def size_text(nbytes: int) -> str:
    """Return a size as people say it."""
    if not nbytes:
        return ""
    factor, unit = next(each for each in UNITS if nbytes >= each[0])
    return f"{nbytes / factor:.4g} {unit}"


def save(
    path: Path,
    bench: Bench,
    outcomes: Sequence[Outcome],
    questions: Mapping[str, str],
    about: Mapping[str, Any],
) -> None:
    """Write everything as JSON.

    Args:
        path: of the file; its folder must be there.
        bench: with timings and answers.
        outcomes: of all checks.
        questions: that were open.
        about: the machine, the command and the like.
    """
    answers = {
        letter: {"question": question, "answer": bench.answers.get(letter)}
        for letter, question in questions.items()
    }
    saved = {
        **about,
        "checks": [asdict(outcome) for outcome in outcomes],
        "questions": answers,
        "rows": rows_of(bench.timings),
        "seconds": [timing._asdict() for timing in bench.timings],
    }
    path.write_text(json.dumps(saved, indent=1) + "\n")
