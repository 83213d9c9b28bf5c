"""The plane of GPUs of one host: the sender's GPU copies straight into the receiver's pool.

The receiver exports the pool once, as a handle of CUDA's that :mod:`..handover` hands to senders
of the same user. A sender opens it once for each of its GPUs, and keeps it open. Nothing on the
device checks where a sender writes, so it checks that itself; processes of one user trust each
other. Memory that is still open in another process is never freed: before the receiver frees its
pool it asks every sender to close it, and waits.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import ClassVar, Self

from ...buffers.arena import Arena
from ...buffers.cuda import CudaArena
from ...errors import PlaneUnavailable
from ...gpu.choice import gpu_runtime, is_in_use
from ...gpu.runtime import HANDLE_NBYTES, GpuError, GpuRuntime, explained
from ..base import Export, Place, Plane, RemoteArena
from ..copying import Copies, CopyThreads
from ..handover import collect
from .exporting import CudaExport, exported_here
from .mappings import Pool
from .sending import RemotePool
from .wire import decode_offer

__all__ = ["CudaIpcPlane"]


class CudaIpcPlane(Plane):
    """Copies from GPU to GPU, and from the host into a GPU's pool.

    Args:
        by_name: use it also in a process that does not use CUDA yet, which initialises it.
    """

    name: ClassVar[str] = "cuda_ipc"

    def __init__(self, *, by_name: bool = True) -> None:
        self._by_name = by_name
        self._threads = CopyThreads(self.name)

    @classmethod
    def at(cls, place: Place, *, by_name: bool) -> Self:
        """Return the plane; where the endpoint is makes no difference."""
        return cls(by_name=by_name)

    def writes_into(self, device: str) -> bool:
        """Whether it is a GPU."""
        return device.startswith("cuda")

    def unusable(self) -> str | None:
        """Say that this process does not use CUDA, unless it is asked to.

        What else is missing shows when it is loaded, by :meth:`export` or :meth:`attach`.
        """
        if sys.platform != "linux":
            return f"needs Linux, this is {sys.platform}"
        if not (self._by_name or is_in_use()):
            return "CUDA is not in use in this process"
        return None

    async def export(self, arena: Arena) -> Export:
        """Open `arena`, which must be a :class:`~aiomm.buffers.cuda.CudaArena`.

        Raises:
            PlaneUnavailable: it is another kind of arena, or CUDA does not share it.
        """
        if not isinstance(arena, CudaArena):
            raise PlaneUnavailable(f"cuda_ipc: writes into a GPU's memory, not {arena.device}")
        copies = Copies(self._threads)
        try:
            export = await copies.run(partial(CudaExport, arena))
        finally:
            await copies.aclose()
        await export.open()
        return export

    async def attach(self, offer: bytes) -> RemoteArena:
        """Open the pool behind `offer`.

        Raises:
            PlaneUnavailable: the receiver is on another host, runs as another user, refuses the
                secret, or is gone; or CUDA does not open the pool here.
        """
        decoded = decode_offer(offer)
        reason = self.unusable()
        if reason is not None:
            raise PlaneUnavailable(f"cuda_ipc: {reason}")
        copies = Copies(self._threads)
        try:
            runtime = await copies.run(gpu_runtime)
            local = exported_here(decoded)
            if local is None:
                invitation = decoded.invitation
                connection, handle, _ = await collect(self.name, invitation, HANDLE_NBYTES, 0)
                pool = Pool(runtime, decoded, handle=handle)
            else:
                connection = local.visit(decoded.invitation.secret)
                pool = Pool(runtime, decoded, local=local.memory)
            remote = RemotePool(pool, connection, copies)
        except BaseException:
            await copies.aclose()
            raise
        try:
            current = runtime.current_device()  # of this thread, where the user's torch is
            home = partial(_home_of, runtime, decoded.uuid, current)
            await remote.open(await copies.run(home))
        except BaseException:
            await remote.aclose()
            raise
        return remote


def _home_of(runtime: GpuRuntime, uuid: bytes, current: int | None) -> int:
    """Return the device by which the host's tensors get into a pool.

    It is the one that this process works on: another would cost it half a GiB for a context.
    Else it is the pool's own, where it is seen.

    Raises:
        PlaneUnavailable: there is no GPU here.
    """
    try:
        devices = runtime.devices()
    except GpuError as exc:
        raise explained(0, exc) from exc
    if not devices:
        raise PlaneUnavailable("cuda_ipc: this process sees no GPU")
    if current is not None:
        return current
    return next((device.ordinal for device in devices if device.uuid == uuid), 0)
