"""GPUs of two processes, on a fake runtime: the ways, deaths, late writers and slow readers."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any, NamedTuple

import pytest

from tests.gpu.children import gpu_child
from tests.planes.test_mooncake import MISSING
from tests.processes import Child, Report

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]

BLOCKS = 16
BIND = "tcp://127.0.0.1:*"
NUM_TOKENS = 1000
NBYTES = NUM_TOKENS * 1028
PROBE_NBYTES = 16


@pytest.fixture(autouse=True)
def fake_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the children two fake devices."""
    monkeypatch.setenv("AIOMM_GPU_RUNTIME", "fake")
    monkeypatch.setenv("AIOMM_FAKE_GPUS", "2")


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


class Pair(NamedTuple):
    """A sender and a receiver, in processes of their own."""

    sender: Child
    receiver: Child

    async def begin(
        self, request_id: str, num_tokens: int = NUM_TOKENS, seed: int = 3, **how: Any
    ) -> None:
        """Begin a transfer, out of the memory of `device` or of the host."""
        expected = await self.receiver.ask("expect", "ticket", request_id=request_id)
        do = "put" if "device" in how else "send"
        self.sender.tell(do, ticket=expected["ticket"], seed=seed, num_tokens=num_tokens, **how)

    async def end(self, request_id: str) -> tuple[Report, Report]:
        """Return how it has ended on both sides; every byte is right."""
        sent = await self.sender.hear("ended", request_id=request_id)
        assert sent["error"] is None, sent
        received = await self.receiver.hear("ended", request_id=request_id)
        assert received["is_right"]
        return sent, received

    async def move(self, request_id: str, **how: Any) -> tuple[Report, Report]:
        """Move one request."""
        await self.begin(request_id, **how)
        return await self.end(request_id)

    async def freed(self) -> None:
        """Return when all blocks are free."""
        end = time.monotonic() + 10
        while (blocks := await self.blocks())["blocks_free"] != BLOCKS:
            assert time.monotonic() < end, blocks

    async def blocks(self) -> Report:
        """Return how many blocks are in which state."""
        return await self.receiver.ask("blocks", "blocks")

    async def unharmed(self) -> None:
        """See that neither process has done what CUDA does not forgive."""
        for child in self:
            if not child.is_dead:
                assert (await child.ask("measure", "measured"))["violations"] == []


async def receiver_in(stack: AsyncExitStack, **settings: Any) -> Child:
    settings = {"bind": BIND, "blocks": BLOCKS, "device": "cuda:0", **settings}
    return await stack.enter_async_context(gpu_child("receiver", **settings))


async def pair_in(stack: AsyncExitStack, **settings: Any) -> Pair:
    sender = {name: settings[name] for name in ("planes", "checksum") if name in settings}
    settings.pop("checksum", None)
    receiver = await receiver_in(stack, **settings)
    return Pair(await stack.enter_async_context(gpu_child("sender", **sender)), receiver)


WAYS = [
    # pool, source, planes, plane taken, copies of the sender's, copies of the receiver's
    ("cuda:0", 0, "auto", "cuda_ipc", {"DtoD": NBYTES}, {}),
    ("cuda:0", 1, "auto", "cuda_ipc", {"PtoP": NBYTES}, {}),
    ("cuda:0", None, "auto", "cuda_ipc", {"HtoD": NBYTES}, {}),
    ("cuda:0", 0, "shm", "shm", {"DtoH": NBYTES}, {"HtoD": NBYTES}),
    ("cuda:0", None, "shm", "shm", {}, {"HtoD": NBYTES}),
    ("cuda:0", 0, "tcp", "tcp", {"DtoH": NBYTES}, {"HtoD": NBYTES}),
    ("cuda:0", None, "tcp", "tcp", {}, {"HtoD": NBYTES}),
    ("cpu", 0, "auto", "shm", {"DtoH": NBYTES}, {}),
    ("cpu", 1, "tcp", "tcp", {"DtoH": NBYTES}, {}),
    ("cpu", None, "auto", "shm", {}, {}),
    ("cuda:0", 0, "mooncake", "mooncake", {"DtoH": NBYTES}, {"HtoD": NBYTES}),
    ("cpu", 0, "mooncake", "mooncake", {"DtoH": NBYTES}, {}),
]


@pytest.mark.parametrize(("pool", "source", "planes", "plane", "sent", "received"), WAYS)
async def test_every_way_and_the_copies_it_takes(
    stack: AsyncExitStack,
    pool: str,
    source: int | None,
    planes: str,
    plane: str,
    sent: dict[str, int],
    received: dict[str, int],
) -> None:
    if plane == "mooncake" and MISSING:
        pytest.skip(MISSING)
    pair = await pair_in(stack, device=pool, planes=planes)
    how = {} if source is None else {"device": source}
    ended, arrived = await pair.move("one", **how)
    assert (ended["plane"], ended["refused"], arrived["plane"]) == (plane, [], plane)
    for child, expected in ((pair.sender, sent), (pair.receiver, received)):
        copied = (await child.ask("measure", "measured"))["copied"]
        # The probe's few bytes, and their comparison, come on top.
        ways = {way: n - n % NBYTES for way, n in copied.items() if n >= NBYTES}
        assert ways == expected
    await pair.unharmed()


async def test_devices_are_known_by_uuid(
    stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sender sees the devices in another order: its second is the receiver's first."""
    receiver = await receiver_in(stack)
    monkeypatch.setenv("AIOMM_FAKE_GPUS", "1,0")
    pair = Pair(await stack.enter_async_context(gpu_child("sender")), receiver)
    await pair.move("one", device=1)
    copied = (await pair.sender.ask("measure", "measured"))["copied"]
    assert copied["DtoD"] == NBYTES


async def test_a_resume_and_a_request_longer_than_the_pool(stack: AsyncExitStack) -> None:
    """Chunks are moved out of the pool into memory of the same device, and joined there."""
    pair = await pair_in(stack, default_blocks=2)
    _, received = await pair.move("resumed", num_tokens=1500, device=0)
    assert received["is_view"]
    sent, received = await pair.move("long", num_tokens=5000, device=1)
    assert (received["is_view"], len(sent["chunks"]) > 1) == (False, True)
    await pair.freed()
    await pair.unharmed()


@pytest.mark.parametrize("planes", ["auto", "tcp"])
async def test_a_short_copy_is_found_by_its_checksum(stack: AsyncExitStack, planes: str) -> None:
    pair = await pair_in(stack, planes=planes, checksum=True)
    await pair.move("right", device=0)
    if planes == "auto":  # the receiver reads the pool back to compare, which is a copy, too
        pair.sender.tell("faults", short_at=1)
        await pair.begin("short", device=0, seed=4)  # other bytes than the blocks hold by now
        ended = await pair.receiver.hear("ended", request_id="short")
        assert "arrived changed" in ended["message"]
    await pair.freed()


# Order.


async def test_a_tensor_that_is_made_late_arrives_whole(stack: AsyncExitStack) -> None:
    pair = await pair_in(stack)
    await pair.move("first", device=0)
    await pair.begin("late", device=0, is_late=True)
    await pair.move("in between", device=0)  # which does not wait for the other
    pair.sender.tell("make")
    await pair.end("late")
    await pair.unharmed()


async def test_a_block_that_is_still_read_is_given_to_nobody(stack: AsyncExitStack) -> None:
    """Released at once, and free when the stream is so far; others are served meanwhile."""
    pair = await pair_in(stack)
    expected = await pair.receiver.ask("expect_slowly", "ticket", request_id="read")
    pair.sender.tell("put", ticket=expected["ticket"], seed=3, num_tokens=1024, device=0)
    await pair.receiver.hear("released")
    for number in range(3):
        await pair.move(f"other {number}", device=0)
    while (leased := (await pair.blocks())["blocks_leased"]) > 8:  # the last one, for a moment
        pass
    assert leased == 8
    pair.receiver.tell("finish_reading")
    await pair.freed()
    await pair.unharmed()


# Deaths.


async def test_a_sender_is_killed_in_the_middle_of_a_copy(stack: AsyncExitStack) -> None:
    pair = await pair_in(stack)
    await pair.move("first", device=0)
    pair.sender.tell("faults", stall_at=1)
    await pair.begin("broken", device=0)
    await pair.sender.hear("stalled")
    at = pair.sender.kill()
    ended = await pair.receiver.hear("ended", request_id="broken")
    assert (ended["error"], ended["at"] - at < 1) == ("PeerLost", True)
    await pair.freed()
    other = Pair(await stack.enter_async_context(gpu_child("sender")), pair.receiver)
    await other.move("next", device=0)
    await other.unharmed()


async def test_a_receiver_is_killed_in_the_middle_of_a_copy(stack: AsyncExitStack) -> None:
    pair = await pair_in(stack)
    await pair.move("first", device=0)
    pair.sender.tell("faults", stall_at=1)
    await pair.begin("broken", device=0)
    await pair.sender.hear("stalled")
    pair.receiver.kill()
    assert (await pair.sender.hear("ended", request_id="broken"))["error"] == "PeerLost"
    pair.sender.tell("release_copy")
    other = Pair(pair.sender, await receiver_in(stack))
    await other.move("next", device=0)
    await other.unharmed()


async def test_a_request_is_given_up_in_the_middle_of_a_copy(stack: AsyncExitStack) -> None:
    """Its blocks are in quarantine until the copy has ended, and others are served meanwhile."""
    pair = await pair_in(stack)
    await pair.move("first", device=0)
    pair.sender.tell("faults", stall_at=1)
    await pair.begin("given up", device=0)
    await pair.sender.hear("stalled")
    pair.receiver.tell("cancel", request_id="given up")
    assert (await pair.sender.hear("ended", request_id="given up"))["error"] == "Cancelled"
    assert (await pair.blocks())["blocks_quarantined"] == 8
    await pair.move("in between", device=0)
    assert (await pair.blocks())["blocks_quarantined"] == 8
    pair.sender.tell("release_copy")
    await pair.freed()
    await pair.unharmed()


async def test_a_stopped_sender_keeps_its_blocks_in_quarantine(stack: AsyncExitStack) -> None:
    """It may go on at any time; when it is dead they are free."""
    pair = await pair_in(stack, peer_timeout=1.0)
    await pair.move("first", device=0)
    pair.sender.tell("faults", stall_at=1)
    await pair.begin("broken", device=0)
    await pair.sender.hear("stalled")
    pair.sender.stop()
    assert (await pair.receiver.hear("ended", request_id="broken"))["error"] == "PeerLost"
    assert (await pair.blocks())["blocks_quarantined"] == 8
    pair.sender.kill()
    await pair.freed()


# Lifetime of the pool.


async def test_senders_close_the_pool_before_it_is_freed(stack: AsyncExitStack) -> None:
    """The receiver asks, and waits; a fake GPU does not forgive freeing what is open."""
    pair = await pair_in(stack)
    second = Pair(await stack.enter_async_context(gpu_child("sender")), pair.receiver)
    await pair.move("one", device=0)
    await second.move("two", device=1)
    pair.receiver.tell("close")
    closed = await pair.receiver.hear("gone")
    assert (closed["violations"], closed["num_pinned"]) == ([], 0)
    assert await pair.receiver.wait() == 0
    other = Pair(pair.sender, await receiver_in(stack))
    await other.move("three", device=0)
    await other.unharmed()


async def test_a_pool_that_a_sender_does_not_close_is_not_freed(stack: AsyncExitStack) -> None:
    """Freeing it under a writer is undefined: it is leaked instead, with a warning."""
    pair = await pair_in(stack)
    await pair.move("one", device=0)
    pair.sender.stop()
    pair.receiver.tell("close")
    closed = await pair.receiver.hear("gone")
    assert closed["violations"] == []
    assert "has not closed the pool, which is not freed" in pair.receiver.stderr.decode()


async def test_many_senders_come_and_go(stack: AsyncExitStack) -> None:
    """Nothing of them is left in the receiver: no descriptor, no thread, no importer."""
    pair = await pair_in(stack)
    await pair.move("first", device=0)
    before = await pair.receiver.ask("leftovers", "leftovers")
    for number in range(200):
        ticket = (await pair.receiver.ask("expect", "ticket", request_id=f"n{number}"))["ticket"]
        report = await pair.sender.ask("send_once", "ended", ticket=ticket)
        assert (report["error"], report["plane"]) == (None, "cuda_ipc"), report
        assert (await pair.receiver.hear("ended", request_id=f"n{number}"))["is_right"]
    after = await pair.receiver.ask("leftovers", "leftovers")
    assert after["descriptors"] <= before["descriptors"] + 4
    assert after["threads"] <= before["threads"] + 1
    await pair.unharmed()


async def test_a_sender_that_does_not_use_cuda_stays_away_from_it(
    stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tensors go through memory of the host, and it says why."""
    receiver = await receiver_in(stack)
    monkeypatch.delenv("AIOMM_GPU_RUNTIME")
    pair = Pair(await stack.enter_async_context(gpu_child("sender")), receiver)
    sent, received = await pair.move("one")
    assert (sent["plane"], received["plane"]) == ("shm", "shm")
    assert sent["refused"] == ["cuda_ipc: CUDA is not in use in this process"]
