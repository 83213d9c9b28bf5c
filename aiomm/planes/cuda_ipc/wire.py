"""What crosses between the processes: the offer in the Hello, and two words on the connection."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from ...errors import PlaneUnavailable
from ...gpu.runtime import UUID_NBYTES
from ..handover import Invitation

__all__ = ["CLOSED", "EPOCH_NBYTES", "RETIRE", "CudaIpcOffer", "decode_offer"]

EPOCH_NBYTES = 16
RETIRE = b"R"
"""Receiver: close the pool; it is about to be freed."""
CLOSED = b"C"
"""Sender: it is closed here, and nothing of this process can land there any more."""


class CudaIpcOffer(msgspec.Struct, frozen=True, array_like=True, tag="cuda_ipc"):
    """One pool, for one sender."""

    invitation: Invitation
    process: Annotated[bytes, Meta(min_length=EPOCH_NBYTES, max_length=EPOCH_NBYTES)]
    """Of the exporter; a process cannot open what it has exported itself."""
    epoch: Annotated[bytes, Meta(min_length=EPOCH_NBYTES, max_length=EPOCH_NBYTES)]
    """Of the export. Handles and addresses may come again after a restart, this does not."""
    uuid: Annotated[bytes, Meta(min_length=UUID_NBYTES, max_length=UUID_NBYTES)]
    """Of the pool's GPU: ordinals differ between processes."""
    nbytes: Annotated[int, Meta(ge=1)]


def decode_offer(offer: bytes) -> CudaIpcOffer:
    """Return what an offer says.

    Raises:
        PlaneUnavailable: it says nothing.
    """
    try:
        return msgspec.msgpack.decode(offer, type=CudaIpcOffer)
    except (msgspec.MsgspecError, RecursionError) as exc:
        raise PlaneUnavailable(f"cuda_ipc: not an offer: {exc}") from exc
