"""Packets over one connected stream socket: four bytes of length, then the packet.

The loop only tells readiness; reading and writing are plain calls on the socket, so a packet is
in the kernel before `write` returns. Only the second and later answers to packets that came in
together wait for the last of these, and leave together in one call.
"""

from __future__ import annotations

import asyncio
import fcntl
import socket
import struct
import termios
from collections.abc import Sequence
from typing import Protocol

from .base import MAX_PACKET_NBYTES

__all__ = ["PacketStream", "StreamIntake"]

LENGTH = struct.Struct("<I")
FIRST_BUFFER_NBYTES = 16 * 1024
FULL_BUFFER_NBYTES = LENGTH.size + MAX_PACKET_NBYTES
TURN_NBYTES = 4 * 1024
"""Taken from a socket in one turn of the loop: some forty packets, 2 ms of work."""
INT = struct.Struct("i")


class StreamIntake(Protocol):
    """What a stream calls. None of these may raise."""

    def packets_received(self, packets: Sequence[bytes]) -> None:
        """Take whole packets, at least one."""

    def stream_ended(self, cause: str) -> None:
        """Learn, once, that the stream ended other than by `close`."""


class PacketStream:
    """One connected, non-blocking stream socket, which it owns."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        connection: socket.socket,
        intake: StreamIntake,
        *,
        limit_nbytes: int,
    ) -> None:
        self._loop = loop
        self._connection = connection
        self._intake = intake
        self._limit_nbytes = limit_nbytes
        # Grows once, when a peer sends more than small packets: there may be many quiet peers.
        self._buffer = bytearray(FIRST_BUFFER_NBYTES)
        self._filled = 0
        self._outgoing = bytearray()
        self._is_delivering = False
        self._gathers = False
        self._waits_for_room = False
        self._is_closed = False
        loop.add_reader(connection.fileno(), self._read)

    def write(self, packet: bytes) -> bool:
        """Send `packet` now or soon; return False if too much waits, or the stream has ended."""
        if self._is_closed:
            return False
        frame = LENGTH.pack(len(packet)) + packet
        if self._gathers or self._outgoing:
            if len(self._outgoing) + len(frame) > self._limit_nbytes:
                return False
            self._outgoing += frame
            return True
        self._gathers = self._is_delivering
        sent = self._send(frame)
        if sent < len(frame):
            self._outgoing += frame[sent:]
            self._wait_for_room()
        return True

    def unread_nbytes(self) -> int:
        """Return how many bytes have arrived and are not read yet."""
        if self._is_closed:
            return 0
        raw = fcntl.ioctl(self._connection.fileno(), termios.FIONREAD, bytes(INT.size))
        return int(INT.unpack(raw)[0])

    def close(self) -> None:
        """Send what can be sent without waiting, and close. Idempotent; calls nothing back."""
        if self._is_closed:
            return
        if self._outgoing:
            self._send(self._outgoing)
        self._stop()

    def _read(self) -> None:
        try:
            free = min(len(self._buffer) - self._filled, TURN_NBYTES)
            received = self._connection.recv_into(memoryview(self._buffer)[self._filled :], free)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as exc:
            self._end(f"the connection broke: {exc}")
            return
        if received == 0:
            self._end("the peer closed the connection")
            return
        self._filled += received
        self._is_delivering = True
        try:
            self._deliver()
        finally:
            self._is_delivering = self._gathers = False
            self._flush()

    def _deliver(self) -> None:
        """Hand over the whole packets of the buffer, and move the rest to its front."""
        packets = []
        start, cause = 0, ""
        while self._filled - start >= LENGTH.size:
            (length,) = LENGTH.unpack_from(self._buffer, start)
            if length > MAX_PACKET_NBYTES:
                cause = f"it announced a packet of {length} bytes"
                break
            end = start + LENGTH.size + length
            if end > self._filled:
                break
            if length:
                packets.append(bytes(self._buffer[start + LENGTH.size : end]))
            start = end
        if packets:
            self._intake.packets_received(packets)
        if self._is_closed:  # by what the packets led to
            return
        if cause:
            self._end(cause)
        else:
            self._keep_rest(start)

    def _keep_rest(self, start: int) -> None:
        if start:
            rest = self._buffer[start : self._filled]
            self._filled = len(rest)
            self._buffer[: self._filled] = rest
        elif self._filled == len(self._buffer):
            self._buffer += bytes(FULL_BUFFER_NBYTES - self._filled)

    def _flush(self) -> None:
        if self._outgoing:
            del self._outgoing[: self._send(self._outgoing)]
        if self._outgoing:
            self._wait_for_room()
        elif self._waits_for_room:
            self._waits_for_room = False
            self._loop.remove_writer(self._connection.fileno())

    def _wait_for_room(self) -> None:
        if not self._waits_for_room:
            self._waits_for_room = True
            self._loop.add_writer(self._connection.fileno(), self._flush)

    def _send(self, octets: bytes | bytearray) -> int:
        """Give the kernel what it takes; return how much that was."""
        try:
            return self._connection.send(octets)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:
            # The reading side learns the same from the kernel, after what is still to be read.
            return len(octets)

    def _end(self, cause: str) -> None:
        self._stop()
        self._intake.stream_ended(cause)

    def _stop(self) -> None:
        self._is_closed = True
        descriptor = self._connection.fileno()
        self._loop.remove_reader(descriptor)
        if self._waits_for_room:
            self._waits_for_room = False
            self._loop.remove_writer(descriptor)
        self._outgoing.clear()
        self._connection.close()
