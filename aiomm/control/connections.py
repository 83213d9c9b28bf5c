"""ZeroMQ's own TCP connections, seen by the descriptors that its monitor tells.

By the time an event is read the descriptor may be closed, or be somebody else's. So nothing
here relies on it: a name is for the log, and an option does no harm to another connection.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

__all__ = ["host_behind", "recover_quickly"]

TCP_THIN_LINEAR_TIMEOUTS = 16
TCP_RTO_MAX_MS = 44  # Linux 6.15
RTO_MAX_MS = 1000


def host_behind(descriptor: int) -> str:
    """Return the address of the host at the other end; empty if there is none any more."""
    with contextlib.suppress(OSError), _duplicate(descriptor) as connection:
        where = connection.getpeername()
        return str(where[0]) if isinstance(where, tuple) else ""  # a Unix socket has no host
    return ""


def recover_quickly(descriptor: int) -> None:
    """Have TCP try again within a second when a cut cable is mended.

    Otherwise it waits about as long again as the cut was: longer than the heartbeats allow.
    """
    with contextlib.suppress(OSError), _duplicate(descriptor) as connection:
        for option, value in ((TCP_RTO_MAX_MS, RTO_MAX_MS), (TCP_THIN_LINEAR_TIMEOUTS, 1)):
            with contextlib.suppress(OSError):  # a kernel that does not know it
                connection.setsockopt(socket.IPPROTO_TCP, option, value)


@contextlib.contextmanager
def _duplicate(descriptor: int) -> Iterator[socket.socket]:
    copy = os.dup(descriptor)
    try:
        connection = socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise
    with connection:
        yield connection
