"""A median and its quartiles, and the same against something else."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Spread(NamedTuple):
    """Of figures that were measured alike."""

    low: float
    median: float
    high: float

    def over(self, other: float) -> Spread:
        """Return how often `other` it is."""
        return Spread(self.low / other, self.median / other, self.high / other)

    def into(self, other: float) -> Spread:
        """Return how often it is in `other`: of seconds, how often as fast."""
        return Spread(other / self.high, other / self.median, other / self.low)


def spread_of(figures: Sequence[float]) -> Spread:
    """Return the quartiles; of one figure, that."""
    if len(figures) == 1:
        return Spread(figures[0], figures[0], figures[0])
    low, median, high = statistics.quantiles(figures, n=4, method="inclusive")
    return Spread(low, median, high)
