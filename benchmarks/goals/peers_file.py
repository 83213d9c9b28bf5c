"""The figures of benchmarks.peers, out of the file that it saves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from aiomm.bench.plan import MEMCPY, MEMCPY_ACK, size_name

from .spread import Spread

OURS = "aiomm "
"""How the names of our own paths begin."""


class PeerRow(msgspec.Struct, frozen=True):
    """One path at one size, in one way of arriving."""

    nbytes: int
    arrival: str
    path: str
    median_us: float
    quartiles_us: tuple[float, float]
    cpu_seconds_per_gb: float

    @property
    def microseconds(self) -> Spread:
        """Of one transfer."""
        low, high = self.quartiles_us
        return Spread(low, self.median_us, high)

    @property
    def is_peer(self) -> bool:
        """It is neither a floor nor one of ours."""
        return self.path not in (MEMCPY, MEMCPY_ACK) and not self.path.startswith(OURS)


class Peers(msgspec.Struct, frozen=True):
    """All rows of a run."""

    rows: list[PeerRow]

    def row(self, path: str, nbytes: int, arrival: str) -> PeerRow:
        """Return one.

        Raises:
            LookupError: it was not measured.
        """
        for row in self.rows:
            if (row.path, row.nbytes, row.arrival) == (path, nbytes, arrival):
                return row
        raise LookupError(f"the peers file has no {path} of {size_name(nbytes)}, {arrival}")

    def others(self, nbytes: int, arrival: str, without: Sequence[str] = ()) -> list[PeerRow]:
        """Return the peers, the fastest first.

        Raises:
            LookupError: none was measured.
        """
        found = [
            row
            for row in self.rows
            if row.is_peer and row.path not in without
            if (row.nbytes, row.arrival) == (nbytes, arrival)
        ]
        if not found:
            raise LookupError(f"the peers file has no peer of {size_name(nbytes)}, {arrival}")
        return sorted(found, key=lambda row: row.median_us)


def peers_in(path: Path) -> Peers | None:
    """Read the file; None if there is none.

    Raises:
        ValueError: it is something else.
        OSError: it cannot be read.
    """
    try:
        peers = msgspec.json.decode(path.read_bytes(), type=Peers)
    except FileNotFoundError:
        return None
    except (msgspec.MsgspecError, UnicodeError) as exc:
        raise ValueError(f"{path}: {exc}") from exc
    for row in peers.rows:
        if min(*row.microseconds, row.nbytes, row.cpu_seconds_per_gb) <= 0:
            raise ValueError(f"{path}: all figures must be over 0, in {row}")
    return peers
