"""Arenas: private memory, and sealed memory that peers map."""

from __future__ import annotations

import errno
import fcntl
import gc
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from aiomm.buffers import mapping
from aiomm.buffers.arena import HostArena
from aiomm.buffers.layout import ALIGNMENT, PROBE_NBYTES, Layout
from aiomm.buffers.shm import MemfdArena, map_peer
from aiomm.errors import PlaneUnavailable, PoolClosed
from aiomm.types import Extent, Field, Schema

PAGE = 4096


def mapped_memfds() -> int:
    gc.collect()
    return Path("/proc/self/maps").read_text().count("memfd:aiomm")


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(params=[HostArena, MemfdArena])
def arena(request: pytest.FixtureRequest) -> Iterator[HostArena]:
    made: HostArena = request.param(4 * PAGE)
    yield made
    made.close()


class TestEveryArena:
    @pytest.mark.parametrize("nbytes", [1 << 55, 1 << 64, (1 << 64) + PAGE])
    @pytest.mark.parametrize("kind", [HostArena, MemfdArena])
    def test_what_no_machine_has_is_unavailable(self, kind: type[HostArena], nbytes: int) -> None:
        """Beyond 2 ** 64, too, where C would take what is left modulo that."""
        with pytest.raises(PlaneUnavailable, match=str(nbytes)):
            kind(nbytes)

    def test_starts_as_zeros_and_views_share_it(self, arena: HostArena) -> None:
        assert bytes(arena.view(0, arena.nbytes)) == bytes(4 * PAGE)
        arena.view(100, 3)[:] = b"abc"
        assert bytes(arena.view(99, 5)) == b"\0abc\0"
        assert (arena.device, arena.nbytes) == ("cpu", 4 * PAGE)

    def test_views_are_flat_writable_bytes(self, arena: HostArena) -> None:
        view = arena.view(5, 10)
        assert (view.format, view.ndim, view.nbytes, view.readonly) == ("B", 1, 10, False)
        assert arena.view(4 * PAGE, 0).nbytes == 0

    @pytest.mark.parametrize(("offset", "nbytes"), [(-1, 4), (0, -1), (1, 4 * PAGE), (5 * PAGE, 0)])
    def test_bytes_outside_are_refused(self, arena: HostArena, offset: int, nbytes: int) -> None:
        with pytest.raises(ValueError, match="outside the arena"):
            arena.view(offset, nbytes)

    def test_views_stay_valid_after_close(self, arena: HostArena) -> None:
        view = arena.view(0, 3)
        view[:] = b"abc"
        arena.close()
        arena.close()
        assert bytes(view) == b"abc"
        with pytest.raises(PoolClosed):
            arena.view(0, 1)
        assert repr(arena) == f"<{type(arena).__name__} of {4 * PAGE} bytes, closed>"

    def test_no_memory_at_all_is_refused(self, arena: HostArena) -> None:
        with pytest.raises((ValueError, PlaneUnavailable), match=r"0 bytes"):
            type(arena)(0)


class TestMemfdArena:
    def test_nothing_is_left_when_the_last_view_is_gone(self) -> None:
        descriptors, maps = open_descriptors(), mapped_memfds()
        arena = MemfdArena(PAGE)
        view = arena.view(0, 3)
        assert mapped_memfds() == maps + 1
        arena.close()
        assert arena.fd == -1
        assert open_descriptors() == descriptors
        assert mapped_memfds() == maps + 1
        del view
        assert mapped_memfds() == maps

    def test_never_closed_it_leaves_nothing_behind_either(self) -> None:
        descriptors, maps = open_descriptors(), mapped_memfds()
        MemfdArena(PAGE)
        assert (open_descriptors(), mapped_memfds()) == (descriptors, maps)

    def test_a_peer_writes_into_it_with_its_own_descriptor(self) -> None:
        arena = MemfdArena(2 * PAGE)
        descriptor = os.dup(arena.fd)
        view = map_peer(descriptor, 2 * PAGE)
        os.close(descriptor)
        view[PAGE : PAGE + 3] = b"abc"
        assert bytes(arena.view(PAGE, 3)) == b"abc"
        arena.close()
        assert bytes(view[PAGE : PAGE + 3]) == b"abc"

    def test_nobody_can_resize_it(self) -> None:
        arena = MemfdArena(PAGE)
        for size in (0, 2 * PAGE):
            with pytest.raises(PermissionError):
                os.ftruncate(arena.fd, size)
        arena.close()

    def test_a_forked_child_has_no_mapping(self) -> None:
        """A child that outlives its parent must not be able to write into the pool."""
        script = """
import os, sys
from pathlib import Path
from aiomm.buffers.shm import MemfdArena, map_peer
arena = MemfdArena(4096)
view = map_peer(arena.fd, 4096)
maps = lambda: Path("/proc/self/maps").read_text().count("memfd:aiomm")
assert maps() >= 1
if (child := os.fork()) == 0:
    os._exit(maps())
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
        assert subprocess.run([sys.executable, "-c", script], timeout=20).returncode == 0

    def test_short_memory_is_an_error_that_names_the_bytes(self) -> None:
        descriptors = open_descriptors()
        with pytest.raises(PlaneUnavailable, match=f"{1 << 60} bytes: more than this machine"):
            MemfdArena(1 << 60)
        assert open_descriptors() == descriptors

    @pytest.mark.parametrize(
        ("limit", "arena", "expected"),
        [
            ("RLIMIT_FSIZE", "MemfdArena", os.strerror(errno.EFBIG)),
            ("RLIMIT_AS", "MemfdArena", os.strerror(errno.ENOMEM)),
            ("RLIMIT_AS", "HostArena", os.strerror(errno.ENOMEM)),
        ],
    )
    def test_what_the_kernel_refuses_is_typed(self, limit: str, arena: str, expected: str) -> None:
        script = f"""
import os, resource
from aiomm.errors import PlaneUnavailable
from aiomm.buffers.shm import MemfdArena, HostArena
before = os.listdir("/proc/self/fd")
pages = int(open("/proc/self/statm").read().split()[0])
size = {{"RLIMIT_FSIZE": 1 << 16, "RLIMIT_AS": pages * 4096 + (1 << 24)}}["{limit}"]
resource.setrlimit(resource.{limit}, (size, size))
try:
    {arena}(1 << 26)
except PlaneUnavailable as exc:
    print(exc)
assert os.listdir("/proc/self/fd") == before
"""
        done = subprocess.run(
            [sys.executable, "-c", script], timeout=20, capture_output=True, text=True, check=True
        )
        assert f"{1 << 26} bytes" in done.stdout
        assert expected in done.stdout


class TestMapPeer:
    def test_memory_that_could_shrink_is_refused(self) -> None:
        descriptor = os.memfd_create("loose", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.truncate(descriptor, PAGE)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
        with pytest.raises(PlaneUnavailable, match="not sealed"):
            map_peer(descriptor, PAGE)
        os.close(descriptor)

    def test_another_size_is_refused(self) -> None:
        arena = MemfdArena(PAGE)
        with pytest.raises(PlaneUnavailable, match="has 4096 bytes, expected 8192"):
            map_peer(arena.fd, 2 * PAGE)
        arena.close()

    def test_what_is_no_memfd_is_refused(self, tmp_path: Path) -> None:
        with (tmp_path / "file").open("wb") as file:
            with pytest.raises(PlaneUnavailable, match="no memfd"):
                map_peer(file.fileno(), PAGE)
            closed = file.fileno()
        with pytest.raises(PlaneUnavailable, match="no memfd"):
            map_peer(closed, PAGE)


def test_an_older_kernel_faults_pages_in_by_touching_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mapping, "_MADV_POPULATE_WRITE", 9999)
    assert bytes(mapping.map_memory(PAGE)) == bytes(PAGE)


class TestLayout:
    SCHEMA = Schema(a=Field("bfloat16", 3), b=Field("uint8"), c=Field("float64", 2, 2))

    def test_fields_and_probes_follow_each_other_without_overlap(self) -> None:
        layout = Layout(self.SCHEMA, 1000, num_probes=3)
        whole = Extent(0, 1000)
        ranges = [layout.field_range(name, whole) for name in self.SCHEMA]
        assert [stop - start for start, stop in ranges] == [6000, 1000, 32000]
        ranges += [layout.probe_range(link) for link in range(3)]
        for before, after in itertools.pairwise(ranges):
            assert before.stop <= after.start
        assert ranges[-1].stop <= layout.nbytes
        assert layout.nbytes % ALIGNMENT == 0
        assert all(offset % ALIGNMENT == 0 for offset in layout.offsets.values())

    def test_links_take_the_probe_slots_in_turn(self) -> None:
        layout = Layout(self.SCHEMA, 1000, num_probes=3)
        slots = [layout.probe_range(link) for link in range(1, 7)]
        assert slots[:3] == slots[3:]
        assert len(set(slots)) == 3
        assert {stop - start for start, stop in slots} == {PROBE_NBYTES}

    def test_an_extent_is_one_run_of_bytes_per_field(self) -> None:
        layout = Layout(self.SCHEMA, 1000, num_probes=0)
        assert layout.field_range("a", Extent(10, 12)) == (60, 72)
        start = layout.offsets["c"]
        assert layout.field_range("c", Extent(10, 12)) == (start + 320, start + 384)
