"""Mooncake's engine in this process: the methods that are used, its rules, and its failures."""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from types import SimpleNamespace

__all__ = ["FakeEngine", "FakeNetwork"]

PENDING, DONE, FAILED = 0, 1, -1


@dataclass
class FakeRead:
    """One read that has begun."""

    target: int
    source: int
    nbytes: int
    engine: FakeEngine | None
    """Whose memory is read; None: it fails."""


class FakeNetwork:
    """All engines of a test, and what shall go wrong with them."""

    def __init__(self) -> None:
        self.engines: dict[str, FakeEngine] = {}
        self.ports = count(15000)
        self.initialize_code = 0
        self.register_code = 0
        self.outcomes: deque[int] = deque()
        """Of the next reads: 0 does not begin, -1 fails, 2 never ends until it is told."""
        self.stuck: set[int] = set()
        """Reads that have not ended, and will not by themselves."""
        self.before_probe: Callable[[], None] = lambda: None
        self.hosts: list[str] = []
        self.most_running = 0

    def library(self) -> SimpleNamespace:
        """Return what stands for the module `mooncake.engine`."""
        return SimpleNamespace(TransferEngine=lambda: FakeEngine(self))


class FakeEngine:
    """One engine. Asking again for a read that has ended is an error, as it is a crash there."""

    def __init__(self, network: FakeNetwork) -> None:
        self.network = network
        self.registered: dict[int, int] = {}
        self.reading = threading.Lock()
        """Held while registered memory is read."""
        self.running: dict[int, FakeRead] = {}
        self.batches = count(1)
        self.port = 0

    def initialize(self, host: str, metadata: str, protocol: str, device: str) -> int:
        """Join the network."""
        self.network.hosts.append(host)
        if self.network.initialize_code:
            return self.network.initialize_code
        self.port = next(self.network.ports)
        own = f"[{host}]" if ":" in host else host
        self.network.engines[f"{own}:{self.port}"] = self
        return 0

    def get_rpc_port(self) -> int:
        """Return the port of the session."""
        assert self.port, "the real one crashes here"
        return self.port

    def batch_register_memory(self, addresses: list[int], capacities: list[int]) -> int:
        """Refuse what overlaps."""
        (address,), (nbytes,) = addresses, capacities
        overlaps = any(
            start < address + nbytes and address < start + length
            for start, length in self.registered.items()
        )
        if overlaps or self.network.register_code:
            return self.network.register_code or -7
        self.registered[address] = nbytes
        return 0

    def batch_unregister_memory(self, addresses: list[int]) -> int:
        """Forget it."""
        with self.reading:  # whoever has unregistered memory may unmap it
            return 0 if self.registered.pop(addresses[0], 0) else -3

    def send_probe(self, peer: str) -> int:
        """Answer for the peer."""
        self.network.before_probe()
        return 0 if peer in self.network.engines else -102

    def batch_transfer_async_read(
        self, peer: str, targets: list[int], sources: list[int], lengths: list[int]
    ) -> int:
        """Begin, unless it is told otherwise."""
        (target,), (source,), (nbytes,) = targets, sources, lengths
        engine = self.network.engines.get(peer)
        outcome = self.network.outcomes.popleft() if self.network.outcomes else DONE
        if engine is None or outcome == PENDING:
            return 0
        batch = next(self.batches)
        read = FakeRead(target, source, nbytes, engine if outcome != FAILED else None)
        self.running[batch] = read
        self.network.most_running = max(self.network.most_running, len(self.running))
        if outcome > DONE:
            self.network.stuck.add(batch)
        return batch

    def has_registered(self, address: int, nbytes: int) -> bool:
        """Whether others may read there."""
        return any(
            start <= address and address + nbytes <= start + length
            for start, length in list(self.registered.items())
        )

    def transfer_check_status(self, batch: int) -> int:
        """Copy when it is asked for."""
        read = self.running[batch]
        if batch in self.network.stuck:
            return PENDING
        del self.running[batch]
        if read.engine is None:
            return FAILED
        with read.engine.reading:
            if not read.engine.has_registered(read.source, read.nbytes):
                return FAILED  # perhaps it was, when the read began
            ctypes.memmove(read.target, read.source, read.nbytes)
        return DONE
