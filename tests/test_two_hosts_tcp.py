"""The `tcp` plane between two hosts: both versions of IP, a cut cable, a broken connection."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack

import pytest

from tests.distant import distant
from tests.hosts import Hosts, two_hosts, unusable
from tests.processes import Child, until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(60),
    pytest.mark.skipif(bool(unusable()), reason=unusable()),
]

PLANE = {"planes": "tcp", "insecure": True}
BLOCKS = 1100
LARGE = 1024 * 128
"""Tokens of 128 MiB: more than a second at 1 Gbit/s."""
LARGE_NBYTES = LARGE * 1028
BEGUN_NBYTES = 16 << 20
CUT_SECONDS = 2.0
OVERHEAD = 1.03
"""Headers, and the control channel. Segments are cut behind the counter: they have up to 64 KiB."""
IN_FLIGHT_NBYTES = 4 << 20
"""What the kernel had sent when the cable was cut, and sends again."""

LINK_LOCAL = """
import asyncio
from aiomm import Field
from aiomm.buffers.arena import HostArena
from aiomm.buffers.layout import ByteRange
from aiomm.buffers.tensors import TokenRows
from aiomm.planes.base import GrantKey, Run
from aiomm.planes.tcp import TcpPlane

async def main():
    plane, arena, grant = TcpPlane(bind="fe80::77%cable"), HostArena(4096), GrantKey(1, 1, 1)
    export = await plane.export(arena)
    remote = await plane.attach(export.offer(1))
    for connection in export.door.callers:
        connection.abort()  # a connection that is made anew knows the interface, too
    export.permit(grant, [ByteRange(0, 64)])
    rows = TokenRows.of("rows", Field("uint8", 16), b"0123456789abcdef" * 4)
    await remote.write(grant, [Run(rows, 0, 4, 0)])
    assert bytes(arena.view(0, 64)) == b"0123456789abcdef" * 4
    await remote.aclose()
    await export.aclose()
    print("landed")

RUN(main())
"""


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with two_hosts() as hosts:
        yield hosts


@pytest.fixture
def slow_hosts(hosts: Hosts) -> Iterator[Hosts]:
    """The same with a slow cable, which is whole again afterwards."""
    hosts.limit("1gbit")
    yield hosts
    hosts.heal()
    hosts.limit("100gbit")


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def pair_on(
    stack: AsyncExitStack, hosts: Hosts, version: str = "ipv4"
) -> tuple[Child, Child]:
    """Start a sender on the near host and a receiver on the far one."""
    where = hosts.far.ipv4 if version == "ipv4" else f"[{hosts.far.ipv6}]"
    bind = f"tcp://{where}:*"
    receiver = distant(hosts.far, "receiver", bind=bind, blocks=BLOCKS, max_tokens=LARGE, **PLANE)
    sender = distant(hosts.near, "sender", **PLANE)
    return await stack.enter_async_context(sender), await stack.enter_async_context(receiver)


async def begin(hosts: Hosts, sender: Child, receiver: Child, timeout: float = 60) -> int:
    """Begin the large request; return when some of it has been sent, and what had been before."""
    expected = await receiver.ask("expect", "ticket", request_id="large", timeout=timeout)
    before = hosts.near.sent_nbytes()
    sender.tell("send", ticket=expected["ticket"], seed=1, num_tokens=LARGE, timeout=timeout)
    await until(lambda: hosts.near.sent_nbytes() > before + BEGUN_NBYTES, "some of it is sent")
    return before


async def end(sender: Child, receiver: Child, request_id: str = "large") -> None:
    """See that a request ends well on both sides."""
    sent = await sender.hear("ended", request_id=request_id)
    assert (sent["error"], sent.get("plane")) == (None, "tcp"), sent
    received = await receiver.hear("ended", request_id=request_id)
    assert received["is_right"]


async def freed(receiver: Child) -> None:
    """Return when all blocks are free."""
    deadline = time.monotonic() + 10
    while (blocks := await receiver.ask("blocks", "blocks"))["free"] != BLOCKS:
        assert time.monotonic() < deadline, blocks


@pytest.mark.parametrize("version", ["ipv4", "ipv6"])
async def test_a_cable_that_is_cut_for_two_seconds(
    slow_hosts: Hosts, stack: AsyncExitStack, version: str
) -> None:
    sender, receiver = await pair_on(stack, slow_hosts, version)
    before = await begin(slow_hosts, sender, receiver)
    slow_hosts.cut()
    await asyncio.sleep(CUT_SECONDS)
    slow_hosts.heal()
    healed = time.monotonic()
    await end(sender, receiver)
    sent = slow_hosts.near.sent_nbytes() - before
    print(
        f"{version}: done {time.monotonic() - healed:.2f} s later, {sent / LARGE_NBYTES:.3f} sent"
    )
    assert sent < LARGE_NBYTES * OVERHEAD + IN_FLIGHT_NBYTES
    await freed(receiver)


async def test_a_connection_that_breaks(slow_hosts: Hosts, stack: AsyncExitStack) -> None:
    """Both ends of the data connection are destroyed; the control channel is left alone."""
    sender, receiver = await pair_on(stack, slow_hosts)
    control = (await receiver.ask("where", "address"))["address"].rpartition(":")[2]
    before = await begin(slow_hosts, sender, receiver)
    killed = slow_hosts.near.run(f"ss --kill --tcp --no-header dport != :{control}")
    assert killed.count("ESTAB") == 1
    await end(sender, receiver)
    assert slow_hosts.near.sent_nbytes() - before < LARGE_NBYTES * OVERHEAD + IN_FLIGHT_NBYTES


async def test_a_cable_that_is_cut_for_good(slow_hosts: Hosts, stack: AsyncExitStack) -> None:
    sender, receiver = await pair_on(stack, slow_hosts)
    await begin(slow_hosts, sender, receiver)
    at = time.monotonic()
    slow_hosts.cut()
    for child in (sender, receiver):
        ended = await child.hear("ended", request_id="large")
        assert ended["error"] == "PeerLost", ended
        print(f"PeerLost after {ended['at'] - at:.2f} s")
    await freed(receiver)
    slow_hosts.heal()
    expected = await receiver.ask("expect", "ticket", request_id="next")
    sender.tell("send", ticket=expected["ticket"], seed=3, num_tokens=3000)
    await end(sender, receiver, "next")


async def test_a_deadline_that_comes_during_a_cut(slow_hosts: Hosts, stack: AsyncExitStack) -> None:
    sender, receiver = await pair_on(stack, slow_hosts)
    await begin(slow_hosts, sender, receiver, timeout=2)
    slow_hosts.cut()
    for child in (sender, receiver):
        ended = await child.hear("ended", request_id="large")
        assert ended["error"] == "TransferTimeout", ended
    slow_hosts.heal()
    await freed(receiver)


def test_an_address_that_holds_on_one_cable_only(hosts: Hosts) -> None:
    hosts.near.run("ip address add fe80::77/64 dev cable nodad")
    for loop in ("asyncio.run", "__import__('uvloop').run"):
        command = hosts.near.command(sys.executable, "-c", LINK_LOCAL.replace("RUN", loop))
        assert subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout == b"landed\n"


async def test_a_hundred_at_once(hosts: Hosts, stack: AsyncExitStack) -> None:
    sender, receiver = await pair_on(stack, hosts)
    expected = await receiver.ask("expect_many", "tickets", count=100)
    for child in (sender, receiver):
        child.tell("beat")
    began = time.monotonic()
    sender.tell("flood", tickets=expected["tickets"], num_tokens=8192)
    sent = await sender.hear("ended", request_id="flood")
    assert (sent["error"], sent.get("plane")) == (None, "tcp"), sent
    print(f"a hundred of 8 MiB in {time.monotonic() - began:.2f} s")
    for number in range(100):
        received = await receiver.hear("ended", request_id=f"many {number}")
        assert received["is_right"]
    await freed(receiver)
