"""The Unix socket between the two processes: first the receivers' addresses, then single bytes."""

from __future__ import annotations

import socket
from collections.abc import Sequence

import msgspec

__all__ = ["put_addresses", "take_addresses"]


def put_addresses(link: socket.socket, addresses: Sequence[str]) -> None:
    """Tell the other side where the receivers listen."""
    link.sendall(msgspec.json.encode(list(addresses)) + b"\n")


def take_addresses(link: socket.socket) -> list[str]:
    """Return where the receivers listen, once they do. Blocks.

    Raises:
        EOFError: the other side is gone.
    """
    line = b""
    while not line.endswith(b"\n"):
        received = link.recv(4096)
        if not received:
            raise EOFError("the other side is gone")
        line += received
    return msgspec.json.decode(line, type=list[str])
