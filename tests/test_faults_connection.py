"""The connection breaks, or nothing proves a death: as between two hosts, on one."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

import aiomm
from tests.processes import SCHEMA, child, failed, num_blocks, pattern, received, receiving, until

pytestmark = [pytest.mark.usefixtures("no_leaks"), pytest.mark.timeout(60)]


@pytest.fixture
def no_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the endpoints of this test do without the same-host stream, as off this host."""
    monkeypatch.setattr("aiomm._driver.base._stream_channel", lambda *, listens: None)


class Cable:
    """Passes TCP connections on to an address, until it is cut; it can be mended."""

    def __init__(self, target: str) -> None:
        _, _, port = target.rpartition(":")
        self.port = int(port)
        self.writers: set[asyncio.StreamWriter] = set()
        self.tasks: set[asyncio.Task[None]] = set()

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass one connection on, both ways."""
        there, back = await asyncio.open_connection("127.0.0.1", self.port)
        await asyncio.gather(self.carry(reader, back), self.carry(there, writer))

    async def carry(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        """Pass bytes on until either end is gone."""
        self.writers.add(target)
        try:
            while octets := await source.read(65536):
                target.write(octets)
        except ConnectionError:
            pass
        finally:
            self.writers.discard(target)
            target.close()

    def cut(self) -> None:
        """End every connection."""
        for writer in list(self.writers):
            writer.transport.abort()


@asynccontextmanager
async def cable_to(receiver: aiomm.Receiver) -> AsyncIterator[tuple[Cable, str]]:
    """Run a cable to a receiver; yield it and the address of its near end."""
    assert receiver.address is not None
    cable = Cable(receiver.address)
    server = await asyncio.start_server(cable.connected, "127.0.0.1", 0)
    yield cable, f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()
    cable.cut()
    await until(lambda: not cable.writers, "the connections are gone")
    await server.wait_closed()


def through(ticket: aiomm.Ticket, address: str) -> aiomm.Ticket:
    """Return the ticket with the address of the cable."""
    return msgspec.structs.replace(ticket, address=address)


@pytest.mark.usefixtures("no_streams")
@pytest.mark.parametrize("control", ["zmq", "aiozmq"])
async def test_a_cut_connection_fails_what_runs_and_is_made_again(control: Any) -> None:
    async with (
        receiving(planes="tcp", control=control) as receiver,
        aiomm.Sender(SCHEMA, planes="tcp", control=control) as sender,
        cable_to(receiver) as (cable, address),
    ):
        for number in range(2):
            transfer = sender.claim(through(receiver.expect("r"), address))
            await until(lambda t=transfer: t.state is aiomm.State.SENDING, "the grant")  # type: ignore[misc]
            waiting = asyncio.ensure_future(failed(receiver, "r"))
            cable.cut()
            with pytest.raises(aiomm.PeerLost):
                await transfer
            assert isinstance((await waiting)[0], aiomm.PeerLost)
            await until(lambda: num_blocks(receiver, "free") == 16, "the grant is withdrawn")
            ticket = through(receiver.expect("again"), address)
            sending = asyncio.ensure_future(sender.send(ticket, pattern(number, 900)))
            assert await received(receiver, "again") == pattern(number, 900)
            await sending
            assert receiver.metrics()["peers"] == 1  # it is the same life, and known as such


@pytest.mark.usefixtures("no_streams")
@pytest.mark.parametrize("plane", ["shm", "tcp"])
@pytest.mark.parametrize("control", ["zmq", "aiozmq"])
async def test_a_death_that_only_the_connection_tells(plane: str, control: str) -> None:
    """The end of a connection proves no death: what shared memory may still get stays apart."""
    async with (
        receiving(planes=plane, control=control, close_timeout=0.2) as receiver,
        child("sender", planes=plane, control=control) as sender,
    ):
        ticket = receiver.expect("r")
        waiting = asyncio.ensure_future(failed(receiver, "r"))
        sender.tell("send", ticket=ticket.to_json(), seed=1, num_tokens=300, fault="stall")
        await sender.hear("halfway")
        at = sender.kill()
        error, failed_at = await waiting
        assert isinstance(error, aiomm.PeerLost)
        print(f"{plane} {control} alone: PeerLost after {1000 * (failed_at - at):.1f} ms")
        assert failed_at - at < 5
        assert num_blocks(receiver, "quarantined") == (3 if plane == "shm" else 0)


async def test_a_full_dev_shm_or_no_memory_is_a_typed_error() -> None:
    with pytest.raises(aiomm.PlaneUnavailable, match="memory"):
        async with receiving(block_size=2**30, planes="shm"):
            pass


async def test_a_hung_up_terminal_is_no_different() -> None:
    """A sender whose process exits by itself in the middle, without Python's clean end."""
    async with receiving() as receiver, child("sender") as sender:
        ticket = receiver.expect("r")
        sender.tell("claim", ticket=ticket.to_json())
        await sender.hear("state", state="SENDING")
        began = time.monotonic()
        os.kill(sender.pid, 1)
        error, failed_at = await failed(receiver, "r")
        assert isinstance(error, aiomm.PeerLost)
        assert failed_at - began < 5
