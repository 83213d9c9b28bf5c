"""Mooncake's engine, shared: one per process and address.

An engine lives until its process ends: its destructor holds the interpreter for a second. It
listens on two ports of every interface, and serves what is registered to whoever asks.
"""

from __future__ import annotations

import asyncio
import ctypes
import secrets
import threading
from typing import Any

from ...errors import PlaneUnavailable
from .library import TransferEngine, load
from .reads import Reads

__all__ = ["PEER_TO_PEER", "SharedEngine", "engine_at"]

PEER_TO_PEER = "P2PHANDSHAKE"
"""The metadata server that is none: peers ask each other."""
CONTACT_SECONDS = 2.5
MAX_CONTACTS = 16
"""First contacts at once. One with a frozen peer hangs for a minute, on its own thread."""


class SharedEngine:
    """One engine and what this process does with it.

    Args:
        engine: initialized.
        session: the name by which peers know it.
    """

    def __init__(self, engine: TransferEngine, session: str) -> None:
        self.session = session
        self.reads = Reads(engine)
        self._engine = engine
        self._lock = threading.Lock()
        self._registered: dict[tuple[int, int], int] = {}
        """How often each piece of memory was registered."""
        self._num_contacts = 0

    def register(self, address: int, nbytes: int) -> None:
        """Let peers read memory; again is counted. Blocks: call it on a thread.

        Raises:
            PlaneUnavailable: the engine refuses, as it does when it overlaps with other memory.
        """
        with self._lock:
            count = self._registered.get((address, nbytes), 0)
            if not count and (code := self._engine.batch_register_memory([address], [nbytes])):
                raise PlaneUnavailable(
                    f"mooncake: {nbytes} bytes cannot be registered: error {code}"
                )
            self._registered[address, nbytes] = count + 1

    def unregister(self, address: int, nbytes: int) -> None:
        """Take back one :meth:`register`. Blocks: call it on a thread."""
        with self._lock:
            count = self._registered.pop((address, nbytes), 0)
            if count > 1:
                self._registered[address, nbytes] = count - 1
            elif count:
                self._engine.batch_unregister_memory([address])

    async def contact(self, session: str) -> bool:
        """Whether the peer's engine answers. It must before the first read from it.

        Inside a read the first contact with a frozen peer would stop every other for a minute.
        """
        with self._lock:
            if self._num_contacts >= MAX_CONTACTS:
                return False
            self._num_contacts += 1
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[bool] = loop.create_future()
        arguments = (session, loop, answered)
        threading.Thread(
            target=self._probe, args=arguments, name="aiomm-mooncake-contact", daemon=True
        ).start()
        try:
            return await asyncio.wait_for(answered, CONTACT_SECONDS)
        except TimeoutError:
            return False

    def _probe(
        self, session: str, loop: asyncio.AbstractEventLoop, answered: asyncio.Future[bool]
    ) -> None:
        code = self._engine.send_probe(session)
        with self._lock:
            self._num_contacts -= 1
        try:
            loop.call_soon_threadsafe(_answer, answered, code == 0)
        except RuntimeError:
            return  # the loop was closed in the meantime


_lock = threading.Lock()
_engines: dict[tuple[str, str], SharedEngine] = {}


def engine_at(host: str, metadata: str) -> SharedEngine:
    """Return the engine that peers reach at `host`. Blocks: call it on a thread.

    Args:
        host: an address or a name of this machine.
        metadata: `P2PHANDSHAKE`, or the URL of a metadata server.

    Raises:
        PlaneUnavailable: there can be none, and why.
    """
    with _lock:
        library = load(host)
        shared = _engines.get((host, metadata))
        if shared is None:
            shared = _engines[host, metadata] = _initialized(library, host, metadata)
        return shared


def _initialized(library: Any, host: str, metadata: str) -> SharedEngine:
    engine: TransferEngine = library.TransferEngine()
    own = f"[{host}]" if ":" in host else host
    if metadata == PEER_TO_PEER:
        code = engine.initialize(host, metadata, "rdma", "")
        session = f"{own}:{engine.get_rpc_port()}" if not code else ""
    else:
        # There the name is ours to choose; its port is not used, and keeps names apart.
        session = f"{own}:{secrets.randbelow(1 << 15) + 1024}"
        code = engine.initialize(session, metadata, "rdma", "")
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine))  # not even at exit: it would take 1 s
    if code:
        raise PlaneUnavailable(f"mooncake: no engine at {host} with {metadata}: error {code}")
    return SharedEngine(engine, session)


def _answer(answered: asyncio.Future[bool], is_there: bool) -> None:
    if not answered.done():
        answered.set_result(is_there)
