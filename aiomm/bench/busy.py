"""A busy process: a thread that spins in pure Python, as a model's or a server's own code does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Spinner"]


class Spinner:
    """Competes with the loop for the GIL, and for nothing while nobody asks for it."""

    def __init__(self) -> None:
        self._is_wanted = False
        self._still = threading.Event()
        self._still.set()

    @contextmanager
    def spinning(self) -> Iterator[None]:
        """Spin from before the first line of the block until behind its last. Blocks briefly."""
        self._still.clear()
        self._is_wanted = True
        thread = threading.Thread(target=self._spin, name="spinner", daemon=True)
        thread.start()  # and it runs when this returns
        try:
            yield
        finally:
            self._is_wanted = False
            thread.join()
            self._still.set()

    def wait_until_still(self) -> None:
        """Return when nothing spins. Blocks."""
        self._still.wait()

    def _spin(self) -> None:
        while self._is_wanted:
            pass
