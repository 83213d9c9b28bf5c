"""Thousands of stories in virtual time, each with its seed; and proof that they would find bugs.

`AIOMM_SIMULATION_SEEDS` says how many (1500 by default), `AIOMM_SIMULATION_FIRST` where to begin.
"""

from __future__ import annotations

import os

from .simulation import Simulation

SEEDS = int(os.environ.get("AIOMM_SIMULATION_SEEDS", "1500"))
FIRST = int(os.environ.get("AIOMM_SIMULATION_FIRST", "0"))


def test_every_story_ends_well() -> None:
    """Whatever happens, memory is safe, every request has one end, and nothing is left."""
    for seed in range(FIRST, FIRST + SEEDS):
        Simulation(seed).run()
