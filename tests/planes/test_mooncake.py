"""The mooncake plane passes the contract, over the real engine and over a fake one that fails."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest

from aiomm.buffers.arena import Arena, HostArena
from aiomm.errors import PlaneUnavailable
from aiomm.planes.base import Plane
from aiomm.planes.mooncake import MooncakePlane, engine, library

from ..conftest import resources
from . import contract
from .contract import PlaneContract
from .fake_mooncake import FakeNetwork


def why_missing() -> str:
    """Say why there is no real engine here; empty if there is one."""
    try:
        library.load("127.0.0.1")
    except PlaneUnavailable as exc:
        return exc.message
    return ""


MISSING = why_missing()
ENGINE_PORTS = range(15000, 17001)


def engine_sockets() -> set[str]:
    """Return the sockets of engines, told by their ports; they live as long as the process."""
    found = set()
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        with open(table) as lines:
            for fields in map(str.split, list(lines)[1:]):
                ports = {int(address.rpartition(":")[2], 16) for address in fields[1:3]}
                if ports & set(ENGINE_PORTS):
                    found.add(f"socket:[{fields[9]}]")
    return found


def own_resources() -> dict[str, set[str]]:
    """Return the resources that are not an engine's."""
    sockets = engine_sockets()
    found = resources()
    found["descriptors"] = {
        each for each in found["descriptors"] if each.partition(" -> ")[2] not in sockets
    }
    return found


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> FakeNetwork:
    """Put a fake engine in place of the real one."""
    network = FakeNetwork()
    monkeypatch.setattr(library, "_import_engine", network.library)
    monkeypatch.setattr(engine, "_engines", {})
    monkeypatch.setattr(library, "_process", os.getpid())
    return network


@pytest.mark.usefixtures("network")
class TestMooncakePlaneOverAFakeEngine(PlaneContract):
    def make_plane(self) -> Plane:
        return MooncakePlane()

    def make_arena(self, nbytes: int) -> Arena:
        return HostArena(nbytes)


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
class TestMooncakePlane(PlaneContract):
    def make_plane(self) -> Plane:
        return MooncakePlane()

    def make_arena(self, nbytes: int) -> Arena:
        return HostArena(nbytes)

    @pytest.fixture
    def no_leaks(self, used_loops: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """As elsewhere, but for what an engine keeps until its process ends."""
        engine.engine_at("127.0.0.1", engine.PEER_TO_PEER)
        monkeypatch.setattr(contract, "resources", own_resources)
        gc.collect()
        before = own_resources()
        yield
        after = own_resources()
        leaked = {name: sorted(after[name] - before[name]) for name in after}
        assert not any(leaked.values()), f"left behind: {leaked}"
