"""The protocol core does not become more expensive unnoticed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from aiomm.protocol.send_transfer import SendTransfer

from . import cost
from .cost import STORIES, VERSION, counted, known

NEWS = "python -m tests.protocol.cost"


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
def test_a_transfer_takes_as_many_instructions_as_before(
    story: Callable[[], Iterator[None]],
) -> None:
    """Within 10 %: more is a regression, and fewer is news to be written down."""
    if VERSION not in ("3.11", "3.12", "3.13"):
        pytest.skip(f"nobody has counted with Python {VERSION} yet: {NEWS}")
    before, now = known()[story.__name__], counted(story)
    assert now <= 1.1 * before, f"{now} instructions, {now / before - 1:.0%} more than {before}"
    assert now >= 0.9 * before, f"{now} instructions instead of {before}; write it down: {NEWS}"


def test_the_count_sees_a_few_more_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """And repeats itself to the last one."""
    before = counted(cost.granted)
    assert counted(cost.granted) == before
    names = {"handle": SendTransfer.handle}
    code = compile("def twice(*args):\n    return handle(*args)", cost.CORE + "/twice.py", "exec")
    exec(code, names)
    monkeypatch.setattr(SendTransfer, "handle", names["twice"])
    assert before < counted(cost.granted) < 1.1 * before
