"""`--device`: whether it names one, and whether this machine has it."""

from __future__ import annotations

import asyncio

import typer

from ..errors import PlaneUnavailable
from ..gpu.choice import check_device, device_ordinal, gpu_runtime
from .running import Unusable

__all__ = ["ensure_present", "ensure_well_formed"]


def ensure_well_formed(device: str) -> None:
    """Check that `device` is `"cpu"` or of the form `"cuda:0"`.

    Raises:
        typer.BadParameter: it is neither.
    """
    if device == "cpu":
        return
    try:
        device_ordinal(device)
    except ValueError as exc:
        raise typer.BadParameter(str(exc), param_hint="--device") from exc


async def ensure_present(device: str) -> None:
    """Find out before two processes do whether a pool can lie on `device`.

    Raises:
        Unusable: no; says why.
    """
    if device == "cpu":
        return
    try:
        await asyncio.to_thread(_check, device)
    except PlaneUnavailable as exc:
        raise Unusable(exc.message) from exc


def _check(device: str) -> None:
    check_device(gpu_runtime(), device_ordinal(device))
