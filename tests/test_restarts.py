"""Another life at the same address, while the loop of the other side slept.

What it remembers of the address is then a life that has ended, and it has not heard of that yet.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Event
from typing import Any

import pytest

from aiomm import PeerLost, Receiver, Sender

from .support import (
    ANYWHERE,
    SCHEMA,
    SMALL_POOL,
    error_of,
    frozen_imports,  # noqa: F401
    same,
    tensors_of,
    until,
)

pytestmark = pytest.mark.usefixtures("no_leaks")

Tell = Callable[[str, str], None]
"""Called with an address and a ticket."""
Life = Callable[[str, Any, Tell, Event], Coroutine[Any, Any, None]]


async def language_process(bind: str, control: Any, tell: Tell, _: Event) -> None:
    """Expect a request, and live until it is here."""
    async with Receiver(SCHEMA, bind=bind, control=control, **SMALL_POOL) as receiver:
        tell(receiver.address or "", receiver.expect("request", timeout=10).to_json())
        async with receiver.receive("request") as lease:
            assert same(dict(lease), tensors_of(100))


async def encoder_process(bind: str, control: Any, tell: Tell, is_over: Event) -> None:
    """Offer a request, and live until that is over."""
    async with Sender(SCHEMA, bind=bind, control=control) as sender:
        offer = sender.offer("request", tensors_of(100), timeout=10)
        tell(sender.address or "", offer.to_json())
        await asyncio.to_thread(is_over.wait)
        offer.withdraw()
        assert await offer == 1


@contextmanager
def life(process: Life, bind: str, control: Any) -> Iterator[tuple[str, str]]:
    """Yield the address and the ticket of a life that runs on a thread. Blocks, on purpose."""
    told: SimpleQueue[tuple[str, str]] = SimpleQueue()
    is_over = Event()

    def tell(address: str, ticket: str) -> None:
        told.put((address, ticket))

    with ThreadPoolExecutor(1) as thread:
        ended = thread.submit(lambda: asyncio.run(process(bind, control, tell, is_over)))
        try:
            yield told.get(timeout=20)
        finally:
            is_over.set()
            ended.result()


@pytest.mark.parametrize("control", ["auto", "zmq"])
async def test_a_ticket_of_a_receiver_that_has_begun_a_new_life(control: Any) -> None:
    """It is claimed from the new life, not judged by what is remembered of the old one."""
    address = ANYWHERE
    async with Sender(SCHEMA, control=control) as sender:
        for _ in range(3):
            with life(language_process, address, control) as (address, ticket):
                await sender.send(ticket, tensors_of(100))


@pytest.mark.parametrize("control", ["auto", "zmq"])
async def test_a_ticket_of_a_life_that_is_over(control: Any) -> None:
    """Whoever is there now says so, as often as it is asked; and nobody waits."""
    with life(language_process, ANYWHERE, control) as (address, old):
        async with Sender(SCHEMA, control=control) as sender:
            await sender.send(old, tensors_of(100))
    async with Sender(SCHEMA, control=control) as sender:
        with life(language_process, address, control) as (_, ticket):
            for _ in range(3):
                error = await error_of(sender.send(old, tensors_of(100)))
                assert isinstance(error, PeerLost)
                assert "restarted since" in error.message
            await sender.send(ticket, tensors_of(100))


@pytest.mark.parametrize("control", ["auto", "zmq"])
async def test_an_offer_of_a_sender_that_has_begun_a_new_life(control: Any) -> None:
    """It is redeemed at the new life."""
    address = ANYWHERE
    async with Receiver(SCHEMA, control=control, **SMALL_POOL) as receiver:
        for _ in range(3):
            with life(encoder_process, address, control) as (address, ticket):
                async with receiver.receive(ticket) as lease:
                    assert same(dict(lease), tensors_of(100))


async def test_a_foreign_program_that_held_the_port_for_a_while() -> None:
    """It greets first, which ZeroMQ takes for a peer's; a standing contact is made again."""

    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"\x01\x00\x06\x00hello")  # an empty message and one of five bytes
        writer.close()

    foreign = await asyncio.start_server(greet, "127.0.0.1", 0)
    address = f"tcp://127.0.0.1:{foreign.sockets[0].getsockname()[1]}"
    async with Receiver(SCHEMA, connect=address, **SMALL_POOL) as receiver:
        driver = receiver._driver
        await until(lambda: driver._complained, driver, "complain")
        foreign.close()
        async with Sender(SCHEMA, bind=address) as sender:
            sending = sender.send("request", tensors_of(10), timeout=10)
            _, lease = await asyncio.gather(sending, take(receiver))
            assert lease == 10


async def take(receiver: Receiver) -> int:
    """Receive the request; return its length."""
    async with receiver.receive("request", timeout=10) as lease:
        return lease.num_tokens
