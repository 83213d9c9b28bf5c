"""The aiozmq channel passes the same contract; its flags say where it does less."""

from __future__ import annotations

import sys
from typing import ClassVar

import pytest

from aiomm.control.aiozmq import AiozmqChannel

from .test_zeromq import TestOverTcp as OverTcp


class TestAiozmqOverTcp(OverTcp):
    kind: ClassVar[str] = "aiozmq"


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiozmq", None)
    with pytest.raises(ImportError, match=r"aiomm\[aiozmq\]"):
        AiozmqChannel(None, name="without")


def test_the_flags_say_what_it_cannot_tell() -> None:
    assert not AiozmqChannel.tells_full_queue
