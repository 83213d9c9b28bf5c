"""Long copies run on one thread, which nobody has to wait for."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest

from aiomm.planes.copying import Copies, CopyThread

pytestmark = pytest.mark.usefixtures("no_leaks")

NEVER_CLOSED = """
import asyncio
from aiomm.buffers.shm import MemfdArena
from aiomm.buffers.layout import ByteRange
from aiomm.buffers.tensors import TokenRows
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
    thread = CopyThread("test")
    first, second = Copies(thread), Copies(thread)
    names = await asyncio.gather(*(one.run(threading.get_ident) for one in (first, second)))
    assert names[0] == names[1] != threading.get_ident()
    await first.aclose()
    await first.aclose()
    assert await second.run(threading.get_ident) == names[0]
    await second.aclose()


@pytest.mark.both_loops
async def test_a_cancelled_wait_does_not_stop_the_work() -> None:
    copies = Copies(CopyThread("test"))
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
    copies = Copies(CopyThread("test"))
    with pytest.raises(ZeroDivisionError):
        await copies.run(lambda: 1 // 0)
    await copies.aclose()


def test_a_loop_that_is_closed_in_the_meantime_is_not_told() -> None:
    thread = CopyThread("test")
    thread.hold()
    go_on = threading.Event()
    loop = asyncio.new_event_loop()

    async def start() -> None:
        thread.start(go_on.wait)

    loop.run_until_complete(start())
    loop.close()
    go_on.set()
    thread.let_go()


def test_a_process_that_never_closes_ends_at_once() -> None:
    result = subprocess.run(
        [sys.executable, "-c", NEVER_CLOSED], capture_output=True, text=True, timeout=20
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "written\n", "")
