"""The kinds of channel under test, by name: what the contract and its child processes build."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import zmq

from aiomm.control.aiozmq import AiozmqChannel
from aiomm.control.base import Channel
from aiomm.control.keys import KeyPair, Keys, KnownKey
from aiomm.control.unix import UnixChannel
from aiomm.control.zeromq import ZmqChannel

MakeChannel: TypeAlias = Callable[[str | None, str], Channel]

SECRET = b"JTKVSB%%)wK0E.X)V>+}o?pNmC{O&4W4b!Ni{Lh6"
"""The secret key of ZeroMQ's own examples."""

PAIR = KeyPair(zmq.curve_public(SECRET), SECRET)
KEYS = Keys(PAIR, frozenset({KnownKey("everybody", PAIR.public)}))

KINDS: dict[str, MakeChannel] = {
    "zmq": lambda bind, name: ZmqChannel(bind, name=name),
    "curve": lambda bind, name: ZmqChannel(bind, keys=KEYS, name=name),
    "aiozmq": lambda bind, name: AiozmqChannel(bind, name=name),
    "unix": lambda bind, name: UnixChannel(bind),
}
