"""What aiomm wants to reach, and whether it does on this machine: every goal with its figure.

Transfers of `aiomm.bench` between two processes, against the memcpy of the same rounds. Plans that
are compared run in turn, three times over (`--turns`), with new processes each time; figures are
medians and quartiles over all rounds of all turns, five of each plan in each turn. What the peers
decide comes out of the file that `python -m benchmarks.peers --save` has written. A goal that is
missed is told, and that is all.

    python -m benchmarks.goals [--quick] [--turns 3] [--peers benchmarks/results/peers.json]
        [--save benchmarks/results/goals.json] [--plots benchmarks/results] [--again FILE.json]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from importlib.util import find_spec
from pathlib import Path

from aiomm.bench.processes import BenchBroke
from aiomm.errors import PeerLost
from benchmarks.latency import machine

from .figures import Figures
from .judge import judge
from .measure import NotMeasured, measure
from .peers_file import Peers, peers_in
from .pictures import draw_both
from .plans import FULL, QUICK, groups
from .report import Measured, footer, measured_in, save, table

PEERS = Path("benchmarks/results/peers.json")


def options_of(arguments: list[str]) -> argparse.Namespace:
    """Read the command line; what cannot be done is refused before anything is measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one round of each; figures for show")
    parser.add_argument("--turns", type=int, default=FULL.turns, help="of every plan; two or more")
    parser.add_argument("--peers", type=Path, default=PEERS, help="figures of benchmarks.peers")
    parser.add_argument("--save", type=Path, help="write machine, goals and raw figures as JSON")
    parser.add_argument("--plots", type=Path, help="draw latency.png and rate.png into this folder")
    parser.add_argument("--again", type=Path, help="judge what was saved, and measure nothing")
    options = parser.parse_args(arguments)
    if options.turns < 2:
        parser.error(f"--turns {options.turns}: two or more, or figures have no spread")
    if options.save is not None and not options.save.absolute().parent.is_dir():
        parser.error(f"--save {options.save}: there is no such folder")
    if options.plots is not None and not options.plots.is_dir():
        parser.error(f"--plots {options.plots}: there is no such folder")
    if options.plots is not None and not find_spec("matplotlib"):
        parser.error("--plots needs matplotlib")
    return options


def main() -> None:
    """Measure, print the table, and keep what is asked for."""
    options = options_of(sys.argv[1:])
    try:
        peers = peers_in(options.peers)
        measured = measured_in(options.again) if options.again else measured_now(options)
        tell(options, measured, peers)
    except (BenchBroke, PeerLost, NotMeasured, LookupError, ValueError, OSError) as exc:
        sys.exit(f"goals: {type(exc).__name__}: {exc}")


def measured_now(options: argparse.Namespace) -> Measured:
    """Measure everything, and tell on stderr what runs now; before each run, save all others."""
    extent = QUICK if options.quick else FULL._replace(turns=options.turns)
    before, figures = os.getloadavg()[0], Figures()

    def measured() -> Measured:
        load = f"{before:.1f} before, {os.getloadavg()[0]:.1f} after"
        return Measured(machine={**machine(), "load": load}, figures=figures)

    def listener(line: str) -> None:
        print(line, file=sys.stderr, flush=True)
        if options.save is not None and figures.plans:
            save(options.save, measured(), [], None)

    asyncio.run(measure(list(groups(extent)), figures, listener))
    return measured()


def tell(options: argparse.Namespace, measured: Measured, peers: Peers | None) -> None:
    """Print the table; save and draw if asked to."""
    goals = list(judge(measured.figures, peers))
    for line in table(goals):
        print(line)
    for line in footer(goals, options.peers, are_peers_there=peers is not None):
        print(line)
    if options.save is not None:
        save(options.save, measured, goals, None if peers is None else options.peers)
    if options.plots is not None:
        draw_both(measured.figures, peers, measured.machine["cpu"], options.plots)


if __name__ == "__main__":
    main()
