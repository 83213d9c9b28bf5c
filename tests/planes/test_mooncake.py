"""The mooncake plane passes the contract, over the real engine and over a fake one that fails."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

import aiomm
from aiomm.buffers.arena import Arena, HostArena
from aiomm.buffers.memcpy import address_of
from aiomm.buffers.tensors import memory_of
from aiomm.errors import PlaneUnavailable, ProtocolError
from aiomm.planes import door
from aiomm.planes.base import Place, Plane
from aiomm.planes.mooncake import MooncakePlane, engine, library, receiving, wire
from aiomm.planes.mooncake.reads import target_in
from aiomm.planes.mooncake.sending import MooncakeArena
from aiomm.planes.mooncake.staging import SLOT_NBYTES
from aiomm.planes.mooncake.wire import MAGIC, decode_offer

from ..conftest import resources
from ..processes import until
from . import contract
from .contract import (
    ARENA_NBYTES,
    GRANT,
    LINK,
    Link,
    NotesContract,
    bytes_of,
    expected_content,
    random_rows,
    strided_rows,
    whole,
)
from .fake_mooncake import FakeNetwork


def why_missing() -> str:
    """Say why there is no real engine here; empty if there is one."""
    try:
        library.load("127.0.0.1")
    except PlaneUnavailable as exc:
        return exc.message
    return ""


MISSING = why_missing()
ENGINE_PORTS = range(15000, 17001)


def engine_sockets() -> set[str]:
    """Return the sockets of engines, told by their ports; they live as long as the process."""
    found = set()
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        with open(table) as lines:
            for fields in map(str.split, list(lines)[1:]):
                ports = {int(address.rpartition(":")[2], 16) for address in fields[1:3]}
                if ports & set(ENGINE_PORTS):
                    found.add(f"socket:[{fields[9]}]")
    return found


def own_resources() -> dict[str, set[str]]:
    """Return the resources that are not an engine's."""
    sockets = engine_sockets()
    found = resources()
    found["descriptors"] = {
        each for each in found["descriptors"] if each.partition(" -> ")[2] not in sockets
    }
    return found


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> FakeNetwork:
    """Put a fake engine in place of the real one."""
    network = FakeNetwork()
    monkeypatch.setattr(library, "_import_engine", network.library)
    monkeypatch.setattr(engine, "_engines", {})
    monkeypatch.setattr(library, "_process", os.getpid())
    return network


@pytest.mark.usefixtures("network")
class TestMooncakePlaneOverAFakeEngine(NotesContract):
    def make_plane(self) -> Plane:
        return MooncakePlane()

    def make_arena(self, nbytes: int) -> Arena:
        return HostArena(nbytes)


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
class TestMooncakePlane(NotesContract):
    def make_plane(self) -> Plane:
        return MooncakePlane()

    def make_arena(self, nbytes: int) -> Arena:
        return HostArena(nbytes)

    @pytest.fixture
    def no_leaks(self, used_loops: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """As elsewhere, but for what an engine keeps until its process ends."""
        engine.engine_at("127.0.0.1", engine.PEER_TO_PEER)
        monkeypatch.setattr(contract, "resources", own_resources)
        gc.collect()
        before = own_resources()
        yield
        after = own_resources()
        leaked = {name: sorted(after[name] - before[name]) for name in after}
        assert not any(leaked.values()), f"left behind: {leaked}"


# What the real engine does rarely, the fake one does at once.


async def open_link(plane: MooncakePlane | None = None, nbytes: int = ARENA_NBYTES) -> Link:
    """Return a link over the fake engine."""
    plane = plane or MooncakePlane()
    arena = HostArena(nbytes)
    arena.view(0, nbytes)[:] = b"\xa5" * nbytes
    export = await plane.export(arena)
    return Link(plane, arena, export, await plane.attach(export.offer(LINK)))


@pytest.fixture
async def link(network: FakeNetwork) -> AsyncIterator[Link]:
    link = await open_link()
    yield link
    network.stuck.clear()
    await link.aclose()


@pytest.mark.parametrize("outcome", [0, -1])
async def test_a_read_that_fails_fails_its_write_only(
    network: FakeNetwork, link: Link, outcome: int
) -> None:
    network.outcomes.append(outcome)
    with pytest.raises(PlaneUnavailable, match="could not read"):
        await link.write([whole(random_rows(4, 16), 0)])
    assert link.export.revoke(GRANT)
    tensor = random_rows(4, 16)
    await link.write([whole(tensor, 64)])
    assert link.content() == expected_content(ARENA_NBYTES, (64, tensor))


async def test_what_a_failed_peer_has_ready_is_not_tried_one_by_one(
    network: FakeNetwork, link: Link
) -> None:
    network.outcomes += [-1] * receiving.MAX_READS
    rows = random_rows(3000, 16)
    with pytest.raises(PlaneUnavailable, match="could not read"):
        await link.write([whole(rows[n : n + 1], 32 * n) for n in range(3000)])
    before = link.content()
    await link.remote.quiesce()
    assert link.content() == before


async def test_what_could_not_be_read_has_no_note(network: FakeNetwork, link: Link) -> None:
    """Neither the one parcel of a short write, nor the parcel behind all others of a long one."""
    notes: list[bytes] = []
    link.export.noted = lambda _, together: notes.extend(together)
    rows = random_rows(600, 16)
    for count in (1, 600):
        network.outcomes.append(-1)
        runs = [whole(rows[n : n + 1], 32 * n) for n in range(count)]
        link.permit(runs)
        with pytest.raises(PlaneUnavailable, match="could not read"):
            await link.remote.write_and_note(GRANT, runs, lambda: b"note")
        await link.remote.quiesce()
        assert notes == []
        network.outcomes.clear()
        await link.remote.write_and_note(GRANT, runs, lambda: b"note")
        assert notes == [b"note"]
        notes.clear()


@pytest.mark.parametrize(
    ("num_pieces", "note_nbytes"), [(0, 0), (257, 0), (0, 4097), (1, 4097), (257, 1)]
)
def test_parcels_that_cannot_be(num_pieces: int, note_nbytes: int) -> None:
    """Each is told from its first bytes."""
    with pytest.raises(ProtocolError, match=f"{num_pieces} pieces and a note of {note_nbytes}"):
        wire.parse_parcel(memoryview(wire.PARCEL.pack(1, 1, 1, num_pieces, note_nbytes)), 100)


def test_a_parcel_comes_in_pieces() -> None:
    """Nothing is taken before all of it is there."""
    pieces = (wire.Piece(1, 2, 3), wire.Piece(4, 5, 6))
    encoded = wire.encode_parcel(9, GRANT, pieces, b"note") + b"behind"
    whole_nbytes = len(encoded) - len(b"behind")
    for nbytes in range(whole_nbytes):
        assert wire.parse_parcel(memoryview(encoded)[:nbytes], 100) is None
    parcel = wire.parse_parcel(memoryview(encoded), 100)
    assert parcel == (9, GRANT.generation, GRANT.sequence, pieces, b"note", whole_nbytes)


async def test_a_stuck_read_is_what_still_lands(network: FakeNetwork, link: Link) -> None:
    network.outcomes.append(2)
    tensor = random_rows(4, 16)
    write = asyncio.create_task(link.write([whole(tensor, 0)]))
    await until(lambda: bool(network.stuck), "the read has begun")
    write.cancel()
    await asyncio.gather(write, return_exceptions=True)
    assert not link.export.revoke(GRANT)
    (landing,) = link.export.landing(GRANT)
    quiet = asyncio.create_task(link.remote.quiesce())
    await asyncio.sleep(0.01)
    assert not quiet.done()
    assert not landing.done()
    network.stuck.clear()
    assert await landing
    await quiet
    assert not link.export.landing(GRANT)
    assert link.export.revoke(GRANT)
    assert link.content() == expected_content(ARENA_NBYTES, (0, tensor))


async def test_closing_waits_no_longer_than_it_says(
    network: FakeNetwork, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiving, "CLOSING_SECONDS", 0.05)
    network.outcomes.append(2)
    write = asyncio.create_task(link.write([whole(random_rows(4, 16), 0)]))
    await until(lambda: bool(network.stuck), "the read has begun")
    await link.export.aclose()
    with pytest.raises(PlaneUnavailable, match="closed the connection"):
        await write
    link.arena.close()  # its memory stays mapped for the read that may still come
    network.stuck.clear()


async def test_the_engine_never_runs_more_than_256_reads(network: FakeNetwork) -> None:
    shared = await asyncio.to_thread(engine.engine_at, "127.0.0.1", engine.PEER_TO_PEER)
    arena = HostArena(4096)
    target = target_in(arena, 0, 8)
    source = engine_of(network)
    await asyncio.to_thread(shared.register, arena_address(arena), 4096)
    network.outcomes += [2] * 256
    shared.reads.hold()
    reads = [shared.reads.start(source, arena_address(arena), target) for _ in range(300)]
    await until(lambda: len(network.stuck) == 256, "256 run")
    network.stuck.clear()
    assert all(await asyncio.gather(*reads))
    assert network.most_running == 256
    shared.reads.let_go()


async def test_staging_is_bounded_and_waits_in_line(network: FakeNetwork) -> None:
    link = await open_link(MooncakePlane(staging_nbytes=2 * SLOT_NBYTES), 64 << 20)
    assert isinstance(link.remote, MooncakeArena)
    network.outcomes += [2, 2]
    tensors = [random_rows(8, 1 << 20, seed) for seed in range(8)]
    writes = [
        asyncio.create_task(
            link.write([whole(tensor, seed * (8 << 20))], GRANT._replace(sequence=seed))
        )
        for seed, tensor in enumerate(tensors)
    ]
    await until(lambda: len(network.stuck) == 2, "both slots are being read")
    assert not any(write.done() for write in writes)
    network.stuck.clear()
    await asyncio.gather(*writes)
    assert link.remote._outlet.staging.num_slots == 2
    assert link.content() == b"".join(map(bytes_of, tensors))
    await link.aclose()
    assert not next(iter(network.engines.values())).registered


async def test_without_memory_for_staging_a_write_fails(network: FakeNetwork, link: Link) -> None:
    network.register_code = -1
    with pytest.raises(PlaneUnavailable, match="registered: error -1"):
        await link.write([whole(random_rows(4, 16), 0)])
    network.register_code = 0
    await link.write([whole(random_rows(4, 16), 0)])


async def test_rows_longer_than_a_slot(network: FakeNetwork) -> None:
    link = await open_link(nbytes=32 << 20)
    for tensor in (random_rows(2, 9 << 20), strided_rows(2, 9 << 20)):
        await link.write([whole(tensor, 0)])
        assert link.content()[: 18 << 20] == bytes_of(tensor)
    await link.aclose()


async def test_registered_memory_is_read_from_where_it_is(network: FakeNetwork, link: Link) -> None:
    assert isinstance(link.remote, MooncakeArena)
    tensor = random_rows(100, 64)
    memory = memory_of(tensor)
    await link.plane.register(memory)
    await link.write([whole(tensor[10:20], 640)])
    assert link.remote._outlet.staging.num_slots == 0
    assert link.content() == expected_content(ARENA_NBYTES, (640, tensor[10:20]))
    await link.plane.unregister(memory)
    await link.plane.unregister(memory)
    await link.write([whole(tensor[:10], 0)])
    assert link.remote._outlet.staging.num_slots == 1


async def test_over_rdma_the_arena_is_registered_once(
    network: FakeNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiomm.planes.mooncake.uses_tcp", lambda: False)
    link = await open_link()
    (fake,) = network.engines.values()
    assert list(fake.registered.values()) == [ARENA_NBYTES]
    await link.write([whole(random_rows(4, 16), 0)])
    await link.aclose()
    assert not fake.registered


async def test_a_sender_that_is_not_reached_is_unavailable(network: FakeNetwork) -> None:
    plane = MooncakePlane()
    arena = HostArena(4096)
    export = await plane.export(arena)
    network.before_probe = network.engines.clear
    with pytest.raises(PlaneUnavailable, match=r"cannot reach this process at 127.0.0.1:\d+"):
        await plane.attach(export.offer(LINK))
    await export.aclose()


async def test_one_engine_serves_a_process(network: FakeNetwork) -> None:
    links = [await open_link() for _ in range(3)]
    assert network.hosts == ["127.0.0.1"]
    for link in links:
        await link.aclose()


async def test_an_engine_that_does_not_begin_is_unavailable(network: FakeNetwork) -> None:
    network.initialize_code = -1
    plane = MooncakePlane(metadata="http://127.0.0.1:1/metadata")
    with pytest.raises(PlaneUnavailable, match="metadata: error -1"):
        await plane.export(HostArena(4096))


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"aiommM01" + bytes(64),
        MAGIC + bytes(8 + 16) + b"\x00\x01x",
        MAGIC + bytes(8 + 16) + b"\xff\xff",
        MAGIC + bytes(8 + 16) + b"\x00\x01\xff",
    ],
)
async def test_a_stranger_gets_nothing(link: Link, said: bytes) -> None:
    offer = decode_offer(link.export.offer(LINK))
    reader, writer = await asyncio.open_connection(offer.host, offer.port)
    writer.write(said)
    assert await reader.read() == b""
    writer.close()
    await link.write([whole(random_rows(4, 16), 0)])


async def test_silent_strangers_are_bounded(link: Link) -> None:
    offer = decode_offer(link.export.offer(LINK))
    strangers = [
        await asyncio.open_connection(offer.host, offer.port) for _ in range(door.MAX_STRANGERS + 2)
    ]
    assert await strangers[0][0].read() == b""
    await link.write([whole(random_rows(4, 16), 0)])
    for _, writer in strangers:
        writer.close()


# Where it cannot be used at all.


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (ModuleNotFoundError("No module named 'mooncake'"), r'pip install "aiomm\[mooncake\]"'),
        (ImportError("libibverbs.so.1: cannot open"), "system package libibverbs1"),
        (ImportError("libnuma.so.1: cannot open"), "system package libnuma1"),
        (ImportError("libcurl.so.4: cannot open"), "system package libcurl4"),
        (ImportError("libcudart.so.12: cannot open"), "CUDA build .*libcudart.so: .*LD_LIBRARY"),
        (ImportError("libcuda.so.1: cannot open"), "CUDA build .*libcuda.so: .*driver"),
        (ImportError("libmlx5.so.1: cannot open"), "CUDA build .*ibverbs-providers; or"),
        (ImportError("undefined symbol: ibv_wink"), "ibv_wink"),
    ],
)
async def test_what_the_import_lacks_is_said(
    network: FakeNetwork, monkeypatch: pytest.MonkeyPatch, error: ImportError, advice: str
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(library, "_import_engine", fail)
    with pytest.raises(PlaneUnavailable, match=advice):
        await MooncakePlane().export(HostArena(4096))


def test_what_is_missing_shows_without_the_import(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        if name == "libnuma.so.1":
            raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(library, "_process", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert 'pip install "aiomm[mooncake]"' in (MooncakePlane().unusable() or "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setattr("ctypes.CDLL", load)
    assert "system package libnuma1" in (MooncakePlane().unusable() or "")


async def test_a_forked_child_is_refused(
    network: FakeNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_process", os.getpid() + 1)
    assert "forked" in (MooncakePlane().unusable() or "")
    with pytest.raises(PlaneUnavailable, match="spawn"):
        await MooncakePlane().export(HostArena(4096))


async def test_an_engine_speaks_one_version_of_ip(
    network: FakeNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MC_USE_IPV6", raising=False)
    with pytest.raises(
        PlaneUnavailable, match="was loaded for IPv4 and cannot use ::1; start another"
    ):
        await MooncakePlane(bind="::1").export(HostArena(4096))


def test_without_rdma_it_has_to_be_asked_for(
    network: FakeNetwork, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "RDMA_DEVICES", tmp_path)
    assert "no RDMA" in (MooncakePlane.at(Place(), by_name=False).unusable() or "")
    assert MooncakePlane.at(Place(), by_name=True).unusable() is None
    (tmp_path / "mlx5_0").touch()
    assert MooncakePlane.at(Place(), by_name=False).unusable() is None


# And what follows for a sender, and for the pool.


async def test_a_sender_registers_its_buffer(network: FakeNetwork) -> None:
    schema = aiomm.Schema(rows=aiomm.Field("uint8", 64))
    buffer = random_rows(512, 64)
    async with (
        aiomm.Receiver(schema, bind="tcp://127.0.0.1:*", planes="mooncake") as receiver,
        aiomm.Sender(schema, planes=["mooncake", "tcp"]) as sender,
    ):
        await sender.register(buffer)
        await sender.send(receiver.expect("one"), {"rows": buffer[100:200]})
        async with receiver.receive("one") as lease:
            assert lease["rows"].numpy().tobytes() == bytes_of(buffer[100:200])  # type: ignore[union-attr]
        (fake,) = network.engines.values()
        assert buffer.nbytes in fake.registered.values()
        await sender.unregister(buffer)
        assert buffer.nbytes not in fake.registered.values()
        for wrong in (buffer[:, ::2], b"read-only", buffer[:0], object()):
            with pytest.raises(aiomm.IncompatibleSchema):
                await sender.register(wrong)


async def test_blocks_are_not_free_before_the_last_read_has_ended(network: FakeNetwork) -> None:
    """Though the sender has lost its connection, and said that it writes no more."""
    schema = aiomm.Schema(rows=aiomm.Field("uint8", 64))
    address = "tcp://127.0.0.1:*"
    async with (
        aiomm.Receiver(schema, bind=address, blocks=4, planes=[MooncakePlane()]) as receiver,
        aiomm.Sender(schema, planes=[MooncakePlane()]) as sender,
    ):
        ticket = receiver.expect("first")
        await sender.send(ticket, {"rows": random_rows(128, 64)})
        (await receiver.receive("first")).release()
        network.outcomes.append(2)
        transfer = sender.claim(receiver.expect("second"), num_tokens=128)
        transfer.send({"rows": random_rows(128, 64)})
        await until(lambda: bool(network.stuck), "the read has begun")
        (route,) = [task.result() for task in sender._driver._routes.values()]
        assert isinstance(route.arena, MooncakeArena)
        route.arena._connection.lose("cut off")
        with pytest.raises(PlaneUnavailable, match="cut off"):
            await transfer
        with pytest.raises(PlaneUnavailable):
            await receiver.receive("second")
        await until(sender._driver.has_drained, "the sender has drained")
        await asyncio.sleep(0.05)
        assert receiver.metrics()["blocks_free"] < 4
        network.stuck.clear()
        await until(lambda: receiver.metrics()["blocks_free"] == 4, "the blocks are free")


def engine_of(network: FakeNetwork) -> str:
    """Return the session of the only engine."""
    (session,) = network.engines
    return session


def arena_address(arena: HostArena) -> int:
    """Return where an arena lies."""
    return address_of(arena.view(0, arena.nbytes))
