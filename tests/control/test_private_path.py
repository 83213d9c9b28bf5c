"""One path, one holder."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from aiomm.control.private_path import PathClaim


def test_a_held_path_cannot_be_claimed_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "socket"
    first = PathClaim(path)
    with pytest.raises(OSError, match="listens") as failure:
        PathClaim(path)
    assert failure.value.errno == errno.EADDRINUSE
    first.release()
    first.release()
    assert os.listdir(tmp_path / "new") == []
    PathClaim(path).release()


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "socket.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic"):
        PathClaim(tmp_path / "socket")
    assert not (tmp_path / "elsewhere").exists()


def test_a_directory_without_a_parent_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        PathClaim(tmp_path / "no" / "such" / "socket")
