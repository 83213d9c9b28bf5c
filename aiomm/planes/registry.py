"""Which planes there are, under which names, and in which order they are tried."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from ..errors import PlaneUnavailable
from .base import Place, Plane

__all__ = ["ENTRY_POINT_GROUP", "PREFERENCE", "known_planes", "make_planes"]

logger = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "aiomm.planes"
PREFERENCE = ("cuda_ipc", "shm", "mooncake", "tcp")
"""What `"auto"` means, as far as these exist. Planes of others are used when they are named."""

BUILT_IN = {
    "cuda_ipc": "aiomm.planes.cuda_ipc:CudaIpcPlane",
    "shm": "aiomm.planes.shm:ShmPlane",
    "mooncake": "aiomm.planes.mooncake:MooncakePlane",
    "tcp": "aiomm.planes.tcp:TcpPlane",
    "memory": "aiomm.planes.memory:MemoryPlane",
}


def known_planes() -> dict[str, Callable[[], type[Plane]]]:
    """Return every known name with a function that imports its plane.

    These are ours and those that installed packages register under the entry-point group
    `aiomm.planes`. A name of ours always means our plane.

    The functions raise:
        PlaneUnavailable: the plane cannot be imported, or is no subclass of `Plane`.
    """
    loaders: dict[str, Callable[[], type[Plane]]] = {
        entry.name: partial(_load, entry.name, entry.load)
        for entry in entry_points(group=ENTRY_POINT_GROUP)
        if not _is_shadowed(entry)
    }
    for name, target in BUILT_IN.items():
        loaders[name] = partial(_load, name, partial(_import, target))
    return loaders


def make_planes(
    spec: str | Plane | Sequence[str | Plane] = "auto",
    place: Place = Place(),  # noqa: B008
) -> list[Plane]:
    """Return the planes to try, the best one first.

    Args:
        spec: `"auto"` (those of :data:`PREFERENCE` that exist), a name, a plane, or several
            in the order in which to try them. Of several, one that cannot be imported is
            left out with a warning in the log.
        place: where the endpoint is on the network.

    Raises:
        PlaneUnavailable: a name is not known, or no plane is left.
        TypeError: something is neither a name nor a plane.
        ValueError: two planes have the same name, by which the two sides know them.
    """
    loaders = known_planes()
    if spec == "auto":
        wanted: Sequence[str | Plane] = [name for name in PREFERENCE if name in loaders]
    else:
        wanted = [spec] if isinstance(spec, str | Plane) else spec
    for one in wanted:
        if not isinstance(one, str | Plane):
            raise TypeError(f"planes are names and Plane objects, not {one!r}")
        if isinstance(one, str) and one not in loaders:
            known = ", ".join(sorted(loaders))
            raise PlaneUnavailable(f"there is no plane {one!r}; known are {known}")
    planes: list[Plane] = []
    reasons: list[str] = []
    for one in wanted:
        try:
            if isinstance(one, str):
                one = loaders[one]().at(place, by_name=spec != "auto")
            planes.append(one)
        except PlaneUnavailable as exc:
            logger.warning("! %s", exc)
            reasons.append(str(exc))
    if not planes:
        raise PlaneUnavailable("; ".join(reasons) or "no plane is asked for")
    names = [plane.name for plane in planes]
    if len(set(names)) < len(names):
        raise ValueError(f"of these planes two have the same name: {names}")
    return planes


def _load(name: str, load: Callable[[], Any]) -> type[Plane]:
    try:
        plane = load()
    except Exception as exc:
        # Whatever another package raises while it is imported is not our failure.
        raise PlaneUnavailable(f"plane {name!r} cannot be imported: {exc!r}") from exc
    if not (isinstance(plane, type) and issubclass(plane, Plane)):
        raise PlaneUnavailable(f"plane {name!r} is no subclass of aiomm's Plane: {plane!r}")
    return plane


def _import(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _is_shadowed(entry: EntryPoint) -> bool:
    """Whether one of our names hides `entry`; told in the log, unless that makes no difference."""
    target = BUILT_IN.get(entry.name)
    if target is not None and entry.value != target:
        logger.warning("! the plane %r of %r is hidden by aiomm's own", entry.name, entry.value)
    return target is not None
