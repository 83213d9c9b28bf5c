"""Who waits for blocks, and in which order they get them.

Two ranks. *Claimed*: a sender waits with tokens in its hands. *Expected*: a scheduler foresees
a request. Claimed comes before expected, always; within a rank, first come, first granted, and
nobody is overtaken (rule 4 of the protocol):

* The claimed head takes its whole need, or else what is free, so it waits only while the pool
  has no free block at all; the rest comes by resume. A large request cannot starve. One that is
  longer than the pool takes half of it at a time.
* The expected head takes its whole need or waits.

What an expected key got is a *soft hold*. It stays with the queue, no sender knows of it, and
it is taken back, newest first, for a claimed key whose need is not free. The key is then first
of the expected again. Once claimed, the allocation belongs to the caller.

The invariant: when a call returns and nothing was freed since the last :meth:`pump`, a claimed
key waits only if no block is free and none is softly held.
"""

from __future__ import annotations

from collections import OrderedDict

from ..errors import Rejected
from ..types import MAX_GRANT_BLOCKS, Allocation
from .pool import BlockPool

__all__ = ["QueueFull", "ReservationQueue"]


class QueueFull(Rejected):
    """Too many requests wait for blocks already; the sender may try again later."""

    def __init__(self, num_waiting: int) -> None:
        super().__init__(f"{num_waiting} requests wait for blocks already", retryable=True)


class ReservationQueue:
    """The waiting requests over one pool. No clock, no asyncio: the caller has the deadlines.

    Call :meth:`pump` after every call that may have freed blocks: `pool.free`, `pool.trim`,
    :meth:`cancel`, and a :meth:`request` for less than was held.

    Args:
        pool: whose blocks are granted.
        max_waiting: keys that may wait, over both ranks.
        max_grant_blocks: blocks of one grant; the rest of a larger need comes by resume.
    """

    def __init__(
        self, pool: BlockPool, *, max_waiting: int, max_grant_blocks: int = MAX_GRANT_BLOCKS
    ) -> None:
        self.pool = pool
        self.max_waiting = max_waiting
        # Waiting for more than the pool has would be waiting for ever.
        self._max_tokens = min(max_grant_blocks, pool.capacity) * pool.block_size
        self._claimed: OrderedDict[int, int] = OrderedDict()  # key -> tokens, first come first
        self._expected: OrderedDict[int, int] = OrderedDict()
        self._held: OrderedDict[int, Allocation] = OrderedDict()  # oldest first

    @property
    def num_waiting(self) -> int:
        """Keys that wait, over both ranks."""
        return len(self._claimed) + len(self._expected)

    def is_waiting(self, key: int) -> bool:
        """Whether a sender waits for the blocks of `key`."""
        return key in self._claimed

    @property
    def num_held(self) -> int:
        """Keys with a soft hold."""
        return len(self._held)

    def __repr__(self) -> str:
        return (
            f"<ReservationQueue: {len(self._claimed)} claimed and {len(self._expected)} expected "
            f"wait, {len(self._held)} held>"
        )

    def request(self, key: int, num_tokens: int, *, claimed: bool) -> Allocation | None:
        """Ask for blocks; None if `key` has to wait, until :meth:`pump` grants it.

        A claimed key may get fewer tokens than it asked for, and owns what it gets. What an
        expected key gets is a soft hold: good to know, not to use. A key that waits or holds
        already changes its length, and its rank if it is claimed now; it is never demoted. A
        hold that is claimed becomes a grant, of exactly `num_tokens` if that can be had.

        Raises:
            QueueFull: it would have to wait, and too many do.
        """
        if key in self._held:
            return self._resize_hold(key, num_tokens, claimed)
        is_new = key not in self._claimed and key not in self._expected
        is_full = self.num_waiting >= self.max_waiting  # whose holds are taken back may wait, too
        if claimed or key in self._claimed:
            self._expected.pop(key, None)
            rank, serve = self._claimed, self._serve_claimed
        else:
            rank, serve = self._expected, self._serve_expected
        rank[key] = self._portion(num_tokens)
        is_first = next(iter(rank)) == key and (rank is self._claimed or not self._claimed)
        allocation = serve() if is_first else None
        if allocation is None and is_new and is_full:
            del rank[key]
            raise QueueFull(self.num_waiting)
        return allocation

    def request_whole(self, num_tokens: int, behind: Allocation | None) -> Allocation | None:
        """Ask for all of `num_tokens` more tokens now, for a resume; None if that cannot be.

        Returns either `behind` enlarged by so many tokens, which replaces it (the two have one
        `start_offset`), or a separate allocation. Never overtakes a claimed key.
        """
        if self._claimed or num_tokens > self._max_tokens:
            return None
        if behind is not None and behind.num_tokens + num_tokens <= self._max_tokens:
            enlarged = self.pool.extend(behind, behind.num_tokens + num_tokens)
            if enlarged is not None:
                return enlarged
        return self._allocate(num_tokens)

    def cancel(self, key: int) -> None:
        """Forget `key`: it waits no more, and what it holds softly is freed. Idempotent."""
        self._claimed.pop(key, None)
        self._expected.pop(key, None)
        hold = self._held.pop(key, None)
        if hold is not None:
            self.pool.free(hold)

    def pump(self) -> list[tuple[int, Allocation]]:
        """Grant what is free now, head first; return the claimed keys and what each one got.

        Expected keys whose turn has come are given soft holds, of which nobody is told.
        """
        granted: list[tuple[int, Allocation]] = []
        while self._claimed:
            key = next(iter(self._claimed))
            allocation = self._serve_claimed()
            if allocation is None:
                return granted
            granted.append((key, allocation))
        while self._expected and self._serve_expected() is not None:
            pass
        return granted

    def _serve_claimed(self) -> Allocation | None:
        """Grant the claimed head its whole need, or else what can be had, if anything."""
        key, num_tokens = next(iter(self._claimed.items()))
        need = self.pool.blocks_for(num_tokens)
        while self._held and self.pool.num_free < need:
            self._take_back()
        available = self.pool.num_free * self.pool.block_size
        if num_tokens and not available:
            return None
        del self._claimed[key]
        return self._allocate(min(num_tokens, available))

    def _serve_expected(self) -> Allocation | None:
        """Give the expected head a soft hold of its whole need, if that is free."""
        key, num_tokens = next(iter(self._expected.items()))
        allocation = self._allocate(num_tokens)
        if allocation is not None:
            del self._expected[key]
            self._held[key] = allocation
        return allocation

    def _take_back(self) -> None:
        """Free the newest soft hold; its key is first of the expected again."""
        key, hold = self._held.popitem()
        self.pool.free(hold)
        self._expected[key] = hold.num_tokens
        self._expected.move_to_end(key, last=False)

    def _resize_hold(self, key: int, num_tokens: int, claimed: bool) -> Allocation:
        # Nobody is overtaken: where a claimed key waits, all holds have been taken back.
        hold = self.pool.reallocate(self._held[key], self._portion(num_tokens))
        if claimed:
            del self._held[key]
        else:
            self._held[key] = hold
        return hold

    def _portion(self, num_tokens: int) -> int:
        """Return how much of a need is served at once.

        What is longer than the pool gets half of it: while one half is moved out, the sender
        writes the other.
        """
        if num_tokens > self.pool.capacity * self.pool.block_size:
            num_tokens = max(1, self.pool.capacity // 2) * self.pool.block_size
        return min(num_tokens, self._max_tokens)

    def _allocate(self, num_tokens: int) -> Allocation | None:
        return self.pool.allocate(self.pool.blocks_for(num_tokens), num_tokens=num_tokens)
