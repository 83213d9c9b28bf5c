"""A handler that writes down what it is told, and lets a test wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from aiomm.control.base import Channel, Peer

DEADLINE = 20.0


class Recorder:
    """Keeps everything a channel says; optionally answers or fails."""

    def __init__(self, on_packet: Callable[[Channel, Peer, bytes], object] | None = None) -> None:
        self.packets: list[bytes] = []
        self.senders: list[Peer] = []
        self.lost: list[Peer] = []
        self.died: list[Peer] = []
        self.causes: list[str] = []
        self._on_packet = on_packet
        self._changed = asyncio.Event()

    def packets_received(self, channel: Channel, peer: Peer, packets: Sequence[bytes]) -> None:
        self.packets += packets
        self.senders += [peer] * len(packets)
        self._changed.set()
        for packet in packets:
            if self._on_packet is not None:
                self._on_packet(channel, peer, packet)

    def peer_lost(self, channel: Channel, peer: Peer, cause: str) -> None:
        self.lost.append(peer)
        self.causes.append(cause)
        self._changed.set()

    def peer_died(self, channel: Channel, peer: Peer) -> None:
        self.died.append(peer)
        self._changed.set()

    async def until(self, holds: Callable[[Recorder], bool]) -> None:
        """Return once `holds` is true of this recorder."""
        async with asyncio.timeout(DEADLINE):
            while not holds(self):
                self._changed.clear()
                await self._changed.wait()

    async def until_packets(self, count: int) -> None:
        await self.until(lambda recorder: len(recorder.packets) >= count)

    async def until_lost(self, count: int = 1) -> None:
        await self.until(lambda recorder: len(recorder.lost) >= count)


def echo(channel: Channel, peer: Peer, packet: bytes) -> None:
    """Send every packet back."""
    channel.send(peer, packet)
