"""Containers of one host: what they do not share shows by trying, and the rest goes on as usual."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from tests.distant import distant
from tests.hosts import Container, Host, two_hosts, unusable
from tests.processes import Child

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]

BLOCKS = 64
CONTAINERS = {
    "a pid namespace": Container(("--pid", "--fork", "--mount-proc")),
    "no room in /dev/shm": Container(
        ("--mount", "--fork"), "mount -t tmpfs -o size=4k no /dev/shm"
    ),
}


@pytest.fixture(params=CONTAINERS)
def container(request: pytest.FixtureRequest) -> Container:
    container = CONTAINERS[request.param]
    if reason := container.unusable():
        pytest.skip(reason)
    return container


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def pair_in(
    stack: AsyncExitStack, near: Container | Host, far: Container | Host, **settings: object
) -> tuple[Child, Child]:
    """Start a sender in one and a receiver in the other."""
    receiver = distant(far, "receiver", blocks=BLOCKS, **{"bind": "tcp://127.0.0.1:*", **settings})
    settings.pop("bind", None)
    sender = distant(near, "sender", **settings)
    return await stack.enter_async_context(sender), await stack.enter_async_context(receiver)


async def test_shared_memory_reaches_from_one_into_the_other(
    container: Container, stack: AsyncExitStack
) -> None:
    """A memfd needs no /dev/shm, and both processes may have the same number."""
    sender, receiver = await pair_in(stack, container, container)
    expected = await receiver.ask("expect", "ticket", request_id="one")
    sender.tell("send", ticket=expected["ticket"], seed=1, num_tokens=3000)
    sent = await sender.hear("ended", request_id="one")
    assert (sent["error"], sent.get("plane")) == (None, "shm"), sent
    assert (await receiver.hear("ended", request_id="one"))["is_right"]


async def test_a_death_in_one_is_proven_in_the_other(
    container: Container, stack: AsyncExitStack
) -> None:
    """The blocks of a write that had begun are free again, not in quarantine for ever."""
    sender, receiver = await pair_in(stack, container, container)
    expected = await receiver.ask("expect", "ticket", request_id="one")
    sender.tell("send", ticket=expected["ticket"], seed=1, num_tokens=3000, fault="stall")
    await sender.hear("halfway")
    at = sender.kill()
    ended = await receiver.hear("ended", request_id="one")
    assert ended["error"] == "PeerLost", ended
    assert ended["at"] - at < 1
    while (await receiver.ask("blocks", "blocks"))["free"] != BLOCKS:
        pass


@pytest.mark.skipif(bool(unusable()), reason=unusable())
async def test_without_a_common_network_namespace_tcp_is_taken_and_told(
    stack: AsyncExitStack,
) -> None:
    with two_hosts() as hosts:
        bind = f"tcp://{hosts.far.ipv4}:*"
        sender, receiver = await pair_in(stack, hosts.near, hosts.far, bind=bind, insecure=True)
        expected = await receiver.ask("expect", "ticket", request_id="one")
        sender.tell("send", ticket=expected["ticket"], seed=1, num_tokens=3000)
        sent = await sender.hear("ended", request_id="one")
        assert (sent["error"], sent.get("plane")) == (None, "tcp"), sent
        assert "another network namespace or host" in " ".join(sent["refused"])
        assert (await receiver.hear("ended", request_id="one"))["is_right"]
        await stack.aclose()
