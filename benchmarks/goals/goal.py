"""A goal: what was measured, what it should be, and whether it is."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, Literal, ParamSpec

import msgspec

from .spread import Spread

Given = ParamSpec("Given")
Bound = Literal["at most", "at least", "over"]
Verdict = Literal["met", "missed", "told", "skipped"]


class Goal(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the table."""

    what: str
    verdict: Verdict
    """`told` has a figure and no goal, `skipped` has no figure."""
    figure: float | None = None
    quartiles: tuple[float, float] | None = None
    bound: Bound | None = None
    value: float | None = None
    unit: str = ""
    """Of figure and value."""
    note: str = ""


def goal(
    what: str, figure: Spread | float, bound: Bound, value: float, unit: str, note: str = ""
) -> Goal:
    """Judge a figure, as it is shown."""
    median, quartiles = _shown_of(figure)
    met = {"at most": median <= value, "at least": median >= value, "over": median > value}
    return Goal(
        what=what,
        verdict="met" if met[bound] else "missed",
        figure=median,
        quartiles=quartiles,
        bound=bound,
        value=value,
        unit=unit,
        note=note,
    )


def told(what: str, figure: Spread, unit: str) -> Goal:
    """Return a row of a figure that has no goal."""
    median, quartiles = _shown_of(figure)
    return Goal(what=what, verdict="told", figure=median, quartiles=quartiles, unit=unit)


def skipped_if_missing(
    judge: Callable[Concatenate[str, Given], Goal],
) -> Callable[Concatenate[str, Given], Goal]:
    """Let a row say what was not measured, where it finds a figure missing."""

    @wraps(judge)
    def judged(what: str, /, *args: Given.args, **kwargs: Given.kwargs) -> Goal:
        try:
            return judge(what, *args, **kwargs)
        except LookupError as exc:
            return Goal(what=what, verdict="skipped", note=str(exc.args[0]))

    return judged


def _shown_of(figure: Spread | float) -> tuple[float, tuple[float, float] | None]:
    if isinstance(figure, Spread):
        return shown(figure.median), (shown(figure.low), shown(figure.high))
    return shown(figure), None


def shown(figure: float) -> float:
    """Round it to what people read."""
    return round(figure, 2) if figure < 100 else float(round(figure))
