"""The ZeroMQ control channel on aiozmq's transport (extra `aiomm[aiozmq]`).

For programs that already live on aiozmq. The default is :class:`aiomm.control.zeromq.ZmqChannel`:
aiozmq has had no release since 2022, does not import on Python 3.14, and reads one message per
turn of the loop. Three of its defects are kept away from here: an exception of a handler never
reaches it (one would stop its intake for ever); its write buffer never holds more than one
message; and `ROUTER_MANDATORY`, with which one vanished peer closes the socket for all, is on
only while this module itself asks ZeroMQ whether a peer is still there.

What follows from that and cannot be mended: a packet to a peer that connected to us and does not
keep up, or is gone, vanishes although `send` returned True; and a message is read in one turn of
the loop, however many frames a stranger puts into it.
"""

from __future__ import annotations

import asyncio
import importlib
from types import ModuleType
from typing import Any, ClassVar

import zmq

from .curve import Complaints
from .delivery import Delivery
from .event_socket import Intake
from .keys import Keys
from .sockets import Limits, PumpFactory, RouterSocket, ZmqPeer
from .zeromq import ZmqChannel

__all__ = ["AiozmqChannel"]


class AiozmqChannel(ZmqChannel):
    """Like :class:`aiomm.control.zeromq.ZmqChannel`, with aiozmq moving the messages.

    Raises:
        ImportError: aiozmq is not installed, or does not work on this Python.
        ValueError: as for `ZmqChannel`.
    """

    tells_full_queue: ClassVar[bool] = False

    def __init__(
        self,
        bind: str | None,
        *,
        keys: Keys | None = None,
        insecure: bool = False,
        advertise: str = "",
        name: str,
        limits: Limits | None = None,
    ) -> None:
        super().__init__(
            bind, keys=keys, insecure=insecure, advertise=advertise, name=name, limits=limits
        )
        self._library = _import_aiozmq()

    @property
    def pump_factory(self) -> PumpFactory:
        """What drives the sockets of this channel."""
        return lambda loop, socket, intake: _AiozmqPump(self._library, loop, socket, intake)

    def make_router(
        self,
        loop: asyncio.AbstractEventLoop,
        context: zmq.Context[zmq.Socket[bytes]],
        delivery: Delivery,
    ) -> RouterSocket:
        """Return the socket that listens, not bound yet."""
        return _LenientRouterSocket(loop, context, delivery, self._limits, self._complaints)


class _LenientRouterSocket(RouterSocket):
    """A ROUTER on which aiozmq never meets an error."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        context: zmq.Context[zmq.Socket[bytes]],
        delivery: Delivery,
        limits: Limits,
        complaints: Complaints,
    ) -> None:
        super().__init__(loop, context, delivery, limits, complaints)
        self.zmq_socket.setsockopt(zmq.ROUTER_MANDATORY, 0)

    def reaches(self, peer: ZmqPeer) -> bool:
        self.zmq_socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        try:
            return super().reaches(peer)
        finally:
            self.zmq_socket.setsockopt(zmq.ROUTER_MANDATORY, 0)


class _AiozmqPump:
    """Drives one socket with an aiozmq transport. It is that transport's protocol as well."""

    def __init__(
        self,
        library: ModuleType,
        loop: asyncio.AbstractEventLoop,
        socket: zmq.Socket[bytes],
        intake: Intake,
    ) -> None:
        self._loop = loop
        self._socket = socket
        self._intake = intake
        self._transport: Any = None
        self._is_paused = False
        self._is_closed = False
        self._next_look: asyncio.Handle | None = None
        # Never cancelled: aiozmq would then set the result of a cancelled future. It ends in
        # the next turn of the loop anyway.
        self._opening = loop.create_task(
            library.create_zmq_connection(lambda: self, socket.type, zmq_sock=socket, loop=loop)
        )

    def send(self, frames: list[bytes]) -> None:
        """Send one message; raises `zmq.Again` while aiozmq still holds one."""
        if self._transport is None or self._is_paused:
            raise zmq.Again
        self._transport.write(frames)

    def look(self) -> None:
        """Look for messages soon."""
        if self._next_look is None and self._transport is not None and not self._is_closed:
            self._next_look = self._loop.call_soon(self._look)

    def close(self, linger_ms: int) -> None:
        """Close the transport, and with it the socket, in the next turn of the loop."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._next_look is not None:
            self._next_look.cancel()
        self._socket.setsockopt(zmq.LINGER, linger_ms)
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: Any) -> None:
        """Begin: aiozmq's transport is there."""
        self._transport = transport
        if self._is_closed:
            transport.abort()
            return
        transport.set_write_buffer_limits(high=0)
        self._intake.turn_began()
        self.look()

    def connection_lost(self, exc: BaseException | None) -> None:
        """End: aiozmq closes the socket after this."""
        self._transport = None

    def pause_writing(self) -> None:
        """One message is in aiozmq's buffer; further ones wait in the peer's backlog."""
        self._is_paused = True

    def resume_writing(self) -> None:
        """The message has left; go on with the backlog."""
        self._is_paused = False
        self._intake.turn_began()

    def msg_received(self, frames: list[bytes]) -> None:
        """Pass one message on. No exception comes out of an intake."""
        if not self._is_closed:
            self._intake.message_received(frames)

    def _look(self) -> None:
        """Have aiozmq look for messages; the only public way is to pause and resume it."""
        self._next_look = None
        if self._transport is None or self._is_closed:
            return
        self._transport.pause_reading()
        self._transport.resume_reading()
        self._report_if_empty()

    def _report_if_empty(self) -> None:
        if self._is_closed:  # by what the look led to
            return
        if int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self.look()
        else:
            self._intake.emptied()


def _import_aiozmq() -> ModuleType:
    try:
        return importlib.import_module("aiozmq")
    except ImportError as exc:
        raise ImportError(
            f'control="aiozmq" needs aiozmq: pip install "aiomm[aiozmq]" ({exc})'
        ) from exc
