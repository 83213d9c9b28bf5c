"""The ZeroMQ channel with keys: the contract over CURVE, and who is kept out."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import ClassVar

import pytest
import zmq

from aiomm.control.curve import secure_client
from aiomm.control.keys import KeyPair, Keys, KnownKey
from aiomm.control.zeromq import ZmqChannel

from .contract import ChannelContract, address_of, round_trips
from .kinds import KEYS, PAIR
from .recorder import Recorder, echo
from .test_zeromq import free_tcp_address, raw_dealer

HERE = "tcp://127.0.0.1:*"


@contextmanager
def deaf_dealer(address: str) -> Iterator[None]:
    """Say hello, with a good key, and never read."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.RCVHWM, 1)
        secure_client(dealer, PAIR, PAIR.public)
        dealer.connect(address)
        dealer.send(b"hello")
        yield


class TestOverCurve(ChannelContract):
    kind: ClassVar[str] = "curve"

    def new_address(self, tmp_path: Path) -> str:
        return free_tcp_address()

    def raw_connection(self, address: str) -> socket.socket:
        return socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])))

    deaf_peer = staticmethod(deaf_dealer)


def pair() -> KeyPair:
    return KeyPair(*zmq.curve_keypair())


def knowing(own: KeyPair, *known: KeyPair) -> Keys:
    return Keys(own, frozenset(KnownKey("", each.public) for each in known))


@asynccontextmanager
async def listening(keys: Keys = KEYS) -> AsyncIterator[tuple[ZmqChannel, Recorder]]:
    channel, recorder = ZmqChannel(HERE, keys=keys, name="listener"), Recorder(echo)
    await channel.start(recorder)
    yield channel, recorder
    await channel.aclose()


@asynccontextmanager
async def connecting(keys: Keys | None) -> AsyncIterator[tuple[ZmqChannel, Recorder]]:
    channel, recorder = ZmqChannel(None, keys=keys, name="connector"), Recorder()
    await channel.start(recorder)
    yield channel, recorder
    await channel.aclose()


async def talks(listener: ZmqChannel, keys: Keys | None = KEYS) -> None:
    """See that a good peer gets in."""
    async with connecting(keys) as (channel, recorder):
        await round_trips(channel, recorder, channel.connect(address_of(listener)), 3)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]


@pytest.mark.both_loops
@pytest.mark.usefixtures("no_leaks")
class TestKeys:
    async def test_each_side_has_its_own_key(self) -> None:
        one, two = pair(), pair()
        async with listening(knowing(one, two)) as (listener, _):
            await talks(listener, knowing(two, one))

    async def test_an_unknown_key_is_refused_and_told_once(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        stranger = pair()
        async with listening() as (listener, heard):
            for _ in range(3):
                async with connecting(knowing(stranger, PAIR)) as (channel, recorder):
                    channel.send(channel.connect(address_of(listener)), b"hello")
                    await recorder.until_lost()
                    assert "not among those that the peer knows" in recorder.causes[0]
            await talks(listener)
            assert b"hello" not in heard.packets
        (warning,) = warnings(caplog)
        assert "127.0.0.1 refused" in warning
        assert stranger.public.decode() in warning

    async def test_a_listener_with_another_key_than_the_known_one_is_refused(self) -> None:
        async with listening() as (listener, heard):
            async with connecting(knowing(PAIR, pair())) as (channel, recorder):
                channel.send(channel.connect(address_of(listener)), b"hello")
                await recorder.until_lost()
            await talks(listener)
            assert b"hello" not in heard.packets

    async def test_a_listener_without_keys_is_refused(self) -> None:
        channel, recorder = ZmqChannel(HERE, name="listener"), Recorder()
        await channel.start(recorder)
        async with connecting(KEYS) as (other, told):
            other.send(other.connect(address_of(channel)), b"hello")
            await told.until_lost()
        assert recorder.packets == []
        await channel.aclose()

    async def test_a_peer_without_keys_is_refused_and_told_once(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with listening() as (listener, heard):
            for _ in range(3):
                async with connecting(None) as (channel, recorder):
                    channel.send(channel.connect(address_of(listener)), b"hello")
                    await recorder.until_lost()
            await talks(listener)
            assert b"hello" not in heard.packets
        # Its address is not told where it was gone before anybody could look.
        told = warnings(caplog)
        assert 1 <= len(told) == len(set(told)) <= 2
        assert all("refused: no keys, a wrong one, or no ZeroMQ" in each for each in told)

    async def test_a_bare_dealer_gets_nothing_through(self) -> None:
        async with listening() as (listener, heard):
            with raw_dealer(address_of(listener)) as dealer:
                dealer.send(b"hello")
                await talks(listener)
            assert b"hello" not in heard.packets

    async def test_a_check_that_fails_costs_one_client(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        checks: list[bytes] = []
        knows = Keys.knows

        def failing_at_first(self: Keys, public: bytes) -> bool:
            checks.append(public)
            if len(checks) == 1:
                raise RuntimeError("the list of keys has burnt")
            return knows(self, public)

        async with listening() as (listener, _), connecting(KEYS) as (channel, recorder):
            peer = channel.connect(address_of(listener))
            monkeypatch.setattr(Keys, "knows", failing_at_first)
            channel.send(peer, b"hello")
            await recorder.until_lost()
            await talks(listener)
        assert any("could not be checked" in each.getMessage() for each in caplog.records)

    @pytest.mark.parametrize(
        "question",
        [
            [],
            [b"1.0"],
            [b"2.0", b"1", b"aiomm", b"127.0.0.1", b"", b"CURVE", bytes(32)],
            [b"1.0", b"1", b"other", b"127.0.0.1", b"", b"CURVE", bytes(32)],
            [b"1.0", b"1", b"aiomm", b"127.0.0.1", b"", b"PLAIN", b"user", b"password"],
            [b"1.0", b"1", b"aiomm", b"127.0.0.1", b"", b"CURVE", b"short"],
        ],
    )
    async def test_a_strange_question_is_answered_with_no(self, question: list[bytes]) -> None:
        async with listening() as (listener, _):
            assert listener._context is not None
            answers: asyncio.Queue[list[bytes]] = asyncio.Queue()
            with listener._context.socket(zmq.DEALER) as asker:
                asker.setsockopt(zmq.LINGER, 0)
                asker.connect("inproc://zeromq.zap.01")
                loop = asyncio.get_running_loop()
                asker.send_multipart([b"", *question])
                if len(question) > 1:
                    await loop.run_in_executor(
                        None, lambda: answers.put_nowait(asker.recv_multipart())
                    )
                    assert answers.get_nowait()[3] == b"400"
            await talks(listener)

    async def test_an_address_with_a_key_needs_keys(self) -> None:
        async with listening() as (listener, _), connecting(None) as (channel, _):
            told = listener.told(address_of(listener))
            assert told != listener.address
            with pytest.raises(ValueError, match="this endpoint has none"):
                channel.connect(told)
            with pytest.raises(ValueError, match="this endpoint has none"):
                channel.check(told)
        async with listening() as (listener, _), connecting(KEYS) as (channel, recorder):
            peer = channel.connect(listener.told(address_of(listener)))
            await round_trips(channel, recorder, peer, 3)

    async def test_off_this_host_keys_are_enough(self) -> None:
        channel = ZmqChannel("tcp://0.0.0.0:*", keys=KEYS, name="listener")
        await channel.start(Recorder())
        channel.check("tcp://192.0.2.1:7")
        await channel.aclose()
        with pytest.raises(ValueError, match="aiomm keygen"):
            ZmqChannel("tcp://0.0.0.0:*", name="listener")

    async def test_ipc_needs_none(self, tmp_path: Path) -> None:
        channel, heard = ZmqChannel(f"ipc://{tmp_path}/x/s", keys=KEYS, name="x"), Recorder(echo)
        await channel.start(heard)
        assert channel.told(address_of(channel)) == channel.address
        await talks(channel, None)
        await channel.aclose()
