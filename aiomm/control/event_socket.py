"""One ZeroMQ socket on an asyncio loop, by callback, on any loop that has `add_reader`.

ZeroMQ's descriptor is edge-triggered and speaks for commands inside the library, not for
messages. Three rules follow, each measured to be necessary: read until EAGAIN; look again after
every send, because a send may swallow the wake-up of a message that came in meanwhile; and
after a budget of messages go on in the next turn of the loop, so that one busy socket does not
starve the rest of the process.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import Protocol

import zmq

__all__ = ["EventMonitor", "EventSocket", "Intake", "Pump"]

MESSAGES_PER_TURN = 64
MAX_FRAMES = 16
"""Of one message. Packets come in two, questions about keys in nine; a stranger's message can have
millions of tiny ones."""


class Intake(Protocol):
    """What a socket's pump calls. None of these may raise."""

    def turn_began(self) -> None:
        """Use the chance to send what did not fit before."""

    def message_received(self, frames: list[bytes]) -> None:
        """Take one whole message."""

    def emptied(self) -> None:
        """Learn that every message that had arrived has been delivered."""


class Pump(Protocol):
    """What moves the messages of one socket: ours, or one built on another library."""

    def send(self, frames: list[bytes]) -> None:
        """Send one message, or raise `zmq.ZMQError` (EAGAIN, EHOSTUNREACH)."""

    def look(self) -> None:
        """Look for messages soon, and call `emptied` when there are none (left)."""

    def close(self, linger_ms: int) -> None:
        """Stop delivering and close the socket; what it holds may leave within `linger_ms`."""


class EventSocket:
    """Drives one pyzmq socket from the loop's readiness events."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, socket: zmq.Socket[bytes], intake: Intake
    ) -> None:
        self._loop = loop
        self._socket = socket
        self._intake = intake
        self._descriptor = int(socket.getsockopt(zmq.FD))
        self._next_look: asyncio.Handle | None = None
        self._is_draining = False
        self._is_refusing = False
        """The next frames still belong to a message that had too many."""
        self._is_closed = False
        loop.add_reader(self._descriptor, self._drain)
        self.look()

    def send(self, frames: list[bytes]) -> None:
        """Send one message; raises `zmq.ZMQError` if the socket does not take it now."""
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        finally:
            self.look()

    def look(self) -> None:
        """Drain in the next turn, unless a drain is already due or under way."""
        if self._next_look is None and not self._is_draining and not self._is_closed:
            self._next_look = self._loop.call_soon(self._drain)

    def close(self, linger_ms: int) -> None:
        """Leave the loop, then close the socket: a closed descriptor must not stay registered."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._next_look is not None:
            self._next_look.cancel()
        self._loop.remove_reader(self._descriptor)
        self._socket.close(linger=linger_ms)

    def _drain(self) -> None:
        if self._next_look is not None:
            self._next_look.cancel()
            self._next_look = None
        self._is_draining = True
        is_empty = False
        try:
            # Sending comes first: the reads that follow are the look that a send needs.
            self._intake.turn_began()
            is_empty = self._deliver_turn()
        finally:
            self._is_draining = False
            if not is_empty:
                self.look()
        if is_empty and not self._is_closed:
            self._intake.emptied()

    def _deliver_turn(self) -> bool:
        """Deliver at most a budget of messages; return whether none is left."""
        for _ in range(MESSAGES_PER_TURN):
            if self._is_closed:
                return True
            try:
                frames = self._receive()
            except zmq.Again:
                return True
            if frames:
                self._intake.message_received(frames)
        return False

    def _receive(self) -> list[bytes]:
        """Return one whole message; of one with too many frames drop some, and return none."""
        frames = [self._socket.recv(zmq.NOBLOCK)]
        while self._socket.getsockopt(zmq.RCVMORE):
            if len(frames) == MAX_FRAMES:
                self._is_refusing = True
                return []
            frames.append(self._socket.recv(zmq.NOBLOCK))
        if self._is_refusing:
            self._is_refusing = False
            return []
        return frames


class EventMonitor:
    """Tells the connection events of one ZeroMQ socket as they happen."""

    EVENTS = (
        zmq.EVENT_ACCEPTED
        | zmq.EVENT_CONNECTED
        | zmq.EVENT_HANDSHAKE_SUCCEEDED
        | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        | zmq.EVENT_DISCONNECTED
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        socket: zmq.Socket[bytes],
        on_event: Callable[[int, int], None],
    ) -> None:
        self._watched = socket
        self._on_event = on_event
        self._reports = EventSocket(loop, socket.get_monitor_socket(self.EVENTS), self)

    def close(self) -> None:
        """Stop; to be called before the watched socket is closed."""
        if not self._watched.closed:
            self._watched.disable_monitor()
        self._reports.close(linger_ms=0)

    def turn_began(self) -> None:
        """Nothing is ever sent here."""

    def message_received(self, frames: list[bytes]) -> None:
        """Pass one event on."""
        # Two bytes of event number, four of value. pyzmq's own reader would load zmq.asyncio.
        event, value = struct.unpack("=HI", frames[0])
        self._on_event(event, value)

    def emptied(self) -> None:
        """Nothing waits for this."""
