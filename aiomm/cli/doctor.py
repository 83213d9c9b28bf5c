"""`aiomm doctor`: what this machine can do, found out by trying."""

from __future__ import annotations

import asyncio
import os
import platform
import resource
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec
from rich.console import Console

from .. import __version__
from ..buffers.arena import Arena, HostArena
from ..buffers.cuda import CudaArena
from ..buffers.layout import ByteRange
from ..buffers.memcpy import is_streaming
from ..buffers.shm import MemfdArena
from ..buffers.tensors import TokenRows
from ..config import PREFIX, ReceiverSettings, SenderSettings, settings_from, variables_of
from ..control.keys import keys_from
from ..demo.loops import loop_factory
from ..errors import AiommError
from ..gpu.choice import VARIABLE as RUNTIME_VARIABLE
from ..gpu.choice import gpu_runtime
from ..gpu.fake.runtime import DEVICES_VARIABLE
from ..gpu.runtime import GpuError
from ..planes.base import GrantKey, Place, Plane, Run
from ..planes.mooncake import METADATA_VARIABLE
from ..planes.registry import known_planes
from ..types import Field
from .doctor_view import show_findings
from .running import Exit

__all__ = ["diagnose", "examine"]

PACKAGES = (
    "pyzmq",
    "msgspec",
    "uvloop",
    "aiozmq",
    "xxhash",
    "torch",
    "numpy",
    "safetensors",
    "transformers",
    "mooncake-transfer-engine-non-cuda",
    "mooncake-transfer-engine",
    "mooncake-transfer-engine-cuda13",
    "cuda-bindings",
)
OTHER_VARIABLES = (RUNTIME_VARIABLE, DEVICES_VARIABLE, METADATA_VARIABLE)
"""Those that are read, and are no settings."""
TRIAL_NBYTES = 1 << 20
TRIAL_SECONDS = 10.0


async def examine() -> dict[str, Any]:
    """Return what there is to know, as plain values; takes a second or two."""
    planes = {name: await _examine_plane(load) for name, load in sorted(known_planes().items())}
    return {
        "planes": planes,
        "gpus": await asyncio.to_thread(_gpus),
        "versions": _versions(),
        "copies": "streaming" if is_streaming else "libc",
        "loop": loop_factory().__module__.split(".")[0],
        "kernel": _kernel(),
        "shared_memory": _shared_memory(),
        "limits": _limits(),
        "environment": _environment(),
        "problems": _problems(planes),
    }


async def _examine_plane(load: Any) -> dict[str, Any]:
    """Say whether a plane works here, and if not, why; move a mebibyte to know."""
    began = time.perf_counter()
    remark = None
    try:
        reason = load()().unusable()
        if reason is None:
            async with asyncio.timeout(TRIAL_SECONDS):
                await _try(load()(), load()())
            unless_named = load().at(Place(), by_name=False).unusable()
            remark = unless_named and f"only if asked for by name: {unless_named}"
    except TimeoutError:
        reason = f"the trial has not ended within {TRIAL_SECONDS:g} s"
    except (AiommError, OSError) as exc:
        reason = str(exc)
    except Exception as exc:  # a plane of others may raise anything: it is not usable, then
        reason = f"{type(exc).__name__}: {exc}"
    seconds = time.perf_counter() - began
    return {
        "usable": reason is None,
        "reason": reason or remark,
        "trial_seconds": round(seconds, 4),
    }


async def _try(receiving: Plane, sending: Plane) -> None:
    """Write through the plane into an arena of this process, and compare.

    Raises:
        AiommError: it does not work, and why.
        ValueError: what was written is not what has arrived.
    """
    written = os.urandom(TRIAL_NBYTES)
    rows = TokenRows.of("trial", Field("uint8", TRIAL_NBYTES), written)
    arena = await asyncio.to_thread(_arena, receiving)
    async with AsyncExitStack() as stack:
        stack.callback(arena.close)
        export = await receiving.export(arena)
        stack.push_async_callback(export.aclose)
        grant = GrantKey(1, 1, 0)
        offer = export.offer(grant.link)
        export.permit(grant, [ByteRange(0, TRIAL_NBYTES)])
        remote = await sending.attach(offer)
        stack.push_async_callback(remote.aclose)
        await remote.write(grant, [Run(rows, 0, 1, 0)])
        if bytes(arena.read(0, TRIAL_NBYTES)) != written:
            raise ValueError("what was written is not what has arrived")


def _arena(plane: Plane) -> Arena:
    if not plane.writes_into("cpu"):
        return CudaArena(TRIAL_NBYTES, "cuda:0")
    try:
        return MemfdArena(TRIAL_NBYTES)
    except AiommError:
        return HostArena(TRIAL_NBYTES)


def _gpus() -> dict[str, Any]:
    """Return what CUDA says of this machine, or why it says nothing. It is initialised for that."""
    try:
        runtime = gpu_runtime()
        devices = runtime.devices()
        versions = runtime.versions()
    except (AiommError, GpuError) as exc:
        return {"runtime": None, "reason": str(exc), "versions": {}, "devices": []}
    return {
        "runtime": runtime.name,
        "reason": None,
        "versions": versions,
        "devices": [
            {
                "device": f"cuda:{device.ordinal}",
                "name": device.name,
                "uuid": device.uuid.hex(),
                "total_bytes": device.total_nbytes,
                "ipc": not device.why_no_ipc,
                "reason": device.why_no_ipc or None,
            }
            for device in devices
        ],
    }


def _versions() -> dict[str, str | None]:
    import zmq

    versions: dict[str, str | None] = {"aiomm": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    versions["libzmq"] = zmq.zmq_version()
    return versions


def _kernel() -> dict[str, Any]:
    return {
        "system": f"{platform.system()} {platform.release()}",
        "memfd": hasattr(os, "memfd_create"),
        "pidfd": _has_pidfd(),
        "SO_PEERCRED": hasattr(socket, "SO_PEERCRED"),
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
    }


def _has_pidfd() -> bool:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return False
    return True


def _shared_memory() -> dict[str, int | None]:
    """Return the size of /dev/shm. A memfd is not of it, and needs no more than free memory."""
    try:
        status = os.statvfs("/dev/shm")
    except OSError:
        return {"total_bytes": None, "free_bytes": None}
    return {
        "total_bytes": status.f_blocks * status.f_frsize,
        "free_bytes": status.f_bavail * status.f_frsize,
    }


def _limits() -> dict[str, dict[str, int | None]]:
    wanted = {"open_files": resource.RLIMIT_NOFILE, "locked_memory_bytes": resource.RLIMIT_MEMLOCK}
    limits = {}
    for name, which in wanted.items():
        soft, hard = map(_finite, resource.getrlimit(which))
        limits[name] = {"soft": soft, "hard": hard}
    return limits


def _finite(limit: int) -> int | None:
    return None if limit == resource.RLIM_INFINITY else limit


def _environment() -> dict[str, dict[str, str | None]]:
    """Return every variable that is read, which setting it is for, and its value if it may."""
    return {
        variable: {"setting": field.name, "value": _shown(field.name, os.environ.get(variable))}
        for kind in (ReceiverSettings, SenderSettings)
        for field in msgspec.structs.fields(kind)
        for variable in variables_of(field.name)
    }


def _shown(setting: str, value: str | None) -> str | None:
    return "(secret)" if value and setting == "secret_key" else value


def _problems(planes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return what stands in the way of any transfer here, or is not as somebody meant it."""
    problems = []
    if not any(planes[name]["usable"] for name in ("shm", "tcp")):
        problems.append("neither shm nor tcp can be used")
    for kind in (ReceiverSettings, SenderSettings):
        try:
            keys_from(settings_from(kind, {}))
        except ValueError as exc:
            problems.append(str(exc))
    return [*dict.fromkeys(problems), *_misspelled(os.environ)]


def _misspelled(environ: Mapping[str, str]) -> Iterator[str]:
    """Tell of every variable that has our prefix and is not read, and which may be meant."""
    read = [*_environment(), *OTHER_VARIABLES]
    ours = [name for name, value in environ.items() if value and name.startswith(PREFIX)]
    for variable in sorted(set(ours).difference(read)):
        [nearest] = get_close_matches(variable, read, n=1, cutoff=0)
        yield f"variable {variable}: nothing reads it; the nearest known one is {nearest}"


async def diagnose(*, as_json: bool, console: Console) -> Exit:
    """Examine this machine, and print what was found."""
    findings = await examine()
    if as_json:
        print(msgspec.json.encode(findings).decode(), flush=True)
    else:
        show_findings(findings, console)
    return Exit.FAILED if findings["problems"] else Exit.OK
