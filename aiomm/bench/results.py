"""What was measured, and the figures that come of it."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ..buffers.memcpy import is_streaming
from .heartbeat import BOUNDS_MS
from .messages import Arrived, Beats, Copied, Held, Left
from .plan import AIOMM, AIOMM_BUSY, MEMCPY, MEMCPY_ACK, Plan, Process, Step, size_name

__all__ = ["Results", "Row", "machine", "peers_from"]

Key = tuple[str, int, str]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One path at one size, with one kind of arrival."""

    size: str
    nbytes: int
    arrival: str
    path: str
    median_us: float
    quartiles_us: tuple[float, float]
    gb_per_second: float
    times_memcpy: float
    times_floor: float
    """Against the memcpy with its acknowledgement."""
    per_second: float
    """Transfers per second, at the median."""
    resumes: int = 0
    """Of one transfer."""


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """A row of another path, measured elsewhere; what a plot needs of it."""

    nbytes: int
    path: str
    median_us: float
    arrival: str = ""


class _Peers(msgspec.Struct, frozen=True):
    rows: list[Peer]


class Results:
    """Collects what the two processes tell of each step."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._copied: dict[int, int] = {}
        self._left: dict[int, Left] = {}
        self._arrived: dict[int, Arrived] = {}
        self._beats: dict[tuple[Process, str], Beats] = {}

    def add(self, message: Copied | Left | Arrived | Beats) -> None:
        """Take what one of the processes told."""
        match message:
            case Copied(step=step, nanoseconds=nanoseconds):
                self._copied[step] = nanoseconds
            case Left(step=step):
                self._left[step] = message
            case Arrived(step=step):
                self._arrived[step] = message
            case Beats(process=process, path=path):
                self._beats[process, path] = message  # they tell all that they know, every time

    @property
    def plane(self) -> str:
        """The plane that was used; several are told with commas."""
        return ",".join(sorted({left.plane for left in self._left.values()}))

    def seconds(self) -> dict[Key, list[float]]:
        """Return the seconds of every round, without warm-up, by (arrival, bytes, path)."""
        figures: dict[Key, list[float]] = {}
        for step in self.plan.steps():
            if not self.plan.is_warm_up(step):
                key = (step.arrival, step.nbytes, step.path)
                figures.setdefault(key, []).append(self._seconds_of(step))
        return figures

    def rows(self) -> list[Row]:
        """Return one row for every kind of arrival, size and path."""
        return list(self._rows())

    def as_json(self, command: str) -> dict[str, Any]:
        """Return machine, rows, raw seconds, and the heartbeat if there is one, as plain values."""
        seconds: dict[str, dict[str, dict[str, list[float]]]] = {}
        for (arrival, nbytes, path), each in self.seconds().items():
            by_size = seconds.setdefault(arrival, {}).setdefault(size_name(nbytes), {})
            by_size[self._told(path)] = each
        heartbeat = {"heartbeat": self._heartbeat()} if self.plan.heartbeat else {}
        return {
            "command": command,
            "machine": machine(),
            "plane": self.plane,
            "rows": msgspec.to_builtins(self.rows()),
            "seconds": seconds,
            **heartbeat,
        }

    def longest_ms(self, process: Process, path: str) -> tuple[float, float]:
        """Return the longest between two beats: of processor time, and by the clock."""
        beats = self._beats[process, path]
        return beats.processor.longest / 1e6, beats.wall.longest / 1e6

    def _heartbeat(self) -> dict[str, Any]:
        """Return for how long each loop was held at a time, by process and path."""
        processes: dict[str, dict[str, dict[str, Any]]] = {}
        for (process, path), beats in sorted(self._beats.items()):
            held = {"processor": _held(beats.processor), "wall": _held(beats.wall)}
            processes.setdefault(process, {})[self._told(path)] = held
        return {"bounds_ms": BOUNDS_MS, **processes}

    def _rows(self) -> Iterator[Row]:
        figures = self.seconds()
        medians = {key: statistics.median(each) for key, each in figures.items()}
        for arrival, nbytes in dict.fromkeys((arrival, nbytes) for arrival, nbytes, _ in figures):
            for path in self.plan.paths:
                key = (arrival, nbytes, path)
                median = medians[key]
                yield Row(
                    size=size_name(nbytes),
                    nbytes=nbytes,
                    arrival=arrival,
                    path=self._told(path),
                    median_us=round(median * 1e6, 1),
                    quartiles_us=_quartiles_us(figures[key]),
                    gb_per_second=round(nbytes / median / 1e9, 3),
                    times_memcpy=round(median / medians[arrival, nbytes, MEMCPY], 2),
                    times_floor=round(median / medians[arrival, nbytes, MEMCPY_ACK], 2),
                    per_second=round(1 / median, 1),
                    resumes=self._resumes(nbytes, path),
                )

    def _seconds_of(self, step: Step) -> float:
        """Return the seconds of one copy, or of one transfer; of many, their share each."""
        if not step.is_transfer:
            return self._copied[step.number] / 1e9
        elapsed = self._arrived[step.number].at - self._left[step.number].at
        return elapsed / 1e9 / (self.plan.concurrency * self.plan.transfers_of(step))

    def _resumes(self, nbytes: int, path: str) -> int:
        steps = (step for step in self.plan.steps() if (step.nbytes, step.path) == (nbytes, path))
        return max(self._arrived[step.number].resumes if step.is_transfer else 0 for step in steps)

    def _told(self, path: str) -> str:
        ours = f"{AIOMM} {self.plane}"
        return {AIOMM: ours, AIOMM_BUSY: f"{ours}, busy {self.plan.busy}"}.get(path, path)


def machine() -> dict[str, Any]:
    """Say where this was measured."""
    has_affinity = hasattr(os, "sched_getaffinity")
    return {
        "cpu": _cpu_model(),
        "processors": len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count(),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "copies": "streaming" if is_streaming else "libc",
    }


def peers_from(path: Path, known: Sequence[str] = (MEMCPY, MEMCPY_ACK)) -> list[Peer]:
    """Read rows of other paths out of a file of the form that `as_json` gives.

    Raises:
        ValueError: it is no such file.
        OSError: it cannot be read.
    """
    try:
        peers = msgspec.json.decode(path.read_bytes(), type=_Peers)
    except (msgspec.MsgspecError, UnicodeError) as exc:
        raise ValueError(f"{path}: {exc}") from exc
    for peer in peers.rows:
        if peer.nbytes <= 0 or peer.median_us <= 0:
            raise ValueError(f"{path}: nbytes and median_us must be over 0, in {peer}")
    return [peer for peer in peers.rows if peer.path not in known]


def _quartiles_us(seconds: Sequence[float]) -> tuple[float, float]:
    if len(seconds) == 1:
        return round(seconds[0] * 1e6, 1), round(seconds[0] * 1e6, 1)
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return round(low * 1e6, 1), round(high * 1e6, 1)


def _held(held: Held) -> dict[str, Any]:
    return {"counts": held.counts, "longest_ms": round(held.longest / 1e6, 3)}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    facts: Mapping[str, str] = {
        name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)
    }
    return facts.get("model name") or platform.processor() or platform.machine()
