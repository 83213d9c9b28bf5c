"""`python -m benchmarks.goals` judges figures rightly, and has them all. Nothing depends on speed.

It is run as a person does: what is made up for it comes in a file, as what an earlier run saved.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
ARRIVALS = ("back to back", "sparse")
MIB = 2**20
LONG = 64 * MIB
OF_PEERS = 20
"""Goals that the peers' file decides; of the others there are 17, and a row without a goal."""


class Outcome(NamedTuple):
    """What a run left behind."""

    code: int
    output: str
    errors: str
    saved: dict[str, Any]

    def verdicts(self) -> dict[str, str]:
        """Return them by what they are of."""
        return {goal["what"]: goal["verdict"] for goal in self.saved["goals"]}


def run(module: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a benchmark to its end."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False
    )


def goals(folder: Path, *arguments: str, peers: object = None, **environment: str) -> Outcome:
    """Run it with that content of the peers file, absent if None, and read what it saved."""
    peers_file, saved_file = folder / "peers.json", folder / "saved.json"
    if peers is not None:
        peers_file.write_text(json.dumps(peers))
    files = ("--peers", str(peers_file), "--save", str(saved_file))
    done = run("goals", *files, *arguments, **environment)
    saved = json.loads(saved_file.read_text()) if saved_file.exists() else {}
    return Outcome(done.returncode, done.stdout, done.stderr, saved)


def judged(folder: Path, measured: object, peers: object = None) -> Outcome:
    """Let it judge figures that are made up."""
    file = folder / "measured.json"
    file.write_text(json.dumps(measured))
    return goals(folder, "--again", str(file), peers=peers)


def figures(slowness: float) -> dict[str, Any]:
    """Return figures of a run where everything takes a millisecond, and what has a goal longer."""
    slow, usual = ("aiomm", slowness), ("aiomm", 1.0)
    copies = (("memcpy", 1.0), ("memcpy + ack", 1.0))
    series = [
        *(
            seconds("one at a time", size, *each, arrival)
            for size in (65536, MIB, 8 * MIB, LONG)
            for each in (*copies, slow)
            for arrival in ARRIVALS
        ),
        seconds("64 in flight", 4096, "aiomm", slowness / 10, "64 in flight"),
        seconds("1000 in flight", 4096, "aiomm", slowness**2 / 10, "1000 in flight"),
        seconds("granted at once", LONG, *usual),
        seconds("one resume", LONG, *slow),
        seconds("streamed", LONG, *slow),
        seconds("without checksums", 8 * MIB, *usual),
        seconds("with checksums", 8 * MIB, *slow),
    ]
    for who in ("encoder", "language", "both"):
        name = f"busy {who}"
        series += [seconds(name, LONG, *usual), seconds(name, LONG, "aiomm, busy", slowness)]
    held = [
        {"plan": "a", "process": process, "path": path, "processor": slowness, "wall": 30.0}
        for process, path in product(("encoder", "language"), ("aiomm", "aiomm, busy"))
    ]
    plans = {f"{number} in flight": {"concurrency": number} for number in (64, 1000)}
    machine = {"cpu": "abacus", "date": "1971-01-01"}
    return {"machine": machine, "figures": {"plans": plans, "series": series, "held": held}}


def seconds(
    plan: str, nbytes: int, path: str, milliseconds: float, arrival: str = "back to back"
) -> dict[str, Any]:
    """Return five rounds around a median."""
    rounds = [milliseconds * part / 1000 for part in (1.2, 0.9, 1.0, 1.1, 0.8)]
    return {"plan": plan, "arrival": arrival, "nbytes": nbytes, "path": path, "seconds": rounds}


def peers(slowness: float, without: str = "") -> dict[str, Any]:
    """Return the peers' figures, of which ours are so slow."""
    took = {"nixl": 25, "pickle over pyzmq": 80, "mooncake sync write": 18, "raw tcp": 11}
    ours = {"aiomm shm": 10 * slowness, "aiomm tcp": 10 * slowness}
    rows = [
        {
            "nbytes": nbytes,
            "arrival": arrival,
            "path": path,
            "median_us": median,
            "quartiles_us": [median * 0.9, median * 1.1],
            "cpu_seconds_per_gb": slowness if path in ours else 1.0,
        }
        for nbytes, arrival in product((65536, MIB, 8 * MIB, LONG), ARRIVALS)
        for path, median in {"memcpy": 9, **took, **ours}.items()
        if path != without
    ]
    return {"command": "", "rows": rows}


@pytest.mark.parametrize(("slowness", "verdict"), [(1.0, "met"), (20.0, "missed")])
def test_every_goal_is_met_or_missed(tmp_path: Path, slowness: float, verdict: str) -> None:
    done = judged(tmp_path, figures(slowness), peers(slowness))
    assert (done.code, done.errors) == (0, "")
    verdicts = done.verdicts()
    assert verdicts.pop("shm 64 MiB, both busy") == "told"
    assert set(verdicts.values()) == {verdict}
    assert len(verdicts) == 17 + OF_PEERS
    met, missed = (37, 0) if verdict == "met" else (0, 37)
    assert f"\n{met} goals met, {missed} missed.\n" in done.output
    assert "tests/protocol/test_cost.py" in done.output
    assert done.saved["machine"] == {"cpu": "abacus", "date": "1971-01-01"}
    assert done.saved["figures"]["series"] == figures(slowness)["figures"]["series"]


@pytest.mark.parametrize(("slowness", "verdict"), [(1.104, "met"), (1.106, "missed")])
def test_a_figure_is_judged_as_it_is_shown(tmp_path: Path, slowness: float, verdict: str) -> None:
    done = judged(tmp_path, figures(slowness))
    row = next(row for row in done.saved["goals"] if row["what"] == "shm 64 MiB, sparse")
    assert (row["bound"], row["value"], row["unit"]) == ("at most", 1.1, "x memcpy")
    assert (row["figure"], row["verdict"]) == (round(slowness, 2), verdict)
    low, high = row["quartiles"]
    assert low < row["figure"] < high
    line = next(line for line in done.output.splitlines() if line.startswith("shm 64 MiB, sparse"))
    assert line.endswith(f"at most 1.1 x memcpy                  {verdict}")


def test_who_is_ahead_is_told(tmp_path: Path) -> None:
    done = judged(tmp_path, figures(1.0), peers(2.0))
    notes = {goal["what"]: goal["note"] for goal in done.saved["goals"]}
    verdicts = done.verdicts()
    what = "shm 1 MiB, sparse, against every peer"
    assert (verdicts[what], notes[what]) == ("missed", "ahead: raw tcp, mooncake sync write")
    assert verdicts["shm 64 KiB, sparse, time against nixl"] == "met"
    assert verdicts["shm 64 MiB, sparse, against nixl"] == "missed"
    assert verdicts["tcp 64 MiB, sparse, against raw tcp"] == "missed"
    assert notes[what] in done.output


def test_without_the_peers_file_their_goals_are_skipped(tmp_path: Path) -> None:
    done = judged(tmp_path, figures(1.0))
    assert done.code == 0
    assert len(done.verdicts()) == 17 + 1
    assert f"{tmp_path / 'peers.json'} is absent" in done.output
    assert "17 goals met, 0 missed." in done.output
    assert done.saved["peers"] is None


def test_without_one_peer_only_its_goals_are_skipped(tmp_path: Path) -> None:
    done = judged(tmp_path, figures(1.0), peers(1.0, without="raw tcp"))
    assert done.code == 0
    skipped = [goal for goal in done.saved["goals"] if goal["verdict"] == "skipped"]
    assert [goal["what"] for goal in skipped] == [
        f"tcp 64 MiB, {arrival}, against raw tcp" for arrival in ARRIVALS
    ]
    assert "the peers file has no raw tcp of 64 MiB, sparse" in done.output
    assert "35 goals met, 0 missed, 2 not measured." in done.output


def test_figures_that_are_not_there_fail_the_run(tmp_path: Path) -> None:
    measured = figures(1.0)
    del measured["figures"]["series"][-1]
    done = judged(tmp_path, measured, peers(1.0))
    assert done.code == 1
    assert "no seconds of 'aiomm, busy' in 'busy both'" in done.errors
    assert not done.saved


def test_another_file_in_place_of_the_peers_fails_the_run(tmp_path: Path) -> None:
    done = judged(tmp_path, figures(1.0), peers={"rows": [{"path": "nixl"}]})
    assert done.code == 1
    assert "peers.json" in done.errors


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_a_measurement_that_breaks_fails_the_run(tmp_path: Path) -> None:
    done = goals(tmp_path, "--quick", AIOMM_MAX_PEERS="none")
    assert done.code == 1
    assert "goals: PeerLost: " in done.errors
    assert not done.saved


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_a_run_that_is_stopped_leaves_what_it_has_measured(tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    command = [sys.executable, "-m", "benchmarks.goals", "--quick", "--save", str(saved)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("4 of 14"):
                process.terminate()
    assert process.returncode != 0
    plans = json.loads(saved.read_text())["figures"]["plans"]
    assert set(plans) >= {"one at a time", "1 in flight"}
    done = goals(tmp_path, "--again", str(saved))
    assert done.code == 1
    assert "goals: LookupError: no seconds of 'aiomm'" in done.errors


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_quick_run_has_all_figures(tmp_path: Path) -> None:
    done = goals(tmp_path, "--quick", "--plots", str(tmp_path), peers=peers(1.0))
    assert done.code == 0, done.errors
    told = [line for line in done.errors.splitlines() if " of 14: " in line]
    assert len(told) == 14
    verdicts = done.verdicts()
    assert len(verdicts) == 17 + OF_PEERS + 1
    assert "skipped" not in verdicts.values()
    assert all(each["seconds"] for each in done.saved["figures"]["series"])
    facts = {"cpu", "kernel", "python", "copies", "date", "load"}
    assert done.saved["machine"].keys() == facts
    for name in ("latency.png", "rate.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    again = goals(tmp_path, "--again", str(tmp_path / "saved.json"))
    assert again.output == done.output
    assert again.saved["figures"] == done.saved["figures"]


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_peers_that_need_nothing_are_measured(tmp_path: Path) -> None:
    saved = tmp_path / "peers.json"
    paths = ["multiprocessing connection", "raw tcp"]
    options = ("--sizes", "64KiB", "--rounds", "1", "--save", str(saved))
    done = run("peers", "--only", ",".join(paths), *options)
    assert (done.returncode, done.stderr) == (0, "")
    measured = json.loads(saved.read_text())
    assert measured["missing"] == {}
    assert [(row["arrival"], row["path"]) for row in measured["rows"]] == list(
        product(ARRIVALS, ["memcpy", "memcpy + ack", *paths])
    )
    for path in paths:
        assert done.stdout.count(path) == 2
