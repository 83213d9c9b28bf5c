"""Free blocks as runs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aiomm.buffers.runs import FreeRuns, grouped


@given(st.sets(st.integers(0, 40)))
def test_grouped_gives_the_maximal_runs(blocks: set[int]) -> None:
    runs = grouped(list(blocks))
    assert [block for run in runs for block in run] == sorted(blocks)
    assert all(run.stop not in blocks for run in runs)


@given(st.lists(st.sets(st.integers(0, 15))))
def test_runs_merge_and_split(changes: list[set[int]]) -> None:
    runs, free = FreeRuns(16), set[int]()
    for wanted in changes:
        for run in grouped(list(free - wanted)):
            runs.remove(run)
        for run in grouped(list(wanted - free)):
            runs.add(run)
        free = wanted
        expected = grouped(list(free))
        found = list(runs.longest_first())
        assert sorted(found, key=lambda run: run.start) == expected
        assert [len(run) for run in found] == sorted(map(len, expected), reverse=True)
        for length in range(1, 17):
            shortest = runs.shortest(length)
            enough = [len(run) for run in expected if len(run) >= length]
            assert (None if shortest is None else len(shortest)) == min(enough, default=None)
            assert runs.covers(range(length)) == (set(range(length)) <= free)


def test_nothing_past_the_end_is_free() -> None:
    runs = FreeRuns(4)
    runs.add(range(4))
    assert runs.covers(range(4))
    assert not runs.covers(range(2, 5))
