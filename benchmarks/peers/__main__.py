"""How long a tensor takes from one process of a host to another: aiomm, and what one would pick.

Every path is a pair of processes, started once and kept warm, one transfer at a time. The clock
(CLOCK_MONOTONIC is one clock on one host) runs from the call in the sender, which has a tensor of
rows of 64 KiB, until the receiver has a usable tensor of those bytes. In interleaved rounds and
random order every path moves every size, arriving in two ways:

* `back-to-back`: six transfers of one path, each directly after the one before; the last three
  count. Caches, pages and threads are as warm as they get
* `sparse`: one transfer after a pause of 10 to 30 ms in which both sides wait, paths and sizes
  mixed: as requests come

CPU time is that of both processes from the preparation of a transfer to its end, with the pause.
`first read` is not in the clock: what the receiver then waits to read a byte of every page, which
is where a tensor that is only mapped is paid for; in the row of `memcpy` it is only the looking.
The first tensor of each size is compared whole, every other by a number in its first and last row.

    python -m benchmarks.peers [--only gloo,nixl] [--sizes 64KiB,8MiB] [--rounds 9]
        [--arrival both|back-to-back|sparse] [--save FILE.json]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from operator import methodcaller
from pathlib import Path

from benchmarks.latency import machine, options_given

from .base import ROW_NBYTES, Setting
from .floor import FLOOR, MEMCPY
from .pairs import Moved, Pair, PeerFailed
from .paths import PATHS
from .report import raw, summary, table

UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
SIZES = "64KiB,1MiB,8MiB,64MiB"
BACK_TO_BACK, SPARSE = "back to back", "sparse"
WARMING, COUNTED = 3, 3
"""Transfers directly after each other, of a round of `back-to-back`."""
PAUSE_SECONDS = (0.010, 0.030)
SPARSE_EACH = 3
"""Sparse transfers of each size and path in a round."""
SCRATCH = "/dev/shm"

Step = tuple[str, str]
"""A size and a path."""


class Measurement:
    """The pairs that still take part, what they took, and why the others do not."""

    def __init__(self, sizes: dict[str, int], arrivals: list[str]) -> None:
        self.sizes = sizes
        self.missing: dict[str, str] = {}
        self.pairs: dict[str, Pair] = {}
        self.figures: dict[str, dict[str, dict[str, list[Moved]]]] = {
            arrival: {size: {} for size in sizes} for arrival in arrivals
        }

    def start(self, names: Iterable[str], scratch: Path) -> None:
        """Start every pair, all at the same time."""
        for name in names:
            if reason := PATHS[name].missing():
                self.missing[name] = reason
                continue
            folder = scratch / str(len(self.pairs))
            folder.mkdir()
            self.pairs[name] = Pair(Setting(name, str(folder), tuple(self.sizes.values())))
        self._each(Pair.begin_near)
        self._each(Pair.begin_moving)
        for nbytes in self.sizes.values():
            self._each(methodcaller("move", nbytes, count=2))

    def back_to_back(self) -> None:
        """One round: several transfers of one path directly after each other."""
        for size, name in self._steps(1):
            self._move(BACK_TO_BACK, size, name, WARMING + COUNTED, 0.0)

    def sparse(self) -> None:
        """One round: one transfer at a time, with pauses."""
        for size, name in self._steps(SPARSE_EACH):
            self._move(SPARSE, size, name, 1, random.uniform(*PAUSE_SECONDS))

    def end(self) -> None:
        """End what still runs."""
        for pair in self.pairs.values():
            pair.ask_to_end()
        for pair in self.pairs.values():
            pair.end()

    def _steps(self, times: int) -> Iterator[Step]:
        """Yield every size and path so many times, in random order."""
        steps = [(size, name) for size in self.sizes for name in self.pairs] * times
        random.shuffle(steps)
        return (step for step in steps if step[1] in self.pairs)

    def _move(self, arrival: str, size: str, name: str, count: int, pause: float) -> None:
        try:
            moves = self.pairs[name].move(self.sizes[size], count=count, pause=pause)
        except PeerFailed as exc:
            self._fail(name, exc)
        else:
            kept = self.figures[arrival][size].setdefault(name, [])
            kept.extend(moves[-COUNTED:])

    def _each(self, step: Callable[[Pair], object]) -> None:
        """Take a step with every pair; those that fail take part no more."""
        for name, pair in list(self.pairs.items()):
            try:
                step(pair)
            except PeerFailed as exc:
                self._fail(name, exc)

    def _fail(self, name: str, reason: PeerFailed) -> None:
        self.missing[name] = str(reason)
        self.pairs.pop(name).end(0)
        for by_size in self.figures.values():
            for by_path in by_size.values():
                by_path.pop(name, None)


def measure(
    names: list[str], sizes: dict[str, int], rounds: int, arrivals: list[str]
) -> Measurement:
    """Start all, measure in rounds, end all."""
    measurement = Measurement(sizes, arrivals)
    with ExitStack() as stack:
        scratch = tempfile.TemporaryDirectory(prefix="peers-of-aiomm-", dir=SCRATCH)
        folder = Path(stack.enter_context(scratch))
        stack.callback(measurement.end)
        measurement.start(names, folder)
        for _ in range(rounds):
            if BACK_TO_BACK in arrivals:
                measurement.back_to_back()
            if SPARSE in arrivals:
                measurement.sparse()
    order = {name: place for place, name in enumerate(PATHS)}
    for by_size in measurement.figures.values():
        for size, by_path in by_size.items():
            by_size[size] = {name: by_path[name] for name in sorted(by_path, key=order.__getitem__)}
    return measurement


def size_of(text: str) -> int:
    """Return the bytes of a size such as `64KiB`.

    Raises:
        ValueError: it is not whole rows.
    """
    unit = text[-3:]
    nbytes = int(text.removesuffix(unit)) * UNITS.get(unit, 0)
    if nbytes <= 0 or nbytes % ROW_NBYTES:
        raise ValueError(f"{text}: a size is a multiple of 64KiB, in {', '.join(UNITS)}")
    return nbytes


def main() -> None:
    """Measure, print a table, and save the figures if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="paths, with commas between them; both floors always run")
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--arrival", choices=["both", "back-to-back", "sparse"], default="both")
    parser.add_argument("--save", type=Path, help="write machine, rows and raw seconds as JSON")
    options = parser.parse_args()
    wanted = options.only.split(",") if options.only else list(PATHS)
    if unknown := [name for name in wanted if name not in PATHS]:
        parser.error(f"no such path: {', '.join(unknown)}; there are: {', '.join(PATHS)}")
    try:
        sizes = {text: size_of(text) for text in options.sizes.split(",")}
    except ValueError as exc:
        parser.error(str(exc))
    both = [BACK_TO_BACK, SPARSE]
    arrivals = both if options.arrival == "both" else [options.arrival.replace("-", " ")]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))
    load_before = os.getloadavg()[0]
    names = list(dict.fromkeys([MEMCPY, FLOOR, *wanted]))
    measurement = measure(names, sizes, options.rounds, arrivals)
    for name, reason in measurement.missing.items():
        print(f"without {name}: {reason}")
    rows = summary(measurement.figures, sizes)
    for line in table(rows):
        print(line)
    if options.save is not None:
        load = f"{load_before:.1f} before, {os.getloadavg()[0]:.1f} after"
        saved = {
            "command": options_given(),
            "machine": {**machine(), "load": load},
            "missing": measurement.missing,
            "rows": rows,
            "seconds": raw(measurement.figures, "seconds"),
            "cpu_seconds": raw(measurement.figures, "cpu_seconds"),
            "first_read_seconds": raw(measurement.figures, "first_read_seconds"),
        }
        options.save.write_text(json.dumps(saved, indent=1) + "\n")


if __name__ == "__main__":
    main()
