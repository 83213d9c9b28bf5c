"""Which runtime this process uses: that of cuda-bindings, else cupy's; or the fake, on demand."""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Mapping

from ..errors import PlaneUnavailable
from .runtime import GpuError, GpuRuntime, explained

__all__ = ["VARIABLE", "check_device", "device_ordinal", "gpu_runtime", "is_in_use", "use_runtime"]

VARIABLE = "AIOMM_GPU_RUNTIME"
"""`auto`, or the name of one runtime."""
RUNTIMES: Mapping[str, str] = {
    "bindings": "aiomm.gpu.bindings:BindingsRuntime",
    "cupy": "aiomm.gpu.cupy:CupyRuntime",
    "fake": "aiomm.gpu.fake:FakeRuntime",
}
AUTOMATIC = ("bindings", "cupy")
NOT_INSTALLED = 'needs cuda-bindings or cupy: pip install "aiomm[cuda]"'

_lock = threading.Lock()
_chosen: GpuRuntime | None = None


def gpu_runtime() -> GpuRuntime:
    """Return the runtime of this process; the same each time. The first call may take a second.

    Nothing of CUDA is initialised before a method of it is called.

    Raises:
        PlaneUnavailable: there is none, and what to install.
    """
    global _chosen
    with _lock:
        if _chosen is None:
            _chosen = _make(os.environ.get(VARIABLE) or "auto")
        return _chosen


def use_runtime(runtime: GpuRuntime | None) -> None:
    """Use this runtime from now on, in tests; None chooses anew."""
    global _chosen
    with _lock:
        _chosen = runtime


def is_in_use() -> bool:
    """Whether this process has initialised CUDA already, or has chosen a runtime."""
    if _chosen is not None or os.environ.get(VARIABLE) == "fake":
        return True
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    is_initialized = getattr(cuda, "is_initialized", None)  # torch may be half imported
    return is_initialized is not None and bool(is_initialized())


def device_ordinal(device: str) -> int:
    """Return the ordinal of `"cuda:0"`; `"cuda"` is the first one.

    Raises:
        ValueError: it is no name of a GPU.
    """
    kind, colon, number = device.partition(":")
    if kind != "cuda" or (colon and not number.isdecimal()):
        raise ValueError(f"device {device!r}: expected 'cpu', 'cuda' or 'cuda:0'")
    return int(number or 0)


def check_device(runtime: GpuRuntime, ordinal: int) -> None:
    """Initialise CUDA and see that there is such a device. Blocks.

    Raises:
        PlaneUnavailable: there is none, and why.
    """
    try:
        devices = runtime.devices()
    except GpuError as exc:
        raise explained(ordinal, exc) from exc
    if not ordinal < len(devices):
        raise PlaneUnavailable(f"cuda:{ordinal}: there are {len(devices)} GPUs here")


def _make(wanted: str) -> GpuRuntime:
    names = AUTOMATIC if wanted == "auto" else (wanted,)
    reasons = []
    for name in names:
        if name not in RUNTIMES:
            known = ", ".join(RUNTIMES)
            raise PlaneUnavailable(f"{VARIABLE}={name}: known are auto, {known}")
        module, _, attribute = RUNTIMES[name].partition(":")
        try:
            runtime: GpuRuntime = getattr(importlib.import_module(module), attribute)()
        except (ImportError, OSError) as exc:
            reasons.append(f"{name}: {exc}")
            continue
        return runtime
    raise PlaneUnavailable(f"{NOT_INSTALLED} ({'; '.join(reasons)})")
