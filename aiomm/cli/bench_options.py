"""The options of `aiomm bench`."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

__all__ = [
    "ARRIVALS",
    "ArrivalChoice",
    "ArrivalOption",
    "BusyOption",
    "ChecksumOption",
    "ConcurrencyOption",
    "HeartbeatOption",
    "PeersOption",
    "PlotOption",
    "ResumeOption",
    "RoundsOption",
    "SaveOption",
    "SizesOption",
    "StreamOption",
    "SwitchIntervalOption",
]


class ArrivalChoice(StrEnum):
    """How the transfers of a benchmark follow each other."""

    BOTH = "both"
    BACK_TO_BACK = "back-to-back"
    SPARSE = "sparse"


class BusyChoice(StrEnum):
    """Which processes of a benchmark are busy with something else."""

    ENCODER = "encoder"
    LANGUAGE = "language"
    BOTH = "both"


ARRIVALS: Mapping[ArrivalChoice, tuple[Literal["back to back", "sparse"], ...]] = {
    ArrivalChoice.BOTH: ("back to back", "sparse"),
    ArrivalChoice.BACK_TO_BACK: ("back to back",),
    ArrivalChoice.SPARSE: ("sparse",),
}

SizesOption = Annotated[str, typer.Option(metavar="SIZE,...", help="Bytes of one transfer.")]
RoundsOption = Annotated[int, typer.Option(min=1, help="Of each measurement, after 2 more.")]
ArrivalOption = Annotated[
    ArrivalChoice | None,
    typer.Option(
        help="The next at once when one is done, or one every 10 to 30 ms.",
        show_default="both; back-to-back with --busy",
    ),
]
ConcurrencyOption = Annotated[
    int, typer.Option(min=1, max=1000, help="Over 1: the rate with so many in flight.")
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Grant half at first; each takes one resume.")
]
StreamOption = Annotated[
    bool, typer.Option("--stream", help="Stream each through a pool of a quarter of its size.")
]
BusyOption = Annotated[
    BusyChoice | None,
    typer.Option(help="Measure also beside a thread that spins there, in pure Python."),
]
SwitchIntervalOption = Annotated[
    float,
    typer.Option(
        metavar="MS",
        min=0.001,
        max=1000.0,
        help="After so long a thread gives up the GIL, in both processes (sys.setswitchinterval).",
    ),
]
HeartbeatOption = Annotated[
    bool, typer.Option("--heartbeat", help="Find out for how long the loops are held.")
]
ChecksumOption = Annotated[
    bool, typer.Option("--checksum", help="Checksum every chunk, and verify it.")
]
PlotOption = Annotated[
    Path | None,
    typer.Option(dir_okay=False, metavar="FILE.png|svg", help="Draw it, with matplotlib."),
]
PeersOption = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        dir_okay=False,
        metavar="FILE.json",
        help="Draw these rows of other paths too; the form is that of --save.",
    ),
]
SaveOption = Annotated[
    Path | None, typer.Option(dir_okay=False, metavar="FILE.json", help="Keep the figures.")
]
