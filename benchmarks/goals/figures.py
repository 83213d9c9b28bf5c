"""The raw figures: seconds of every plan, all its runs together, and how long loops were held."""

from __future__ import annotations

from itertools import product

import msgspec

from aiomm.bench.plan import AIOMM, AIOMM_BUSY, Plan, Process
from aiomm.bench.results import Results

from .plans import BACK_TO_BACK, rate
from .spread import Spread, spread_of

PROCESSES: tuple[Process, ...] = ("encoder", "language")


class Series(msgspec.Struct, frozen=True):
    """The seconds of one path in every round of a plan."""

    plan: str
    arrival: str
    nbytes: int
    path: str
    seconds: list[float]


class Held(msgspec.Struct, frozen=True):
    """The longest between two beats of a loop, in one run of a plan, in milliseconds."""

    plan: str
    process: Process
    path: str
    processor: float
    wall: float


class Figures(msgspec.Struct):
    """What all runs of all plans have measured."""

    plans: dict[str, Plan] = {}
    series: list[Series] = []
    held: list[Held] = []

    def add(self, name: str, results: Results) -> None:
        """Take what a run of a plan has measured; of its earlier runs the plan is the same."""
        self.plans[name] = results.plan
        for (arrival, nbytes, path), seconds in results.seconds().items():
            found = self._find(name, arrival, nbytes, path)
            if found is None:
                self.series.append(Series(name, arrival, nbytes, path, seconds))
            else:
                found.seconds.extend(seconds)
        if results.plan.heartbeat:
            for process, path in product(PROCESSES, (AIOMM, AIOMM_BUSY)):
                longest = results.longest_ms(process, path)
                self.held.append(Held(name, process, path, *longest))

    def seconds(
        self, name: str, nbytes: int, path: str = AIOMM, arrival: str = BACK_TO_BACK
    ) -> Spread:
        """Return the seconds of one transfer.

        Raises:
            LookupError: they were not measured.
        """
        found = self._find(name, arrival, nbytes, path)
        if found is None:
            raise LookupError(f"no seconds of {path!r} in {name!r}, {arrival}, {nbytes} bytes")
        return spread_of(found.seconds)

    def seconds_in_flight(self, number: int, nbytes: int) -> Spread:
        """Return the seconds of one request with so many in flight: their share of the whole.

        Raises:
            LookupError: they were not measured.
        """
        arrival = BACK_TO_BACK if number == 1 else rate(number)
        return self.seconds(rate(number), nbytes, arrival=arrival)

    def held_ms(self, path: str) -> Held:
        """Return the most processor time that a loop took at a time.

        Raises:
            LookupError: no heart has beaten.
        """
        held = [each for each in self.held if each.path == path]
        if not held:
            raise LookupError(f"no heart has beaten beside {path!r}")
        return max(held, key=lambda each: each.processor)

    def sizes(self, name: str) -> tuple[int, ...]:
        """Return the sizes of a plan; none if it was not measured."""
        return self.plans[name].sizes if name in self.plans else ()

    def in_flight(self) -> list[int]:
        """Return of how many transfers in flight the rate was measured."""
        numbers = sorted({plan.concurrency for plan in self.plans.values()})
        return [number for number in numbers if rate(number) in self.plans]

    def _find(self, name: str, arrival: str, nbytes: int, path: str) -> Series | None:
        key = (name, arrival, nbytes, path)
        same = (s for s in self.series if (s.plan, s.arrival, s.nbytes, s.path) == key)
        return next(same, None)
