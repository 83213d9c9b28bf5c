"""Thousands of stories in virtual time, each with its seed; and proof that they would find bugs.

`AIOMM_SIMULATION_SEEDS` says how many (1500 by default), `AIOMM_SIMULATION_FIRST` where to begin.
"""

from __future__ import annotations

import os

import pytest

from .planted_bugs import BUGS, Plant
from .simulation import Simulation

SEEDS = int(os.environ.get("AIOMM_SIMULATION_SEEDS", "1500"))
SEEDS_TO_FIND_A_BUG = 2000
FIRST = int(os.environ.get("AIOMM_SIMULATION_FIRST", "0"))


@pytest.mark.slow
@pytest.mark.timeout(60 + SEEDS // 20)
def test_every_story_ends_well() -> None:
    """Whatever happens, memory is safe, every request has one end, and nothing is left."""
    for seed in range(FIRST, FIRST + SEEDS):
        Simulation(seed).run()


@pytest.mark.parametrize("plant", BUGS, ids=lambda plant: plant.__name__)
def test_planted_bug_is_found(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stories are good enough: with any one of these bugs, one of them ends badly."""
    plant(monkeypatch)
    assert any(ends_badly(seed) for seed in range(SEEDS_TO_FIND_A_BUG))


def ends_badly(seed: int) -> bool:
    """Tell whether a story breaks a rule, of ours or of Python's."""
    try:
        Simulation(seed).run()
    except Exception:
        return True
    return False
