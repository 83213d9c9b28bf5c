"""What an event loop can do over TCP on 127.0.0.1: no header, no check, one connection.

`transport.write` of the tensor on one side, a `BufferedProtocol` on the other that receives into
memory that is there. Both sides know how long it is.
"""

from __future__ import annotations

import asyncio
import socket

import torch

from .base import ROW_NBYTES, Adapter, Far, Near, bytes_of, landing

HOST = "127.0.0.1"


class Sink(asyncio.BufferedProtocol):
    """Receives as many bytes as it is told to expect, then the next as many."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._rest = memory[:0]
        self._spare = memoryview(bytearray(1))
        self.connected = asyncio.Event()
        self.filled = asyncio.Event()

    def expect(self, nbytes: int) -> None:
        """Take the next bytes for one tensor."""
        self.filled.clear()
        self._rest = self._memory[:nbytes]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Tell it."""
        self.connected.set()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return the memory for the next bytes; the end of the connection asks for some, too."""
        return self._rest or self._spare

    def buffer_updated(self, nbytes: int) -> None:
        """Tell when everything is there."""
        if not self._rest:
            raise RuntimeError("more came than was expected")
        self._rest = self._rest[nbytes:]
        if not self._rest:
            self.filled.set()


class RawFar(Far):
    """Has the memory, and a tensor over it."""

    async def open(self) -> str:
        """Listen; return the port."""
        self._target = landing(self.setting.largest)
        self._sink = Sink(bytes_of(self._target))
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: self._sink, HOST, 0)
        return str(self._server.sockets[0].getsockname()[1])

    async def connect(self) -> None:
        """Wait for the near side."""
        await self._sink.connected.wait()

    async def prepare(self, nbytes: int) -> str:
        """Expect that many bytes."""
        self._sink.expect(nbytes)
        return ""

    async def receive(self, nbytes: int) -> torch.Tensor:
        """Wait for them."""
        await self._sink.filled.wait()
        return self._target[: nbytes // ROW_NBYTES]

    async def close(self) -> None:
        """Listen no more."""
        self._server.close()


class RawNear(Near):
    """Writes."""

    runs_on_the_loop = True

    async def open(self, where: str) -> None:
        """Connect."""
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_connection(asyncio.Protocol, HOST, int(where))
        own = transport.get_extra_info("socket")
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._transport = transport

    async def send(self, rows: torch.Tensor) -> None:
        """Write the tensor's memory as it is; the loop goes on with what is left."""
        self._transport.write(bytes_of(rows))

    async def close(self) -> None:
        """Close the connection."""
        self._transport.close()


PATHS = {"raw tcp": Adapter(RawFar, RawNear)}
