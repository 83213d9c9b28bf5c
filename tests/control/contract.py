"""What every control channel must do, whatever moves its packets.

Where a transport cannot do something, its class says so in a flag of
:class:`aiomm.control.base.Channel`, and the contract then asks for what it does instead.
"""

from __future__ import annotations

import asyncio
import errno
import random
import signal
import socket
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import ClassVar

import pytest

from aiomm.control.base import MAX_PACKET_NBYTES, Channel, Peer
from aiomm.errors import PoolClosed

from .kinds import KINDS
from .recorder import DEADLINE, Recorder, echo

Open = Callable[..., Awaitable[Channel]]
ROOT = Path(__file__).parents[2]


def address_of(channel: Channel) -> str:
    assert channel.address is not None
    return channel.address


@contextmanager
def child(kind: str, address: str, mode: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a peer in a process of its own; it is dead afterwards."""
    command = [sys.executable, "-m", "tests.control.child", kind, address, mode]
    with subprocess.Popen(command, stdin=subprocess.PIPE, cwd=ROOT) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGCONT)
            process.kill()


async def round_trips(channel: Channel, recorder: Recorder, peer: Peer, count: int) -> None:
    """Have `peer`, which echoes, answer `count` packets one after the other."""
    for _ in range(count):
        before = len(recorder.packets)
        assert channel.send(peer, b"again")
        await recorder.until_packets(before + 1)


class Duplex:
    """One side of a full-duplex run: sends numbered packets in random bursts.

    At most `WINDOW` packets are under way, so that no bounded queue has to drop any.
    """

    COUNT = 4_000
    WINDOW = 128

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.recorder = Recorder(self._received)
        self.channel: Channel
        self.peer: Peer | None = None
        self.other: Duplex
        self.sent = 0

    @property
    def received(self) -> list[int]:
        return [int(packet[:8]) for packet in self.recorder.packets]

    def burst(self) -> None:
        room = self.WINDOW - (self.sent - len(self.other.recorder.packets))
        for _ in range(min(room, self.COUNT - self.sent, self.random.randint(1, 40))):
            padding = bytes(self.random.choice((0, 10, 200, 4000)))
            assert self.channel.send(self.peer, b"%08d" % self.sent + padding)
            self.sent += 1

    def _received(self, channel: Channel, peer: Peer, packet: bytes) -> None:
        if self.peer is None:
            self.peer = peer
        self.burst()
        self.other.burst()


@pytest.mark.both_loops
@pytest.mark.usefixtures("no_leaks")
class ChannelContract(ABC):
    """Inherit this, say how the channel is made, and collect the tests."""

    kind: ClassVar[str]
    """The channel's name in :data:`tests.control.kinds.KINDS`."""

    @abstractmethod
    def new_address(self, tmp_path: Path) -> str:
        """Return an address that nobody listens at yet."""

    @abstractmethod
    def raw_connection(self, address: str) -> socket.socket:
        """Return a plain blocking socket, connected to where `address` listens."""

    @abstractmethod
    def deaf_peer(self, address: str) -> AbstractContextManager[object]:
        """Have a peer connect and say `hello` which never reads."""

    @pytest.fixture
    async def open_channel(self, tmp_path: Path) -> AsyncIterator[Open]:
        """Start channels that are closed after the test; no task may be left then."""
        opened: list[Channel] = []

        async def open_channel(
            recorder: Recorder, *, listens: bool = False, address: str | None = None
        ) -> Channel:
            bind = address or (self.new_address(tmp_path) if listens else None)
            channel = KINDS[self.kind](bind, f"test-{len(opened)}")
            await channel.start(recorder)
            opened.append(channel)
            return channel

        yield open_channel
        for channel in opened:
            await channel.aclose()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    # Packets.

    async def test_a_packet_goes_and_another_comes_back(self, open_channel: Open) -> None:
        near, far = Recorder(), Recorder(echo)
        listener = await open_channel(far, listens=True)
        channel = await open_channel(near)
        peer = channel.connect(address_of(listener))
        assert channel.send(peer, b"ping")
        await near.until_packets(1)
        assert near.packets == [b"ping"]
        assert near.senders == [peer]
        assert listener.address is not None
        assert channel.address is None

    async def test_full_duplex_traffic_neither_stalls_nor_loses_nor_reorders(
        self, open_channel: Open
    ) -> None:
        left, right = Duplex(1), Duplex(2)
        left.other, right.other = right, left
        right.channel = await open_channel(right.recorder, listens=True)
        left.channel = await open_channel(left.recorder)
        left.peer = left.channel.connect(address_of(right.channel))
        left.channel.send(left.peer, b"%08d" % 0)
        left.sent = 1
        await right.recorder.until_packets(Duplex.COUNT)
        await left.recorder.until_packets(Duplex.COUNT)
        assert left.received == list(range(Duplex.COUNT))
        assert right.received == list(range(Duplex.COUNT))

    async def test_the_longest_packet_goes_through_and_a_longer_one_is_refused(
        self, open_channel: Open
    ) -> None:
        near, far = Recorder(), Recorder(echo)
        listener = await open_channel(far, listens=True)
        channel = await open_channel(near)
        peer = channel.connect(address_of(listener))
        longest = random.Random(3).randbytes(MAX_PACKET_NBYTES)
        for packet in (longest + b"!", b""):
            with pytest.raises(ValueError, match="a packet has 1 to 65536 bytes"):
                channel.send(peer, packet)
        assert channel.send(peer, longest)
        assert channel.send(peer, b"short")
        await near.until_packets(2)
        assert near.packets == [longest, b"short"]

    async def test_an_exception_of_the_handler_costs_one_call(
        self, open_channel: Open, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail_on_bad(channel: Channel, peer: Peer, packet: bytes) -> None:
            if packet == b"bad":
                raise LookupError(packet)
            channel.send(peer, packet)

        near, far = Recorder(), Recorder(fail_on_bad)
        listener = await open_channel(far, listens=True)
        channel = await open_channel(near)
        peer = channel.connect(address_of(listener))
        for count, packet in enumerate((b"first", b"second", b"third"), 1):
            assert channel.send(peer, packet)
            await near.until_packets(count)
            assert channel.send(peer, b"bad")
            await far.until_packets(2 * count)
        assert near.packets == [b"first", b"second", b"third"]
        assert [record.name for record in caplog.records] == ["aiomm.control"] * 3

    async def test_many_peers_are_told_apart(self, open_channel: Open) -> None:
        listener = await open_channel(Recorder(echo), listens=True)
        recorders = [Recorder() for _ in range(20)]
        for number, recorder in enumerate(recorders):
            channel = await open_channel(recorder)
            peer = channel.connect(address_of(listener))
            for turn in range(5):
                assert channel.send(peer, b"%d-%d" % (number, turn))
        for number, recorder in enumerate(recorders):
            await recorder.until_packets(5)
            assert recorder.packets == [b"%d-%d" % (number, turn) for turn in range(5)]

    async def test_a_peer_that_does_not_read_is_bounded_and_harms_nobody(
        self, open_channel: Open
    ) -> None:
        far, near = Recorder(), Recorder()
        listener = await open_channel(far, listens=True)
        channel = await open_channel(near)
        with self.deaf_peer(address_of(listener)):
            await far.until_packets(1)
            deaf = far.senders[0]
            taken = [listener.send(deaf, bytes(MAX_PACKET_NBYTES)) for _ in range(1000)]
            assert taken[0]
            assert all(taken) is not listener.tells_full_queue
            peer = channel.connect(address_of(listener))
            assert channel.send(peer, b"me too")
            await far.until_packets(2)
            assert listener.send(far.senders[1], b"you too")
            await near.until_packets(1)
            assert far.lost == []

    async def test_what_was_handed_over_just_before_the_end_arrives(
        self, open_channel: Open
    ) -> None:
        far, near = Recorder(), Recorder()
        listener = await open_channel(far, listens=True)
        channel = await open_channel(near)
        peer = channel.connect(address_of(listener))
        channel.send(peer, b"hello")
        await far.until_packets(1)
        assert channel.send(peer, b"goodbye")
        await channel.aclose()
        await far.until_lost()
        assert far.packets == [b"hello", b"goodbye"]

    # Who comes and goes.

    async def test_a_peer_that_closes_is_lost_once(self, open_channel: Open) -> None:
        far, stays = Recorder(echo), Recorder()
        listener = await open_channel(far, listens=True)
        channel = await open_channel(Recorder())
        other = await open_channel(stays)
        other_peer = other.connect(address_of(listener))
        await round_trips(other, stays, other_peer, 1)
        channel.send(channel.connect(address_of(listener)), b"hello")
        await far.until_packets(2)
        await channel.aclose()
        await far.until_lost()
        assert far.lost == [far.senders[1]]
        assert listener.send(far.lost[0], b"too late") is False
        await round_trips(other, stays, other_peer, 20)
        assert len(far.lost) == 1

    async def test_a_listener_that_closes_is_lost_to_all_its_peers(
        self, open_channel: Open
    ) -> None:
        far, near = Recorder(echo), Recorder()
        listener = await open_channel(far, listens=True)
        channel = await open_channel(near)
        peers = {channel.connect(address_of(listener)) for _ in range(3)}
        for peer in peers:
            channel.send(peer, b"hello")
        await near.until_packets(3)
        await listener.aclose()
        await near.until_lost(3)
        assert set(near.lost) == peers
        assert all(near.causes)
        for peer in peers:
            assert channel.send(peer, b"too late") is False
        assert far.lost == []

    async def test_connecting_before_anybody_listens(
        self, open_channel: Open, tmp_path: Path
    ) -> None:
        near = Recorder()
        address = self.new_address(tmp_path)
        channel = await open_channel(near)
        peer = channel.connect(address)
        taken = channel.send(peer, b"early")
        if not channel.waits_for_listener:
            assert not taken
            assert near.lost == []  # not before the caller knows the peer
            await near.until_lost()
            assert near.lost == [peer]
            return
        await open_channel(Recorder(echo), address=address)
        await near.until_packets(1)
        assert near.packets == [b"early"]
        assert near.lost == []

    async def test_two_endpoints_that_connect_to_each_other_at_once(
        self, open_channel: Open, tmp_path: Path
    ) -> None:
        left, right = Recorder(), Recorder()
        one = await open_channel(left, address=self.new_address(tmp_path))
        two = await open_channel(right, address=self.new_address(tmp_path))
        one.send(one.connect(address_of(two)), b"from one")
        two.send(two.connect(address_of(one)), b"from two")
        await left.until_packets(1)
        await right.until_packets(1)
        assert (left.packets, right.packets) == ([b"from two"], [b"from one"])

    async def test_disconnect_of_a_peer_we_connected_to(self, open_channel: Open) -> None:
        far, near = Recorder(echo), Recorder()
        listener = await open_channel(far, listens=True)
        channel = await open_channel(near)
        peer = channel.connect(address_of(listener))
        await round_trips(channel, near, peer, 1)
        assert channel.send(peer, b"last")
        channel.disconnect(peer)
        channel.disconnect(peer)
        assert channel.send(peer, b"too late") is False
        await far.until_lost()
        assert far.packets[-1] == b"last"
        assert (len(near.packets), near.lost, near.died) == (1, [], [])

    async def test_disconnect_of_a_peer_that_connected_to_us(self, open_channel: Open) -> None:
        far, near, other = Recorder(echo), Recorder(), Recorder()
        listener = await open_channel(far, listens=True)
        channel = await open_channel(near)
        peer = channel.connect(address_of(listener))
        await round_trips(channel, near, peer, 1)
        listener.disconnect(far.senders[0])
        assert listener.send(far.senders[0], b"too late") is False
        channel.send(peer, b"anybody there?")
        if listener.shows_disconnect:
            await near.until_lost()
        second = await open_channel(other)
        await round_trips(second, other, second.connect(address_of(listener)), 20)
        assert far.packets == [b"again"] * 21
        assert far.lost == []

    async def test_a_handler_may_disconnect_while_packets_come_in(self, open_channel: Open) -> None:
        far = Recorder(lambda channel, peer, packet: channel.disconnect(peer))
        near, other = Recorder(), Recorder()
        listener = await open_channel(far, listens=True)
        channel = await open_channel(near)
        peer = channel.connect(address_of(listener))
        for _ in range(10):
            channel.send(peer, b"one of many")
        await far.until_packets(1)  # perhaps several at once
        came = len(far.packets)
        channel.send(peer, b"too late")
        second = await open_channel(other)
        second.send(second.connect(address_of(listener)), b"fresh")
        await far.until_packets(came + 1)
        assert far.packets == [b"one of many"] * came + [b"fresh"]
        assert far.lost == []

    # Opening and closing.

    async def test_a_closed_channel_stays_closed(self, open_channel: Open) -> None:
        far, near = Recorder(), Recorder()
        listener = await open_channel(far, listens=True)
        channel = await open_channel(near)
        peer = channel.connect(address_of(listener))
        channel.send(peer, b"hello")
        await far.until_packets(1)
        await asyncio.gather(channel.aclose(), channel.aclose())
        await channel.aclose()
        assert channel.send(peer, b"too late") is False
        channel.disconnect(peer)
        with pytest.raises(PoolClosed):
            channel.connect(address_of(listener))
        with pytest.raises(RuntimeError):
            await channel.start(near)
        assert near.lost == []

    async def test_a_channel_that_never_started(self, tmp_path: Path) -> None:
        channel = KINDS[self.kind](self.new_address(tmp_path), "idle")
        assert channel.send("nobody", b"hello") is False
        with pytest.raises(RuntimeError):
            channel.connect(self.new_address(tmp_path))
        await channel.aclose()

    async def test_a_second_bind_fails_and_leaves_the_first_alone(self, open_channel: Open) -> None:
        near = Recorder()
        listener = await open_channel(Recorder(echo), listens=True)
        thief = KINDS[self.kind](address_of(listener), "thief")
        with pytest.raises(OSError, match=r".+") as failure:
            await thief.start(Recorder())
        assert failure.value.errno == errno.EADDRINUSE
        await thief.aclose()
        channel = await open_channel(near)
        await round_trips(channel, near, channel.connect(address_of(listener)), 1)

    async def test_an_address_can_be_bound_again_after_closing(self, open_channel: Open) -> None:
        near = Recorder()
        first = await open_channel(Recorder(echo), listens=True)
        address = address_of(first)
        await first.aclose()
        second = await open_channel(Recorder(echo), address=address)
        channel = await open_channel(near)
        await round_trips(channel, near, channel.connect(address_of(second)), 1)

    @pytest.mark.parametrize(
        "address", ["", "nonsense", "http://127.0.0.1:80", "unix://", "tcp://"]
    )
    async def test_a_malformed_address_is_refused(self, open_channel: Open, address: str) -> None:
        channel = await open_channel(Recorder())
        with pytest.raises(ValueError, match="address"):
            channel.connect(address)

    # Strangers.

    @pytest.mark.parametrize("speech", ["http", "noise", "zeros", "half a greeting", "nothing"])
    async def test_a_stranger_harms_nobody(self, open_channel: Open, speech: str) -> None:
        octets = {
            "http": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello",
            "noise": random.Random(4).randbytes(8 * 1024 * 1024),
            "zeros": bytes(8 * 1024 * 1024),
            "half a greeting": b"\xff\0\0\0\0\0\0\0\1\x7f\3",
            "nothing": b"",
        }[speech]
        far, near = Recorder(echo), Recorder()
        listener = await open_channel(far, listens=True)
        channel = await open_channel(near)
        peer = channel.connect(address_of(listener))
        await round_trips(channel, near, peer, 1)
        with self.raw_connection(address_of(listener)) as stranger:
            stranger.setblocking(False)
            with suppress(ConnectionError):  # thrown out
                await asyncio.wait_for(
                    asyncio.get_running_loop().sock_sendall(stranger, octets), DEADLINE
                )
            await round_trips(channel, near, peer, 20)
        await round_trips(channel, near, peer, 20)
        # Noise can happen to be well-formed packets (ZMTP 1.0 is four octets of framing): then
        # the stranger is a peer like any other, whose packets mean nothing.
        honest = far.senders[0]
        heard = zip(far.senders, far.packets, strict=True)
        assert [packet for sender, packet in heard if sender == honest] == [b"again"] * 41
        assert honest not in far.lost
        assert near.lost == []

    # Real processes.

    async def test_a_killed_process_is_lost(self, open_channel: Open) -> None:
        far = Recorder()
        listener = await open_channel(far, listens=True)
        with child(self.kind, address_of(listener), "echo") as process:
            await far.until_packets(1)
            process.kill()
            await far.until_lost()
            assert far.lost == [far.senders[0]]
            if listener.proves_death:
                await far.until(lambda recorder: bool(recorder.died))
                assert far.died == far.lost

    async def test_a_stopped_process_is_neither_lost_nor_dead(self, open_channel: Open) -> None:
        far = Recorder()
        listener = await open_channel(far, listens=True)
        with child(self.kind, address_of(listener), "echo") as process:
            await far.until_packets(1)
            process.send_signal(signal.SIGSTOP)
            second = await open_channel(Recorder())
            peer = second.connect(address_of(listener))
            for turn in range(200):
                second.send(peer, b"tick")
                await far.until_packets(turn + 2)
            assert (far.lost, far.died) == ([], [])
            process.send_signal(signal.SIGCONT)
            assert listener.send(far.senders[0], b"awake?")
            await far.until(lambda recorder: recorder.packets[-1] == b"awake?")

    async def test_a_process_that_closes_says_its_last_word(self, open_channel: Open) -> None:
        far = Recorder()
        listener = await open_channel(far, listens=True)
        with child(self.kind, address_of(listener), "echo") as process:
            await far.until_packets(1)
            assert process.stdin is not None
            process.stdin.close()
            await far.until_lost()
            assert far.packets == [b"hello", b"goodbye"]
            assert process.wait(DEADLINE) == 0

    async def test_a_process_that_closes_nothing_ends_promptly(self, open_channel: Open) -> None:
        far = Recorder(echo)
        listener = await open_channel(far, listens=True)
        with child(self.kind, address_of(listener), "unclosed") as process:
            await far.until_lost()
            assert process.wait(DEADLINE) == 0
