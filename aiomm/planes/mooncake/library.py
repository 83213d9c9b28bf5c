"""Mooncake's engine as a library: what it has, when it can be imported, and what it is told.

It is told by its environment, which it reads once, at its import.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.metadata
import importlib.util
import ipaddress
import os
from pathlib import Path
from typing import Any, Protocol

from ...errors import PlaneUnavailable

__all__ = ["TransferEngine", "has_rdma", "is_cuda_build", "load", "uses_tcp", "why_unusable"]

DEFAULTS = {
    "MC_LOG_LEVEL": "ERROR",
    "MC_TRANSFER_TIMEOUT": "5",
    "MC_TCP_PROGRESS_TIMEOUT_SEC": "2",
    "MC_TCP_STATUS_TIMEOUT_SEC": "2",
    "MC_HANDSHAKE_CONNECT_TIMEOUT": "2",
}
"""A frozen or cut off peer is noticed after 2 s, not after 30. What the user has set stays."""
SYSTEM_PACKAGES = {
    "libibverbs.so.1": "libibverbs1",
    "libnuma.so.1": "libnuma1",
    "libcurl.so.4": "libcurl4",
}
CUDA_LIBRARIES = {
    "libcuda.so": "a driver of NVIDIA's",
    "libcudart.so": "it in LD_LIBRARY_PATH (torch brings it along, as nvidia/cu13/lib or the like)",
    "libmlx5.so": "the system package ibverbs-providers",
}
"""What only the CUDA builds need, and where it comes from."""
CUDA_BUILDS = ("mooncake-transfer-engine", "mooncake-transfer-engine-cuda13")
NOT_INSTALLED = 'needs Mooncake: pip install "aiomm[mooncake]"'
IPV6_VARIABLE = "MC_USE_IPV6"
RDMA_DEVICES = Path("/sys/class/infiniband")
_process: int | None = None
"""The process that has imported the engine; its forked children cannot use it."""


class TransferEngine(Protocol):
    """What is used of `mooncake.engine.TransferEngine`. All but the first two let the GIL go."""

    def initialize(
        self, local_hostname: str, metadata_server: str, protocol: str, device_name: str, /
    ) -> int:
        """Begin to listen; 0 if it does."""

    def get_rpc_port(self) -> int:
        """Return the port behind `local_hostname` by which peers know this engine."""

    def batch_register_memory(self, addresses: list[int], capacities: list[int], /) -> int:
        """Let peers read and write this memory; 0 if they can."""

    def batch_unregister_memory(self, addresses: list[int], /) -> int:
        """Turn away what peers begin from now on; what has begun goes on."""

    def send_probe(self, peer: str, /) -> int:
        """Return 0 if `peer` answers; a frozen one takes a minute not to."""

    def batch_transfer_async_read(
        self, peer: str, targets: list[int], sources: list[int], lengths: list[int], /
    ) -> int:
        """Begin to read; return what to ask for the status by, or 0 if it cannot begin."""

    def transfer_check_status(self, batch: int, /) -> int:
        """Return 1 for done, -1 for failed, else something else; never ask again after these."""


def has_rdma() -> bool:
    """Whether this machine has an RDMA device."""
    return RDMA_DEVICES.is_dir() and any(RDMA_DEVICES.iterdir())


def uses_tcp() -> bool:
    """Whether the engine moves bytes over TCP here, which needs no registered target."""
    return bool(os.environ.get("MC_FORCE_TCP")) or not has_rdma()


@functools.cache
def is_cuda_build() -> bool:
    """Whether the engine that is installed reads and writes memory of GPUs."""
    return any(map(_is_installed, CUDA_BUILDS))


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def why_unusable() -> str | None:
    """Say what is missing here, as far as that shows without the import, or None."""
    if _process is not None and _process != os.getpid():
        return "its engine was loaded before this process was forked: spawn processes instead"
    if _process is not None:
        return None
    if importlib.util.find_spec("mooncake") is None:
        return NOT_INSTALLED
    for library, package in SYSTEM_PACKAGES.items():
        try:
            ctypes.CDLL(library)
        except OSError:
            return f"{library} is missing: install the system package {package}"
    return None


def load(host: str) -> Any:
    """Import the engine for an address of this host. It reads its environment now, never again.

    Takes 0.1 s the first time. Which of IPv4 and IPv6 it speaks is settled by it, too.

    Raises:
        PlaneUnavailable: something is missing, or the engine speaks the other of the two.
    """
    global _process
    reason = why_unusable()
    if reason is not None:
        raise PlaneUnavailable(f"mooncake: {reason}")
    if _process is None:
        _tell(host)
    try:
        module = _import_engine()
    except ImportError as exc:
        raise PlaneUnavailable(f"mooncake: {_explain(exc)}") from exc
    _process = os.getpid()
    if _is_ipv6(host) != bool(os.environ.get(IPV6_VARIABLE)):
        version = "IPv4" if _is_ipv6(host) else "IPv6"
        raise PlaneUnavailable(
            f"mooncake: this process's engine was loaded for {version} and cannot use {host}; "
            "start another process"
        )
    return module


def _tell(host: str) -> None:
    """Set the environment, as far as the user has not."""
    if not has_rdma():
        os.environ.setdefault("MC_FORCE_TCP", "1")
    if _is_ipv6(host):
        os.environ.setdefault(IPV6_VARIABLE, "1")
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)


def _import_engine() -> Any:
    return importlib.import_module("mooncake.engine")


def _explain(exc: ImportError) -> str:
    """Say what to install. That `import mooncake` succeeds proves nothing."""
    text = str(exc)
    for library, source in CUDA_LIBRARIES.items():
        if library in text:
            return (
                f"Mooncake's CUDA build does not find {library}: it needs {source}; or, without "
                'CUDA, uninstall it and pip install "aiomm[mooncake]"'
            )
    for library, package in SYSTEM_PACKAGES.items():
        if library in text:
            return f"{library} is missing: install the system package {package}"
    if isinstance(exc, ModuleNotFoundError):
        return f"{NOT_INSTALLED} ({text})"
    return f"its engine cannot be imported: {text}"


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return bool(os.environ.get(IPV6_VARIABLE))
