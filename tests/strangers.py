"""Those who do not belong to the network: what they do to an address, over and over.

Each runs in a process of its own: `python -m tests.strangers KIND ADDRESS`, until it is killed.
It prints a line for each attempt.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable

import zmq

__all__ = ["KINDS", "command_of"]

PAUSE = 0.01
"""Seconds between two attempts."""

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x04\x1c\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
FRAME_NBYTES = 60_000
MORE = b"\x03" + FRAME_NBYTES.to_bytes(8, "big") + bytes(FRAME_NBYTES)


def without_keys(host: str, port: int) -> None:
    """Speak plain ZeroMQ."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        _knock(dealer, host, port)


def with_a_wrong_key(host: str, port: int) -> None:
    """Speak CURVE to a server key out of the air."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.CURVE_SERVERKEY, zmq.curve_keypair()[0])
        public, secret = zmq.curve_keypair()
        dealer.setsockopt(zmq.CURVE_PUBLICKEY, public)
        dealer.setsockopt(zmq.CURVE_SECRETKEY, secret)
        _knock(dealer, host, port)


def http(host: str, port: int) -> None:
    """Ask for a page."""
    _say(host, port, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", 0)


def endless_multipart(host: str, port: int) -> None:
    """Send frames of a message that never ends: no limit of ZeroMQ's own stops this."""
    _say(host, port, GREETING + READY, 100_000)


KINDS: dict[str, Callable[[str, int], None]] = {
    "without keys": without_keys,
    "with a wrong key": with_a_wrong_key,
    "http": http,
    "endless multipart": endless_multipart,
}


def command_of(kind: str, address: str) -> list[str]:
    """Return the command that runs one stranger."""
    return [sys.executable, "-m", "tests.strangers", kind, address]


def _knock(dealer: zmq.Socket[bytes], host: str, port: int) -> None:
    dealer.setsockopt(zmq.LINGER, 0)
    dealer.setsockopt(zmq.IPV6, 1)
    dealer.setsockopt(zmq.RECONNECT_IVL, round(PAUSE * 1000))
    dealer.connect(f"tcp://{f'[{host}]' if ':' in host else host}:{port}")
    dealer.send(b"hello")
    dealer.poll(round(10_000 * PAUSE))  # nobody answers


def _say(host: str, port: int, first: bytes, count: int) -> None:
    """Connect, speak until the other side has had enough, and wait a little."""
    try:
        with socket.create_connection((host, port), timeout=5) as connection:
            connection.sendall(first)
            for _ in range(count):
                connection.sendall(MORE)
            while connection.recv(4096):
                pass
    except OSError:
        pass
    time.sleep(PAUSE)


if __name__ == "__main__":
    place, _, number = sys.argv[2].removeprefix("tcp://").rpartition(":")
    while True:
        KINDS[sys.argv[1]](place.strip("[]"), int(number))
        print(flush=True)
