"""Long copies run on threads, which nobody has to wait for; short ones share the loop's time."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, combinations
from typing import Any
from unittest.mock import Mock

import pytest

from aiomm.buffers import memcpy
from aiomm.buffers.memcpy import Memcpy, SharedCopies, address_of
from aiomm.buffers.tensors import TokenRows
from aiomm.errors import PlaneUnavailable
from aiomm.planes import copying
from aiomm.planes.base import Run
from aiomm.planes.copying import (
    Copies,
    CopyThreads,
    LoopCopies,
    LoopTime,
    pieces_of,
    shares_of,
)
from aiomm.types import Field

pytestmark = pytest.mark.usefixtures("no_leaks")

NEVER_CLOSED = """
import asyncio
from aiomm.buffers.shm import MemfdArena
from aiomm.buffers.layout import ByteRange
from aiomm.buffers.tensors import TokenRows
from aiomm.errors import PlaneUnavailable
from aiomm.planes.base import GrantKey, Run
from aiomm.planes.registry import make_planes
from aiomm.types import Field

NBYTES = 4 << 20

async def main():
    grant = GrantKey(1, 1, 1)
    rows = TokenRows.of("rows", Field("uint8", 4096), bytearray(b"x") * NBYTES)
    for plane in make_planes(["shm", "tcp", "memory"]):
        arena = MemfdArena(NBYTES)
        export = await plane.export(arena)
        remote = await plane.attach(export.offer(1))
        export.permit(grant, [ByteRange(0, NBYTES)])
        await remote.write(grant, [Run(rows, 0, NBYTES // 4096, 0)])
        assert arena.view(0, NBYTES) == b"x" * NBYTES
    print("written")

asyncio.run(main())
"""


@pytest.mark.both_loops
async def test_two_attachments_share_a_thread_and_the_last_one_ends_it() -> None:
    threads = CopyThreads("test")
    first, second = Copies(threads), Copies(threads)
    names = await asyncio.gather(*(one.run(threading.get_ident) for one in (first, second)))
    assert names[0] == names[1] != threading.get_ident()
    await first.aclose()
    await first.aclose()
    assert await second.run(threading.get_ident) == names[0]
    await second.aclose()


@pytest.mark.both_loops
async def test_a_cancelled_wait_does_not_stop_the_work() -> None:
    copies = Copies(CopyThreads("test"))
    go_on = threading.Event()
    done: list[bool] = []
    waiting = asyncio.create_task(copies.run(lambda: done.append(go_on.wait())))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert waiting.cancelled()
    assert not done
    go_on.set()
    await copies.drain()
    assert done == [True]
    await copies.aclose()


@pytest.mark.both_loops
async def test_an_error_is_that_of_the_work() -> None:
    copies = Copies(CopyThreads("test"))
    with pytest.raises(ZeroDivisionError):
        await copies.run(lambda: 1 // 0)
    await copies.aclose()


@pytest.mark.both_loops
async def test_a_long_copy_is_shared_by_the_threads(six_processors: set[int]) -> None:
    """All are at work at the same time, none where another one is, and the end is told once."""
    copies, story = Copies(CopyThreads("test", 3)), list[tuple[int, int, set[int]]]()
    all_at_work = threading.Barrier(3)

    def copy(run: Run) -> None:
        story.append((run.first, run.count, os.sched_getaffinity(0)))
        all_at_work.wait(10)

    await copies.share_out(copy, [run_of(13, 1 << 20)])
    assert [piece[:2] for piece in sorted(story)] == [(0, 5), (5, 5), (10, 3)]
    places = [piece[2] for piece in story]
    assert not any(one & other for one, other in combinations(places, 2))
    assert set.union(*places) == six_processors
    await copies.aclose()


@pytest.mark.both_loops
async def test_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """One share runs, the others never will: all is over when that one is, and not before."""
    threads = CopyThreads("test", 3)
    threads.num_threads = 3
    copies, ended = Copies(threads), list[int]()
    may_end = threading.Event()
    start = threading.Thread.start

    def start_one(thread: threading.Thread) -> None:
        if any(each.name.startswith("aiomm-test") for each in threading.enumerate()):
            raise RuntimeError("can't start new thread")
        start(thread)

    def copy(run: Run) -> None:
        may_end.wait(10)
        ended.append(run.first)

    monkeypatch.setattr(copying, "LATE_SECONDS", 10.0)
    monkeypatch.setattr(threading.Thread, "start", start_one)
    writing = asyncio.ensure_future(copies.share_out(copy, [run_of(12, 1 << 20)]))
    await asyncio.sleep(0)
    draining = asyncio.ensure_future(copies.drain())
    for _ in range(10):  # turns in which a premature end would be told
        await asyncio.sleep(0)
    assert not writing.done()
    assert not draining.done()
    may_end.set()
    with pytest.raises(PlaneUnavailable, match="test: can't start new thread"):
        await writing
    await draining
    assert ended == [0]
    monkeypatch.setattr(threading.Thread, "start", start)
    ended.clear()
    await copies.share_out(copy, [run_of(12, 1 << 20)])
    assert sorted(ended) == [0, 4, 8]
    await copies.aclose()


@pytest.mark.both_loops
async def test_a_share_that_fails_is_told_when_the_others_have_ended() -> None:
    copies, ended = Copies(CopyThreads("test", 2)), list[int]()
    failed = threading.Event()

    def copy(run: Run) -> None:
        if not run.first:
            failed.set()
            raise ZeroDivisionError
        failed.wait(10)
        ended.append(run.first)

    with pytest.raises(ZeroDivisionError):
        await copies.share_out(copy, [run_of(8, 1 << 20)])
    assert ended == [4]
    await copies.aclose()


@pytest.mark.both_loops
async def test_a_work_that_is_over_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though its thread may get no processor to say so to its executor."""
    copies, go_on = Copies(CopyThreads("test")), threading.Event()
    loop = asyncio.get_running_loop()
    tell = loop.call_soon_threadsafe

    def tell_and_wait(*arguments: Any) -> None:
        tell(*arguments)
        go_on.wait(10)

    class Work:
        def __call__(self) -> bool:
            return True

    slow_loop = Mock(call_soon_threadsafe=tell_and_wait, create_future=loop.create_future)
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: slow_loop)
    work = Work()
    alive = weakref.ref(work)
    finished = copies.start([work])
    monkeypatch.undo()
    del work
    assert await finished == [True]
    assert alive() is None
    go_on.set()
    await copies.aclose()


@pytest.mark.both_loops
async def test_works_that_begin_late_are_noticed_and_those_in_time_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copies, seen = Copies(CopyThreads("test")), []
    for late_seconds in (-1.0, 20.0, -1.0, 20.0):
        monkeypatch.setattr(copying, "LATE_SECONDS", late_seconds)
        copies.look_again()
        await copies.drain()
        seen.append(copies.are_late)
    assert seen == [True, False, True, False]
    await copies.aclose()
    copies.look_again()
    with pytest.raises(PlaneUnavailable, match="threads of test have ended"):
        await copies.run(lambda: None)


@pytest.mark.both_loops
@pytest.mark.parametrize("probes", [True, False])
async def test_copies_are_made_by_whoever_is_in_time(
    probes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Probing, the loop's thread makes a piece, and is then late or not in getting the GIL back."""
    on_loop = LoopCopies()
    copies = Copies(CopyThreads("test"), on_loop)
    makers = list[str]()
    monkeypatch.setattr(memcpy, "PIECE_NBYTES", 10)
    run, pieces = SharedCopies.run, SharedCopies.pieces

    def noted_run(shared: SharedCopies) -> None:
        makers.append("thread")
        run(shared)

    def noted_pieces(shared: SharedCopies, *copy: Memcpy) -> Iterator[Callable[[], object]]:
        for piece in pieces(shared, *copy):
            makers.append("loop")
            yield piece

    monkeypatch.setattr(SharedCopies, "run", noted_run)
    monkeypatch.setattr(SharedCopies, "pieces", noted_pieces)
    in_time = ["loop", "thread"] if probes else ["thread"]
    for late_seconds, made in (
        (20.0, in_time),
        (-1.0, ["loop"] * 3 if probes else ["thread"]),
        (-1.0, ["loop"] * 3),  # and looks again
        (20.0, ["loop"] * 3),
        (20.0, in_time),
    ):
        monkeypatch.setattr(copying, "LATE_SECONDS", late_seconds)
        source, target = bytearray(range(30)), bytearray(30)
        there, here = (address_of(memoryview(memory)) for memory in (target, source))
        shared = SharedCopies([(there, here, 30)], (source, target))
        await copies.share(shared, probes=probes)
        await copies.drain()
        assert (target, makers) == (source, made)
        makers.clear()
    await copies.aclose()


@pytest.mark.both_loops
async def test_a_short_copy_needs_no_thread_and_none_needs_a_turn_that_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_loop = LoopCopies()
    copies = Copies(CopyThreads("test"), on_loop)
    source, target = bytearray(b"abc"), bytearray(3)
    monkeypatch.setattr(copying, "LATE_SECONDS", 20.0)
    here, there = (address_of(memoryview(memory)) for memory in (source, target))
    started = Mock(wraps=copies.run_all)
    monkeypatch.setattr(copies, "run_all", started)
    await copies.share(SharedCopies([(there, here, 3)], source), probes=False)
    assert (target, started.called) == (source, False)
    monkeypatch.setattr(on_loop.time, "is_left", lambda: False)
    await copies.share(SharedCopies([(there, here, 3)], source), probes=False)
    assert started.called
    await copies.aclose()


@pytest.mark.both_loops
async def test_works_that_wait_for_others_are_not_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have waited for long, but for copies of ours."""
    copies = Copies(CopyThreads("test"))
    clock = Mock(monotonic=Mock(return_value=0.0))
    monkeypatch.setattr(copying, "time", clock)
    begun, go_on = threading.Event(), threading.Event()

    def work() -> bool:
        begun.set()
        return go_on.wait(10)

    first, second = copies.start([work]), copies.start([lambda: True])
    assert begun.wait(10)
    clock.monotonic.return_value = 100.0
    go_on.set()
    assert await second == [True]
    assert first.done()
    assert not copies.are_late
    await copies.aclose()


@pytest.mark.parametrize(
    ("num_processors", "max_threads", "shares"),
    [
        (1, 4, {0: 1, 4: 1, 64: 1}),
        (2, 4, {4: 1, 5: 2, 64: 2}),
        (3, 1, {64: 1}),
        (4, 4, {2: 1, 3: 2, 4: 2, 5: 3, 7: 4, 64: 4}),
        (16, 4, {8: 4, 64: 4}),
    ],
)
async def test_a_share_is_worth_a_thread(
    num_processors: int, max_threads: int, shares: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of few processors, each is missing elsewhere."""
    monkeypatch.setattr(copying, "num_processors", lambda: num_processors)
    copies = Copies(CopyThreads("test", max_threads))
    assert {mib: copies.num_shares(mib << 20) for mib in shares} == shares
    await copies.aclose()


async def test_a_copy_of_nothing_ends_too() -> None:
    copies = Copies(CopyThreads("test", 2))
    await copies.share_out(lambda run: None, [])
    await copies.aclose()


@pytest.mark.parametrize(
    ("lengths", "num_shares", "shares"),
    [
        ([1], 3, [[(0, 0, 1)]]),
        ([6], 1, [[(0, 0, 6)]]),
        ([6], 3, [[(0, 0, 2)], [(0, 2, 2)], [(0, 4, 2)]]),
        ([7], 3, [[(0, 0, 3)], [(0, 3, 3)], [(0, 6, 1)]]),
        ([1, 5], 2, [[(0, 0, 1), (1, 0, 2)], [(1, 2, 3)]]),
        ([0, 2, 0, 1, 1], 2, [[(1, 0, 2)], [(3, 0, 1), (4, 0, 1)]]),
        ([], 2, []),
    ],
)
def test_shares_are_alike_and_of_whole_rows(
    lengths: list[int], num_shares: int, shares: list[list[tuple[int, int, int]]]
) -> None:
    runs = [run_of(length, 48, 1000 * place) for place, length in enumerate(lengths)]
    told = [
        [(run.offset // 1000, run.first, run.count) for run in share]
        for share in shares_of(runs, num_shares)
    ]
    assert told == shares
    for run in chain.from_iterable(shares_of(runs, num_shares)):
        assert run.offset % 1000 == run.first * 48


def test_a_loop_that_is_closed_in_the_meantime_is_not_told() -> None:
    threads = CopyThreads("test")
    threads.hold()
    go_on = threading.Event()
    loop = asyncio.new_event_loop()

    async def start() -> None:
        threads.start([go_on.wait])

    loop.run_until_complete(start())
    loop.close()
    go_on.set()
    threads.let_go()


def test_a_process_that_never_closes_ends_at_once() -> None:
    result = subprocess.run(
        [sys.executable, "-c", NEVER_CLOSED], capture_output=True, text=True, timeout=20
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "written\n", "")


@pytest.fixture
def six_processors(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Have threads bind themselves to processors that are not there."""
    of_thread: dict[int, set[int]] = {}

    def bind(_: int, processors: Sequence[int]) -> None:
        of_thread[threading.get_ident()] = set(processors)

    monkeypatch.setattr(
        os, "sched_getaffinity", lambda _: of_thread.get(threading.get_ident(), set(range(6)))
    )
    monkeypatch.setattr(os, "sched_setaffinity", bind)
    return set(range(6))


def run_of(num_rows: int, row_nbytes: int, offset: int = 0) -> Run:
    """Return a run of the first rows of a source that has one more."""
    source = bytearray((num_rows + 1) * row_nbytes)
    return Run(TokenRows.of("rows", Field("uint8", row_nbytes), source), 0, num_rows, offset)


@pytest.mark.parametrize(
    ("num_rows", "row_nbytes", "lengths"),
    [
        (0, 64, []),
        (1, 64, [1]),
        (16384, 64, [16384]),
        (16385, 64, [16384, 1]),
        (3, 700_000, [1, 1, 1]),
        (2, 2 << 20, [1, 1]),
    ],
)
def test_pieces_are_short_and_of_whole_rows(
    num_rows: int, row_nbytes: int, lengths: list[int]
) -> None:
    pieces = list(pieces_of(run_of(num_rows, row_nbytes, 100), 1 << 20))
    assert [piece.count for piece in pieces] == lengths
    place = 0
    for piece in pieces:
        assert (piece.first, piece.offset) == (place, 100 + place * row_nbytes)
        place += piece.count


@pytest.mark.both_loops
async def test_each_turn_of_the_loop_has_time_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    time = LoopTime()
    assert all(time.is_left() for _ in range(10))
    await asyncio.sleep(0)
    monkeypatch.setattr(copying, "TURN_SECONDS", -1.0)  # it is up as soon as it has begun
    for _ in range(3):
        assert [time.is_left() for _ in range(3)] == [True, False, False]
        await asyncio.sleep(0)


@pytest.mark.both_loops
async def test_copies_on_the_loop_let_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Piece by piece, the first write to its end before the next."""
    monkeypatch.setattr(copying, "TURN_SECONDS", -1.0)
    copies, story = LoopCopies(), list[str]()

    async def write(name: str) -> None:
        runs = [run_of(1, 8, offset) for offset in range(4)]
        await copies.copy(lambda run: story.append(f"{name}{run.offset}"), runs)

    async def others() -> None:
        while "b3" not in story:
            story.append(".")
            await asyncio.sleep(0)

    await asyncio.gather(write("a"), write("b"), others())
    await copies.drain()
    told = "".join(story)
    assert told.replace(".", "") == "a0a1a2a3b0b1b2b3"
    assert max(map(len, told.split("."))) <= 4  # two pieces in a turn, and not all eight


@pytest.mark.both_loops
async def test_a_copy_on_the_loop_that_fails_leaves_the_turn_to_the_next() -> None:
    copies, done = LoopCopies(), list[int]()

    def fail(run: Run) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await copies.copy(fail, [run_of(1, 8)])
    await copies.copy(lambda run: done.append(run.offset), [run_of(1, 8, 7)])
    assert done == [7]
