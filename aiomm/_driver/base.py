"""What both drivers share: the channels, the timer, and the order in which things happen.

Everything here runs on the loop thread. An input (a packet, a finished task, a call of the
user's) goes into the endpoint, then :meth:`Driver.pump` executes what the endpoint wants, in
order, until it wants nothing more. No input is taken in between, so a batch of commands never
meets a state that it was not meant for.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Hashable, Sequence
from collections.abc import Set as AbstractSet
from threading import get_ident
from typing import Any, ClassVar, Final, Generic, TypeVar, assert_never

from ..config import EndpointSettings
from ..control.base import Channel, Peer
from ..control.keys import keys_from
from ..control.unix import ANY_UNIX_ADDRESS, UnixChannel
from ..control.zeromq import ZmqChannel
from ..errors import AiommError, Failure, PoolClosed, Reason
from ..protocol.commands import Command, Greet, Leave, Part, Transmit
from ..protocol.endpoint import Endpoint
from ..protocol.frames import PROTOCOL_VERSION, Packet, Ping, encode
from ..protocol.session import NEVER, Path
from .outbox import Outbox

__all__ = ["Driver", "new_epoch"]

RECONTACT_DELAY = 0.1
"""Seconds before a lost standing contact is made again: whoever is there may refuse each one."""
REFUSED_DELAY = 1.0
"""The same where the peer has turned this side away, or parted, or no socket could be made."""

MAX_ABANDONED = 128
"""Transfers that a closing endpoint fails in one turn of the loop: 2 ms."""

OF_LINKS: Final = (Greet, Part, Leave)
"""Commands that both kinds of endpoint know."""

logger = logging.getLogger("aiomm")

_Endpoint = TypeVar("_Endpoint", bound=Endpoint)


def new_epoch() -> int:
    """Return the random number of a new life.

    It is exact as a double, too: routers carry tickets as JSON, and many read numbers so.
    """
    return secrets.randbelow(2**53 - 1) + 1


class Driver(ABC, Generic[_Endpoint]):
    """One endpoint's connection to the world. It is its channels' handler.

    Args:
        settings: of the endpoint.
        bind: where the control channel listens, or None.
        name: for logs and peers.
    """

    endpoint: _Endpoint
    standing_contacts: AbstractSet[str] = frozenset()
    """Addresses where this side says Hello when it starts, and again after every loss."""
    listens: ClassVar[bool]
    """Whether peers on this host connect their streams here, or this side to them."""

    def __init__(self, settings: EndpointSettings, bind: str | None, name: str) -> None:
        self.settings = settings
        self.name = name
        self.bind = bind
        self.channel = _control_channel(settings, bind, name)
        self.stream = _stream_channel(listens=self.listens)
        self._stream_rank = 1 if settings.control == "auto" else -1
        self.outbox = Outbox()
        self._at_address: dict[str, Path] = {}
        self._lives: dict[Path, int] = {}
        """The peer's epoch behind each path that a packet has come through."""
        self._complained: set[Hashable] = set()
        """Paths and links out of which something has come that was refused."""
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = NEVER
        self._tasks: set[asyncio.Task[Any]] = set()
        self._is_pumping = False
        self._pumped = asyncio.Event()
        self._starting: asyncio.Task[None] | None = None
        self.is_started = False
        self.is_closing = False
        self._is_finished = False
        self._closing: asyncio.Task[None] | None = None

    # Beginning and end.

    def ensure_started(self) -> asyncio.Task[None]:
        """Begin to start, once, on the running loop; return the task that does it."""
        self.check_open()
        self.check_loop()
        if self._starting is None:
            self.loop, self._thread = asyncio.get_running_loop(), get_ident()
            self._starting = self.loop.create_task(self._start(), name=f"{self.name} start")
        return self._starting

    def when_started(self, action: Callable[[], None], fail: Callable[[Failure], None]) -> None:
        """Call `action` as soon as this side is up (now, if it is), or `fail` if it never is."""
        starting = self.ensure_started()
        if self.is_started:
            action()
            return

        def started(task: asyncio.Task[None]) -> None:
            try:
                self.check_startable()
            except PoolClosed as exc:
                fail(Failure(Reason.CLOSED, exc.message))
            else:
                action()

        starting.add_done_callback(started)

    async def _start(self) -> None:
        try:
            if self.stream is not None:
                await self._start_stream(self.stream)
            await self.set_up()
            await self.channel.start(self)
        except BaseException:
            await self._close_channels()
            await self.tear_down()
            raise
        self.is_started = True
        logger.debug("= %s is up at %s", self.name, self.channel.address)
        self._keep_contacts()
        self.pump()

    async def _start_stream(self, stream: UnixChannel) -> None:
        try:
            await stream.start(self)
        except OSError as exc:
            logger.info("! %s has no same-host stream: %s", self.name, exc)
            self.stream = None

    def metrics_of_links(self) -> dict[str, int]:
        """Return what `metrics()` tells of either kind of endpoint."""
        counters = self.endpoint.counters.items()
        return {
            "peers": self.endpoint.num_links,
            **{f"ignored_{name}": count for name, count in counters},
        }

    def check_startable(self) -> None:
        """Raise PoolClosed if this endpoint has tried to start and could not."""
        task = self._starting
        if task is not None and task.done() and not self.is_started:
            raise PoolClosed(f"{self.name} could not start: {_cause(task)}")

    def check_loop(self) -> None:
        """Raise RuntimeError on another thread, or in another loop, than those of the start."""
        if self._starting is None:
            return
        try:
            is_here = asyncio.get_running_loop() is self.loop
        except RuntimeError:  # no loop runs: between two runs of the one it belongs to, perhaps
            is_here = get_ident() == self._thread and not self.loop.is_running()
        if not is_here:
            raise RuntimeError(
                f"{self.name} belongs to another event loop: call it there, "
                "by call_soon_threadsafe or asyncio.run_coroutine_threadsafe"
            )

    def check_open(self) -> None:
        """Raise PoolClosed if this endpoint is closed or closing."""
        if self.is_closing:
            raise PoolClosed(f"{self.name} is closed")

    async def aclose(self) -> None:
        """Close within `close_timeout`: end what runs, part from every peer, give memory back."""
        self.check_loop()
        self.is_closing = True
        if self._starting is None:
            return
        if self._closing is None:
            closing = self._drain_and_close()
            self._closing = self.loop.create_task(closing, name=f"{self.name} close")
        await asyncio.shield(self._closing)  # cancelled, one stops waiting; it closes all the same

    async def _drain_and_close(self) -> None:
        assert self._starting is not None
        await asyncio.wait([self._starting])
        if self.is_started:
            try:
                await self._part()
            except Exception:  # a bug in parting must not cost the memory and the sockets
                logger.exception("! %s could not part from its peers", self.name)
        self._is_finished = True
        self._stop_timer()
        self.outbox.flush()
        await self._close_channels()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.tear_down()

    async def _part(self) -> None:
        """Fail what runs, wait until nothing can land any more, and say goodbye."""
        closed = Failure(Reason.CLOSED, f"{self.name} was closed")
        by = self.now() + self.settings.close_timeout
        await self._abandon(closed, by)
        left = "writes that have not drained"
        try:
            async with asyncio.timeout(max(0.0, by - self.now())):
                await self.drain()
                left = "a peer that does not take what it is told"
                while self.endpoint.holds_back():  # a goodbye behind so much would not get through
                    await self.next_pump()
        except TimeoutError:
            logger.warning("! %s closes with %s", self.name, left)
        if self.has_drained():  # else a goodbye would have the peer give the blocks to others
            self.endpoint.say_goodbye(closed)
            self.pump()

    async def _abandon(self, failure: Failure, by: float) -> None:
        """Fail everything that is not done, some in each turn of the loop until that time."""
        numbers = self.unfinished()
        for first in range(0, len(numbers), MAX_ABANDONED):
            for number in numbers[first : first + MAX_ABANDONED]:
                self.give_up(number, failure)
            self.pump()
            if self.now() < by:
                await asyncio.sleep(0)

    async def _close_channels(self) -> None:
        if self.stream is not None:
            await self.stream.aclose()
        await self.channel.aclose()

    # What the two kinds of driver add.

    @abstractmethod
    async def set_up(self) -> None:
        """Make what the Hello speaks of: arena, planes."""

    @abstractmethod
    async def tear_down(self) -> None:
        """Give back what :meth:`set_up` made, as far as it got."""

    @abstractmethod
    def unfinished(self) -> list[int]:
        """Return the numbers of all that somebody may still wait for; none is added from now on."""

    @abstractmethod
    def give_up(self, number: int, failure: Failure) -> None:
        """Fail one of them, if it is not over by now."""

    @abstractmethod
    async def drain(self) -> None:
        """Return when no write runs or can land any more."""

    @abstractmethod
    def has_drained(self) -> bool:
        """Whether none of *this* side's writes can land any more."""

    @abstractmethod
    def execute(self, command: Command) -> None:
        """Carry out one command of this kind of endpoint."""

    @abstractmethod
    def parted(self, command: Part) -> None:
        """Drop what belongs to a peer that is gone for good."""

    # Inputs.

    now = staticmethod(time.monotonic)
    """Return the time. Not the loop's: uvloop's stands still within a turn, in whole ms."""

    def packets_received(self, channel: Channel, peer: Peer, packets: Sequence[bytes]) -> None:
        """Take packets from a channel; what all of them lead to is done behind the last."""
        path, now = self._path(channel, peer), self.now()
        for packet in packets:
            try:
                self.endpoint.packet_received(path, packet, now)
            except AiommError as exc:
                self.complain(self._address_of(path) or path, str(peer), exc)
            except Exception:  # a bug with one packet must not cost the others
                logger.exception("! %s could not take a packet from %s", self.name, peer)
        if path not in self._lives:
            self._remember_life(path)
        self.pump()

    def complain(self, source: Hashable, what: str, error: AiommError) -> None:
        """Log that something was refused, once for each source."""
        if source not in self._complained:
            self._complained.add(source)
            logger.warning("! %s refuses %s: %s", self.name, what, error)

    def peer_lost(self, channel: Channel, peer: Peer, cause: str) -> None:
        """Learn from a channel that a path has ended."""
        path = self._path(channel, peer)
        logger.debug("x %s lost %s: %s", self.name, peer, cause)
        if path in self._lives:
            self._contact_anew(path)
        self.endpoint.path_lost(path, cause, self.now())
        self._complained.discard(path)
        self._forget_address(path)
        if not channel.proves_death or path not in self._lives:
            self._lives.pop(path, None)
            channel.disconnect(peer)  # else it is watched until it dies
        if not self.standing_contacts <= self._at_address.keys():
            self.loop.call_later(RECONTACT_DELAY, self._keep_contacts)
        self.pump()

    def peer_died(self, channel: Channel, peer: Peer) -> None:
        """Learn from a channel that a process is dead for certain."""
        life = self._lives.pop(self._path(channel, peer), None)
        if life is not None:
            self.endpoint.peer_died(life, self.now())
            self.pump()

    def _keep_contacts(self) -> None:
        """Contact whoever this side stays in contact with, also their next life."""
        if self.is_closing:
            return
        failed = []
        for address in self.standing_contacts:
            try:
                self.contact(address)
            except ValueError as exc:  # no descriptor is free: one may be soon
                failed.append(str(exc))
        if failed:
            logger.warning("! %s: %s", self.name, "; ".join(failed))
            self.loop.call_later(REFUSED_DELAY, self._keep_contacts)
        self.pump()

    def contact(self, address: str, until: float = NEVER) -> Path:
        """Return the path to `address`, saying Hello there until then if nobody has answered.

        Raises:
            ValueError: the address is malformed or not allowed.
        """
        path = self._at_address.get(address)
        if path is None:
            path = Path(0, self.channel, self.channel.connect(address))
            self._at_address[address] = path
        self.endpoint.contact(path, self.now(), until)
        return path

    def _contact_anew(self, path: Path) -> None:
        """Whoever waits for a Hello there, where a life has ended, means the next one."""
        address = self._address_of(path)
        if self.is_closing or address is None or not self.endpoint.says_hello(path):
            return
        self._forget_address(path)
        try:
            successor = Path(0, self.channel, self.channel.connect(address))
        except ValueError as exc:  # no descriptor is free
            logger.warning("! %s: %s", self.name, exc)
        else:
            self._at_address[address] = successor
            self.endpoint.redirect(path, successor, self.now())

    def path_to(self, address: str | None, life: int, timeout: float) -> Path | None:
        """Return the path for a first contact with `life`; None where none is needed, or helps.

        Hello is said there for `timeout` seconds at least.

        Raises:
            ValueError: the address is malformed or not allowed.
        """
        session = self.endpoint.sessions.get(life)
        if not address or self.endpoint.has_ended(life) or (session and session.paths):
            return None
        return self.contact(address, self.now() + timeout)

    def pump(self) -> None:
        """Execute what the endpoint wants, then arm the timer. Call it after every input.

        Before the start and after the end it does nothing: there is no way out.
        """
        if self._is_pumping or not self.is_started or self._is_finished:
            return
        self._is_pumping = True
        try:
            while commands := self.endpoint.commands(self.now()):
                for command in commands:
                    try:
                        if isinstance(command, Transmit):  # most are
                            self.outbox.send(command)
                        elif isinstance(command, OF_LINKS):
                            self._carry_out(command)
                        else:
                            self.execute(command)
                    except Exception:  # a bug in one command must not cost the others
                        kind = type(command).__name__  # its values may be secret
                        logger.exception("! %s could not carry out %s", self.name, kind)
        finally:
            self._is_pumping = False
            self._pumped.set()
            self.outbox.next_turn()
            self._arm_timer()

    async def next_pump(self) -> None:
        """Return when an input has led to something, or to nothing."""
        self._pumped.clear()
        await self._pumped.wait()

    def spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run `coroutine` as a task that this driver owns."""
        task = self.loop.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # Commands that both kinds know.

    def _carry_out(self, command: Greet | Part | Leave) -> None:
        match command:
            case Greet(peer, hello):
                logger.debug("= %s has a link with %s", self.name, hello.name)
                if hello.role == "receiver" and hello.stream and self.stream is not None:
                    self._upgrade(peer, hello.stream, self.stream)
                self.execute(command)
            case Part(peer, failure, proven):
                if failure.reason is Reason.BUSY:
                    logger.warning("! %s parts from a peer: %s", self.name, failure.message)
                logger.debug("x %s parts: %s (proven: %s)", self.name, failure.message, proven)
                if self.standing_contacts:
                    self.loop.call_later(REFUSED_DELAY, self._keep_contacts)
                if proven:
                    self._leave_streams(peer)
                    self.parted(command)
            case Leave(path):
                self._leave(path)
            case _:
                assert_never(command)

    def _address_of(self, path: Path) -> str | None:
        return next((at for at, each in self._at_address.items() if each == path), None)

    def _forget_address(self, path: Path) -> None:
        self._at_address = {at: each for at, each in self._at_address.items() if each != path}

    def _leave(self, path: Path) -> None:
        """Close the connection to where nobody has answered."""
        if not self.endpoint.leads_somewhere(path):  # as it may by now
            logger.debug("x %s: nobody answers at %s", self.name, path.peer)
            self._forget_address(path)
            path.channel.disconnect(path.peer)
            if not self.standing_contacts <= self._at_address.keys():
                self.loop.call_later(REFUSED_DELAY, self._keep_contacts)

    def _upgrade(self, peer: int, address: str, stream: UnixChannel) -> None:
        """Try the same-host stream: if the peer hears the Ping there, it will answer there."""
        try:
            there = stream.connect(address)
        except ValueError as exc:
            logger.debug("! %s cannot use %s: %s", self.name, address, exc)
            return
        # Known before anything comes from there: a stream of low rank is only ever listened to.
        self._lives[self._path(stream, there)] = peer
        ping = Packet(PROTOCOL_VERSION, self.endpoint.epoch, peer, 0, 0, Ping())
        stream.send(there, encode(ping))

    def _leave_streams(self, life: int) -> None:
        """Watch the process of a life that is over no longer."""
        for path in [path for path, each in self._lives.items() if each == life]:
            if self.stream is not None and path.channel is self.stream:
                del self._lives[path]
                self.stream.disconnect(path.peer)

    def _path(self, channel: Channel, peer: Peer) -> Path:
        return Path(self._stream_rank if channel is self.stream else 0, channel, peer)

    def _remember_life(self, path: Path) -> None:
        for life, session in self.endpoint.sessions.items():
            if path in session.paths:
                self._lives[path] = life
                return

    # The timer.

    def _arm_timer(self) -> None:
        at = self.endpoint.next_deadline()
        if at < self._timer_at:
            self._stop_timer()
            self._timer_at = at
            self._timer = self.loop.call_later(max(0.0, at - self.now()), self._timer_fired)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_at = None, NEVER

    def _timer_fired(self) -> None:
        self._timer, self._timer_at = None, NEVER
        self.endpoint.timer(self.now())
        self.pump()


def _control_channel(settings: EndpointSettings, bind: str | None, name: str) -> ZmqChannel:
    kind: type[ZmqChannel] = ZmqChannel
    if settings.control == "aiozmq":
        from ..control.aiozmq import AiozmqChannel

        kind = AiozmqChannel
    keys = keys_from(settings)
    return kind(
        bind, keys=keys, insecure=settings.insecure, advertise=settings.advertise, name=name
    )


def _stream_channel(*, listens: bool) -> UnixChannel | None:
    if not hasattr(os, "pidfd_open"):  # not Linux
        return None
    return UnixChannel(ANY_UNIX_ADDRESS if listens else None)


def _cause(task: asyncio.Task[None]) -> str:
    return "cancelled" if task.cancelled() else str(task.exception())
