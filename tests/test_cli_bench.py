"""`aiomm bench` measures transfers between two real processes. Nothing here depends on speed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from aiomm.bench.plan import Plan, size_from, size_name
from aiomm.bench.results import peers_from
from tests.command import command, outcome_of
from tests.processes import until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

TINY = ("--sizes", "64KiB", "--rounds", "2")
PATHS = ["memcpy", "memcpy + ack", "aiomm shm"]
ROW = {
    *("size", "nbytes", "arrival", "path", "median_us", "quartiles_us", "gb_per_second"),
    *("times_memcpy", "times_floor", "per_second", "resumes"),
}


async def bench(*arguments: str) -> dict[str, Any]:
    """Run the benchmark; what it prints as JSON, once it has ended well and without complaint."""
    done = await outcome_of("bench", "--json", *TINY, *arguments)
    assert (done.code, done.errors) == (0, ""), done
    report: dict[str, Any] = json.loads(done.output)
    assert report.keys() == {"command", "machine", "plane", "rows", "seconds"}
    for row in report["rows"]:
        assert row.keys() == ROW
        low, high = row["quartiles_us"]
        assert 0 < low <= row["median_us"] <= high
        raw = report["seconds"][row["arrival"]][row["size"]][row["path"]]
        assert len(raw) == 2
    return report


def rows_of(report: dict[str, Any]) -> list[tuple[str, int, str]]:
    """Return what was measured."""
    return [(row["arrival"], row["nbytes"], row["path"]) for row in report["rows"]]


async def test_both_arrivals_and_all_paths_are_measured() -> None:
    report = await bench()
    arrivals = ("back to back", "sparse")
    assert rows_of(report) == [(arrival, 65536, path) for arrival in arrivals for path in PATHS]
    assert {row["resumes"] for row in report["rows"]} == {0}
    assert report["plane"] == "shm"
    assert report["command"].startswith("bench --json")
    assert report["machine"].keys() == {"cpu", "processors", "kernel", "python"}
    for row in report["rows"]:
        assert (row["times_memcpy"] == 1) or row["path"] != "memcpy"
        assert (row["times_floor"] == 1) or row["path"] != "memcpy + ack"


@pytest.mark.parametrize("concurrency", ["1", "3"])
async def test_with_resume_every_transfer_takes_one(concurrency: str) -> None:
    options = ("--resume", "--checksum", "--concurrency", concurrency, "--arrival", "back-to-back")
    report = await bench(*options)
    arrival = "back to back" if concurrency == "1" else "3 in flight"
    assert rows_of(report) == [(arrival, 65536, path) for path in PATHS]
    assert [row["resumes"] for row in report["rows"]] == [0, 0, 1]


async def test_many_at_a_time_over_tcp() -> None:
    report = await bench("--concurrency", "4", "--plane", "tcp")
    assert [path for _, _, path in rows_of(report)] == [*PATHS[:2], "aiomm tcp"]


async def test_the_table_and_its_files(tmp_path: Path) -> None:
    picture, figures, peers = (tmp_path / name for name in ("a.svg", "a.json", "peers.json"))
    rows = [
        {"nbytes": nbytes, "path": "pigeon", "median_us": 1e6, "more": 1} for nbytes in (1, 65536)
    ]
    peers.write_text(json.dumps({"rows": [*rows, rows[0] | {"path": "memcpy"}]}))
    files = ("--plot", str(picture), "--peers", str(peers), "--save", str(figures))
    done = await outcome_of("bench", *TINY, "--arrival", "sparse", *files)
    assert (done.code, done.errors) == (0, ""), done
    shown = done.output.splitlines()
    told = ["machine: ", "plane: shm (cpu)", "arrival: sparse: one every 10", "aiomm: ", "floor: "]
    for line, beginning in zip(shown, told, strict=False):
        assert line.startswith(beginning)
    assert sum("64 KiB" in line for line in shown) == 1
    drawn = picture.read_text()
    for path in (*(f"{path}, sparse" for path in PATHS), "pigeon"):
        assert f"<!-- {path} -->" in drawn
    assert rows_of(json.loads(figures.read_text())) == [("sparse", 65536, path) for path in PATHS]
    assert {peer.path for peer in peers_from(figures)} == {"aiomm shm"}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--sizes", "many"], "'many' is no size such as 64KiB"),
        (["--sizes", "64KiB,"], "'' is no size"),
        (["--sizes", "64XiB"], "is no size"),
        (["--sizes", "100"], "no multiple of 64 bytes"),
        (["--sizes", "0"], "no multiple"),
        (["--sizes", "2GiB"], "up to 1 GiB"),
        (["--rounds", "0"], "--rounds"),
        (["--concurrency", "0"], "--concurrency"),
        (["--arrival", "late"], "late"),
        (["--device", "abacus"], "abacus"),
        (["--plot", "a.gif"], "must end with .png or .svg"),
        (["--plot", "/no such folder/a.png"], "there is no such folder"),
        (["--peers", __file__], "--peers is for --plot"),
        (["--plot", "a.png", "--peers", __file__], "Expected `object`"),
    ],
)
def test_a_wrong_command_line_is_refused_with_2(arguments: list[str], complaint: str) -> None:
    from typer.testing import CliRunner

    from aiomm.cli.app import app

    refused = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["bench", *arguments])
    assert refused.exit_code == 2
    assert complaint in " ".join(refused.output.split())


@pytest.mark.parametrize(
    ("package", "option"), [("matplotlib", "--plot=a.png"), ("xxhash", "--checksum")]
)
def test_without_its_extra_an_option_names_it(
    package: str, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    from typer.testing import CliRunner

    from aiomm.cli.app import app

    monkeypatch.setitem(sys.modules, package, None)
    refused = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["bench", option])
    assert refused.exit_code == 2
    assert f"{option.partition('=')[0]} needs python -m pip install" in refused.output


async def test_a_plane_that_cannot_be_used_is_named() -> None:
    done = await outcome_of("bench", *TINY, "--plane", "cuda_ipc")
    assert done.code == 1
    assert done.errors.startswith("aiomm: PlaneUnavailable: no plane can be used: cuda_ipc: ")


def children_of(pid: int) -> list[int]:
    """Return the numbers of the processes that a process has started, oldest first."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("which", ["language", "encoder", "command"])
async def test_nobody_stays_when_one_is_gone(which: str) -> None:
    async with command("bench", "--sizes", "64KiB", "--rounds", "100000") as running:
        await until(lambda: len(children_of(running.pid)) == 2, "two processes run")
        started = children_of(running.pid)
        if which == "command":
            await asyncio.sleep(1.0)  # somewhere in its work
            running.interrupt()
        else:
            os.kill(started[which == "encoder"], signal.SIGKILL)
        done = await running.end()
    assert done.code == (130 if which == "command" else 1)
    assert not any(str(pid) in os.listdir("/proc") for pid in started)


class TestPlan:
    """Both processes derive the same steps and pools from one plan."""

    def test_a_round_measures_every_path_at_every_size(self) -> None:
        plan = Plan(sizes=(64, 4096), rounds=1, warm_up_rounds=1)
        steps = list(plan.steps())
        assert steps == list(plan.steps())
        assert [step.number for step in steps] == list(range(24))
        kinds = [(step.turn, step.arrival, step.nbytes, step.path) for step in steps]
        assert len(set(kinds)) == 24
        assert all(bool(step.pause) == (step.arrival == "sparse") for step in steps)
        assert [plan.is_warm_up(step) for step in steps] == [True] * 12 + [False] * 12

    @pytest.mark.parametrize("concurrency", [1, 5])
    @pytest.mark.parametrize("nbytes", [64, 192, 64000, 2**16, 10**6, 2**20, 2**26])
    def test_half_of_the_tokens_is_the_default_grant(self, nbytes: int, concurrency: int) -> None:
        plan = Plan(sizes=(nbytes, 2**16), resume=True, concurrency=concurrency)
        shape = plan.pools()[plan.pool_of(nbytes)]
        assert 2 * shape.default_blocks * shape.block_size * plan.row_nbytes == nbytes
        assert shape.blocks >= (concurrency + 1) * 2 * shape.default_blocks

    def test_one_pool_holds_all_that_is_in_flight(self) -> None:
        plan = Plan(sizes=(192, 2**26), concurrency=5)
        [shape] = plan.pools()
        assert shape.blocks * shape.block_size * plan.row_nbytes >= 6 * 2**26

    @pytest.mark.parametrize(
        ("text", "nbytes", "name"),
        [
            ("64KiB", 2**16, "64 KiB"),
            (" 1 mib ", 2**20, "1 MiB"),
            ("64kB", 64000, "64000 B"),
            ("128", 128, "128 B"),
            ("1GiB", 2**30, "1 GiB"),
        ],
    )
    def test_sizes_have_units(self, text: str, nbytes: int, name: str) -> None:
        assert size_from(text) == nbytes
        assert size_name(nbytes) == name
