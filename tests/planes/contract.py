"""What every plane must do. A plane's test file inherits :class:`PlaneContract`."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial

import msgspec
import pytest
import torch

from aiomm.buffers.arena import Arena, HostArena
from aiomm.buffers.layout import ByteRange
from aiomm.buffers.tensors import TokenRows, memory_of
from aiomm.errors import PlaneUnavailable
from aiomm.planes.base import MAX_NOTE_NBYTES, Export, GrantKey, Plane, RemoteArena, Run
from aiomm.protocol.frames import PlaneOffer
from aiomm.types import Field

from ..conftest import resources

ARENA_NBYTES = 1 << 20
LARGE_NBYTES = 32 << 20
BACKGROUND = 0xA5
LINK = 7
GRANT = GrantKey(link=LINK, generation=1, sequence=1)


def rows_of(tensor: torch.Tensor) -> TokenRows:
    """Return the rows of `tensor` along its first dimension."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TokenRows.of("rows", Field(dtype, *tensor.shape[1:]), tensor)


def random_rows(num_rows: int, row_nbytes: int, seed: int = 0) -> torch.Tensor:
    """Return random bytes, one row of `row_nbytes` for each token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (num_rows, row_nbytes), dtype=torch.uint8, generator=generator)


def strided_rows(num_rows: int, row_nbytes: int, seed: int = 0) -> torch.Tensor:
    """Return rows whose bytes are not adjacent: every other column of a wider tensor."""
    return random_rows(num_rows, 2 * row_nbytes, seed)[:, ::2]


def bytes_of(tensor: torch.Tensor) -> bytes:
    """Return what a dense copy of `tensor` holds."""
    return bytes(tensor.contiguous().view(torch.uint8).flatten().numpy())


def whole(tensor: torch.Tensor, offset: int) -> Run:
    """Return the run that writes all of `tensor` to `offset`."""
    return Run(rows_of(tensor), 0, tensor.shape[0], offset)


@dataclass
class Link:
    """One receiver's arena, exported, and one sender that is attached to it."""

    plane: Plane
    arena: Arena
    export: Export
    remote: RemoteArena

    def content(self) -> bytes:
        """Return all bytes of the arena."""
        return bytes(self.arena.read(0, self.arena.nbytes))

    async def write(self, runs: Sequence[Run], grant: GrantKey = GRANT) -> None:
        """Permit exactly the bytes of `runs` and write them."""
        self.permit(runs, grant)
        await self.remote.write(grant, runs)

    def permit(self, runs: Sequence[Run], grant: GrantKey = GRANT) -> None:
        """Permit exactly the bytes of `runs`."""
        ranges = [ByteRange(run.offset, run.offset + run.nbytes) for run in runs]
        self.export.permit(grant, ranges)

    async def aclose(self) -> None:
        """Close both ends."""
        await self.remote.aclose()
        await self.export.aclose()
        self.arena.close()


def expected_content(nbytes: int, *parts: tuple[int, torch.Tensor]) -> bytes:
    """Return an untouched arena with the bytes of the tensors at their offsets."""
    content = bytearray([BACKGROUND]) * nbytes
    for offset, tensor in parts:
        dense = bytes_of(tensor)
        content[offset : offset + len(dense)] = dense
    return bytes(content)


@pytest.mark.both_loops
@pytest.mark.usefixtures("no_leaks")
class PlaneContract(ABC):
    """The tests. A subclass says how to make the plane and an arena that it can export."""

    @abstractmethod
    def make_plane(self) -> Plane:
        """Return a new plane."""

    @abstractmethod
    def make_arena(self, nbytes: int) -> Arena:
        """Return a new arena that the plane can export."""

    def fill(self, arena: Arena, content: bytes) -> None:
        """Write all of the arena, as its owner."""
        assert isinstance(arena, HostArena)
        arena.view(0, arena.nbytes)[:] = content

    async def open_link(self, nbytes: int = ARENA_NBYTES) -> Link:
        """Return a new link over an arena filled with the background byte."""
        plane = self.make_plane()
        arena = self.make_arena(nbytes)
        self.fill(arena, bytes([BACKGROUND]) * nbytes)
        export = await plane.export(arena)
        remote = await plane.attach(export.offer(LINK))
        return Link(plane, arena, export, remote)

    @pytest.fixture
    async def link(self) -> AsyncIterator[Link]:
        link = await self.open_link()
        yield link
        await link.aclose()

    def test_is_usable_here(self) -> None:
        assert self.make_plane().unusable() is None

    async def test_writes_a_dense_run_and_leaves_its_neighbours_alone(self, link: Link) -> None:
        tensor = random_rows(100, 48)
        await link.write([whole(tensor, 4096)])
        assert link.content() == expected_content(ARENA_NBYTES, (4096, tensor))

    async def test_writes_rows_from_the_middle_of_a_tensor(self, link: Link) -> None:
        tensor = random_rows(100, 48)
        await link.write([Run(rows_of(tensor), 10, 20, 480)])
        assert link.content() == expected_content(ARENA_NBYTES, (480, tensor[10:30]))

    async def test_writes_strided_rows(self, link: Link) -> None:
        tensor = strided_rows(100, 48)
        await link.write([Run(rows_of(tensor), 5, 90, 96)])
        assert link.content() == expected_content(ARENA_NBYTES, (96, tensor[5:95]))

    async def test_writes_a_transposed_tensor_of_wide_elements(self, link: Link) -> None:
        tensor = torch.arange(64 * 32, dtype=torch.int32).reshape(32, 64).T
        await link.write([whole(tensor, 1024)])
        assert link.content() == expected_content(ARENA_NBYTES, (1024, tensor))

    async def test_writes_several_fields_into_several_extents(self, link: Link) -> None:
        dense, strided, scalars = random_rows(60, 64, 1), strided_rows(60, 12, 2), torch.arange(60)
        runs: list[Run] = []
        parts: list[tuple[int, torch.Tensor]] = []
        for base, tensor in ((0, dense), (100_000, strided), (200_000, scalars)):
            for first, count, gap in ((0, 25, 0), (25, 35, 500)):
                row_nbytes = rows_of(tensor).row_nbytes
                offset = base + (first + gap) * row_nbytes
                runs.append(Run(rows_of(tensor), first, count, offset))
                parts.append((offset, tensor[first : first + count]))
        await link.write(runs)
        assert link.content() == expected_content(ARENA_NBYTES, *parts)

    async def test_writes_more_runs_than_fit_into_one_message(self, link: Link) -> None:
        tensor = random_rows(3000, 16)
        rows = rows_of(tensor)
        runs = [Run(rows, index, 1, 32 * index) for index in range(3000)]
        await link.write(runs)
        parts = [(32 * index, tensor[index : index + 1]) for index in range(3000)]
        assert link.content() == expected_content(ARENA_NBYTES, *parts)

    async def test_writes_nothing(self, link: Link) -> None:
        tensor = random_rows(4, 16)
        await link.remote.write(GRANT, [])
        await link.write([Run(rows_of(tensor), 4, 0, 0), Run(rows_of(tensor[:0]), 0, 0, 64)])
        assert link.content() == expected_content(ARENA_NBYTES)

    async def test_writes_the_whole_arena(self, link: Link) -> None:
        tensor = random_rows(1, ARENA_NBYTES)
        await link.write([whole(tensor, 0)])
        assert link.content() == bytes_of(tensor)

    async def test_writes_concurrently(self, link: Link) -> None:
        tensors = [random_rows(1 + 37 * index, 64, index) for index in range(16)]
        offsets = [index * (ARENA_NBYTES // 16) for index in range(16)]
        writes = [
            link.write([whole(tensor, offset)], GRANT._replace(sequence=1 + index))
            for index, (tensor, offset) in enumerate(zip(tensors, offsets, strict=True))
        ]
        await asyncio.gather(*writes)
        parts = zip(offsets, tensors, strict=True)
        assert link.content() == expected_content(ARENA_NBYTES, *parts)

    @pytest.mark.parametrize("make", [random_rows, strided_rows])
    async def test_writes_large_tensors(self, make: object) -> None:
        link = await self.open_link(LARGE_NBYTES)
        tensor = random_rows(LARGE_NBYTES // 4096, 4096)
        if make is strided_rows:
            tensor = tensor.reshape(4096, -1).T
        await link.write([whole(tensor, 0)])
        assert link.content() == bytes_of(tensor)
        await link.aclose()

    async def test_two_large_writes_at_once(self) -> None:
        link = await self.open_link(LARGE_NBYTES)
        half = LARGE_NBYTES // 2
        first, second = random_rows(half // 4096, 4096, 1), random_rows(half // 4096, 4096, 2)
        await asyncio.gather(
            link.write([whole(first, 0)]),
            link.write([whole(second, half)], GRANT._replace(sequence=2)),
        )
        assert link.content() == bytes_of(first) + bytes_of(second)
        await link.aclose()

    async def test_writes_a_grant_again(self, link: Link) -> None:
        first, second = random_rows(10, 64, 1), random_rows(10, 64, 2)
        await link.write([whole(first, 0)])
        await link.write([whole(second, 0)])
        assert link.content() == expected_content(ARENA_NBYTES, (0, second))

    @pytest.mark.parametrize(
        ("first", "count", "offset"),
        [
            (0, 8, ARENA_NBYTES - 64),
            (0, 8, ARENA_NBYTES),
            (0, 8, -64),
            (0, 9, 0),
            (-1, 2, 0),
            (8, 1, 0),
            (4, -1, 64),
        ],
    )
    async def test_refuses_a_run_out_of_range(
        self, link: Link, first: int, count: int, offset: int
    ) -> None:
        tensor = random_rows(8, 16)
        good, bad = whole(tensor, 0), Run(rows_of(tensor), first, count, offset)
        link.export.permit(GRANT, [ByteRange(0, ARENA_NBYTES)])
        with pytest.raises(PlaneUnavailable):
            await link.remote.write(GRANT, [good, bad])
        await link.remote.quiesce()
        assert link.content() == expected_content(ARENA_NBYTES)
        await link.write([good])
        assert link.content() == expected_content(ARENA_NBYTES, (0, tensor))

    async def test_offers_fit_into_a_hello_and_are_of_one_link(self, link: Link) -> None:
        offer = link.export.offer(LINK)
        in_hello = PlaneOffer(link.plane.name, offer)
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(in_hello), type=PlaneOffer) == in_hello
        assert offer == link.export.offer(LINK)
        assert offer != link.export.offer(LINK + 1)

    async def test_takes_the_largest_link_number(self, link: Link) -> None:
        number = 2**63 - 1
        remote = await link.plane.attach(link.export.offer(number))
        grant = GrantKey(number, 2**63 - 1, 2**63 - 1)
        tensor = random_rows(4, 16)
        link.export.permit(grant, [ByteRange(0, 64)])
        await remote.write(grant, [whole(tensor, 0)])
        assert link.content() == expected_content(ARENA_NBYTES, (0, tensor))
        await remote.aclose()

    @pytest.mark.parametrize(
        "offer",
        [b"", b"\x00", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64, b"\x93" * 1000, b"\x90", b"\xc1"],
    )
    async def test_an_offer_of_garbage_is_unavailable(self, offer: bytes) -> None:
        with pytest.raises(PlaneUnavailable):
            await self.make_plane().attach(offer)

    async def test_the_offer_of_a_closed_export_is_unavailable(self, link: Link) -> None:
        arena = self.make_arena(4096)
        export = await link.plane.export(arena)
        offer = export.offer(LINK)
        await export.aclose()
        with pytest.raises(PlaneUnavailable):
            await link.plane.attach(offer)
        arena.close()

    async def test_an_offer_cut_short_or_changed_is_unavailable(self, link: Link) -> None:
        offer = link.export.offer(LINK)
        with pytest.raises(PlaneUnavailable):
            await link.plane.attach(offer[:-9])
        with pytest.raises(PlaneUnavailable):
            await link.plane.attach(offer[:8] + bytes(8) + offer[16:])

    async def test_attaches_twice(self, link: Link) -> None:
        second = await link.plane.attach(link.export.offer(LINK))
        tensor = random_rows(4, 16)
        await link.write([whole(tensor, 0)])
        link.export.permit(GRANT, [ByteRange(64, 128)])
        await second.write(GRANT, [whole(tensor, 64)])
        await second.aclose()
        await link.write([whole(tensor, 128)])
        parts = [(0, tensor), (64, tensor), (128, tensor)]
        assert link.content() == expected_content(ARENA_NBYTES, *parts)

    async def test_two_senders_do_not_disturb_each_other(self, link: Link) -> None:
        other = await link.plane.attach(link.export.offer(LINK + 1))
        link.export.forget(LINK)
        grant = GRANT._replace(link=LINK + 1)
        tensor = random_rows(4, 16)
        link.export.permit(grant, [ByteRange(0, 64)])
        await other.write(grant, [whole(tensor, 0)])
        assert link.content() == expected_content(ARENA_NBYTES, (0, tensor))
        await other.aclose()

    async def test_a_forgotten_offer_is_unavailable(self, link: Link) -> None:
        offer = link.export.offer(LINK + 1)
        link.export.forget(LINK + 1)
        link.export.forget(LINK + 1)
        with pytest.raises(PlaneUnavailable):
            await link.plane.attach(offer)

    async def test_revoke_is_harmless_when_nothing_runs(self, link: Link) -> None:
        tensor = random_rows(4, 16)
        await link.write([whole(tensor, 0)])
        answer = link.export.revoke(GRANT)
        assert link.export.revoke(GRANT) is answer
        await link.write([whole(tensor, 64)])
        assert link.content() == expected_content(ARENA_NBYTES, (0, tensor), (64, tensor))

    async def test_quiesce_without_a_failure_returns(self, link: Link) -> None:
        await link.remote.quiesce()
        await link.write([whole(random_rows(4, 16), 0)])
        await link.remote.quiesce()

    async def test_closing_while_writing_finishes_or_fails_the_write(self) -> None:
        link = await self.open_link(LARGE_NBYTES)
        tensor = random_rows(LARGE_NBYTES // 4096, 4096)
        write = asyncio.create_task(link.write([whole(tensor, 0)]))
        await asyncio.sleep(0)
        await link.remote.aclose()
        try:
            await write
        except PlaneUnavailable:
            pass
        else:
            assert link.content() == bytes_of(tensor)
        await link.aclose()

    async def test_closing_the_export_while_writing_ends_the_write(self) -> None:
        link = await self.open_link(LARGE_NBYTES)
        tensor = random_rows(LARGE_NBYTES // 4096, 4096)
        write = asyncio.create_task(link.write([whole(tensor, 0)]))
        await asyncio.sleep(0)
        await link.export.aclose()
        await asyncio.gather(write, return_exceptions=True)
        assert isinstance(write.exception(), PlaneUnavailable | None)
        await link.aclose()

    async def test_a_write_after_the_end_is_refused(self, link: Link) -> None:
        run = whole(random_rows(4, 16), 0)
        await link.remote.aclose()
        with pytest.raises(PlaneUnavailable):
            await link.write([run])
        assert link.content() == expected_content(ARENA_NBYTES)

    async def test_closes_twice(self, link: Link) -> None:
        await link.remote.aclose()
        await link.remote.aclose()
        await link.export.aclose()
        await link.export.aclose()

    async def test_a_cancelled_write_lands_wholly_before_quiesce_returns_or_never(self) -> None:
        link = await self.open_link(LARGE_NBYTES)
        write = asyncio.create_task(link.write([whole(random_rows(8192, 4096), 0)]))
        await asyncio.sleep(0)
        write.cancel()
        await asyncio.gather(write, return_exceptions=True)
        link.export.revoke(GRANT)
        await link.remote.quiesce()
        before = link.content()
        tensor = random_rows(4, 16)
        offset = LARGE_NBYTES - 64
        await link.write([whole(tensor, offset)], GRANT._replace(sequence=2))
        assert link.content() == before[:offset] + bytes_of(tensor)
        await link.aclose()

    async def test_nothing_is_left_behind(self) -> None:
        async def live_once() -> None:
            link = await self.open_link(4 << 20)
            await link.write([whole(strided_rows(1024, 3000), 0)])
            with pytest.raises(PlaneUnavailable):
                await link.write([whole(random_rows(1, 8), link.arena.nbytes)])
            await link.aclose()

        await live_once()
        before = resources()
        await live_once()
        assert resources() == before
        assert asyncio.all_tasks() == {asyncio.current_task()}


class NotesContract(PlaneContract):
    """More tests, for planes that carry notes."""

    def listen(self, link: Link) -> list[tuple[bytes, bytes]]:
        """Return a list that each note goes into, with what the arena holds at that moment."""
        heard: list[tuple[bytes, bytes]] = []

        def noted(number: int, notes: Sequence[bytes]) -> None:
            assert number == LINK
            heard.extend((note, link.content()) for note in notes)

        link.export.noted = noted
        return heard

    async def test_a_note_comes_behind_the_last_byte(self, link: Link) -> None:
        heard, tensor = self.listen(link), random_rows(4, 1000)
        assert link.remote.carries_notes
        run = whole(tensor, 64)
        link.permit([run])
        await link.remote.write_and_note(GRANT, [run], lambda: b"first")
        assert heard == [(b"first", expected_content(ARENA_NBYTES, (64, tensor)))]
        await link.remote.write_and_note(GRANT, [run], lambda: b"x" * MAX_NOTE_NBYTES)
        assert [note for note, _ in heard] == [b"first", b"x" * MAX_NOTE_NBYTES]

    async def test_a_write_without_a_note_has_none(self, link: Link) -> None:
        heard = self.listen(link)
        await link.write([whole(random_rows(4, 1000), 0)])
        assert heard == []

    async def test_one_note_of_many_runs(self, link: Link) -> None:
        heard, tensor = self.listen(link), random_rows(3000, 8)
        runs = [Run(rows_of(tensor), row, 1, 16 * row) for row in range(3000)]
        link.permit(runs)
        await link.remote.write_and_note(GRANT, runs, lambda: b"note")
        parts = [(16 * row, tensor[row : row + 1]) for row in range(3000)]
        assert heard == [(b"note", expected_content(ARENA_NBYTES, *parts))]

    @pytest.mark.parametrize("make", [random_rows, strided_rows])
    async def test_a_note_of_a_large_write(self, make: Callable[[int, int], torch.Tensor]) -> None:
        link = await self.open_link(LARGE_NBYTES)
        heard, tensor = self.listen(link), make(LARGE_NBYTES >> 12, 4096)
        run = whole(tensor, 0)
        link.permit([run])
        await link.remote.write_and_note(GRANT, [run], lambda: b"note")
        assert heard == [(b"note", bytes_of(tensor))]
        await link.aclose()

    async def test_notes_of_writes_at_once(self, link: Link) -> None:
        heard, notes = self.listen(link), [f"{number}".encode() for number in range(600)]
        run = whole(random_rows(1, 8), 0)
        link.permit([run])
        await asyncio.gather(
            *(link.remote.write_and_note(GRANT, [run], partial(bytes, note)) for note in notes)
        )
        assert sorted(note for note, _ in heard) == sorted(notes)

    async def test_no_note_of_what_was_not_granted(self, link: Link) -> None:
        heard, run = self.listen(link), whole(random_rows(1, 64), 0)
        with pytest.raises(PlaneUnavailable):
            await link.remote.write_and_note(GRANT, [run], lambda: b"note")
        link.permit([run])
        link.export.revoke(GRANT)
        with pytest.raises(PlaneUnavailable):
            await link.remote.write_and_note(GRANT, [run], lambda: b"note")
        assert heard == []

    @pytest.mark.parametrize("is_registered", [False, True])
    @pytest.mark.parametrize("nbytes", [64 << 10, 1 << 20, 6 << 20])
    async def test_a_note_is_made_when_the_bytes_are_needed_no_more(
        self, nbytes: int, is_registered: bool
    ) -> None:
        """The transfer fails while its write runs, and the bytes change: then none is given."""
        link = await self.open_link(nbytes)
        for turns in range(12):
            heard, tensor = self.listen(link), random_rows(nbytes >> 12, 4096, turns)
            sent, run = bytes_of(tensor), whole(tensor, 0)
            note = bytearray(b"note")
            if is_registered:
                await link.plane.register(memory_of(tensor))
            link.permit([run])
            write = asyncio.ensure_future(
                link.remote.write_and_note(GRANT, [run], partial(bytes, note))
            )
            for _ in range(turns):
                await asyncio.sleep(0)
            note.clear()
            tensor.fill_(7)
            await write
            assert heard in ([], [(b"note", sent)])
            if is_registered:
                await link.plane.unregister(memory_of(tensor))
        await link.aclose()
