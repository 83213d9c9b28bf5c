"""What is known of a machine before anything is tried: driver, MIG, MPS, kernel, limits."""

from __future__ import annotations

import importlib
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from aiomm.errors import PlaneUnavailable
from aiomm.gpu.choice import gpu_runtime
from aiomm.gpu.runtime import GpuError
from aiomm.planes.mooncake.library import CUDA_BUILDS
from benchmarks.gpu.tensors import is_fake

__all__ = ["NOT_INSTALLED", "gpus", "machine_facts"]

NOT_INSTALLED = "not installed"
MOONCAKE = (*CUDA_BUILDS, "mooncake-transfer-engine-non-cuda")
"""The builds of its engine."""
SMI_QUERY = "index,name,driver_version,uuid,mig.mode.current,pcie.link.gen.max,compute_mode"
MPS_PROCESSES = ("nvidia-cuda-mps", "nvidia-cuda-mp")
"""The kernel cuts names of processes at 15 characters."""


def gpus() -> dict[str, Any]:
    """Return what the runtime sees, or why it sees nothing; and whether torch sees it, too."""
    try:
        runtime = gpu_runtime()
        devices = runtime.devices()
        versions = runtime.versions()
    except (PlaneUnavailable, GpuError) as exc:
        return {"devices": [], "reason": str(exc)}
    described = [
        {**device._asdict(), "uuid": device.uuid.hex(), "attributes": _attributes(device.ordinal)}
        for device in devices
    ]
    reason = "" if devices else "the driver sees no GPU"
    if devices and not is_fake():
        reason = _why_no_torch()
    return {
        "runtime": runtime.name,
        "versions": {**versions, **({} if is_fake() else _packages())},
        "devices": described,
        "reason": reason,
    }


def machine_facts() -> dict[str, Any]:
    """Return what the operating system tells. Nothing here can fail."""
    shared = shutil.disk_usage("/dev/shm")
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return {
        "kernel": platform.release(),
        "sandbox": _sandbox(),
        "driver_file": _read("/proc/driver/nvidia/version").partition("\n")[0],
        "nvidia_smi": _output(["nvidia-smi", f"--query-gpu={SMI_QUERY}", "--format=csv,noheader"]),
        "mps_runs": _mps_runs(),
        "mps_pipe": os.environ.get("CUDA_MPS_PIPE_DIRECTORY", ""),
        "shared_memory_gib": round(shared.total / 2**30, 2),
        "lockable_memory": "unlimited" if locked < 0 else f"{locked} bytes",
        "pid_namespace": _pid_namespace(),
        "pidfd_works": _pidfd_works(),
        "python": sys.version.split()[0],
    }


def _why_no_torch() -> str:
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError as exc:
        return f"torch cannot be imported: {exc}"
    return "" if torch.cuda.is_available() else "torch is not built for CUDA, or sees no GPU"


def _packages() -> dict[str, str]:
    names = ("torch", "cupy", "numpy", "uvloop")
    return {**{name: _version(name) for name in names}, "mooncake": _mooncake()}


def _version(name: str) -> str:
    try:
        return str(importlib.import_module(name).__version__)
    except Exception:  # whatever another package raises while it is imported
        return NOT_INSTALLED


def _mooncake() -> str:
    """Return the build of Mooncake's engine and its version, without loading it."""
    for build in MOONCAKE:
        with suppress(PackageNotFoundError):
            return f"{build} {version(build)}"
    return NOT_INSTALLED


def _attributes(device: int) -> dict[str, int]:
    """Return attributes of a device that decide on other ways to share memory."""
    try:
        cuda: Any = importlib.import_module("cuda.bindings.driver")
        names = {
            "ipc_events": "CU_DEVICE_ATTRIBUTE_IPC_EVENT_SUPPORTED",
            "file_descriptors": "CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED",
            "copy_engines": "CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT",
            "unified_addresses": "CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING",
        }
        attributes = cuda.CUdevice_attribute
        told = {
            name: cuda.cuDeviceGetAttribute(getattr(attributes, full), device)
            for name, full in names.items()
        }
        return {name: int(value) for name, (status, value) in told.items() if not int(status)}
    except (ImportError, AttributeError, RuntimeError, TypeError):
        return {}


def _sandbox() -> str:
    """Guess in which kind of machine this runs."""
    version = f"{_read('/proc/version')} {_output(['dmesg'])}".lower()
    if "gvisor" in version or platform.release() == "4.4.0":
        return "gVisor"
    if "firecracker" in version or "-fc" in platform.release():
        return "Firecracker"
    return "none seen"


def _mps_runs() -> bool:
    names = [_read(str(path)).strip() for path in Path("/proc").glob("[0-9]*/comm")]
    return any(name.startswith(MPS_PROCESSES) for name in names)


def _pid_namespace() -> str:
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return "unknown"


def _pidfd_works() -> bool:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        return False
    return True


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _output(command: Sequence[str]) -> str:
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ended.stdout.strip()
