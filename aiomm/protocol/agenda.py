"""Which sessions to look at: those that have changed, and those whose time has come.

An endpoint has as many sessions as peers, and most have nothing to say most of the time. So
nobody asks them all: a session says when it has changed, and its next deadline stands here.
"""

from __future__ import annotations

import heapq

from .session import Session

__all__ = ["Agenda"]

MIN_ENTRIES = 1024


class Agenda:
    """Sessions by urgency. A session stands here once, with the deadline it was given last."""

    def __init__(self) -> None:
        self._changed: dict[Session, None] = {}
        self._deadlines: dict[Session, float] = {}
        self._heap: list[tuple[float, int, Session]] = []
        """May hold deadlines that are not true any more."""
        self._entries = 0

    def note(self, session: Session) -> None:
        """Have `session` looked at soon: it has changed."""
        self._changed[session] = None

    @property
    def has_changes(self) -> bool:
        """Whether a session has changed."""
        return bool(self._changed)

    def take(self) -> list[Session]:
        """Return the sessions that have changed, in the order in which they did first."""
        taken, self._changed = list(self._changed), {}
        return taken

    def schedule(self, session: Session, at: float | None) -> None:
        """Have `session` looked at at that time, or not for the sake of time."""
        if at is None:
            self._deadlines.pop(session, None)
        elif self._deadlines.get(session) != at:
            self._deadlines[session] = at
            self._entries += 1
            heapq.heappush(self._heap, (at, self._entries, session))
            self._compact()

    def forget(self, session: Session) -> None:
        """Never look at `session` again."""
        self._changed.pop(session, None)
        self._deadlines.pop(session, None)

    def due(self, now: float) -> list[Session]:
        """Return the sessions whose time has come, and note them."""
        due = []
        while (at := self.next_deadline()) is not None and at <= now:
            _, _, session = heapq.heappop(self._heap)
            del self._deadlines[session]
            self.note(session)
            due.append(session)
        return due

    def next_deadline(self) -> float | None:
        """Return the earliest deadline."""
        while self._heap and self._deadlines.get(self._heap[0][2]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def _compact(self) -> None:
        if len(self._heap) > MIN_ENTRIES + 2 * len(self._deadlines):
            self._heap = [each for each in self._heap if self._deadlines.get(each[2]) == each[0]]
            heapq.heapify(self._heap)
