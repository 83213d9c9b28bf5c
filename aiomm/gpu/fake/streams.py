"""Streams and events of a fake GPU: queues that threads work off."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

__all__ = ["FakeEvent", "FakeStream"]


class FakeEvent:
    """How often it was recorded, and which of the records are over."""

    def __init__(self) -> None:
        self.issued = 0
        self.done = 0
        self.changed = threading.Condition()

    def issue(self) -> int:
        with self.changed:
            self.issued += 1
            return self.issued

    def finish(self, ticket: int) -> None:
        with self.changed:
            self.done = max(self.done, ticket)
            self.changed.notify_all()

    def wait(self, ticket: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.done >= ticket)


class FakeStream:
    """A queue of work, and a thread for as long as there is some."""

    def __init__(self) -> None:
        self._work: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()
        self._is_running = False
        self._thread: threading.Thread | None = None

    def give(self, work: Callable[[], None]) -> None:
        with self._lock:
            self._work.append(work)
            if not self._is_running:
                self._is_running = True
                self._thread = threading.Thread(
                    target=self._run, name="fake-gpu-stream", daemon=True
                )
                self._thread.start()

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._work:
                    self._is_running = False
                    return
                work = self._work.popleft()
            work()
