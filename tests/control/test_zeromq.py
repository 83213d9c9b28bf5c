"""The ZeroMQ channel: the contract over TCP and ipc, and what only ZeroMQ can get wrong."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import zmq

from aiomm.control import zeromq
from aiomm.control.base import MAX_PACKET_NBYTES
from aiomm.control.sockets import RETRY_DELAY
from aiomm.control.zeromq import Limits, ZmqChannel

from .contract import ChannelContract, address_of, round_trips
from .recorder import Recorder, echo


def free_tcp_address() -> str:
    """Return a loopback address where nobody listens."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{found.getsockname()[1]}"


@contextmanager
def raw_dealer(address: str) -> Iterator[zmq.Socket[bytes]]:
    """Connect a bare DEALER: a peer that speaks ZeroMQ and nothing of ours."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.RCVHWM, 1)
        dealer.connect(address)
        yield dealer


@contextmanager
def deaf_dealer(address: str) -> Iterator[None]:
    """Say hello and never read."""
    with raw_dealer(address) as dealer:
        dealer.send(b"hello")
        yield


class TestOverTcp(ChannelContract):
    kind: ClassVar[str] = "zmq"

    def new_address(self, tmp_path: Path) -> str:
        return free_tcp_address()

    def raw_connection(self, address: str) -> socket.socket:
        return socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])))

    deaf_peer = staticmethod(deaf_dealer)


class TestOverIpc(ChannelContract):
    kind: ClassVar[str] = "zmq"

    def new_address(self, tmp_path: Path) -> str:
        directory = tmp_path / "private"
        return f"ipc://{directory}/{len(os.listdir(directory)) if directory.exists() else 0}.sock"

    def raw_connection(self, address: str) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(address.removeprefix("ipc://"))
        return connection

    deaf_peer = staticmethod(deaf_dealer)


class Listener:
    """A bound channel, an honest peer connected to it, and what both were told."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.told = Recorder(echo)
        self.channel = ZmqChannel("tcp://127.0.0.1:0", name="listener", limits=limits)
        self.peer_told = Recorder()
        self.peer_channel = ZmqChannel(None, name="honest")

    async def __aenter__(self) -> Listener:
        await self.channel.start(self.told)
        await self.peer_channel.start(self.peer_told)
        self.peer = self.peer_channel.connect(address_of(self.channel))
        await self.check()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.peer_channel.aclose()
        await self.channel.aclose()

    async def check(self) -> None:
        """The honest peer is served."""
        await round_trips(self.peer_channel, self.peer_told, self.peer, 5)


pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.mark.both_loops
async def test_multipart_messages_never_reach_the_handler() -> None:
    async with Listener() as listener:
        with raw_dealer(address_of(listener.channel)) as dealer:
            for _ in range(500):
                dealer.send_multipart([b"part"] * 20)
                dealer.send_multipart([b"", b"envelope"])
                dealer.send_multipart([b""])
            dealer.send(b"one frame")
            await listener.told.until(lambda recorder: b"one frame" in recorder.packets)
            await listener.check()
        assert set(listener.told.packets) == {b"again", b"one frame"}


@pytest.mark.both_loops
async def test_a_message_over_the_limit_ends_its_sender_only() -> None:
    async with Listener() as listener:
        with raw_dealer(address_of(listener.channel)) as dealer:
            dealer.send(b"hello")
            await listener.told.until(lambda recorder: b"hello" in recorder.packets)
            stranger = listener.told.senders[-1]
            dealer.send(bytes(MAX_PACKET_NBYTES + 1))
            await listener.told.until_lost()
        assert listener.told.lost == [stranger]
        await listener.check()


async def test_more_peers_than_allowed_are_not_heard(caplog: pytest.LogCaptureFixture) -> None:
    async with Listener(Limits(peers=2)) as listener:
        address = address_of(listener.channel)
        with raw_dealer(address) as second, raw_dealer(address) as third:
            second.send(b"second")
            await listener.told.until(lambda recorder: b"second" in recorder.packets)
            third.send(b"one too many")
            while not caplog.records:
                await listener.check()
            second.close()
            await listener.told.until_lost()
            third.send(b"third")
            await listener.told.until(lambda recorder: b"third" in recorder.packets)
        assert b"one too many" not in listener.told.packets
        assert "there are 2 peers" in caplog.text


async def test_a_second_peer_of_the_same_identity_does_not_take_over() -> None:
    async with Listener() as listener:
        identity = listener.told.senders[0].identity  # type: ignore[attr-defined]
        with zmq.Context() as context, context.socket(zmq.DEALER) as impostor:
            impostor.setsockopt(zmq.LINGER, 0)
            impostor.setsockopt(zmq.IDENTITY, identity)
            impostor.connect(address_of(listener.channel))
            impostor.send(b"I am the honest one")
            await listener.check()
        await listener.check()
        assert set(listener.told.packets) == {b"again"}


async def test_a_peer_that_reads_late_gets_everything_that_was_taken() -> None:
    told = Recorder()
    channel = ZmqChannel("tcp://127.0.0.1:0", name="listener", limits=Limits(queue_packets=2))
    await channel.start(told)
    with raw_dealer(address_of(channel)) as dealer:
        dealer.send(b"hello")
        await told.until_packets(1)
        packets = [b"%08d" % number + bytes(32 * 1024) for number in range(1000)]
        taken = [packet for packet in packets if channel.send(told.senders[0], packet)]
        assert 0 < len(taken) < len(packets)
        loop = asyncio.get_running_loop()
        got = await loop.run_in_executor(None, lambda: [dealer.recv() for _ in taken])
        assert got == taken
    await channel.aclose()
    await loop.shutdown_default_executor()


async def test_a_tunnel_whose_far_end_vanishes_without_a_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both sides lose the peer, though their connections to the tunnel stand."""
    monkeypatch.setattr(zeromq, "LOOPBACK_HEARTBEAT_MS", (50, 200))
    heard, told = Recorder(echo), Recorder()
    listener = ZmqChannel("tcp://127.0.0.1:0", name="listener")
    await listener.start(heard)
    channel = ZmqChannel(None, name="dealer")
    await channel.start(told)
    async with tunnel_to(address_of(listener)) as (address, vanish):
        peer = channel.connect(address)
        channel.send(peer, b"hello")
        await told.until_packets(1)
        vanish.set()
        await told.until_lost()
        await heard.until_lost()
        await channel.aclose()
        await listener.aclose()


@asynccontextmanager
async def tunnel_to(address: str) -> AsyncIterator[tuple[str, asyncio.Event]]:
    """Yield an address that leads there, until the event is set: then it swallows everything."""
    vanish, tasks = asyncio.Event(), set[asyncio.Task[None]]()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer):
            while octets := await reader.read(1 << 16):
                if not vanish.is_set():
                    writer.write(octets)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far = await asyncio.open_connection("127.0.0.1", int(address.rpartition(":")[2]))
        tasks.add(asyncio.ensure_future(carry(reader, far[1])))
        tasks.add(asyncio.ensure_future(carry(far[0], writer)))

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}", vanish
    finally:
        server.close()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_backlog_to_nobody_is_not_tried_before_somebody_listens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop, delays = asyncio.get_running_loop(), []
    call_later = loop.call_later

    def noted(delay: float, *args: Any, **more: Any) -> asyncio.TimerHandle:
        delays.append(delay)
        return call_later(delay, *args, **more)

    monkeypatch.setattr(loop, "call_later", noted)
    address, told = free_tcp_address(), Recorder()
    channel = ZmqChannel(None, name="early", limits=Limits(queue_packets=2))
    await channel.start(Recorder())
    peer = channel.connect(address)
    packets = [b"%d" % number for number in range(500)]
    assert all(channel.send(peer, packet) for packet in packets)
    assert RETRY_DELAY not in delays
    listener = ZmqChannel(address, name="late", limits=Limits(queue_packets=2))
    await listener.start(told)
    await told.until_packets(len(packets))
    assert told.packets == packets
    await channel.aclose()
    await listener.aclose()


@pytest.mark.parametrize(
    "address",
    [
        "tcp://0.0.0.0:0",
        "tcp://*:0",
        "tcp://192.0.2.7:5555",
        "tcp://example.org:5555",
        "tcp://[::]:0",
    ],
)
async def test_addresses_off_this_host_need_a_word(address: str) -> None:
    with pytest.raises(ValueError, match="insecure=True"):
        ZmqChannel(address, name="open")
    channel = ZmqChannel(None, name="open")
    await channel.start(Recorder())
    with pytest.raises(ValueError, match="insecure=True"):
        channel.connect(address)
    await channel.aclose()


@pytest.mark.parametrize("bind", ["tcp://0.0.0.0:0", "tcp://*:*"])
async def test_all_interfaces_when_asked_for(bind: str) -> None:
    told = Recorder(echo)
    channel = ZmqChannel(bind, name="open", insecure=True)
    await channel.start(told)
    assert "0.0.0.0" not in address_of(channel)
    near = Recorder()
    other = ZmqChannel(None, name="near", insecure=True)
    await other.start(near)
    await round_trips(other, near, other.connect(address_of(channel)), 5)
    await other.aclose()
    await channel.aclose()


@pytest.mark.parametrize(
    "bind", ["tcp://127.0.0.1:*", "tcp://localhost:0", "tcp://127.1.2.3:0", "tcp://[::1]:0"]
)
async def test_loopback_spellings(bind: str) -> None:
    told, near = Recorder(echo), Recorder()
    channel, other = ZmqChannel(bind, name="listener"), ZmqChannel(None, name="near")
    await channel.start(told)
    await other.start(near)
    await round_trips(other, near, other.connect(address_of(channel)), 5)
    await other.aclose()
    await channel.aclose()


async def test_a_directory_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o755)
    channel = ZmqChannel(f"ipc://{shared}/control.sock", name="listener")
    with pytest.raises(PermissionError, match="0700"):
        await channel.start(Recorder())
    assert os.listdir(shared) == []


async def test_an_ipc_channel_leaves_no_file(tmp_path: Path) -> None:
    channel = ZmqChannel(f"ipc://{tmp_path}/deep/control.sock", name="listener")
    await channel.start(Recorder())
    assert len(os.listdir(tmp_path / "deep")) == 2
    assert (tmp_path / "deep").stat().st_mode & 0o777 == 0o700
    await channel.aclose()
    assert os.listdir(tmp_path / "deep") == []


async def test_what_a_killed_process_left_at_the_path_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    (tmp_path / "control.sock.lock").touch()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    told, near = Recorder(echo), Recorder()
    channel, other = ZmqChannel(f"ipc://{path}", name="listener"), ZmqChannel(None, name="near")
    await channel.start(told)
    await other.start(near)
    await round_trips(other, near, other.connect(address_of(channel)), 5)
    await other.aclose()
    await channel.aclose()
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_another_user_is_refused_even_if_the_directory_is_opened() -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "control.sock")
        told = Recorder()
        channel = ZmqChannel(f"ipc://{path}", name="listener")
        await channel.start(told)
        os.chmod(directory, 0o755)
        os.chmod(path, 0o777)
        script = (
            "import os, socket, sys\n"
            "os.setuid(int(sys.argv[2]))\n"
            "stream = socket.socket(socket.AF_UNIX)\n"
            "stream.connect(sys.argv[1])\n"
            "stream.settimeout(20)\n"
            "print(len(stream.recv(1)))\n"  # the first octet of a greeting, or the end
        )
        for user, greeting in ((0, b"1\n"), (65534, b"0\n")):
            stranger = await asyncio.to_thread(
                subprocess.run,
                [sys.executable, "-c", script, str(path), str(user)],
                stdout=subprocess.PIPE,
                check=True,
            )
            assert stranger.stdout == greeting
        await channel.aclose()


async def test_the_name_must_fit_an_identity() -> None:
    for name in ("", "x" * 300, "\0zero"):
        with pytest.raises(ValueError, match="a name has"):
            ZmqChannel(None, name=name)
