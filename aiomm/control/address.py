"""Where a ZeroMQ channel may bind and connect: `tcp://host:port` and `ipc://path`."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

__all__ = ["Address", "IpcAddress", "TcpAddress", "parse_address", "require_allowed"]

MAX_IPC_PATH_NBYTES = 107  # sizeof(sockaddr_un.sun_path) less the closing zero
ANY_HOSTS = frozenset({"*", "0.0.0.0", "::"})


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A TCP host and port."""

    host: str
    """Host name or address, without the brackets of IPv6."""

    port: int
    """0 to bind any free port."""

    key: str = ""
    """The public key of whoever listens there, in hex, as `?key=` in tickets; mostly not told."""

    @property
    def is_loopback(self) -> bool:
        """Whether only processes of this host can be meant."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a host name; what it resolves to may change, so it does not count
            return False

    @property
    def is_any(self) -> bool:
        """Whether the address stands for every interface of the host."""
        return self.host in ANY_HOSTS

    @property
    def is_ipv6(self) -> bool:
        """Whether the host is an IPv6 address."""
        return ":" in self.host

    def __str__(self) -> str:
        host = f"[{self.host}]" if self.is_ipv6 else self.host
        return f"tcp://{host}:{self.port}" + (f"?key={self.key}" if self.key else "")

    def endpoint(self) -> str:
        """Return the spelling that ZeroMQ takes: it does not bind to `localhost`."""
        return str(TcpAddress("127.0.0.1" if self.host == "localhost" else self.host, self.port))

    def reachable(self, port: int, advertise: str = "") -> TcpAddress:
        """Return where others reach a socket bound here that was given `port`.

        Args:
            port: the real one.
            advertise: the host to tell them; found out if it is empty.
        """
        return TcpAddress(advertise or self.own_host(), port)

    def own_host(self) -> str:
        """Return the address of this host behind a bound address, also a wildcard."""
        if not self.is_any:
            return self.host
        return _route_to("2001:db8::1" if self.is_ipv6 else "192.0.2.1") or socket.gethostname()

    def local_host(self) -> str:
        """Return the address that this host uses towards this one, a loopback one if none.

        A name is not looked up, which may take long: what leads out of this host counts for it.
        """
        try:
            ipaddress.ip_address(self.host)
        except ValueError:
            return _route_to("192.0.2.1") or "127.0.0.1"
        return _route_to(self.host) or ("::1" if self.is_ipv6 else "127.0.0.1")


@dataclass(frozen=True, slots=True)
class IpcAddress:
    """A Unix socket in the file system."""

    path: Path

    @property
    def is_loopback(self) -> bool:
        """Whether only processes of this host can be meant: always."""
        return True

    def __str__(self) -> str:
        return f"ipc://{self.path}"

    def endpoint(self) -> str:
        """Return the spelling that ZeroMQ takes."""
        return str(self)


Address: TypeAlias = TcpAddress | IpcAddress


def parse_address(address: str) -> Address:
    """Read an address.

    Raises:
        ValueError: it is neither `tcp://host:port` nor `ipc://path`.
        TypeError: it is no string.
    """
    if not isinstance(address, str):
        raise TypeError(f"an address is a string, not {address!r}")
    scheme, separator, rest = address.partition("://")
    if separator and scheme == "tcp":
        return _parse_tcp(address, rest)
    if separator and scheme == "ipc":
        return _parse_ipc(address, rest)
    raise ValueError(f"an address is tcp://host:port or ipc://path, not {address!r}")


def require_allowed(address: Address, *, has_keys: bool, insecure: bool) -> None:
    """Raise ValueError if `address` leaves this host without keys, and nobody said it may."""
    if has_keys or insecure or address.is_loopback:
        return
    raise ValueError(
        f"{address} is not a loopback address, and whoever reaches it could talk to this process: "
        "make keys with `aiomm keygen` and pass key_file=, or pass insecure=True on a network "
        "you trust"
    )


def _parse_tcp(address: str, rest: str) -> TcpAddress:
    place, question, key = rest.partition("?key=")
    host, _, port_text = place.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    port = 0 if port_text == "*" else _port(port_text)
    strange = not host or any(letter.isspace() or letter in "/;[]?" for letter in host)
    strange = strange or (question != "" and not _is_key(key))
    if port is None or strange or (":" in host) != bracketed:
        raise ValueError(f"a TCP address is tcp://host:port, not {address!r}")
    return TcpAddress(host, port, key)


def _is_key(text: str) -> bool:
    return len(text) == 64 and all(letter in "0123456789abcdef" for letter in text)


def _port(text: str) -> int | None:
    if text.isascii() and text.isdigit() and int(text) < 2**16:
        return int(text)
    return None


def _parse_ipc(address: str, rest: str) -> IpcAddress:
    if not rest or rest[0] in "@*" or "\0" in rest:
        raise ValueError(f"an ipc address names a file in a private directory, not {address!r}")
    if len(rest.encode()) > MAX_IPC_PATH_NBYTES:
        raise ValueError(
            f"the path of an ipc address has at most {MAX_IPC_PATH_NBYTES} bytes: {address}"
        )
    return IpcAddress(Path(rest))


def _route_to(host: str) -> str:
    """Return the address of this host that packets to `host` carry; empty without a route."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # a datagram socket sends nothing for it
        except OSError:
            return ""
        return str(probe.getsockname()[0])
