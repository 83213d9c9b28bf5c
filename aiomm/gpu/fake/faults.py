"""What goes wrong with the copies of a fake GPU, on demand."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

__all__ = ["FakeFaults"]


@dataclass
class FakeFaults:
    """What goes wrong with which call of :meth:`FakeRuntime.copy`; they are counted from 1."""

    delay: float = 0.0
    """Seconds that every one takes longer."""
    stall_at: int | None = None
    """The one that waits for :meth:`release`."""
    refuse_at: int | None = None
    """The one that raises an error at once."""
    fail_at: int | None = None
    """The one that fails on the device, which is lost from then on."""
    short_at: int | None = None
    """The one that copies half of its bytes, and says nothing."""
    num_copies: int = 0
    """Calls so far."""
    stalled: threading.Event = field(default_factory=threading.Event)
    """Set when the one named by `stall_at` has begun to wait."""
    _released: threading.Event = field(default_factory=threading.Event, repr=False)

    def release(self) -> None:
        """Let the stalled copy go on."""
        self._released.set()

    def hold(self, number: int) -> None:
        """Keep copy `number` waiting for as long as it shall; on its stream's thread."""
        if number == self.stall_at:
            self.stalled.set()
            self._released.wait()
        if self.delay:
            time.sleep(self.delay)
