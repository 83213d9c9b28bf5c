"""Which sessions to look at: those that have changed, and those whose time may have come.

An endpoint has as many sessions as peers, and most have nothing to say most of the time. So
nobody asks them all: a session says when it has changed, and when to look at it at the latest.
"""

from __future__ import annotations

import heapq

from .session import NEVER, Session

__all__ = ["Agenda"]

MIN_ENTRIES = 1024


class Agenda:
    """Sessions by urgency. Each is looked at by its deadline, and sometimes once too early.

    With every packet a session's deadline moves, mostly further away. That changes nothing here:
    when the old one comes, the session is looked at for nothing, and says the new one.
    """

    def __init__(self) -> None:
        self.changed: dict[Session, None] = {}
        """Sessions that have changed, in the order in which they did first."""
        self._deadlines: dict[Session, float] = {}
        self._heap: list[tuple[float, int, Session]] = []
        """May hold deadlines that an earlier one has replaced."""
        self._entries = 0

    def note(self, session: Session) -> None:
        """Have `session` looked at soon: it has changed."""
        self.changed[session] = None

    def take(self) -> dict[Session, None]:
        """Return the sessions that have changed."""
        taken, self.changed = self.changed, {}
        return taken

    def schedule(self, session: Session, at: float) -> None:
        """Have `session` looked at by that time."""
        if at < self._deadlines.get(session, NEVER):
            self._deadlines[session] = at
            self._entries += 1
            heapq.heappush(self._heap, (at, self._entries, session))
            if len(self._heap) > MIN_ENTRIES + 2 * len(self._deadlines):
                self._compact()

    def forget(self, session: Session) -> None:
        """Never look at `session` again."""
        self.changed.pop(session, None)
        self._deadlines.pop(session, None)

    def due(self, now: float) -> list[Session]:
        """Return the sessions whose time may have come, and note them."""
        due = []
        while self._heap and self._heap[0][0] <= now:
            at, _, session = heapq.heappop(self._heap)
            if self._deadlines.get(session) == at:
                del self._deadlines[session]
                self.note(session)
                due.append(session)
        return due

    def next_deadline(self) -> float:
        """Return when to ask for :meth:`due`."""
        return self._heap[0][0] if self._heap else NEVER

    def _compact(self) -> None:
        self._heap = [each for each in self._heap if self._deadlines.get(each[2]) == each[0]]
        heapq.heapify(self._heap)
