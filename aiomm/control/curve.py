"""CURVE on ZeroMQ sockets: who is let in, and how a handshake that fails is told.

A listening socket asks this process about every client's key (ZAP, RFC 27, over an inproc
socket of its context). The answer comes from the event loop, by callback.
"""

from __future__ import annotations

import asyncio
import logging

import zmq
from zmq.utils import z85

from .base import MAX_PACKET_NBYTES
from .event_socket import EventSocket
from .keys import KeyPair, Keys

__all__ = ["Authenticator", "Complaints", "secure_client", "secure_server"]

logger = logging.getLogger("aiomm.control")

ENDPOINT = "inproc://zeromq.zap.01"
DOMAIN = b"aiomm"
VERSION = b"1.0"
MAX_COMPLAINTS = 1024
MAX_BOX_NBYTES = MAX_PACKET_NBYTES + 33
"""ZeroMQ's limit is for what is on the wire: command, nonce, flags and seal come on top."""


def secure_server(socket: zmq.Socket[bytes], own: KeyPair) -> None:
    """Let in only whom the context's :class:`Authenticator` knows; without one, nobody."""
    socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
    socket.setsockopt(zmq.CURVE_SECRETKEY, own.secret)
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_BOX_NBYTES)


def secure_client(socket: zmq.Socket[bytes], own: KeyPair, server: bytes) -> None:
    """Talk only to whoever has the public key `server`."""
    socket.setsockopt(zmq.CURVE_SERVERKEY, server)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, own.public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, own.secret)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_BOX_NBYTES)


class Complaints:
    """Warns of each peer once; what comes again is for debugging."""

    def __init__(self) -> None:
        self._made: dict[object, None] = {}

    def make(self, about: object, message: str) -> None:
        """Log `message`, unless that was done for `about` before."""
        level = logging.DEBUG if about in self._made else logging.WARNING
        logger.log(level, "%s", message)
        self._made[about] = None
        if len(self._made) > MAX_COMPLAINTS:
            del self._made[next(iter(self._made))]


class Authenticator:
    """Answers the questions of one context's sockets: is this key known?"""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        context: zmq.Context[zmq.Socket[bytes]],
        keys: Keys,
        complaints: Complaints,
    ) -> None:
        self._keys = keys
        self._complaints = complaints
        socket = context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(ENDPOINT)
        self._pump = EventSocket(loop, socket, self)

    def close(self) -> None:
        """Answer no more."""
        self._pump.close(linger_ms=0)

    def turn_began(self) -> None:
        """Nothing waits to be sent."""

    def emptied(self) -> None:
        """Nothing waits for this."""

    def message_received(self, frames: list[bytes]) -> None:
        """Answer one question. Whatever is wrong with it, the next one is answered, too."""
        delimiter = frames.index(b"") + 1
        envelope, question = frames[:delimiter], frames[delimiter:]
        try:
            is_known = self._is_known(question)
        except Exception:
            logger.exception("! a client's key could not be checked")
            is_known = False
        status, text = (b"200", b"OK") if is_known else (b"400", b"unknown key")
        try:
            self._pump.send([*envelope, VERSION, question[1], status, text, b"", b""])
        except zmq.ZMQError as exc:
            logger.warning("! a client's handshake cannot be answered: %s", exc)

    def _is_known(self, question: list[bytes]) -> bool:
        version, _, domain, address, _, mechanism, *credentials = question
        if (version, domain, mechanism) != (VERSION, DOMAIN, b"CURVE"):
            return False
        public = z85.encode(credentials[0])
        if self._keys.knows(public):
            return True
        where = address.decode(errors="replace")
        message = f"x {where} refused: its key {public.decode()} is not among the known keys"
        self._complaints.make((where, public), message)
        return False
