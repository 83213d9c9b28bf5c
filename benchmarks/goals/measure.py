"""Runs the plans in turn, and looks whether what ran is what was to be measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from msgspec.structs import replace

from aiomm.bench.plan import Plan
from aiomm.bench.processes import run_bench
from aiomm.bench.results import Results

from .figures import Figures
from .plans import Group

Listener = Callable[[str], None]


class NotMeasured(Exception):
    """Something ran, but not what was to be measured."""


async def measure(groups: Sequence[Group], figures: Figures, listener: Listener) -> None:
    """Run every plan of every group.

    Args:
        groups: one after the other.
        figures: takes what each run has measured as soon as it is over.
        listener: told what runs now.

    Raises:
        BenchBroke: a process could not go on.
        PeerLost: a process ended before its work was done.
        NotMeasured: a plan went another way than it says.
    """
    runs = [run for group in groups for run in _turns(group)]
    for number, (turn, name, plan) in enumerate(runs, 1):
        listener(f"{number} of {len(runs)}: {name}, turn {turn + 1}")
        results = await run_bench(replace(plan, seed=turn))
        check(name, results)
        figures.add(name, results)


def check(name: str, results: Results) -> None:
    """Let nothing count that was granted otherwise, or came another way.

    Raises:
        NotMeasured: it did.
    """
    plan = results.plan
    if results.plane != plan.plane:
        raise NotMeasured(f"{name}: over {results.plane}, not {plan.plane}")
    resumes = max(row.resumes for row in results.rows())
    if bool(resumes) != (plan.resume or plan.stream):
        raise NotMeasured(f"{name}: {resumes} resumes")


def _turns(group: Group) -> list[tuple[int, str, Plan]]:
    return [(turn, name, plan) for turn in range(group.turns) for name, plan in group.plans.items()]
