"""Mooncake between two hosts: both versions of IP, deaths, standstills, and a cut cable."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack

import pytest

from tests.distant import distant
from tests.hosts import Host, Hosts, two_hosts, unusable
from tests.planes.test_mooncake import MISSING
from tests.processes import Child, Report, until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(90),
    pytest.mark.skipif(bool(unusable()), reason=unusable()),
    pytest.mark.skipif(bool(MISSING), reason=MISSING),
]

PLANE = {"planes": "mooncake", "insecure": True}
BLOCKS = 1100
LARGE = 1024 * 128
"""Tokens of 128 MiB: more than a second at 1 Gbit/s."""
BEGUN_NBYTES = 16 << 20


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


async def receiver_on(stack: AsyncExitStack, host: Host, where: str = "") -> Child:
    bind = f"tcp://{where or host.ipv4}:*"
    started = distant(host, "receiver", bind=bind, blocks=BLOCKS, max_tokens=LARGE, **PLANE)
    return await stack.enter_async_context(started)


async def sender_on(stack: AsyncExitStack, host: Host) -> Child:
    return await stack.enter_async_context(distant(host, "sender", **PLANE))


async def move(sender: Child, receiver: Child, request_id: str, num_tokens: int = 3000) -> None:
    """Move one request, and see that every byte is right."""
    expected = await receiver.ask("expect", "ticket", request_id=request_id)
    sender.tell("send", ticket=expected["ticket"], seed=3, num_tokens=num_tokens)
    sent = await sender.hear("ended", request_id=request_id)
    assert (sent["error"], sent.get("plane")) == (None, "mooncake"), sent
    received = await receiver.hear("ended", request_id=request_id)
    assert received["is_right"]


async def begin(hosts: Hosts, sender: Child, receiver: Child) -> None:
    """Begin the large request, and return when some of it is under way."""
    expected = await receiver.ask("expect", "ticket", request_id="large")
    before = sent_nbytes(hosts.near)
    sender.tell("send", ticket=expected["ticket"], seed=1, num_tokens=LARGE)
    await until(lambda: sent_nbytes(hosts.near) > before + BEGUN_NBYTES, "some of it is sent")
    for child in (sender, receiver):
        child.tell("beat")


def sent_nbytes(host: Host) -> int:
    """Return what a host has ever sent over the cable."""
    words = host.run(f"ip -s link show dev {host.device}").split()
    return int(words[words.index("TX:") + 7])


async def failed(child: Child, errors: str, since: float) -> None:
    """See that the large request fails there, and that the loop never stood still."""
    ended: Report = await child.hear("ended", request_id="large")
    assert ended["error"] in errors.split(), ended
    measured = await child.ask("measure", "measured")
    print(f"{ended['error']} after {ended['at'] - since:.2f} s, {measured}")
    assert measured["standstill"] < 0.25


async def freed(receiver: Child) -> None:
    """Return when no block is in quarantine any more."""

    async def ask() -> Report:
        return await receiver.ask("blocks", "blocks")

    end = time.monotonic() + 10
    while (blocks := await ask())["quarantined"] or blocks["free"] != BLOCKS:
        assert time.monotonic() < end, blocks


@pytest.mark.parametrize("version", ["ipv4", "ipv6"])
async def test_transfers(hosts: Hosts, stack: AsyncExitStack, version: str) -> None:
    where = hosts.far.ipv4 if version == "ipv4" else f"[{hosts.far.ipv6}]"
    receiver = await receiver_on(stack, hosts.far, where)
    sender = await sender_on(stack, hosts.near)
    await move(sender, receiver, "one")
    await move(sender, receiver, "two", 20_000)
    await freed(receiver)


async def test_a_sender_is_killed(slow_hosts: Hosts, stack: AsyncExitStack) -> None:
    receiver = await receiver_on(stack, slow_hosts.far)
    sender = await sender_on(stack, slow_hosts.near)
    await begin(slow_hosts, sender, receiver)
    at = sender.kill()
    await failed(receiver, "PeerLost", at)
    await freed(receiver)
    await move(await sender_on(stack, slow_hosts.near), receiver, "next")


async def test_a_receiver_is_killed(slow_hosts: Hosts, stack: AsyncExitStack) -> None:
    receiver = await receiver_on(stack, slow_hosts.far)
    sender = await sender_on(stack, slow_hosts.near)
    await begin(slow_hosts, sender, receiver)
    at = receiver.kill()
    await failed(sender, "PeerLost", at)
    await move(sender, await receiver_on(stack, slow_hosts.far), "next")


async def test_a_sender_stands_still(slow_hosts: Hosts, stack: AsyncExitStack) -> None:
    receiver = await receiver_on(stack, slow_hosts.far)
    sender = await sender_on(stack, slow_hosts.near)
    await begin(slow_hosts, sender, receiver)
    at = time.monotonic()
    sender.stop()
    await failed(receiver, "PeerLost", at)
    await freed(receiver)
    sender.resume()
    await sender.hear("ended", request_id="large")
    await move(sender, receiver, "next")
    await freed(receiver)


async def test_a_receiver_stands_still(slow_hosts: Hosts, stack: AsyncExitStack) -> None:
    receiver = await receiver_on(stack, slow_hosts.far)
    sender = await sender_on(stack, slow_hosts.near)
    await begin(slow_hosts, sender, receiver)
    at = time.monotonic()
    receiver.stop()
    await failed(sender, "PeerLost", at)
    receiver.resume()
    await receiver.hear("ended", request_id="large")
    await freed(receiver)
    await move(sender, receiver, "next")


async def test_the_cable_is_cut(slow_hosts: Hosts, stack: AsyncExitStack) -> None:
    receiver = await receiver_on(stack, slow_hosts.far)
    sender = await sender_on(stack, slow_hosts.near)
    await begin(slow_hosts, sender, receiver)
    at = time.monotonic()
    slow_hosts.cut()
    await failed(sender, "PeerLost PlaneUnavailable", at)  # whichever notices first
    await failed(receiver, "PeerLost PlaneUnavailable", at)
    await freed(receiver)
    slow_hosts.heal()
    # Perhaps the sender has not yet noticed that the receiver gave up the link, or the engine that
    # a connection of its own is broken: then they do now.
    for request_id in ("next", "the next but one"):
        expected = await receiver.ask("expect", "ticket", request_id=request_id)
        sender.tell("send", ticket=expected["ticket"], seed=3, num_tokens=1)
        ended = await sender.hear("ended", request_id=request_id)
        assert ended["error"] in (None, "PeerLost", "PlaneUnavailable"), ended
    await move(sender, receiver, "the one after")
    await freed(receiver)


async def test_a_hundred_at_once(hosts: Hosts, stack: AsyncExitStack) -> None:
    """None is lost, and the sender stages them in bounded memory."""
    receiver = await receiver_on(stack, hosts.far)
    sender = await sender_on(stack, hosts.near)
    await move(sender, receiver, "first")
    before = (await sender.ask("measure", "measured"))["peak_nbytes"]
    expected = await receiver.ask("expect_many", "tickets", count=100)
    began = time.monotonic()
    sender.tell("flood", tickets=expected["tickets"], num_tokens=8192)
    sent = await sender.hear("ended", request_id="flood")
    assert (sent["error"], sent.get("plane")) == (None, "mooncake"), sent
    print(f"a hundred of 8 MiB in {time.monotonic() - began:.2f} s")
    for number in range(100):
        received = await receiver.hear("ended", request_id=f"many {number}")
        assert received["is_right"]
    after = (await sender.ask("measure", "measured"))["peak_nbytes"]
    assert after - before < 160 << 20
    await freed(receiver)
