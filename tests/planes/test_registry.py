"""Names become planes: ours, those of others, and none that does not exist."""

from __future__ import annotations

import logging
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from aiomm.errors import PlaneUnavailable
from aiomm.planes import registry
from aiomm.planes.base import Plane
from aiomm.planes.memory import MemoryPlane
from aiomm.planes.registry import known_planes, make_planes

PLUGIN = """
from aiomm.planes.memory import MemoryPlane

class OutsiderPlane(MemoryPlane):
    name = "outsider"

not_a_plane = 3
"""
ENTRY_POINTS = """
[aiomm.planes]
outsider = outsider_package:OutsiderPlane
broken = outsider_package_that_is_missing:Plane
wrong = outsider_package:not_a_plane
tcp = outsider_package:OutsiderPlane
"""


@pytest.fixture
def outsider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a package that registers planes."""
    installed = tmp_path / "outsider_package-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: outsider\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(ENTRY_POINTS)
    (tmp_path / "outsider_package.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "outsider_package", raising=False)


def names(planes: list[Plane]) -> list[str]:
    return [plane.name for plane in planes]


def test_auto_is_the_order_of_preference() -> None:
    assert names(make_planes("auto")) == ["cuda_ipc", "shm", "mooncake", "tcp"]
    assert names(make_planes()) == ["cuda_ipc", "shm", "mooncake", "tcp"]


def test_the_built_in_planes_need_no_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "entry_points", lambda group: ())
    assert set(known_planes()) == {"cuda_ipc", "shm", "mooncake", "tcp", "memory"}
    assert names(make_planes("auto")) == ["cuda_ipc", "shm", "mooncake", "tcp"]


def test_names_and_planes_keep_their_order() -> None:
    own = MemoryPlane()
    planes = make_planes(["tcp", own, "shm"])
    assert names(planes) == ["tcp", "memory", "shm"]
    assert planes[1] is own
    assert names(make_planes("memory")) == ["memory"]


def test_an_unknown_name_tells_the_known_ones() -> None:
    with pytest.raises(PlaneUnavailable, match=r"'carrier_pigeon'; known are .*shm.*tcp"):
        make_planes(["tcp", "carrier_pigeon"])
    with pytest.raises(PlaneUnavailable, match="no plane is asked for"):
        make_planes([])


def test_one_plane_needs_no_list() -> None:
    own = MemoryPlane()
    assert make_planes(own) == [own]


@pytest.mark.parametrize("wrong", [5, MemoryPlane, None])
def test_what_is_no_plane_is_told_at_once(wrong: object) -> None:
    with pytest.raises(TypeError, match="planes are names and Plane objects, not "):
        make_planes(["tcp", wrong])  # type: ignore[list-item]


def test_two_planes_of_one_name_are_refused() -> None:
    """One of them would be open for ever, and no sender could tell them apart."""
    with pytest.raises(ValueError, match="two have the same name"):
        make_planes([MemoryPlane(), "memory"])


@pytest.mark.usefixtures("outsider")
def test_an_outsider_can_add_a_plane() -> None:
    assert names(make_planes("outsider")) == ["outsider"]
    assert names(make_planes("auto")) == ["cuda_ipc", "shm", "mooncake", "tcp"]


@pytest.mark.usefixtures("outsider")
@pytest.mark.parametrize("name", ["broken", "wrong"])
def test_a_broken_plane_costs_only_itself(name: str, caplog: pytest.LogCaptureFixture) -> None:
    assert names(make_planes([name, "tcp"])) == ["tcp"]
    assert f"! plane '{name}' " in caplog.text
    with pytest.raises(PlaneUnavailable, match=name):
        make_planes(name)


@pytest.mark.usefixtures("outsider")
def test_our_names_mean_our_planes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    assert names(make_planes("tcp")) == ["tcp"]
    assert "! the plane 'tcp' of 'outsider_package:OutsiderPlane' is hidden" in caplog.text


def test_an_entry_that_leads_to_our_plane_is_nothing_to_tell(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As older installations of aiomm have them."""
    entry = EntryPoint("tcp", "aiomm.planes.tcp:TcpPlane", registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: (entry,))
    assert names(make_planes("tcp")) == ["tcp"]
    assert caplog.text == ""


def test_planes_are_imported_without_torch_and_numpy() -> None:
    program = (
        "import sys; from aiomm.planes.registry import make_planes; import aiomm.planes.tcp;"
        "make_planes('auto'); heavy = {'torch', 'numpy', 'uvloop', 'mooncake'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
