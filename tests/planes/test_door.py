"""A door lets in who shows a secret in time, and few strangers wait there."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator

import pytest

from aiomm.planes import door
from aiomm.planes.door import MAX_STRANGERS, SECRET_NBYTES, Caller, Door

pytestmark = [pytest.mark.both_loops, pytest.mark.usefixtures("no_leaks")]


class Guest(Caller, asyncio.Protocol):
    """Shows link and secret in one packet; a wrong secret is complained of."""

    def data_received(self, data: bytes) -> None:
        link, secret = data[0], data[1:]
        if self._door.knows(link, secret):
            self.let_in(link)
            self._transport.write(b"welcome")
        else:
            self.complain("wrong secret")
            self.abort()


class Outside:
    """The other end of a guest's connection."""

    def __init__(self, end: socket.socket, guest: Guest) -> None:
        self.end = end
        self.guest = guest

    @classmethod
    async def at(cls, the_door: Door[Guest]) -> Outside:
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setblocking(False)
        loop = asyncio.get_running_loop()
        _, guest = await loop.connect_accepted_socket(lambda: Guest(the_door), theirs)
        return cls(ours, guest)

    async def show(self, link: int, secret: bytes) -> bytes:
        """Show a secret, and return what is answered; nothing is the end."""
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self.end, bytes([link]) + secret)
        return await self.heard()

    async def heard(self) -> bytes:
        with contextlib.suppress(ConnectionError):
            return await asyncio.get_running_loop().sock_recv(self.end, 100)
        return b""


@pytest.fixture
async def front() -> AsyncIterator[Door[Guest]]:
    front: Door[Guest] = Door("plane")
    yield front
    await front.aclose()
    assert (front.callers, front.strangers) == (set(), {})


@contextlib.asynccontextmanager
async def outside(front: Door[Guest]) -> AsyncIterator[Outside]:
    one = await Outside.at(front)
    try:
        yield one
    finally:
        one.end.close()


class TestSecrets:
    def test_are_the_same_each_time_and_of_one_link(self) -> None:
        front: Door[Guest] = Door("plane")
        assert len(front.secret_of(1)) == SECRET_NBYTES
        assert front.secret_of(1) == front.secret_of(1) != front.secret_of(2)

    @pytest.mark.parametrize("wrong", [b"", bytes(SECRET_NBYTES), bytes(SECRET_NBYTES + 1)])
    def test_are_known_of_their_links_only(self, wrong: bytes) -> None:
        front: Door[Guest] = Door("plane")
        first, second = front.secret_of(1), front.secret_of(2)
        assert front.knows(1, first)
        assert front.knows(2, second)
        assert not front.knows(1, second)
        assert not front.knows(1, wrong)
        assert (front.owner_of(first), front.owner_of(second)) == (1, 2)
        assert front.owner_of(wrong) is None

    @pytest.mark.parametrize("place", [0, SECRET_NBYTES - 1])
    def test_are_compared_to_their_end(self, place: int) -> None:
        front: Door[Guest] = Door("plane")
        wrong = bytearray(front.secret_of(1))
        wrong[place] ^= 1
        assert not front.knows(1, bytes(wrong))
        assert front.owner_of(bytes(wrong)) is None

    def test_of_no_link_are_never_known(self) -> None:
        front: Door[Guest] = Door("plane")
        for nbytes in range(SECRET_NBYTES + 3):
            assert not front.knows(3, bytes(nbytes))

    def test_that_are_void_are_drawn_anew(self) -> None:
        front: Door[Guest] = Door("plane")
        kept, void = front.secret_of(1), front.secret_of(2)
        front.void(2)
        front.void(2)
        assert not front.knows(2, void)
        assert front.owner_of(void) is None
        assert front.knows(1, kept)
        assert front.secret_of(2) != void


class TestCallers:
    async def test_are_strangers_until_they_show_a_secret(self, front: Door[Guest]) -> None:
        async with outside(front) as one:
            assert (set(front.strangers), one.guest.link) == ({one.guest}, None)
            assert await one.show(7, front.secret_of(7)) == b"welcome"
            assert (front.strangers, one.guest.link) == ({}, 7)
            assert front.callers == {one.guest}

    async def test_that_leave_are_gone(self, front: Door[Guest]) -> None:
        async with outside(front) as one, outside(front) as other:
            await other.show(7, front.secret_of(7))
            assert len(front.callers) == 2
        await one.guest.lost
        await other.guest.lost
        assert (front.callers, front.strangers) == (set(), {})

    async def test_that_show_nothing_are_sent_away_in_time(
        self, front: Door[Guest], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And those that have shown a secret are not."""
        monkeypatch.setattr(door, "HANDSHAKE_SECONDS", 0.05)
        async with outside(front) as one, outside(front) as other:
            assert await other.show(7, front.secret_of(7)) == b"welcome"
            assert await one.heard() == b""
            await one.guest.lost
            assert front.callers == {other.guest}

    async def test_without_a_secret_are_bounded_and_the_oldest_leaves_first(
        self, front: Door[Guest]
    ) -> None:
        async with contextlib.AsyncExitStack() as stack:
            inside = await stack.enter_async_context(outside(front))
            await inside.show(7, front.secret_of(7))
            many = [
                await stack.enter_async_context(outside(front)) for _ in range(MAX_STRANGERS + 2)
            ]
            assert list(front.strangers) == [each.guest for each in many[2:]]
            for gone in many[:2]:
                assert await gone.heard() == b""
            assert await many[2].show(8, front.secret_of(8)) == b"welcome"
            assert not inside.guest.lost.done()

    async def test_of_a_forgotten_link_are_sent_away(self, front: Door[Guest]) -> None:
        async with outside(front) as one, outside(front) as other:
            secret = front.secret_of(1)
            await one.show(1, secret)
            await other.show(2, front.secret_of(2))
            front.forget(1)
            front.forget(3)
            assert await one.heard() == b""
            await one.guest.lost
            assert front.callers == {other.guest}
            assert not front.knows(1, secret)

    async def test_of_a_void_secret_stay(self, front: Door[Guest]) -> None:
        async with outside(front) as one:
            await one.show(1, front.secret_of(1))
            front.void(1)
            assert front.callers == {one.guest}

    async def test_are_complained_of_once_as_a_warning(
        self, front: Door[Guest], caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG, "aiomm.planes.door")
        for _ in range(3):
            async with outside(front) as one:
                assert await one.show(7, bytes(SECRET_NBYTES)) == b""
        levels = [each.levelname for each in caplog.records if "wrong secret" in each.message]
        assert levels == ["WARNING", "DEBUG", "DEBUG"]
        assert "x plane: closed the connection from " in caplog.text


class TestAShutDoor:
    async def test_knows_no_secret_and_lets_who_is_in_stay(self, front: Door[Guest]) -> None:
        async with outside(front) as one, outside(front) as late:
            secret = front.secret_of(7)
            await one.show(7, secret)
            front.shut()
            assert await late.show(7, secret) == b""
            assert not one.guest.lost.done()
            async with outside(front) as later:
                assert await later.heard() == b""
            assert front.callers == {one.guest}

    async def test_that_is_closed_has_nobody_left(self, front: Door[Guest]) -> None:
        async with outside(front) as one, outside(front) as stranger:
            await one.show(7, front.secret_of(7))
            await front.aclose()
            assert (front.is_shut, front.callers) == (True, set())
            for each in (one, stranger):
                assert each.guest.lost.done()
                assert await each.heard() == b""
            await front.aclose()
