"""The Unix channel: the contract, and what only a stream and a pidfd can get wrong."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import pytest

from aiomm.control.base import MAX_PACKET_NBYTES, Channel, Peer
from aiomm.control.unix import UnixChannel

from .contract import ChannelContract, address_of, child, round_trips
from .recorder import DEADLINE, Recorder, echo

pytestmark = pytest.mark.usefixtures("no_leaks")


def raw_stream(address: str) -> socket.socket:
    """Return a plain blocking socket connected to `address`."""
    stream = socket.socket(socket.AF_UNIX)
    stream.connect("\0" + address.removeprefix("unix://@"))
    return stream


def framed(packet: bytes) -> bytes:
    return struct.pack("<I", len(packet)) + packet


class TestUnix(ChannelContract):
    kind: ClassVar[str] = "unix"

    def new_address(self, tmp_path: Path) -> str:
        return f"unix://@aiomm-test-{secrets.token_hex(16)}"

    def raw_connection(self, address: str) -> socket.socket:
        return raw_stream(address)

    @contextmanager
    def deaf_peer(self, address: str) -> Iterator[None]:
        with raw_stream(address) as stream:
            stream.sendall(framed(b"hello"))
            yield


async def listening(told: Recorder) -> UnixChannel:
    channel = UnixChannel()
    await channel.start(told)
    return channel


async def test_the_address_is_new_each_time_and_has_no_file() -> None:
    one, two = await listening(Recorder()), await listening(Recorder())
    assert one.address != two.address
    for channel in (one, two):
        assert address_of(channel).startswith("unix://@aiomm-")
        assert len(address_of(channel)) == len("unix://@aiomm-") + 32
        await channel.aclose()


@pytest.mark.both_loops
@pytest.mark.parametrize("piece", [1000, 4096, 16384, 65540, 10**9])
async def test_packets_cut_and_joined_come_out_whole(piece: int) -> None:
    told = Recorder()
    channel = await listening(told)
    packets = [bytes([65 + size % 26]) * size for size in (1, 2, 5, 16380, 16384, 65536, 1, 40000)]
    octets = b"".join(framed(packet) + framed(b"") for packet in packets)
    loop = asyncio.get_running_loop()
    with raw_stream(address_of(channel)) as stream:
        stream.setblocking(False)
        for start in range(0, len(octets), piece):
            await loop.sock_sendall(stream, octets[start : start + piece])
        await told.until_packets(len(packets))
    assert told.packets == packets
    await channel.aclose()


@pytest.mark.both_loops
async def test_a_flood_is_taken_turn_by_turn() -> None:
    """However much has come, a turn of the loop takes what it can do in a few milliseconds."""
    turns: list[int] = []

    class Counting(Recorder):
        def packets_received(self, channel: Channel, peer: Peer, packets: Sequence[bytes]) -> None:
            turns.append(sum(len(framed(packet)) for packet in packets))
            super().packets_received(channel, peer, packets)

    told = Counting()
    channel = await listening(told)
    with raw_stream(address_of(channel)) as stream:
        stream.sendall(b"".join(framed(b"%04d" % number) * 10 for number in range(300)))
        await told.until_packets(3000)
    assert told.packets == [b"%04d" % number for number in range(300) for _ in range(10)]
    assert 4000 < max(turns) <= 4096 + 8
    await channel.aclose()


async def test_a_length_cut_in_the_middle() -> None:
    told = Recorder()
    channel = await listening(told)
    with raw_stream(address_of(channel)) as stream:
        for octet in framed(b"whole") + framed(b"too"):
            stream.send(bytes([octet]))
            await asyncio.sleep(0)  # lets the loop read: the octets arrive one by one
        await told.until_packets(2)
    assert told.packets == [b"whole", b"too"]
    await channel.aclose()


@pytest.mark.both_loops
async def test_a_packet_over_the_limit_ends_its_sender_only() -> None:
    told, near = Recorder(echo), Recorder()
    channel, other = await listening(told), UnixChannel(None)
    await other.start(near)
    peer = other.connect(address_of(channel))
    await round_trips(other, near, peer, 1)
    with raw_stream(address_of(channel)) as stream:
        stream.sendall(framed(b"hello") + struct.pack("<I", MAX_PACKET_NBYTES + 1))
        await told.until_lost()
        assert told.lost == [told.senders[1]]
        assert "65537" in told.causes[0]
    await round_trips(other, near, peer, 5)
    await other.aclose()
    await channel.aclose()


async def test_what_did_not_fit_at_once_arrives_when_the_peer_reads() -> None:
    told = Recorder()
    channel = await listening(told)
    with raw_stream(address_of(channel)) as stream:
        stream.sendall(framed(b"hello"))
        await told.until_packets(1)
        packets = [b"%08d" % number + bytes(10_000) for number in range(1000)]
        taken = [packet for packet in packets if channel.send(told.senders[0], packet)]
        assert 100 < len(taken) < len(packets)
        expected = b"".join(framed(packet) for packet in taken)
        stream.setblocking(False)
        got = bytearray()
        while len(got) < len(expected):
            got += await asyncio.get_running_loop().sock_recv(stream, 1 << 20)
        assert got == expected
    await channel.aclose()


@pytest.mark.both_loops
async def test_a_killed_process_is_dead_though_its_child_keeps_the_connection() -> None:
    told = Recorder()
    channel = await listening(told)
    with child("unix", address_of(channel), "fork") as process:
        await told.until_packets(1)
        process.kill()
        await told.until(lambda recorder: bool(recorder.died))
        assert told.lost == told.died == [told.senders[0]]
        assert told.causes == ["its process died"]
        assert channel.send(told.lost[0], b"anybody?") is False
        assert process.stdin is not None
        process.stdin.close()  # ends the child's child
    await channel.aclose()


async def test_a_peer_may_be_lost_long_before_it_dies() -> None:
    told = Recorder()
    channel = await listening(told)
    with child("unix", address_of(channel), "leave") as process:
        await told.until_lost()
        assert told.died == []
        process.kill()
        await told.until(lambda recorder: bool(recorder.died))
        assert told.died == told.lost == told.senders
    await channel.aclose()


async def test_a_disconnected_peer_may_die_unnoticed() -> None:
    told = Recorder()
    channel = await listening(told)
    with child("unix", address_of(channel), "echo") as process:
        await told.until_packets(1)
        channel.disconnect(told.senders[0])
        process.kill()
        process.wait()
        await asyncio.sleep(0)  # one turn of the loop, in which a watch would have fired
        assert (told.lost, told.died) == ([], [])
    await channel.aclose()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_another_user_is_refused() -> None:
    told = Recorder()
    channel = await listening(told)
    script = (
        "import os, socket, sys\n"
        "os.setuid(65534)\n"
        "stream = socket.socket(socket.AF_UNIX)\n"
        "stream.connect(chr(0) + sys.argv[1])\n"
        "try:\n"
        "    stream.sendall(bytes([5, 0, 0, 0]) + b'hello')\n"
        "    sys.exit(0 if stream.recv(1) == b'' else 1)\n"
        "except ConnectionError:\n"
        "    sys.exit(0)\n"
    )
    name = address_of(channel).removeprefix("unix://@")
    stranger = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", script, name], timeout=DEADLINE, check=False
    )
    assert stranger.returncode == 0
    assert (told.packets, told.lost) == ([], [])
    await channel.aclose()
