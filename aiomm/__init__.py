"""aiomm moves multimodal embeddings from encoder processes into language-model processes.

Importing it loads neither torch nor numpy; `Sender` and `Receiver` load on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .errors import (
        AiommError,
        Cancelled,
        IncompatibleSchema,
        PeerLost,
        PlaneUnavailable,
        PoolClosed,
        ProtocolError,
        Rejected,
        TransferTimeout,
    )
    from .protocol.states import State
    from .receiver import Lease, Receiver, Reception
    from .sender import OfferedTicket, Sender, Transfer
    from .types import Allocation, Extent, Field, Schema, Ticket, TransferStats

__version__ = "0.1.0"

_HOMES = {
    "AiommError": ".errors",
    "Allocation": ".types",
    "Cancelled": ".errors",
    "Extent": ".types",
    "Field": ".types",
    "IncompatibleSchema": ".errors",
    "Lease": ".receiver",
    "OfferedTicket": ".sender",
    "PeerLost": ".errors",
    "PlaneUnavailable": ".errors",
    "PoolClosed": ".errors",
    "ProtocolError": ".errors",
    "Receiver": ".receiver",
    "Reception": ".receiver",
    "Rejected": ".errors",
    "Schema": ".types",
    "Sender": ".sender",
    "State": ".protocol.states",
    "Ticket": ".types",
    "Transfer": ".sender",
    "TransferStats": ".types",
    "TransferTimeout": ".errors",
}

__all__ = [
    "AiommError",
    "Allocation",
    "Cancelled",
    "Extent",
    "Field",
    "IncompatibleSchema",
    "Lease",
    "OfferedTicket",
    "PeerLost",
    "PlaneUnavailable",
    "PoolClosed",
    "ProtocolError",
    "Receiver",
    "Reception",
    "Rejected",
    "Schema",
    "Sender",
    "State",
    "Ticket",
    "Transfer",
    "TransferStats",
    "TransferTimeout",
]


def __getattr__(name: str) -> object:
    """Import a public name from its home when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'aiomm' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
