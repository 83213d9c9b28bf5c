"""A peer in a process of its own: `python -m tests.control.child KIND ADDRESS MODE`.

It connects, says hello, echoes, and says goodbye when its standard input ends. Modes:

* `echo`: as told
* `unclosed`: leaves the loop after the first answer and closes nothing
* `leave`: disconnects at once, but stays until the input ends
* `fork`: starts a child that inherits its connections, and stays until the input ends
"""

from __future__ import annotations

import asyncio
import os
import sys

from aiomm.control.base import Peer

from .kinds import KINDS
from .recorder import Recorder, echo


async def input_ended() -> None:
    """Return when the test closes the pipe."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(sys.stdin.fileno(), ended.set)
    await ended.wait()
    loop.remove_reader(sys.stdin.fileno())


async def main(kind: str, address: str, mode: str) -> None:
    recorder = Recorder(echo if mode != "unclosed" else None)
    channel = KINDS[kind](None, "child")
    await channel.start(recorder)
    peer: Peer = channel.connect(address)
    if mode == "fork" and os.fork() == 0:
        sys.stdin.buffer.read()
        os._exit(0)
    channel.send(peer, b"hello")
    if mode == "unclosed":
        await recorder.until_packets(1)
        return
    if mode == "leave":
        channel.disconnect(peer)
    await input_ended()
    channel.send(peer, b"goodbye")
    await channel.aclose()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
