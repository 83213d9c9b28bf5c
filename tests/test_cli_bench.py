"""`aiomm bench` measures transfers between two real processes. Nothing here depends on speed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest

from aiomm.bench.busy import Spinner
from aiomm.bench.heartbeat import Heart
from aiomm.bench.plan import Busy, Plan, Process, size_from, size_name
from aiomm.bench.results import peers_from
from aiomm.cli.running import Exit
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
    optional = {"heartbeat"} if "--heartbeat" in arguments else set()
    assert report.keys() == {"command", "machine", "plane", "rows", "seconds"} | optional
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
    assert report["machine"].keys() == {"cpu", "processors", "kernel", "python", "copies"}
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


@pytest.mark.parametrize("concurrency", ["1", "3"])
async def test_with_stream_every_transfer_is_longer_than_the_pool(concurrency: str) -> None:
    options = ("--stream", "--checksum", "--concurrency", concurrency, "--arrival", "back-to-back")
    report = await bench(*options)
    arrival = "back to back" if concurrency == "1" else "3 in flight"
    assert rows_of(report) == [(arrival, 65536, path) for path in PATHS]
    *floors, resumes = [row["resumes"] for row in report["rows"]]
    assert floors == [0, 0]
    assert resumes == 3 if concurrency == "1" else resumes >= 3


async def test_a_stream_of_the_smallest_transfer_beside_a_large_one() -> None:
    report = await bench("--stream", "--sizes", "64,1MiB", "--arrival", "sparse")
    resumes = [(row["nbytes"], row["resumes"]) for row in report["rows"] if row["resumes"]]
    assert sorted(resumes) == [(64, 3), (2**20, 3)]


@pytest.mark.parametrize("busy", ["encoder", "language", "both"])
async def test_a_busy_process_is_measured_in_the_same_rounds(busy: str) -> None:
    report = await bench("--busy", busy, "--sizes", "64KiB,128KiB")
    paths = [*PATHS, f"aiomm shm, busy {busy}"]
    sizes = (2**16, 2**17)
    assert rows_of(report) == [("back to back", size, path) for size in sizes for path in paths]


async def test_a_heartbeat_tells_for_how_long_each_loop_was_held() -> None:
    report = await bench("--heartbeat", "--stream", "--busy", "both")
    heartbeat = report["heartbeat"]
    assert heartbeat.keys() == {"bounds_ms", "encoder", "language"}
    assert heartbeat["bounds_ms"] == [0.25, 0.5, 1, 2, 5, 10]
    for process in ("encoder", "language"):
        assert heartbeat[process].keys() == {"aiomm shm", "aiomm shm, busy both"}
        for beats in heartbeat[process].values():
            processor, wall = beats["processor"], beats["wall"]
            assert len(processor["counts"]) == len(wall["counts"]) == 7
            assert sum(processor["counts"]) == sum(wall["counts"]) >= 2  # one in each round
            assert processor["longest_ms"] > 0
            assert wall["longest_ms"] > 0


async def test_one_heart_beats_for_all_that_is_in_flight() -> None:
    report = await bench("--heartbeat", "--concurrency", "3")
    for process in ("encoder", "language"):
        [beats] = report["heartbeat"][process].values()
        assert sum(beats["wall"]["counts"]) > 0


async def test_the_table_tells_of_a_busy_process_and_of_the_heartbeat() -> None:
    done = await outcome_of(
        "bench", *TINY, "--stream", "--busy", "encoder", "--switch-interval", "0.5", "--heartbeat"
    )
    assert (done.code, done.errors) == (0, ""), done
    for words in (
        "a quarter of each size",
        "spins in pure Python, in the encoder process, which keeps the GIL for 0.5 ms",
        "loop held: encoder at most ",
        "loop held: language at most ",
    ):
        assert words in done.output
    figures = next(line for line in done.output.splitlines() if "64 KiB" in line).split()
    _, _, _, _, quiet, *_, busy, times = (figure.replace(",", "") for figure in figures)
    assert float(times) == pytest.approx(float(busy) / float(quiet), rel=0.1)


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
        (["--concurrency", "1001"], "--concurrency"),
        (["--arrival", "late"], "late"),
        (["--stream", "--resume"], "--stream and --resume"),
        (["--busy", "all"], "all"),
        (["--busy", "both", "--arrival", "both"], "--busy is for --arrival back-to-back"),
        (["--busy", "both", "--arrival", "sparse"], "--busy is for --arrival back-to-back"),
        (["--busy", "both", "--concurrency", "2"], "--busy is for one transfer at a time"),
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
    assert done.code == 2
    assert done.errors.startswith("aiomm: --plane cuda_ipc: it does not write into a pool on cpu")


async def test_a_transfer_that_fails_ends_it_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIOMM_MAX_WAITING", "1")
    done = await outcome_of("bench", *TINY, "--concurrency", "4")
    assert (done.code, done.output) == (1, "")
    assert "aiomm: Rejected: 1 open requests" in done.errors


def children_of(pid: int) -> list[int]:
    """Return the numbers of the processes that a process has started, oldest first."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_the_switch_interval_is_for_both_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from aiomm.bench import __main__ as process
    from aiomm.cli import bench as command
    from aiomm.cli.app import app

    plans: list[Plan] = []

    async def noted(plan: Plan, *_: object, **__: object) -> Exit:
        plans.append(plan)
        return Exit.OK

    monkeypatch.setattr(command, "measure", noted)
    for arguments in (["bench"], ["bench", "--switch-interval", "0.5"]):
        assert CliRunner().invoke(app, arguments).exit_code == 0
    assert [plan.switch_interval for plan in plans] == [sys.getswitchinterval(), 0.0005]

    intervals: list[float] = []

    def run(work: Coroutine[Any, Any, None]) -> int:
        work.close()
        intervals.append(sys.getswitchinterval())
        return 0

    monkeypatch.setattr(process, "_run", run)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    before = sys.getswitchinterval()
    try:
        for name in ("language", "encoder"):
            ours, theirs = socket.socketpair()
            encoded = msgspec.json.encode(plans[1]).decode()
            monkeypatch.setattr(sys, "argv", ["bench", name, str(ours.detach()), encoded])
            with theirs, pytest.raises(SystemExit, match="0"):
                process.main()
            sys.setswitchinterval(before)
    finally:
        sys.setswitchinterval(before)
    assert intervals == [0.0005, 0.0005]


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


def test_the_spinner_runs_only_meanwhile(no_leaks: None) -> None:
    def spinners() -> list[str]:
        return [each.name for each in threading.enumerate() if each.name == "spinner"]

    spinner = Spinner()
    for _ in range(2):
        assert not spinners()
        with spinner.spinning():
            assert spinners() == ["spinner"]
        spinner.wait_until_still()
    assert not spinners()


async def test_a_turn_that_computes_is_noted_whole() -> None:
    heart = Heart("encoder")
    assert heart.beats() == []
    with heart.beating("here"), heart.beating("here"):
        end = time.thread_time_ns() + 6_000_000
        while time.thread_time_ns() < end:
            pass
        await asyncio.sleep(0)
    [beats] = heart.beats()
    assert (beats.process, beats.path) == ("encoder", "here")
    assert beats.processor.longest >= 6_000_000
    assert sum(beats.processor.counts) == sum(beats.wall.counts) > 0
    assert sum(beats.processor.counts[-2:]) == 1  # over 5 ms


class TestPlan:
    """Both processes derive the same steps and pools from one plan."""

    def test_a_round_measures_every_path_at_every_size(self) -> None:
        plan = Plan(sizes=(64, 4096), rounds=1, warm_up_rounds=1)
        steps = list(plan.steps())
        assert steps == list(plan.steps())
        assert [step.number for step in steps] == list(range(26))
        kinds = {(step.turn, step.arrival, step.nbytes, step.path) for step in steps}
        assert len(kinds) == 24
        assert all(bool(step.pause) == (step.arrival == "sparse") for step in steps)
        assert [plan.is_warm_up(step) for step in steps] == [True] * 14 + [False] * 12

    def test_back_to_back_begins_with_a_rehearsal(self) -> None:
        """Both processes have just told what they measured: the first figure would be too high."""
        plan = Plan(sizes=(64, 4096), rounds=2, warm_up_rounds=0)
        rehearsals = [step for step in plan.steps() if step.is_rehearsal]
        assert [(step.turn, step.arrival) for step in rehearsals] == [
            (0, "back to back"),
            (1, "back to back"),
        ]
        assert all(plan.is_warm_up(step) and not step.is_transfer for step in rehearsals)

    @pytest.mark.parametrize("concurrency", [1, 5])
    @pytest.mark.parametrize("nbytes", [64, 192, 64000, 2**16, 10**6, 2**20, 2**26])
    def test_half_of_the_tokens_is_the_default_grant(self, nbytes: int, concurrency: int) -> None:
        plan = Plan(sizes=(nbytes, 2**16), resume=True, concurrency=concurrency)
        shape = plan.pools()[plan.pool_of(nbytes)]
        assert 2 * shape.default_blocks * shape.block_size * plan.row_nbytes == nbytes
        assert shape.blocks >= (concurrency + 1) * 2 * shape.default_blocks

    @pytest.mark.parametrize("concurrency", [1, 5])
    @pytest.mark.parametrize("nbytes", [64, 192, 64000, 2**16, 10**6, 2**20, 2**26, 2**30])
    def test_a_quarter_of_the_tokens_is_the_pool(self, nbytes: int, concurrency: int) -> None:
        plan = Plan(sizes=(nbytes, 2**16), stream=True, concurrency=concurrency)
        shape = plan.pools()[plan.pool_of(nbytes)]
        assert 4 * shape.blocks * shape.block_size * plan.row_nbytes == nbytes
        assert shape.default_blocks == shape.blocks <= 1024  # so that one grant is all of it
        assert plan.buffered_nbytes == concurrency * max(nbytes, 2**16)

    @pytest.mark.parametrize(
        ("busy", "processes"),
        [("encoder", {"encoder"}), ("language", {"language"}), ("both", {"encoder", "language"})],
    )
    def test_only_the_busy_step_spins(self, busy: Busy, processes: set[Process]) -> None:
        plan = Plan(sizes=(64,), rounds=1, warm_up_rounds=0, arrivals=("back to back",), busy=busy)
        *quiet, rehearsal, last = plan.steps()
        assert [step.is_transfer for step in quiet] == [False, False, False, True, True]
        both: tuple[Process, ...] = ("encoder", "language")
        for step in (rehearsal, last):
            assert {process for process in both if plan.spins(process, step)} == processes
        assert not any(plan.spins(process, step) for process in both for step in quiet)

    def test_beside_a_busy_thread_every_transfer_is_rehearsed(self) -> None:
        """A long one is copied in another way when the one before it was held up."""
        plan = Plan(sizes=(64,), rounds=3, arrivals=("back to back",), busy="encoder")
        transfers = [step for step in plan.steps() if step.is_transfer]
        rehearsals, counted = transfers[::2], transfers[1::2]
        assert [step.path for step in rehearsals] == [step.path for step in counted]
        assert all(map(plan.is_warm_up, rehearsals))
        assert {step.turn for step in counted if not plan.is_warm_up(step)} == {2, 3, 4}

    def test_one_pool_holds_all_that_is_in_flight(self) -> None:
        plan = Plan(sizes=(192, 2**26), concurrency=5)
        [shape] = plan.pools()
        assert shape.blocks * shape.block_size * plan.row_nbytes >= 6 * 2**26

    @pytest.mark.parametrize(
        ("nbytes", "block_nbytes"),
        [(64, 2**16), (2**26, 2**16), (2**28, 2**18), (2**30, 2**20), (10**9, 976_896)],
    )
    def test_one_grant_is_all_of_the_largest(self, nbytes: int, block_nbytes: int) -> None:
        plan = Plan(sizes=(2**16, nbytes))
        [shape] = plan.pools()
        assert shape.block_size * plan.row_nbytes == block_nbytes
        assert -(-nbytes // block_nbytes) <= 1024
        assert shape.blocks * block_nbytes >= 2 * nbytes

    def test_one_token_is_the_whole_of_a_small_transfer(self) -> None:
        assert Plan(sizes=(4096,), concurrency=64).num_tokens(4096) == 1

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
