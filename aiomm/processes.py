"""Proof that a process is dead: its pidfd, which no reuse of process numbers can confuse."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable
from typing import NamedTuple

__all__ = ["Credentials", "ProcessWatch", "peer_credentials", "peer_pidfd"]

_SO_PEERPIDFD = 77  # Linux 6.5; Python has no name for it yet
_UCRED = struct.Struct("iII")


class Credentials(NamedTuple):
    """Who opened the other end of a Unix socket."""

    pid: int
    uid: int
    gid: int


def peer_credentials(connection: socket.socket) -> Credentials:
    """Return who opened the other end, as the kernel recorded it then."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return Credentials(*_UCRED.unpack(raw))


def peer_pidfd(connection: socket.socket) -> int | None:
    """Return a pidfd of the process that opened the other end; the caller closes it.

    None if it can no longer be had, or never could (a process of another pid namespace).
    """
    try:
        return connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError:  # an older kernel, or the process has been reaped already
        pass
    try:
        # The number could have been reused since the peer connected; taking it at once keeps
        # that window as small as an older kernel allows.
        return os.pidfd_open(peer_credentials(connection).pid)
    except OSError:
        return None


class ProcessWatch:
    """Calls back once, when the process behind a pidfd has died. Owns the pidfd."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, pidfd: int, on_death: Callable[[], None]
    ) -> None:
        self._loop = loop
        self._pidfd: int | None = pidfd
        self._on_death = on_death
        loop.add_reader(pidfd, self._died)

    def close(self) -> None:
        """Stop watching. Idempotent."""
        if self._pidfd is None:
            return
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = None

    def _died(self) -> None:
        self.close()
        self._on_death()
