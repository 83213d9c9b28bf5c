"""Whoever is invited is handed everything; nobody else is handed anything."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import multiprocessing
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from multiprocessing.resource_tracker import ensure_running

import pytest

from aiomm.errors import PlaneUnavailable
from aiomm.planes import door, handover
from aiomm.planes.handover import Desk, HandedOver, Invitation, Visitor, collect
from tests.support import no_descriptors_left

pytestmark = [pytest.mark.both_loops, pytest.mark.usefixtures("no_leaks")]

NOBODY = 65534
LINK = 7
MESSAGE = b"what is handed over"
REFUSED = "plane: the receiver refuses this process"
GONE = "plane: no such receiver; it is gone"


def hand_message(visitor: Visitor) -> tuple[bytes, list[int]]:
    return MESSAGE, []


@asynccontextmanager
async def opened(
    hand: Callable[[Visitor], tuple[bytes, list[int]]] = hand_message,
    heard: Callable[[Visitor, bytes], None] | None = None,
) -> AsyncIterator[Desk]:
    """Open a desk until the block ends."""
    desk = Desk("plane", hand, heard)
    await desk.open()
    try:
        yield desk
    finally:
        await desk.aclose()
        assert (desk.door.callers, desk.door.strangers) == (set(), {})


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    async with opened() as desk:
        yield desk


async def take(invitation: Invitation, num_fds: int = 0) -> HandedOver:
    return await collect("plane", invitation, len(MESSAGE), num_fds)


async def end_of(connection: socket.socket) -> bool:
    """Return, when there is something to read, whether it is the end."""
    with contextlib.suppress(ConnectionError):
        return await asyncio.get_running_loop().sock_recv(connection, 1) == b""
    return True


class Stranger:
    """Somebody who has found the desk's name."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def at(cls, desk: Desk) -> Stranger:
        connection = socket.socket(socket.AF_UNIX)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, b"\0" + desk._name)
        return cls(*await asyncio.open_unix_connection(sock=connection))

    async def heard(self) -> bytes:
        """Return all that it is told before it is sent away."""
        with contextlib.suppress(ConnectionError):
            return await self.reader.read()
        return b""

    async def leave(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


@asynccontextmanager
async def stranger_at(desk: Desk) -> AsyncIterator[Stranger]:
    stranger = await Stranger.at(desk)
    try:
        yield stranger
    finally:
        await stranger.leave()


@pytest.fixture(scope="module", autouse=True)
def resource_tracker() -> None:
    """Start the process that multiprocessing keeps, before anybody looks for leaks."""
    ensure_running()


class TestHandingOver:
    async def test_gives_the_message_and_the_descriptors(self) -> None:
        ends = [os.pipe() for _ in range(2)]
        shown: list[int | None] = []

        def hand(visitor: Visitor) -> tuple[bytes, list[int]]:
            shown.append(visitor.link)
            return MESSAGE, [reader for reader, _ in ends]

        async with opened(hand) as desk:
            received = await take(desk.invite(LINK), num_fds=2)
            assert (received.message, shown) == (MESSAGE, [LINK])
            for (reader, writer), descriptor in zip(ends, received.descriptors, strict=True):
                os.write(writer, b"a pipe")
                assert descriptor != reader
                assert os.read(descriptor, 100) == b"a pipe"
            assert not received.connection.getblocking()
            received.connection.close()
        for descriptor in (*received.descriptors, *ends[0], *ends[1]):
            os.close(descriptor)

    async def test_gives_descriptors_that_no_program_inherits(self) -> None:
        with socket.socket() as null:
            async with opened(lambda visitor: (MESSAGE, [null.fileno()])) as desk:
                received = await take(desk.invite(LINK), num_fds=1)
                (descriptor,) = received.descriptors
                is_inheritable = os.get_inheritable(descriptor)
                os.close(descriptor)
                received.connection.close()
        assert not is_inheritable

    async def test_gives_a_message_alone(self, desk: Desk) -> None:
        received = await take(desk.invite(LINK))
        assert (received.message, received.descriptors) == (MESSAGE, [])
        received.connection.close()

    async def test_gives_it_again_to_the_same_and_to_others(self, desk: Desk) -> None:
        first, second = desk.invite(1), desk.invite(2)
        assert desk.invite(1) == first
        assert (first.name, first.secret != second.secret) == (second.name, True)
        received = [await take(invitation) for invitation in (first, second, first)]
        assert sorted(visitor.link or 0 for visitor in desk.door.callers) == [1, 1, 2]
        for each in received:
            each.connection.close()

    async def test_takes_a_secret_in_pieces(self, desk: Desk) -> None:
        secret = desk.invite(LINK).secret
        async with stranger_at(desk) as stranger:
            stranger.writer.write(secret[:7])
            await stranger.writer.drain()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stranger.reader.read(1), 0.01)
            assert len(desk.door.strangers) == 1
            stranger.writer.write(secret[7:])
            assert await stranger.reader.readexactly(len(MESSAGE)) == MESSAGE
            assert len(desk.door.strangers) == 0

    @pytest.mark.parametrize("error", [OSError(errno.EBADF, "closed"), PlaneUnavailable("closed")])
    async def test_that_fails_sends_the_sender_away(
        self, error: Exception, caplog: pytest.LogCaptureFixture
    ) -> None:
        def hand(visitor: Visitor) -> tuple[bytes, list[int]]:
            raise error

        async with opened(hand) as desk:
            with pytest.raises(PlaneUnavailable, match=REFUSED):
                await take(desk.invite(LINK))
        assert "x plane: refused a sender that cannot be handed the arena" in caplog.text

    async def test_of_what_is_not_open_fails(self) -> None:
        async with opened(lambda visitor: (MESSAGE, [1 << 20])) as desk:
            with pytest.raises(PlaneUnavailable, match=REFUSED):
                await take(desk.invite(LINK), num_fds=1)

    @pytest.mark.parametrize(("num_handed", "num_expected"), [(0, 1), (1, 2), (2, 0)])
    async def test_of_other_descriptors_than_expected_is_refused(
        self, num_handed: int, num_expected: int
    ) -> None:
        """Those that have come are closed."""
        with socket.socket() as null:
            async with opened(lambda visitor: (MESSAGE, [null.fileno()] * num_handed)) as desk:
                with pytest.raises(PlaneUnavailable, match=REFUSED):
                    await take(desk.invite(LINK), num_fds=num_expected)

    async def test_needs_a_descriptor_on_this_side(self, desk: Desk) -> None:
        """Whose fault it is if there is none: for the socket, or for what is handed over."""
        invitation = desk.invite(LINK)
        with no_descriptors_left(), pytest.raises(PlaneUnavailable, match="no socket can be made"):
            await collect("plane", invitation, len(MESSAGE), 1)
        here, there = socket.socketpair()
        with here, there:
            socket.send_fds(there, [MESSAGE], [0])
            with no_descriptors_left(), pytest.raises(PlaneUnavailable, match="no descriptor free"):
                handover._take("plane", here, len(MESSAGE), 1)

    async def test_of_a_short_message_is_refused(self) -> None:
        with socket.socket() as null:
            async with opened(lambda visitor: (MESSAGE[1:], [null.fileno()])) as desk:
                with pytest.raises(PlaneUnavailable, match=REFUSED):
                    await take(desk.invite(LINK), num_fds=1)


class TestStrangers:
    @pytest.mark.parametrize("shown", [bytes(16), b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 100_000])
    async def test_without_a_secret_get_nothing(
        self, desk: Desk, shown: bytes, caplog: pytest.LogCaptureFixture
    ) -> None:
        desk.invite(LINK)
        async with stranger_at(desk) as stranger:
            stranger.writer.write(shown)
            assert await stranger.heard() == b""
        assert "x plane: refused a stranger without a secret" in caplog.text

    @pytest.mark.parametrize("place", [0, 15])
    async def test_with_a_wrong_secret_get_nothing(self, desk: Desk, place: int) -> None:
        name, secret = desk.invite(LINK).name, bytearray(desk.invite(LINK).secret)
        secret[place] ^= 1
        with pytest.raises(PlaneUnavailable, match=REFUSED):
            await take(Invitation(name, bytes(secret)))

    async def test_that_show_more_than_a_secret_get_nothing(self, desk: Desk) -> None:
        async with stranger_at(desk) as stranger:
            stranger.writer.write(desk.invite(LINK).secret + b"!")
            assert await stranger.heard() == b""

    async def test_that_say_nothing_are_sent_away_in_time(
        self, desk: Desk, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And those that have shown a secret are not."""
        monkeypatch.setattr(door, "HANDSHAKE_SECONDS", 0.05)
        received = await take(desk.invite(LINK))
        async with stranger_at(desk) as stranger:
            stranger.writer.write(desk.invite(LINK).secret[:15])
            assert await stranger.heard() == b""
        assert [visitor.link for visitor in desk.door.callers] == [LINK]
        received.connection.close()

    async def test_are_bounded_and_the_oldest_leave_first(self, desk: Desk) -> None:
        received = await take(desk.invite(LINK))
        strangers = [await Stranger.at(desk) for _ in range(door.MAX_STRANGERS + 3)]
        for stranger in strangers[:3]:
            assert await stranger.heard() == b""
        assert len(desk.door.strangers) == door.MAX_STRANGERS
        assert len(desk.door.callers) == door.MAX_STRANGERS + 1
        strangers[3].writer.write(desk.invite(8).secret)
        assert await strangers[3].reader.readexactly(len(MESSAGE)) == MESSAGE
        for stranger in strangers:
            await stranger.leave()
        received.connection.close()

    async def test_that_leave_are_forgotten(self, desk: Desk) -> None:
        stranger = await Stranger.at(desk)
        await stranger.leave()
        (await take(desk.invite(LINK))).connection.close()
        while desk.door.callers:
            await asyncio.wait([visitor.lost for visitor in desk.door.callers])
        assert desk.door.strangers == {}

    async def test_of_another_user_get_nothing(
        self, desk: Desk, caplog: pytest.LogCaptureFixture
    ) -> None:
        desk.user = os.geteuid() + 1
        with pytest.raises(PlaneUnavailable, match=REFUSED):
            await take(desk.invite(LINK))
        assert f"x plane: refused user {os.geteuid()}" in caplog.text

    async def test_of_an_unknown_user_get_nothing(
        self, desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def credentials(connection: socket.socket) -> None:
            raise OSError(errno.EMFILE, "Too many open files")

        monkeypatch.setattr(handover, "peer_credentials", credentials)
        async with stranger_at(desk) as stranger:
            stranger.writer.write(desk.invite(LINK).secret)
            assert await stranger.heard() == b""
        assert "refused somebody unknown ([Errno 24] Too many open files)" in caplog.text


def collect_as_nobody(pipe: Connection) -> None:
    """Become another user, and tell why an invitation cannot be used."""
    os.setuid(NOBODY)

    async def run() -> str:
        try:
            await take(pipe.recv())
        except PlaneUnavailable as exc:
            return str(exc)
        return "collected"

    pipe.send(asyncio.run(run()))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_a_sender_trusts_no_receiver_of_another_user(desk: Desk) -> None:
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=collect_as_nobody, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    ours.send(desk.invite(LINK))
    told = await asyncio.to_thread(ours.recv)
    assert told == "plane: the receiver runs as another user"
    process.join()
    process.close()
    ours.close()


class TestVisitors:
    async def test_that_go_on_talking_are_sent_away(
        self, desk: Desk, caplog: pytest.LogCaptureFixture
    ) -> None:
        received = await take(desk.invite(LINK))
        received.connection.send(b"hello?")
        assert await end_of(received.connection)
        received.connection.close()
        assert "x plane: refused a sender that goes on talking" in caplog.text
        (await take(desk.invite(LINK))).connection.close()

    async def test_are_heard_and_answered_where_they_may_talk(self) -> None:
        def answer(visitor: Visitor, said: bytes) -> None:
            visitor.say(str(visitor.link).encode() + b": " + said)

        async with opened(heard=answer) as desk:
            received = await take(desk.invite(LINK))
            loop = asyncio.get_running_loop()
            for said in (b"hello", b"hello again"):
                await loop.sock_sendall(received.connection, said)
                assert await loop.sock_recv(received.connection, 100) == b"7: " + said
            received.connection.close()

    async def test_are_sent_away_when_they_are_forgotten(self, desk: Desk) -> None:
        invitations = [desk.invite(link) for link in (1, 2)]
        first, second = [await take(invitation) for invitation in invitations]
        desk.forget(1)
        desk.forget(3)
        assert await end_of(first.connection)
        with pytest.raises(PlaneUnavailable, match=REFUSED):
            await take(invitations[0])
        assert [visitor.link for visitor in desk.door.callers] == [2]
        again = await take(desk.invite(1))
        assert desk.invite(1).secret != invitations[0].secret
        for received in (first, second, again):
            received.connection.close()

    async def test_that_leave_are_noticed(self, desk: Desk) -> None:
        received = await take(desk.invite(LINK))
        (visitor,) = desk.door.callers
        assert not visitor.lost.done()
        received.connection.close()
        await visitor.lost
        assert desk.door.callers == set()

    async def test_stay_when_more_are_refused(self, desk: Desk) -> None:
        invitation = desk.invite(LINK)
        received = await take(invitation)
        async with stranger_at(desk) as late:
            await until(lambda: len(desk.door.callers) == 2)
            desk.refuse_more()
            desk.refuse_more()
            late.writer.write(invitation.secret)
            assert await late.heard() == b""
        with pytest.raises(PlaneUnavailable, match=GONE):
            await take(invitation)
        assert [visitor.link for visitor in desk.door.callers] == [LINK]
        received.connection.close()

    async def test_that_come_while_it_closes_are_sent_away(self, desk: Desk) -> None:
        desk.door.is_shut = True
        with pytest.raises(PlaneUnavailable, match=REFUSED):
            await take(desk.invite(LINK))

    async def test_see_the_end_of_the_desk(self) -> None:
        async with opened() as desk:
            invitation = desk.invite(LINK)
            received = await take(invitation)
            async with stranger_at(desk) as stranger:
                await until(lambda: len(desk.door.callers) == 2)
                await desk.aclose()
                assert await end_of(received.connection)
                assert await stranger.heard() == b""
                await desk.aclose()
            with pytest.raises(PlaneUnavailable, match=GONE):
                await take(invitation)
            received.connection.close()


async def until(condition: Callable[[], bool]) -> None:
    """Let the others have turns until something is so."""
    while not condition():  # noqa: ASYNC110 -- nobody would set an event
        await asyncio.sleep(0)


class TestDesk:
    async def test_that_was_never_opened_is_closed(self) -> None:
        desk = Desk("plane", hand_message)
        await desk.aclose()
        assert desk.door.is_shut

    async def test_cannot_have_the_name_of_another(self, desk: Desk) -> None:
        other = Desk("other", hand_message)
        other._name = desk._name
        with pytest.raises(PlaneUnavailable, match="other: cannot listen: "):
            await other.open()

    async def test_that_is_not_opened_to_the_end_keeps_no_socket(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def create(*_: object, **__: object) -> None:
            raise asyncio.CancelledError

        loop = asyncio.get_running_loop()
        if not hasattr(loop, "__dict__"):
            pytest.skip("a loop whose methods cannot be replaced")
        monkeypatch.setattr(loop, "create_unix_server", create)
        with pytest.raises(asyncio.CancelledError):
            await Desk("plane", hand_message).open()


@asynccontextmanager
async def listening() -> AsyncIterator[tuple[socket.socket, Invitation]]:
    """Listen as a desk would, and do nothing more."""
    name = os.urandom(handover.NAME_NBYTES)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as listener:
        listener.bind(b"\0" + name)
        listener.listen()
        yield listener, Invitation(name, bytes(door.SECRET_NBYTES))


class TestReceiversThatAreNone:
    async def test_nobody_listens(self) -> None:
        with pytest.raises(PlaneUnavailable, match=GONE):
            await take(Invitation(os.urandom(handover.NAME_NBYTES), bytes(16)))

    async def test_one_ends_before_it_has_answered(self) -> None:
        async with listening() as (listener, invitation):
            taking = asyncio.create_task(take(invitation))
            connection, _ = await asyncio.get_running_loop().sock_accept(listener)
            connection.close()
            with pytest.raises(PlaneUnavailable, match=REFUSED):
                await taking

    async def test_one_never_answers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(handover, "ANSWER_SECONDS", 0.01)
        async with listening() as (_, invitation):
            told = "plane: the receiver has not answered for 0.01 s"
            with pytest.raises(PlaneUnavailable, match=told):
                await take(invitation)

    async def test_one_answers_something_else(self) -> None:
        async with listening() as (listener, invitation):
            taking = asyncio.create_task(take(invitation))
            connection, _ = await asyncio.get_running_loop().sock_accept(listener)
            with connection:
                connection.send(b"no")
                with pytest.raises(PlaneUnavailable, match=REFUSED):
                    await taking

    async def test_one_cannot_be_asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def credentials(connection: socket.socket) -> None:
            raise OSError(errno.ENOPROTOOPT, "Protocol not available")

        monkeypatch.setattr(handover, "peer_credentials", credentials)
        async with listening() as (_, invitation):
            told = "plane: the receiver cannot be reached: .*Protocol not available"
            with pytest.raises(PlaneUnavailable, match=told):
                await take(invitation)

    async def test_nobody_waits_for_one_any_more(self) -> None:
        async with listening() as (listener, invitation):
            taking = asyncio.create_task(take(invitation))
            connection, _ = await asyncio.get_running_loop().sock_accept(listener)
            with connection:
                taking.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await taking
                connection.setblocking(False)
                while not await end_of(connection):
                    continue
