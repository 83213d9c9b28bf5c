"""The free blocks of a pool as maximal runs, found by length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

__all__ = ["FreeRuns", "grouped"]


def grouped(blocks: Sequence[int]) -> list[range]:
    """Return the runs that these distinct blocks form, in ascending order."""
    if not blocks:
        return []
    first, last = min(blocks), max(blocks)
    if last - first + 1 == len(blocks):
        return [range(first, last + 1)]
    runs: list[range] = []
    following = first
    for block in sorted(blocks):
        if block != following:
            runs.append(range(first, following))
            first = block
        following = block + 1
    runs.append(range(first, following))
    return runs


class FreeRuns:
    """Which of the blocks `[0, num_blocks)` are free. None at first.

    The time of every call grows with the number of different lengths of runs (at most 127 in
    a pool of 8192), not with the number of blocks.
    """

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        # One byte per block: the ends of the run around a block are found at the speed of C.
        self._is_free = bytearray(num_blocks)
        self._by_length: dict[int, dict[int, None]] = {}  # length -> first blocks of such runs

    def add(self, run: range) -> None:
        """Note that the blocks of `run`, none of which was free, are."""
        whole = self._around(run)
        self._drop(whole.start, run.start)
        self._drop(run.stop, whole.stop)
        self._is_free[run.start : run.stop] = b"\x01" * len(run)
        self._keep(whole.start, whole.stop)

    def remove(self, run: range) -> None:
        """Note that the blocks of `run`, all of which were free, are not."""
        whole = self._around(run)
        self._drop(whole.start, whole.stop)
        self._is_free[run.start : run.stop] = bytes(len(run))
        self._keep(whole.start, run.start)
        self._keep(run.stop, whole.stop)

    def covers(self, run: range) -> bool:
        """Whether all blocks of `run` exist and are free."""
        free = self._is_free.count(1, run.start, run.stop)
        return free == len(run)

    def shortest(self, at_least: int) -> range | None:
        """Return the shortest maximal run of at least so many blocks, if there is one."""
        length = min((n for n in self._by_length if n >= at_least), default=None)
        if length is None:
            return None
        start = next(iter(self._by_length[length]))
        return range(start, start + length)

    def longest_first(self) -> Iterator[range]:
        """Yield all maximal runs, longest first; change nothing meanwhile."""
        for length in sorted(self._by_length, reverse=True):
            for start in self._by_length[length]:
                yield range(start, start + length)

    def _around(self, run: range) -> range:
        """Return `run` with the free blocks that adjoin it."""
        stop = self._is_free.find(0, run.stop)
        return range(
            self._is_free.rfind(0, 0, run.start) + 1, stop if stop >= 0 else self._num_blocks
        )

    def _keep(self, start: int, stop: int) -> None:
        if start < stop:
            self._by_length.setdefault(stop - start, {})[start] = None

    def _drop(self, start: int, stop: int) -> None:
        if start < stop:
            starts = self._by_length[stop - start]
            del starts[start]
            if not starts:
                del self._by_length[stop - start]
