"""Figures in rows: medians, quartiles, rates, and how often the time of the floors."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from .floor import FLOOR, MEMCPY
from .pairs import Moved

Figures = Mapping[str, Mapping[str, Mapping[str, list[Moved]]]]
"""By the way of arriving, then by size, then by path."""


def summary(figures: Figures, sizes: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return one row per way of arriving, size and path."""
    return [
        row(arrival, size, sizes[size], path, by_path)
        for arrival, by_size in figures.items()
        for size, by_path in by_size.items()
        for path, moves in by_path.items()
        if len(moves) > 1
    ]


def row(
    arrival: str, size: str, nbytes: int, path: str, by_path: Mapping[str, list[Moved]]
) -> dict[str, Any]:
    """Return one."""
    moves = by_path[path]
    low, median, high = statistics.quantiles([each.seconds for each in moves], n=4)
    cpu = statistics.median(each.cpu_seconds for each in moves)
    first_read = statistics.median(each.first_read_seconds for each in moves)
    return {
        "size": size,
        "nbytes": nbytes,
        "arrival": arrival,
        "path": path,
        "transfers": len(moves),
        "median_us": round(median * 1e6, 1),
        "quartiles_us": [round(low * 1e6, 1), round(high * 1e6, 1)],
        "gb_per_second": round(nbytes / median / 1e9, 3),
        "times_memcpy": times(median, by_path.get(MEMCPY)),
        "times_floor": times(median, by_path.get(FLOOR)),
        "cpu_seconds_per_gb": round(cpu / nbytes * 1e9, 3),
        "first_read_us": round(first_read * 1e6, 1),
    }


def times(median: float, floor: list[Moved] | None) -> float | None:
    """Return the ratio of medians, None where the floor was not measured."""
    if not floor:
        return None
    return round(median / statistics.median(each.seconds for each in floor), 2)


def raw(figures: Figures, field: str) -> dict[str, Any]:
    """Return one field of every transfer, in the same order as the figures."""
    return {
        arrival: {
            size: {path: [getattr(each, field) for each in moves] for path, moves in paths.items()}
            for size, paths in by_size.items()
        }
        for arrival, by_size in figures.items()
    }


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of a table for people."""
    yield (
        f"{'arrival':>12} {'size':>7} {'path':>26} {'median us':>11} {'quartiles us':>21} "
        f"{'GB/s':>7} {'x memcpy':>8} {'x floor':>7} {'CPU s/GB':>8} {'first read us':>13}"
    )
    for each in rows:
        low, high = each["quartiles_us"]
        yield (
            f"{each['arrival']:>12} {each['size']:>7} {each['path']:>26} "
            f"{each['median_us']:>11,} {f'{low:,} to {high:,}':>21} "
            f"{each['gb_per_second']:>7} {each['times_memcpy'] or '':>8} "
            f"{each['times_floor'] or '':>7} {each['cpu_seconds_per_gb']:>8} "
            f"{each['first_read_us']:>13,}"
        )
