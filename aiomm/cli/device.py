"""`--device` and `--plane`: whether they name what there is, and go with each other here."""

from __future__ import annotations

import asyncio

import typer

from ..errors import PlaneUnavailable
from ..gpu.choice import check_device, device_ordinal, gpu_runtime
from ..planes.registry import make_planes
from .running import Unusable

__all__ = ["ensure_usable", "ensure_well_formed"]


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


async def ensure_usable(device: str, plane: str) -> None:
    """Find out before two processes do whether `plane` can write into a pool on `device`.

    Raises:
        Unusable: no; says why.
    """
    try:
        if device != "cpu":
            await asyncio.to_thread(_check_device, device)
        _check_plane(device, plane)
    except PlaneUnavailable as exc:
        raise Unusable(exc.message) from exc


def _check_device(device: str) -> None:
    check_device(gpu_runtime(), device_ordinal(device))


def _check_plane(device: str, plane: str) -> None:
    if plane == "auto":
        return
    [named] = make_planes(plane)
    reason = named.unusable()
    if reason is None and device == "cpu" and not named.writes_into(device):
        reason = "it does not write into a pool on cpu; give --device cuda:0"
    if reason is not None:
        raise PlaneUnavailable(f"--plane {plane}: {reason}")
