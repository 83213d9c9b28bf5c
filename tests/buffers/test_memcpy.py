"""Copies of bytes: all of them arrive, nothing beside them changes, and who has the GIL."""

from __future__ import annotations

import ctypes
import platform
import random
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
import weakref
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import pytest

from aiomm.buffers import memcpy
from aiomm.buffers.memcpy import (
    STREAM_NBYTES,
    Memcpy,
    SharedCopies,
    address_of,
    copy_bytes,
    copy_memory,
)

PAGE = 4096
MARGIN = 64
LENGTHS = (
    *(0, 1, 63, 64, 65, PAGE, STREAM_NBYTES - 1),
    *(STREAM_NBYTES + more for more in (0, 1, 63, 64, PAGE - 1, 4 * PAGE - 1, 4 * PAGE + 65)),
    (1 << 20) + 12345,
)
RANDOM = random.Random(7).randbytes(max(LENGTHS) + 2 * MARGIN)
WITHOUT_COMPILED = """
import sys
sys.modules["aiomm.buffers._memcpy"] = None  # as if nobody had compiled it
import asyncio, aiomm
from aiomm.buffers.memcpy import is_streaming

async def main():
    schema = aiomm.Schema(rows=aiomm.Field("uint8", 4096))
    content = bytes(range(256)) * 16 * 512
    async with (
        aiomm.Receiver(schema, bind="tcp://127.0.0.1:*") as receiver,
        aiomm.Sender(schema) as sender,
    ):
        sending = asyncio.create_task(sender.send(receiver.expect("r"), {"rows": content}))
        async with receiver.receive("r") as lease:
            equal = bytes(memoryview(lease["rows"].numpy()).cast("B")) == content
        print(is_streaming, equal, (await sending).plane)

asyncio.run(main())
"""


def functions_of(name: str) -> memcpy._Functions:
    if name == "libc":
        return memcpy._libc()
    try:
        return memcpy._compiled()
    except ImportError:
        pytest.skip("aiomm was installed without a C compiler")


@pytest.fixture(params=["compiled", "libc"])
def functions(request: pytest.FixtureRequest) -> memcpy._Functions:
    return functions_of(request.param)


@pytest.fixture(params=["with_gil", "without_gil"])
def copy(functions: memcpy._Functions, request: pytest.FixtureRequest) -> Memcpy:
    made: Memcpy = getattr(functions, request.param)
    return made


def test_it_is_compiled_where_that_is_possible() -> None:
    """Else what follows would test half of it, and nobody would know."""
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    header = Path(sysconfig.get_path("include"), "Python.h")
    if shutil.which(compiler) is None or not header.exists():
        pytest.skip(f"there is no {compiler} here, or no {header}")
    assert memcpy._compiled().is_streaming is (platform.machine() == "x86_64")


@pytest.mark.parametrize("nbytes", LENGTHS)
def test_every_byte_arrives_and_none_beside_it_changes(copy: Memcpy, nbytes: int) -> None:
    """From and to any alignment."""
    source = bytearray(RANDOM)
    for target_skip, source_skip in ((0, 0), (1, 0), (0, 1), (63, 17), (16, 48)):
        target = bytearray(len(source) + MARGIN)
        start = MARGIN + target_skip
        copy(
            address_of(memoryview(target)) + start,
            address_of(memoryview(source)) + source_skip,
            nbytes,
        )
        assert target[start : start + nbytes] == source[source_skip : source_skip + nbytes]
        assert not any(target[:start])
        assert not any(target[start + nbytes :])
    assert source == RANDOM


def test_what_is_no_address_or_length_is_refused(copy: Memcpy) -> None:
    refused = (TypeError, ctypes.ArgumentError)
    for arguments in ((0, 0), (0, 0.5, 0), (0, 0, "1")):
        with pytest.raises(refused):
            copy(*arguments)


def test_other_threads_run_only_during_copies_that_let_them(functions: memcpy._Functions) -> None:
    memory = memoryview(bytearray(128 << 20))
    half, address = memory.nbytes // 2, address_of(memory)
    turns = 0
    is_over = False

    def count() -> None:
        nonlocal turns
        while not is_over:
            turns += 1
            time.sleep(0)  # whoever waits for the GIL gets it

    def turns_during(work: Callable[[], object]) -> int:
        before = turns
        work()
        return turns - before

    def copy_by(copy: Memcpy) -> Callable[[], object]:
        return lambda: copy(address, address + half, half)

    def copy_pieces() -> None:
        """None of which is long."""
        pieces = [(address + at, address + half + at, 1 << 16) for at in range(0, half, 1 << 16)]
        functions.shared(array("Q", chain.from_iterable(pieces)), array("Q", [0]))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(20)  # nobody is made to give it away
    counting = threading.Thread(target=count)
    try:
        counting.start()
        assert any(turns_during(copy_by(functions.without_gil)) for _ in range(100))
        assert any(turns_during(copy_pieces) for _ in range(100))
        assert not any(turns_during(copy_by(functions.with_gil)) for _ in range(5))
    finally:
        is_over = True
        sys.setswitchinterval(interval)
        counting.join()


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_threads_make_all_shared_copies(functions: memcpy._Functions, num_threads: int) -> None:
    nbytes = 1 << 20
    memory = bytearray(RANDOM[:nbytes] + bytes(nbytes))
    source = address_of(memoryview(memory))
    pieces, taken = array("Q"), array("Q", [0])
    for at in range(0, nbytes, 997):
        pieces.extend((source + nbytes + at, source + at, min(997, nbytes - at)))
    by_threads(num_threads, lambda: functions.shared(pieces, taken))
    assert memory[nbytes:] == RANDOM[:nbytes]
    memory[:nbytes] = bytes(nbytes)
    functions.shared(pieces, taken)  # none is left
    assert memory[nbytes:] == RANDOM[:nbytes]


def test_each_shared_copy_is_taken_by_one_thread() -> None:
    """So many that they take longer than threads need to meet."""
    shared, num_copies = functions_of("compiled").shared, 2_000_000
    byte = bytearray(2)
    address = address_of(memoryview(byte))
    pieces, taken = array("Q", (address, address + 1, 1)) * num_copies, array("Q", [0])
    by_threads(3, lambda: shared(pieces, taken))
    assert taken[0] == num_copies + 3  # each thread finds once that none is left


def by_threads(num_threads: int, work: Callable[[], object]) -> None:
    with ThreadPoolExecutor(num_threads) as threads:
        for done in [threads.submit(work) for _ in range(num_threads)]:
            done.result()


def test_what_are_no_copies_is_refused() -> None:
    shared = functions_of("compiled").shared
    for copies, taken in (
        (array("Q", [0, 0]), array("Q", [0])),
        (array("Q", [0, 0, 0]), array("Q")),
        (array("Q", [0, 0, 0]), array("I", [0])),
    ):
        with pytest.raises(ValueError, match="three numbers of 8 bytes each"):
            shared(copies, taken)
    for arguments in ((array("Q"),), (array("Q"), b"12345678"), (None, array("Q", [0]))):
        with pytest.raises((TypeError, BufferError)):
            shared(*arguments)


def test_shared_copies_are_cut_so_that_all_threads_get_some() -> None:
    source, target = bytearray(RANDOM * 2), bytearray(2 * len(RANDOM))
    to, at = address_of(memoryview(target)), address_of(memoryview(source))
    rest = len(source) - 5
    copies = SharedCopies([(to, at, 5), (to + 5, at + 5, 0), (to + 5, at + 5, rest)], source)
    assert len(copies._pieces) == 3 * (1 + -(-rest // memcpy.PIECE_NBYTES))
    copies.run()
    assert target == source


def test_shared_copies_keep_their_memory() -> None:
    class Owner:
        pass

    owner = Owner()
    alive = weakref.ref(owner)
    copies = SharedCopies([], owner)
    del owner
    assert alive() is not None
    copies.run()
    del copies
    assert alive() is None


@pytest.mark.parametrize("nbytes", [0, 1, STREAM_NBYTES - 1, STREAM_NBYTES, (1 << 20) + 1])
@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_bytes_are_copied_from_read_only_memory_too(
    nbytes: int, kind: type[bytes | bytearray]
) -> None:
    source = memoryview(kind(RANDOM[:nbytes] if nbytes < len(RANDOM) else RANDOM * 2))[:nbytes]
    target = bytearray(nbytes + 1)
    copy_bytes(memoryview(target)[:nbytes], source)
    assert target[:nbytes] == source
    assert target[nbytes] == 0


def test_the_address_says_where_read_only_bytes_lie() -> None:
    """So that it is they that are read, not what the memoryview is of."""
    source = bytearray(RANDOM)
    target = bytearray(len(source))
    lying = memoryview(bytes(len(source)))
    copy_bytes(memoryview(target), lying, address_of(memoryview(source)))
    assert target == source


def test_short_copies_keep_the_gil(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[str, int]] = []
    for name in ("copy_with_gil", "copy_without_gil"):
        record = lambda target, source, nbytes, name=name: taken.append((name, nbytes))  # noqa: E731
        monkeypatch.setattr(memcpy, name, record)
    for nbytes in (1, memcpy.GIL_NBYTES, memcpy.GIL_NBYTES + 1):
        copy_memory(0, 0, nbytes)
    assert [name for name, _ in taken] == ["copy_with_gil", "copy_with_gil", "copy_without_gil"]


def test_aiomm_works_without_the_compiled_part() -> None:
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILED], capture_output=True, text=True, check=False
    )
    assert (run.stdout.split(), run.stderr) == (["False", "True", "shm"], "")
