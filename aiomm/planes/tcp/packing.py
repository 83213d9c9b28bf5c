"""Where rows are packed, piece by piece, that are not dense bytes of the host."""

from __future__ import annotations

from functools import partial

from ...gpu.pinning import Pin
from ..base import Run
from ..copying import STRIDED_NBYTES, Copies

__all__ = ["Packing"]

NBYTES = 1 << 20
"""At most so many bytes are packed at a time, unless one row is longer."""


class Packing:
    """Memory of one connection, for one write at a time. It is pinned for rows of a GPU."""

    def __init__(self) -> None:
        self._memory: memoryview | None = None
        self._pin: Pin | None = None
        self._is_closed = False

    async def room_for(self, run: Run, copies: Copies) -> memoryview:
        """Return the memory, large enough for at least one row."""
        nbytes = max(NBYTES, run.rows.row_nbytes)
        if self._memory is None or len(self._memory) < nbytes:
            await self._unpin(copies)
            self._memory = memoryview(bytearray(nbytes))
        on_device = run.rows.on_device
        if on_device is not None and self._pin is None and not self._is_closed:
            pin = partial(Pin, on_device.runtime, on_device.device, self._memory)
            self._pin = await copies.run(pin)
        return self._memory

    async def pack(self, run: Run, target: memoryview, copies: Copies) -> None:
        """Copy the rows of `run` into `target`, on the thread if that takes long."""
        copy = partial(run.rows.copy_into, target, run.first, run.count)
        if run.nbytes <= STRIDED_NBYTES and run.rows.device == "cpu":
            copy()
        else:
            await copies.run(copy)

    async def aclose(self, copies: Copies) -> None:
        """Unpin the memory, behind whatever is being packed. Idempotent."""
        self._is_closed = True
        await self._unpin(copies)

    async def _unpin(self, copies: Copies) -> None:
        pin, self._pin = self._pin, None
        if pin is not None:
            await copies.run(pin.release)
