"""`aiomm bench`: runs the two processes, shows what was measured, and keeps it if asked to."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from rich.console import Console

from ..bench.plan import Plan
from ..bench.plot import FORMATS, draw
from ..bench.processes import BenchBroke, run_bench
from ..bench.results import Peer, Results, machine, peers_from
from .bench_view import BenchProgress, machine_line, show_results
from .device import ensure_usable
from .running import Exit, Unusable, fail

__all__ = ["Outputs", "measure"]


class Outputs(NamedTuple):
    """Where the figures go, besides stdout."""

    as_json: bool
    plot: Path | None
    peers: Path | None
    save: Path | None


async def measure(plan: Plan, outputs: Outputs, *, console: Console, errors: Console) -> Exit:
    """Run the benchmark; print one JSON object or a table, and write the files asked for.

    Raises:
        Unusable: an extra is missing, or the device, the plane or a file cannot be used.
        typer.Exit: it broke, which has been told.
    """
    peers = _checked(plan, outputs)
    await ensure_usable(plan.device, plan.plane)
    try:
        with BenchProgress(plan, errors) as progress:
            results = await run_bench(plan, progress.heard)
    except BenchBroke as exc:
        raise fail(str(exc), Exit.FAILED, errors=errors) from None
    saved = results.as_json(" ".join(sys.argv[1:]))
    try:
        if outputs.as_json:
            print(msgspec.json.encode(saved).decode(), flush=True)
        else:
            show_results(results, console)
    finally:  # neither who reads stdout nor a full disk loses what the other keeps
        await asyncio.to_thread(_write, results, saved, peers, outputs)
    return Exit.OK


def _checked(plan: Plan, outputs: Outputs) -> list[Peer]:
    """Find out before anything is measured; return the peers of the plot."""
    _check_combination(plan)
    if plan.checksum and not _is_installed("xxhash"):
        raise Unusable("--checksum needs python -m pip install 'aiomm[checksum]'")
    for path in filter(None, (outputs.plot, outputs.save)):
        if not path.absolute().parent.is_dir():
            raise Unusable(f"{path}: there is no such folder")
    if outputs.peers is not None and outputs.plot is None:
        raise Unusable("--peers is for --plot")
    if outputs.plot is None:
        return []
    if outputs.plot.suffix.lower() not in FORMATS:
        raise Unusable(f"--plot {outputs.plot}: the name must end with {' or '.join(FORMATS)}")
    if not _is_installed("matplotlib"):
        raise Unusable("--plot needs python -m pip install matplotlib")
    try:
        return [] if outputs.peers is None else peers_from(outputs.peers)
    except (ValueError, OSError) as exc:
        raise Unusable(f"--peers {exc}") from exc


def _check_combination(plan: Plan) -> None:
    if plan.stream and plan.resume:
        raise Unusable("--stream and --resume: each wants a pool of its own kind, give one of them")
    if plan.busy and plan.concurrency > 1:
        raise Unusable("--busy is for one transfer at a time, without --concurrency")
    if plan.busy and plan.arrivals != ("back to back",):
        raise Unusable("--busy is for --arrival back-to-back only")


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # blocked: sys.modules holds None for it
        return False


def _write(
    results: Results, saved: dict[str, Any], peers: Sequence[Peer], outputs: Outputs
) -> None:
    if outputs.save is not None:
        encoded = msgspec.json.format(msgspec.json.encode(saved), indent=1)
        outputs.save.write_bytes(encoded + b"\n")
    if outputs.plot is not None:
        ours = msgspec.convert(results.rows(), list[Peer], from_attributes=True)
        others = [peer for peer in peers if peer.path not in {row.path for row in ours}]
        draw([*ours, *others], f"aiomm bench: {machine_line(machine())}", outputs.plot)
