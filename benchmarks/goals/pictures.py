"""Two pictures: latency over size beside the peers', and the rate over transfers in flight."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

from aiomm.bench.plan import AIOMM, MEMCPY, MEMCPY_ACK, size_name
from aiomm.bench.plot import draw
from aiomm.bench.results import Peer

from .against import SHM
from .figures import Figures
from .peers_file import Peers
from .plans import ARRIVALS, BACK_TO_BACK, LARGE_SIZES, SIZES, TOKEN_NBYTES

LATENCY, RATE = "latency.png", "rate.png"


def draw_both(figures: Figures, peers: Peers | None, where: str, folder: Path) -> None:
    """Draw them into the folder. Takes a few seconds.

    Args:
        figures: ours.
        peers: those of others, if there are any.
        where: on which machine, for the titles.
        folder: exists.

    Raises:
        OSError: a file cannot be written.
    """
    from matplotlib import rc_context

    points = [*_ours(figures), *(_theirs(peers) if peers else ())]
    beside = " (dotted: what one would pick instead, back to back)" if peers else ""
    with rc_context({"xtick.labelsize": 6}):  # ours are powers of four, and 8 MiB is in between
        draw(points, f"A granted transfer{beside}: {where}", folder / LATENCY)
    draw_rates(figures, where, folder / RATE)


def draw_rates(figures: Figures, where: str, path: Path) -> None:
    """Draw requests per second, with quartiles.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    numbers = figures.in_flight()
    rates = [figures.seconds_in_flight(number, TOKEN_NBYTES).into(1.0) for number in numbers]
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    axes.fill_between(
        numbers, [rate.low for rate in rates], [rate.high for rate in rates], alpha=0.2
    )
    axes.plot(numbers, [rate.median for rate in rates], marker="o", markersize=4)
    axes.set_xscale("log", base=2)
    axes.set_xticks(numbers, [str(number) for number in numbers])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("requests in flight (a single one is granted before its time begins)")
    axes.set_ylabel("requests per second, median and quartiles")
    axes.grid(visible=True, alpha=0.3)
    figure.suptitle(f"Requests of {size_name(TOKEN_NBYTES)} over shm: {where}", fontsize="medium")
    figure.savefig(path, dpi=150)


def _ours(figures: Figures) -> Iterator[Peer]:
    """Yield the floors and ours, in this order with each arrival."""
    for path, arrival in product((MEMCPY, MEMCPY_ACK, AIOMM), ARRIVALS):
        for name in (SIZES, LARGE_SIZES):
            for nbytes in figures.sizes(name):
                median = figures.seconds(name, nbytes, path, arrival).median
                yield _point(SHM if path == AIOMM else path, nbytes, median * 1e6, arrival)


def _theirs(peers: Peers) -> Iterator[Peer]:
    """Yield one line of each, back to back; without a name of its arrival it is dotted."""
    for row in peers.rows:
        if row.is_peer and row.arrival == BACK_TO_BACK:
            yield _point(row.path, row.nbytes, row.median_us)


def _point(path: str, nbytes: int, median_us: float, arrival: str = "") -> Peer:
    return Peer(path=path, nbytes=nbytes, median_us=median_us, arrival=arrival)
