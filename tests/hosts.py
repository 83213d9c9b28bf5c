"""Two hosts on one machine: network namespaces with a pair of virtual Ethernet cards.

::

    near  10.77.0.1, fd77::1   <------ veth ------>   far  10.77.0.2, fd77::2

The test itself stays in the machine's own namespace and runs commands "on" a host by `nsenter`.
Where the kernel or the rights forbid namespaces, :func:`unusable` says why.
"""

from __future__ import annotations

import functools
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["Container", "Host", "Hosts", "two_hosts", "unusable"]


@dataclass(frozen=True)
class Host:
    """One of the two."""

    pid: int
    """Of a process that keeps the namespace alive."""
    device: str
    ipv4: str
    ipv6: str
    card: str
    """The Ethernet address of its end of the cable."""

    def command(self, *arguments: str) -> list[str]:
        """Return the command that runs `arguments` on this host."""
        return ["nsenter", "--net", "--target", str(self.pid), "--", *arguments]

    def run(self, command: str) -> str:
        """Run a short command on this host and return what it prints."""
        return _run(*self.command(*command.split()))

    def sent_nbytes(self) -> int:
        """Return what this host has ever sent over the cable, with all headers."""
        words = self.run(f"ip -s link show dev {self.device}").split()
        return int(words[words.index("TX:") + 7])


@dataclass(frozen=True)
class Hosts:
    """Both, and the cable between them."""

    near: Host
    far: Host

    def cut(self) -> None:
        """Cut the cable: from now on every packet is lost on its way, and nobody is told."""
        self._connect(STRANGER, STRANGER)

    def heal(self) -> None:
        """Mend the cable."""
        self._connect(self.near.card, self.far.card)

    def _connect(self, near: str, far: str) -> None:
        """Have each host send to that card; one that the other does not have hears nothing."""
        for host, peer, card in ((self.near, self.far, far), (self.far, self.near, near)):
            for address in (peer.ipv4, peer.ipv6):
                to = f"lladdr {card} nud permanent dev {host.device}"
                host.run(f"ip neighbor replace {address} {to}")

    def limit(self, rate: str) -> None:
        """Let the cable carry `rate`, such as `1gbit`, in either direction."""
        for host in (self.near, self.far):
            queue = f"tbf rate {rate} burst 256kb latency 50ms"
            host.run(f"tc qdisc replace dev {host.device} root {queue}")


STRANGER = "02:00:00:00:00:99"


@dataclass(frozen=True)
class Container:
    """What shares this host's kernel and network, and not all of the rest."""

    options: tuple[str, ...]
    """Of `unshare`: which namespaces are its own."""
    setup: str = "true"
    """A shell command that is run in it first."""

    def command(self, *arguments: str) -> list[str]:
        """Return the command that runs `arguments` in it; they end with that command."""
        script = f'{self.setup} && exec "$@"'
        return ["unshare", "--kill-child", *self.options, "sh", "-c", script, "sh", *arguments]

    def unusable(self) -> str:
        """Say why there cannot be such a container here; empty if there can."""
        try:
            _run(*self.command("true"))
        except (OSError, subprocess.SubprocessError) as exc:
            return f"no such namespaces here: {exc}"
        return ""


@functools.cache
def unusable() -> str:
    """Say why there cannot be two hosts here; empty if there can."""
    for tool in ("ip", "tc", "nsenter", "unshare"):
        if shutil.which(tool) is None:
            return f"there is no command {tool!r} (iproute2, util-linux)"
    try:
        with two_hosts() as hosts:
            hosts.cut()
            hosts.heal()
    except (OSError, subprocess.SubprocessError) as exc:
        return f"no network namespaces here: {exc}"
    return ""


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Make two hosts, which are gone on exit with everything in them."""
    keepers = [_keeper(), _keeper()]
    try:
        near, far = (keeper.pid for keeper in keepers)
        one = Host(near, "cable", "10.77.0.1", "fd77::1", "02:00:00:00:00:01")
        two = Host(far, "cable", "10.77.0.2", "fd77::2", "02:00:00:00:00:02")
        # Made inside the first namespace, so that the machine's own network never sees it.
        one.run(f"ip link add {one.device} type veth peer name {two.device} netns {far}")
        for host in (one, two):
            host.run("ip link set lo up")
            host.run(f"ip link set {host.device} address {host.card} up")
            host.run(f"ip address add {host.ipv4}/24 dev {host.device}")
            host.run(f"ip address add {host.ipv6}/64 dev {host.device} nodad")
        hosts = Hosts(one, two)
        hosts.heal()
        yield hosts
    finally:
        for keeper in keepers:
            keeper.kill()
            keeper.wait()


def _keeper() -> subprocess.Popen[bytes]:
    """Start a process that does nothing, in a network namespace of its own."""
    keeper = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", "echo; exec sleep infinity"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_IGN),
    )
    assert keeper.stdout is not None
    assert keeper.stderr is not None
    with keeper.stdout, keeper.stderr:
        if not keeper.stdout.readline():
            keeper.wait()
            raise OSError(keeper.stderr.read().decode().strip())
    return keeper


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
