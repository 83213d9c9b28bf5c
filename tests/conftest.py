"""What all tests share: the event loops, the check for leaks, and the photograph."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

import pytest

LoopFactory = Callable[[], asyncio.AbstractEventLoop]

SHARED_MEMORY_NAMES = ("aiomm", "psm_")
"""What files in /dev/shm would begin with, were they ours or of Python's `shared_memory`.

Others come and go: tests and benchmarks that run beside this one have theirs.
"""


def loop_factories() -> dict[str, LoopFactory]:
    """Return every event loop of this machine by name: the default one, and uvloop if installed."""
    factories: dict[str, LoopFactory] = {"asyncio": asyncio.new_event_loop}
    if find_spec("uvloop") is not None:
        import uvloop

        factories["uvloop"] = uvloop.new_event_loop
    return factories


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, LoopFactory]:
    """Run a test marked `both_loops` once per loop, and any other on the default loop."""
    factories = loop_factories()
    if item.get_closest_marker("both_loops"):
        return factories
    return {"asyncio": factories["asyncio"]}


def open_descriptors() -> dict[str, str]:
    """Return what each open descriptor of this process points to, epoll and pipes of loops too."""
    found = {}
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            found[descriptor] = os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:  # the descriptor that listed the folder
            continue
    return found


def resources() -> dict[str, set[str]]:
    """Return the threads, descriptors and shared-memory files that exist now."""
    gc.collect()
    return {
        "threads": {f"{thread.name} ({thread.ident})" for thread in threading.enumerate()},
        "descriptors": {f"{number} -> {target}" for number, target in open_descriptors().items()},
        "/dev/shm": shared_memory_files(),
    }


def shared_memory_files() -> set[str]:
    """Return the names in /dev/shm that could be ours."""
    return {name for name in os.listdir("/dev/shm") if name.startswith(SHARED_MEMORY_NAMES)}


LAST_SECONDS = 1.0


@pytest.fixture(scope="session")
def used_loops() -> None:
    """Run each loop once: libuv opens a pipe for signals at its first loop and keeps it."""
    for factory in loop_factories().values():
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(asyncio.sleep(0))


@pytest.fixture
def no_leaks(used_loops: None) -> Iterator[None]:
    """Fail the test when it leaves threads, descriptors or files in /dev/shm behind.

    It is set up before the event loop and checked after the loop is closed.
    """
    before = resources()
    # What is there by now, such as torch's modules, takes 0.2 s to look through each time.
    gc.freeze()
    yield
    # A thread that waited for a GPU tells the loop first and ends after: nobody can join it, and
    # until then it refers to an error, whose traceback refers to memory.
    end = time.monotonic() + LAST_SECONDS
    while any(leaked := left_behind(before)) and time.monotonic() < end:
        time.sleep(0.01)
    assert not any(leaked), f"left behind: {leaked}"


def left_behind(before: dict[str, set[str]]) -> list[list[str]]:
    """Return the threads, descriptors and files that were not there before."""
    after = resources()
    return [sorted(after[name] - before[name]) for name in after]


@pytest.fixture(scope="session")
def photo() -> Path:
    """Return a real photograph, the one that matplotlib ships; it is not in this repository."""
    spec = find_spec("matplotlib")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "mpl-data" / "sample_data" / "grace_hopper.jpg"
