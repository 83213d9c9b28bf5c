"""The plane of `examples/custom_plane.py`, an outsider's, passes the contract of every plane."""

from __future__ import annotations

import ast
import inspect
import os
from pathlib import Path

import pytest

from aiomm.buffers.arena import Arena, HostArena
from aiomm.buffers.shm import MemfdArena
from aiomm.errors import PlaneUnavailable
from aiomm.planes.base import Plane
from examples import custom_plane
from examples.custom_plane import FilePlane

from .contract import PlaneContract


class TestFilePlane(PlaneContract):
    def make_plane(self) -> Plane:
        return FilePlane()

    def make_arena(self, nbytes: int) -> Arena:
        return MemfdArena(nbytes)

    async def test_needs_an_arena_behind_a_descriptor(self) -> None:
        arena = HostArena(4096)
        with pytest.raises(PlaneUnavailable, match="needs a memfd"):
            await self.make_plane().export(arena)
        arena.close()

    async def test_never_writes_into_a_file(self, tmp_path: Path) -> None:
        """An offer may name anything; what is no receiver's memory is left alone."""
        path = tmp_path / "file"
        path.write_bytes(b"kept")
        with pytest.raises(PlaneUnavailable, match="not a receiver's arena"):
            await self.make_plane().attach(os.fsencode(path))
        assert path.read_bytes() == b"kept"


def test_is_as_short_as_the_docs_say() -> None:
    """Under 80 lines of code: the three classes, without blank lines and docstrings."""
    module = ast.parse(inspect.getsource(custom_plane))
    classes = ast.Module([each for each in module.body if isinstance(each, ast.ClassDef)], [])
    for node in ast.walk(classes):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = node.body[ast.get_docstring(node) is not None :]
    assert len(ast.unparse(classes).replace("\n\n", "\n").splitlines()) < 80
