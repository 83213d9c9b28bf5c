"""What aiomm does on real GPUs: whether it is right, what it survives, and how fast it is.

One command for a machine with one NVIDIA GPU or more. Every check runs in processes of its own,
under a time limit of its own, and none stops the others. Speed fails nothing; it is told, against
a plain copy of the same bytes within the GPU in the same round.

    python -m benchmarks.gpu [--save FILE.json] [--only handles,bytes] [--quick]
    python -m benchmarks.gpu --dry-run      # on a fake GPU: only that the checks themselves work

It ends with 0 if nothing has failed, 1 if something has, 2 if msgspec or pyzmq is missing (see
`make gpu-wheels`), 77 if there is no GPU. `make gpu` does it all, and saves what it finds.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import wheels

NO_GPU = 77
NO_PACKAGES = 2
FAKE = {"AIOMM_GPU_RUNTIME": "fake", "AIOMM_FAKE_GPUS": "2"}
START_SECONDS = 120.0
"""To find out what there is; to import torch and to wake a GPU may take long the first time."""


def main() -> None:
    """Run what is asked for."""
    options = arguments()
    lacking = wheels.missing()
    if lacking:
        print(f"nothing was run: {' and '.join(lacking)} cannot be imported; make gpu-wheels")
        raise SystemExit(NO_PACKAGES)
    if options.dry_run:
        os.environ.update(FAKE)
    elif os.environ.get("AIOMM_GPU_RUNTIME") == "fake":
        raise SystemExit("AIOMM_GPU_RUNTIME is fake: that is what --dry-run is for")
    raise SystemExit(asyncio.run(run_all(options)))


def arguments() -> argparse.Namespace:
    """Return what the command line asks for."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--save", type=Path, help="write everything as JSON")
    parser.add_argument("--only", help="checks, with commas between them")
    parser.add_argument("--quick", action="store_true", help="everything less often")
    parser.add_argument("--dry-run", action="store_true", help="on a fake GPU; saves nothing")
    return parser.parse_args()


async def run_all(options: argparse.Namespace) -> int:
    """Run the checks one after the other; return the exit status."""
    # Not before: what they import may be in the wheels.
    from benchmarks.gpu.bench import Bench
    from benchmarks.gpu.checks import CHECKS, QUESTIONS
    from benchmarks.gpu.report import print_answers, print_outcome, print_timings, save

    wanted = _wanted(options.only, [check.name for check in CHECKS])
    gpus = await _gpus()
    if gpus["reason"]:
        print(f"nothing was run: no GPU can be used here ({gpus['reason']})")
        return NO_GPU
    bench = Bench(gpus, is_dry=options.dry_run, is_quick=options.quick)
    outcomes = []
    for check in CHECKS:
        if check.name in wanted:
            outcomes.append(await bench.run(check))
            print_outcome(outcomes[-1])
            if options.save is not None and not options.dry_run:  # now: this may be killed
                save(options.save, bench, outcomes, QUESTIONS, _about(options, gpus))
    if bench.timings:
        print_timings(bench.timings)
    if not options.dry_run:
        print_answers(QUESTIONS, bench.answers)
    counts = {
        status: sum(each.status == status for each in outcomes)
        for status in ("passed", "failed", "skipped")
    }
    print("\n" + ", ".join(f"{count} {status}" for status, count in counts.items()))
    if options.dry_run:
        print("a dry run on a fake GPU: no figure of it means anything, and nothing was saved")
    elif options.save is not None:
        print(f"saved as {options.save}")
    return 1 if counts["failed"] else 0


def _wanted(only: str | None, names: Sequence[str]) -> Sequence[str]:
    wanted = [name.strip() for name in only.split(",")] if only else names
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise SystemExit(f"no such check: {', '.join(unknown)}; there are {', '.join(names)}")
    return wanted


async def _gpus() -> dict[str, Any]:
    """Return what a child sees: this process never touches CUDA."""
    from benchmarks.gpu.peers import Died, Peer, Told

    try:
        async with asyncio.timeout(START_SECONDS):
            child = await Peer.start("bare", START_SECONDS, {}, {}, [])
            try:
                found: dict[str, Any] = await child.call("gpus")
            finally:
                await child.abort()
    except (Died, Told, TimeoutError) as exc:
        return {"devices": [], "reason": f"{type(exc).__name__}: {exc}"}
    return found


def _about(options: argparse.Namespace, gpus: dict[str, Any]) -> dict[str, Any]:
    """Return where and how this was run."""
    from benchmarks.latency import machine

    where = machine()
    only = ["--only", repr(options.only)] if options.only else []
    quick = ["--quick"] if options.quick else []
    return {
        "command": " ".join(["python -m benchmarks.gpu", *only, *quick]),
        "date": where["date"],
        "machine": where,
        "gpus": [device["name"] for device in gpus["devices"]],
        "driver": gpus["versions"].get("driver"),
        "runtime": gpus["runtime"],
        "versions": gpus["versions"],
    }


if __name__ == "__main__":
    main()
