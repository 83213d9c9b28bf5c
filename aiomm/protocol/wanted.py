"""What receivers have asked a sender for by a bare request id, before it had it."""

from __future__ import annotations

import math
from typing import NamedTuple

__all__ = ["Wanted", "WantedRequests"]


class Wanted(NamedTuple):
    """One redemption of a receiver's that waits for a transfer of its request id."""

    peer: int
    redemption: int
    request_id: str
    deadline: float


class WantedRequests:
    """All of them at one sender, oldest first. Every step but two costs the same with thousands."""

    def __init__(self) -> None:
        self._all: dict[tuple[int, int], Wanted] = {}
        self._of_id: dict[str, dict[tuple[int, int], None]] = {}
        self._earliest = math.inf
        """No deadline is earlier."""

    def __len__(self) -> int:
        return len(self._all)

    def add(self, wanted: Wanted) -> None:
        """Let it wait."""
        key = wanted.peer, wanted.redemption
        self.remove(*key)
        self._all[key] = wanted
        self._of_id.setdefault(wanted.request_id, {})[key] = None
        self._earliest = min(self._earliest, wanted.deadline)

    def remove(self, peer: int, redemption: int) -> None:
        """Let it wait no longer. Harmless if it does not."""
        wanted = self._all.pop((peer, redemption), None)
        if wanted is not None:
            keys = self._of_id[wanted.request_id]
            del keys[peer, redemption]
            if not keys:
                del self._of_id[wanted.request_id]

    def take(self, request_id: str, now: float) -> Wanted | None:
        """Remove and return the one that has waited longest for that id, and is not too late."""
        while keys := self._of_id.get(request_id):
            key = next(iter(keys))
            wanted = self._all[key]
            self.remove(*key)
            if wanted.deadline > now:
                return wanted
        return None

    def take_all_of(self, peer: int) -> list[Wanted]:
        """Remove and return everything that one receiver waits for. Looks at all."""
        taken = [each for each in self._all.values() if each.peer == peer]
        for wanted in taken:
            self.remove(wanted.peer, wanted.redemption)
        return taken

    def expire(self, now: float) -> None:
        """Remove those whose receivers do not wait any more. Looks at all if there is one."""
        if now < self._earliest:
            return
        for wanted in list(self._all.values()):
            if wanted.deadline <= now:
                self.remove(wanted.peer, wanted.redemption)
        self._earliest = min((each.deadline for each in self._all.values()), default=math.inf)
