"""Where planes listen, and what peers are told: never a wildcard, and loopback where possible."""

from __future__ import annotations

import pytest

from aiomm import Field, Receiver, Schema
from aiomm._driver.place import place_of
from aiomm.control.address import TcpAddress
from aiomm.planes.base import Place
from aiomm.planes.registry import make_planes
from aiomm.planes.tcp import TcpPlane
from aiomm.planes.tcp.wire import decode_offer

OUT = TcpAddress("192.0.2.1", 9).local_host()


@pytest.mark.parametrize(
    ("bind", "contacts", "advertise", "place"),
    [
        (None, (), "", Place("127.0.0.1", "127.0.0.1")),
        ("ipc:///tmp/x/y", (), "", Place("127.0.0.1", "127.0.0.1")),
        ("tcp://127.0.0.1:*", (), "", Place("127.0.0.1", "127.0.0.1")),
        ("tcp://localhost:7", (), "", Place("127.0.0.1", "127.0.0.1")),
        ("tcp://[::1]:7", (), "", Place("::1", "::1")),
        ("tcp://10.1.2.3:7", (), "", Place("10.1.2.3", "10.1.2.3")),
        ("tcp://10.1.2.3:7", (), "gpu-7", Place("10.1.2.3", "gpu-7")),
        ("tcp://0.0.0.0:7", (), "gpu-7", Place("0.0.0.0", "gpu-7")),
        ("tcp://*:7", (), "", Place("*", OUT)),
        (None, ("tcp://127.0.0.1:7",), "", Place("127.0.0.1", "127.0.0.1")),
        (None, ("tcp://127.0.0.1:7", "tcp://192.0.2.9:7"), "", Place(OUT, OUT)),
        (None, ("tcp://host.invalid:7",), "", Place(OUT, OUT)),
        (None, ("tcp://192.0.2.9:7",), "gpu-7", Place(OUT, "gpu-7")),
        (None, (), "10.1.2.3", Place("10.1.2.3", "10.1.2.3")),
    ],
)
def test_place(bind: str | None, contacts: tuple[str, ...], advertise: str, place: Place) -> None:
    assert place_of(bind, contacts, advertise) == place


async def test_planes_listen_where_the_endpoint_does() -> None:
    (plane,) = make_planes("tcp", Place("0.0.0.0", "127.0.0.2"))
    assert isinstance(plane, TcpPlane)
    receiver = Receiver(
        Schema(rows=Field("uint8", 8)),
        bind="tcp://0.0.0.0:*",
        advertise="127.0.0.2",
        insecure=True,
        planes="tcp",
        blocks=1,
    )
    async with receiver:
        assert str(receiver.address).startswith("tcp://127.0.0.2:")
        (offer,) = receiver._driver._exports.offers(1)
        assert decode_offer(offer.offer).host == "127.0.0.2"
