"""`aiomm demo` moves real requests between two real processes, and compares every byte."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from aiomm.demo import content
from tests.command import command, outcome_of
from tests.conftest import shared_memory_files
from tests.processes import until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

RESUMED = ["ALLOC", "SENDING", "AWAITING_RESUME", "SENDING", "DONE"]


async def demo(*arguments: str) -> dict[str, Any]:
    """Run the demo; what it prints as JSON, once it has ended well and without complaint."""
    done = await outcome_of("demo", "--json", *arguments)
    assert (done.code, done.errors) == (0, ""), done
    report: dict[str, Any] = json.loads(done.output)
    assert report["verified"] is True
    assert (report["completed"], report["failed"]) == (report["requests"], 0)
    assert len(report["transfers"]) == report["requests"]
    assert report["bytes"] == sum(each["bytes"] for each in report["transfers"])
    return report


async def test_2000_tokens_take_one_resume() -> None:
    report = await demo("--tokens", "2000")
    [transfer] = report["transfers"]
    assert report["plane"] == transfer["plane"] == "shm"
    assert transfer["total_tokens"] == 2000
    assert transfer["buffered_chunks"] == [1024, 976]
    assert transfer["resumes"] == 1
    assert transfer["sender_states"] == transfer["receiver_states"] == RESUMED
    assert [len(blocks) for blocks in transfer["block_indices"]] == [8, 8]
    assert transfer["start_offset"] == [128 * min(blocks) for blocks in transfer["block_indices"]]


async def test_an_announced_length_takes_none_and_stays_in_the_pool() -> None:
    report = await demo("--tokens", "2000", "--announce")
    [transfer] = report["transfers"]
    assert transfer["buffered_chunks"] == [2000]
    assert transfer["resumes"] == 0
    assert transfer["view"] is True
    assert transfer["sender_states"] == ["ALLOC", "SENDING", "DONE"]


async def test_a_request_longer_than_the_pool_takes_bounded_memory() -> None:
    report = await demo("--tokens", "50000", "--hidden", "512", "--pool-blocks", "16")
    [transfer] = report["transfers"]
    assert sum(transfer["buffered_chunks"]) == 50000
    assert transfer["resumes"] >= 24
    assert not transfer["view"]
    pool_nbytes = 16 * 128 * report["bytes"] / 50000
    allowed = (report["bytes"] + pool_nbytes) / 2**20 + 150
    assert report["peak_rss_mb"] - report["baseline_rss_mb"] < allowed


@pytest.mark.parametrize(
    "options",
    [
        ("--plane", "tcp"),
        ("--control", "aiozmq"),
        ("--bind", "sender"),
    ],
    ids=" ".join,
)
async def test_many_requests_share_a_small_pool(options: tuple[str, ...]) -> None:
    many = ("--requests", "40", "--concurrency", "40", "--hidden", "64", "--pool-blocks", "24")
    report = await demo(*many, *options)
    assert report["plane"] == ("tcp" if "tcp" in options else "shm")
    assert {tuple(each["buffered_chunks"]) for each in report["transfers"]} == {(1024, 976)}


async def test_a_photo_goes_through_both_models(photo: Path) -> None:
    done = await outcome_of("demo", "--image", str(photo))
    assert (done.code, done.errors) == (0, ""), done
    *_, last = done.output.splitlines()
    assert last.startswith("verified: every byte equal (1 of 1 requests")
    assert "grace_hopper.jpg: 1131 tokens; next token ids: " in done.output
    for shown in ("AWAITING_RESUME", "first", "resume 1", "0-7", "1024", "GB/s", "shm"):
        assert shown in done.output


def children_of(pid: int) -> list[int]:
    """Return the numbers of the processes that a process has started, oldest first."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def test_ctrl_c_ends_both_processes() -> None:
    before = shared_memory_files()
    async with command("demo", "--requests", "100000") as running:
        await until(lambda: len(children_of(running.pid)) == 2, "two processes run")
        started = children_of(running.pid)
        running.interrupt()
        done = await running.end()
    assert done.code == 130
    assert not any(str(pid) in os.listdir("/proc") for pid in started)
    assert shared_memory_files() == before


@pytest.mark.parametrize("which", [0, 1], ids=["language", "encoder"])
async def test_a_process_that_ends_early_is_told(which: int) -> None:
    async with command("demo", "--requests", "100000") as running:
        await until(lambda: len(children_of(running.pid)) == 2, "two processes run")
        os.kill(children_of(running.pid)[which], signal.SIGKILL)
        done = await running.end()
    assert done.code == 1
    assert done.errors.count("\n") == 1
    assert "ended with status -9 before its work" in done.errors


def test_every_byte_counts() -> None:
    """A change of any byte of any field is found, and so is a missing token."""
    sent = content.make(3, 2500, 16)
    assert content.difference(sent, 3, 2500, 16) is None
    assert content.difference(sent, 4, 2500, 16) is not None
    assert content.difference(content.make(3, 0, 16), 3, 0, 16) is None
    shorter = {name: tensor[1:] for name, tensor in sent.items()}
    assert content.difference(shorter, 3, 2500, 16) == (
        "input_embeddings has 2499 tokens, 2500 were sent"
    )
    for name, tensor in sent.items():
        changed = tensor.clone()
        changed.flatten()[-1] = 0 if changed.flatten()[-1] else 1
        found = content.difference({**sent, name: changed}, 3, 2500, 16)
        assert found == f"{name} differs in tokens [2042, 2500)"
