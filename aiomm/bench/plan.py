"""What is to be measured, and in which order; both processes derive the same steps from it.

A step is one measurement: a floor, or aiomm. In a round every size is measured on every path,
so that what else the machine does meanwhile hits all paths alike.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from itertools import groupby
from typing import Literal, NamedTuple, TypeAlias

import msgspec

__all__ = [
    "AIOMM",
    "AIOMM_BUSY",
    "MEMCPY",
    "MEMCPY_ACK",
    "Arrival",
    "Busy",
    "Plan",
    "PoolShape",
    "Process",
    "Step",
    "size_from",
    "size_name",
]

MEMCPY = "memcpy"
MEMCPY_ACK = "memcpy + ack"
AIOMM = "aiomm"
AIOMM_BUSY = "aiomm, busy"
"""The same, beside a thread that spins."""

SPARSE_SECONDS = (0.010, 0.030)
"""Between one start and the next, if they are sparse."""
LARGEST_ROW_NBYTES = 4096
BLOCK_NBYTES = 256 * 1024
COLD_NBYTES = 64 * 2**20
"""Sources, targets and pools are walked through and are at least so large, so that small copies
do not stay in the caches either."""
MAX_BLOCKS = 1024
"""That one transfer takes of a pool for all, so that one grant is all of it."""
MAX_TRANSFERS = 4096
"""That a pool holds for the sake of that."""
ALIGNMENT = 64
MAX_NBYTES = 2**30
RATE_NBYTES = 64 * 2**20
RATE_TRANSFERS = 20
UNITS = {"b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}

Arrival: TypeAlias = Literal["back to back", "sparse"]
Process: TypeAlias = Literal["encoder", "language"]
Busy: TypeAlias = Process | Literal["both"]


class Step(NamedTuple):
    """One measurement."""

    number: int
    turn: int
    """The round, from 0 on; the first ones are warm-up."""
    arrival: str
    nbytes: int
    path: str
    pause: float
    """Seconds after the start of the step before; 0 means at once."""
    is_rehearsal: bool = False
    """Never counted. First of a round, where both processes have just told what they measured; or
    in front of a transfer that a busy thread changes: the sender learns of it by one."""

    @property
    def is_transfer(self) -> bool:
        """It goes through aiomm; else it is a floor."""
        return self.path in (AIOMM, AIOMM_BUSY)

    @property
    def is_busy(self) -> bool:
        """A thread spins beside it."""
        return self.path == AIOMM_BUSY


class PoolShape(NamedTuple):
    """How the language side cuts a pool."""

    blocks: int
    block_size: int
    default_blocks: int


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What the benchmark is asked to do."""

    plane: Literal["auto", "cuda_ipc", "shm", "mooncake", "tcp"] = "auto"
    device: str = "cpu"
    """Where the encoder's tensors and the language side's pool lie."""
    sizes: tuple[int, ...] = (2**16, 2**20, 2**23, 2**26)
    """Bytes of one transfer."""
    rounds: int = 15
    warm_up_rounds: int = 2
    arrivals: tuple[Arrival, ...] = ("back to back", "sparse")
    concurrency: int = 1
    """Over 1: measure the rate with so many transfers in flight."""
    resume: bool = False
    """The first grant is for half of the tokens."""
    stream: bool = False
    """The pool holds a quarter of the tokens; not together with `resume`."""
    busy: Busy | None = None
    """Where a thread spins during some transfers; only back to back, one at a time."""
    switch_interval: float = 0.005
    """Seconds after which a thread gives up the GIL, in both processes."""
    heartbeat: bool = False
    """Find out for how long the loops are held."""
    checksum: bool = False
    seed: int = 0
    timeout: float = 60.0
    """Seconds for one transfer."""

    @property
    def row_nbytes(self) -> int:
        """Bytes of one token; what is granted of any size at first is a whole number of tokens."""
        parts = 4 if self.stream else 2 if self.resume else 1
        return math.gcd(LARGEST_ROW_NBYTES, *(nbytes // parts for nbytes in self.sizes))

    @property
    def buffer_nbytes(self) -> int:
        """Bytes of the source and of the floor's target."""
        return max(COLD_NBYTES, 2 * max(self.sizes))

    @property
    def buffered_nbytes(self) -> int | None:
        """Bytes that the language side may hold outside its pools; None if it needs no more."""
        return self.concurrency * max(self.sizes) if self.stream else None

    @property
    def paths(self) -> tuple[str, ...]:
        """What is measured at every size, in this order."""
        quiet = (MEMCPY, MEMCPY_ACK, AIOMM)
        return (*quiet, AIOMM_BUSY) if self.busy else quiet

    def spins(self, process: Process, step: Step) -> bool:
        """Whether a thread of that process spins during the step."""
        return step.is_busy and self.busy in (process, "both")

    def num_tokens(self, nbytes: int) -> int:
        """Tokens of a transfer of so many bytes."""
        return nbytes // self.row_nbytes

    def pool_of(self, nbytes: int) -> int:
        """Return which of the pools a transfer of so many bytes goes to."""
        return self.sizes.index(nbytes) if self.resume or self.stream else 0

    def pools(self) -> list[PoolShape]:
        """One pool for all; with `resume` and `stream` one for each size, made for it."""
        if self.stream:
            return [self._quarter_pool(nbytes) for nbytes in self.sizes]
        if self.resume:
            return [self._halving_pool(nbytes) for nbytes in self.sizes]
        longest = self.num_tokens(max(self.sizes))
        block_size = max(BLOCK_NBYTES // 4 // self.row_nbytes, -(-longest // MAX_BLOCKS))
        nbytes = max(COLD_NBYTES, (self.concurrency + 1) * max(self.sizes))
        return [PoolShape(-(-nbytes // (block_size * self.row_nbytes)), block_size, 1)]

    def is_warm_up(self, step: Step) -> bool:
        """Whether the step does not count."""
        return step.is_rehearsal or step.turn < self.warm_up_rounds

    def told_together(self) -> Iterator[Iterator[Step]]:
        """Yield the steps of every round and kind of arrival."""
        for _, steps in groupby(self.steps(), lambda step: (step.turn, step.arrival)):
            yield steps

    def _halving_pool(self, nbytes: int) -> PoolShape:
        half = self.num_tokens(nbytes) // 2
        default_blocks = math.gcd(half, max(1, nbytes // 2 // BLOCK_NBYTES))
        transfers = max(self.concurrency + 1, min(MAX_TRANSFERS, COLD_NBYTES // nbytes))
        return PoolShape(2 * transfers * default_blocks, half // default_blocks, default_blocks)

    def _quarter_pool(self, nbytes: int) -> PoolShape:
        quarter = self.num_tokens(nbytes) // 4
        blocks = math.gcd(quarter, max(1, nbytes // 4 // BLOCK_NBYTES))
        return PoolShape(blocks, quarter // blocks, blocks)

    def transfers_of(self, step: Step) -> int:
        """Return how many transfers each of the concurrent workers makes in a step."""
        if self.concurrency == 1:
            return 1
        fitting = RATE_NBYTES // (self.concurrency * step.nbytes)
        return max(2, min(RATE_TRANSFERS, fitting))

    def steps(self) -> Iterator[Step]:
        """Yield every measurement in order; the same for everybody who asks."""
        chance = random.Random(self.seed)
        number = 0
        for turn in range(self.warm_up_rounds + self.rounds):
            for arrival in self._arrivals():
                pairs = [(nbytes, path) for nbytes in self.sizes for path in self.paths]
                if arrival == "sparse":
                    chance.shuffle(pairs)
                else:
                    yield Step(number, turn, arrival, self.sizes[0], MEMCPY_ACK, 0.0, True)
                    number += 1
                for nbytes, path in pairs:
                    if self.busy and path in (AIOMM, AIOMM_BUSY):
                        yield Step(number, turn, arrival, nbytes, path, 0.0, True)
                        number += 1
                    pause = chance.uniform(*SPARSE_SECONDS) if arrival == "sparse" else 0.0
                    yield Step(number, turn, arrival, nbytes, path, pause)
                    number += 1

    def _arrivals(self) -> tuple[str, ...]:
        return self.arrivals if self.concurrency == 1 else (f"{self.concurrency} in flight",)


def size_from(text: str) -> int:
    """Read a size such as `64KiB`, `1MiB` or `4096`.

    Raises:
        ValueError: it is none, or no size that can be measured; says why.
    """
    digits = text.strip().rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = text.strip()[len(digits) :].strip().lower() or "b"
    if not (digits.isascii() and digits.isdecimal() and unit in UNITS):
        raise ValueError(f"{text.strip()!r} is no size such as 64KiB, 1MiB or 4096")
    nbytes = int(digits) * UNITS[unit]
    if not 0 < nbytes <= MAX_NBYTES or nbytes % ALIGNMENT:
        raise ValueError(f"{text.strip()!r} is no multiple of {ALIGNMENT} bytes up to 1 GiB")
    return nbytes


def size_name(nbytes: int) -> str:
    """Return `nbytes` in the largest binary unit of which it is a multiple."""
    for name, unit in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes % unit == 0:
            return f"{nbytes // unit} {name}"
    return f"{nbytes} B"
