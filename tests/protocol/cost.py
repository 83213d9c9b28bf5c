"""What the protocol core costs: the instructions that Python executes in it, counted, not timed.

A count is the same on every machine, so a few per cent more are seen where a clock would show
noise. `python -m tests.protocol.cost` writes what is counted now into `cost.json`, under this
version of Python.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import aiomm.protocol

from .pairs import Pair
from .world import DEFAULT_TOKENS

__all__ = ["STORIES", "counted", "known"]

FILE = Path(__file__).with_name("cost.json")
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
CORE = str(Path(str(aiomm.protocol.__file__)).parent)
TRANSFERS = 20
"""Of which the first is left out."""
STEP = 0.02
"""Seconds between two acts: most of what is counted is not for the passing of time."""


def known() -> dict[str, int]:
    """Return what each story has cost so far, with this version of Python."""
    costs: dict[str, dict[str, int]] = json.loads(FILE.read_text())
    return costs.get(VERSION, {})


def counted(story: Callable[[], Iterator[None]]) -> int:
    """Return the instructions in the core of one transfer, of which a story tells some."""
    transfers = story()
    next(transfers)
    with counting() as count:
        num_transfers = sum(1 for _ in transfers)
    return round(count() / num_transfers)


@contextmanager
def counting() -> Iterator[Callable[[], int]]:
    """Count the instructions that this thread executes in the core meanwhile."""
    instructions = 0

    def called(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(CORE):
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        return executed

    def executed(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal instructions
        instructions += event == "opcode"
        return executed

    before = sys.gettrace()
    sys._getframe().f_trace_opcodes = True  # else Python 3.12 counts nothing the first time
    sys.settrace(called)
    try:
        yield lambda: instructions
    finally:
        sys.settrace(before)


def granted() -> Iterator[None]:
    """Blocks are granted before the tokens are there, and all of them suffice."""
    yield from _transfers(Pair(), tokens=DEFAULT_TOKENS)


def noted() -> Iterator[None]:
    """The same over a plane that carries notes."""
    yield from _transfers(Pair(), tokens=DEFAULT_TOKENS, notes=1.0)


def resumed() -> Iterator[None]:
    """The default allocation is too short: the rest is granted later."""
    yield from _transfers(Pair(), tokens=20)


def streamed() -> Iterator[None]:
    """The request is longer than the pool: chunks are moved out of it, and joined."""
    yield from _transfers(Pair(blocks=2), tokens=70)


def _transfers(pair: Pair, tokens: int, notes: float = 0.0) -> Iterator[None]:
    pair.sender.notes = notes
    pair.meet()
    for number in range(TRANSFERS):
        name = f"request {number}"
        received = pair.expect(name)
        generation = pair.claim(name, tokens=None)
        pair.wait(STEP)
        pair.sender.totals[generation] = tokens
        pair.ready(generation, tokens, tokens)
        while received not in pair.receiver.delivered:
            pair.wait(STEP)
        assert len(pair.receiver.delivered[received].content) == tokens
        yield


STORIES = (granted, noted, resumed, streamed)


def _main() -> None:
    costs = json.loads(FILE.read_text()) if FILE.exists() else {}
    costs[VERSION] = {story.__name__: counted(story) for story in STORIES}
    FILE.write_text(json.dumps(costs, indent=1, sort_keys=True) + "\n")
    print(f"Python {VERSION}: {costs[VERSION]}")


if __name__ == "__main__":
    _main()
