"""A GPU that is none: shared memory and threads, for tests of whoever uses aiomm without a GPU.

Chosen by `AIOMM_GPU_RUNTIME=fake`. Memory of its devices is shared memory, so that handles lead
from one process into another; each stream is a queue that a thread works off. It is stricter than
CUDA: what CUDA leaves undefined (freeing what another process has open, using what was closed,
opening twice, handles of the inside of an allocation, any use after a fork) is an error here, and
stands in :attr:`FakeRuntime.violations`.

::

    runtime = FakeRuntime(faults=FakeFaults(stall_at=2))
    ...
    await asyncio.to_thread(runtime.faults.stalled.wait)     # the second copy has begun
    runtime.faults.release()                                 # let it go on
"""

from __future__ import annotations

from .arrays import FakeArray
from .faults import FakeFaults
from .runtime import FakeRuntime

__all__ = ["FakeArray", "FakeFaults", "FakeRuntime"]
