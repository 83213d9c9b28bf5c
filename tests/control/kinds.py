"""The kinds of channel under test, by name: what the contract and its child processes build."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from aiomm.control.aiozmq import AiozmqChannel
from aiomm.control.base import Channel
from aiomm.control.unix import UnixChannel
from aiomm.control.zeromq import ZmqChannel

MakeChannel: TypeAlias = Callable[[str | None, str], Channel]

KINDS: dict[str, MakeChannel] = {
    "zmq": lambda bind, name: ZmqChannel(bind, name=name),
    "aiozmq": lambda bind, name: AiozmqChannel(bind, name=name),
    "unix": lambda bind, name: UnixChannel(bind, name=name),
}
