"""The figures as a picture: latency and bandwidth against size, one line for every path."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .plan import size_name
from .results import Peer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["FORMATS", "draw"]

FORMATS = (".png", ".svg")
STYLES = ("-", "--", ":", "-.")
"""Of the kinds of arrival, in the order in which they come."""


def draw(points: Sequence[Peer], title: str, path: Path) -> None:
    """Draw medians, and save the picture. Takes a second or two.

    Args:
        points: at least one, of any paths and kinds of arrival.
        title: above both panels.
        path: of a format that its ending names.

    Raises:
        ImportError: matplotlib is missing.
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.5), layout="constrained")
    latency, bandwidth = figure.subplots(1, 2)
    paths = list(dict.fromkeys(point.path for point in points))
    arrivals = list(dict.fromkeys(point.arrival for point in points))
    for name, arrival in dict.fromkeys((point.path, point.arrival) for point in points):
        line = sorted(
            (point for point in points if (point.path, point.arrival) == (name, arrival)),
            key=lambda point: point.nbytes,
        )
        sizes = [point.nbytes for point in line]
        look = {
            "color": f"C{paths.index(name) % 10}",
            "linestyle": STYLES[arrivals.index(arrival) % len(STYLES)],
            "marker": "o",
            "markersize": 4,
            "label": f"{name}, {arrival}" if arrival else name,
        }
        latency.plot(sizes, [point.median_us for point in line], **look)
        rates = [point.nbytes / point.median_us / 1e3 for point in line]
        bandwidth.plot(sizes, rates, **look)
    latency.set_yscale("log")
    latency.set_ylabel("median time of one, microseconds")
    bandwidth.set_ylabel("bandwidth, GB/s")
    bandwidth.set_ylim(bottom=0)
    for axes in (latency, bandwidth):
        _mark_sizes(axes, sorted({point.nbytes for point in points}))
    latency.legend(fontsize="small")
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=150)


def _mark_sizes(axes: Axes, sizes: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [size_name(nbytes) for nbytes in sizes])
    axes.minorticks_off()
    axes.set_xlabel("bytes of one transfer")
    axes.grid(visible=True, alpha=0.3)
