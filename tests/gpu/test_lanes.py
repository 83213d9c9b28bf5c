"""Copies hold up neither each other nor the loop, and every error reaches whoever waits."""

from __future__ import annotations

import _thread
import asyncio
import ctypes
import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import pytest

from aiomm.gpu import lanes as lanes_module
from aiomm.gpu.fake import FakeArray, FakeRuntime
from aiomm.gpu.lanes import MAX_LANES, Lanes, Mark, finished, lanes_of
from aiomm.gpu.runtime import Copy, GpuError

REFUSED = "refused on demand"
LOST = "illegal memory access"
AT_ONCE = -1.0
NEVER = 1e6


@pytest.fixture(autouse=True)
def streams_end(no_leaks: None) -> Iterator[None]:
    """Let the threads of the fake's streams end before anybody looks for leaks."""
    yield
    for thread in threading.enumerate():
        if thread.name == "fake-gpu-stream":
            thread.join()


@pytest.fixture
def sleepers(
    monkeypatch: pytest.MonkeyPatch, streams_end: None
) -> Iterator[list[threading.Thread]]:
    """Return the threads that wait for an event, each when it is started."""
    threads: list[threading.Thread] = []

    def start(function: Callable[..., object], arguments: tuple[object, ...]) -> int:
        threads.append(threading.Thread(target=function, args=arguments))
        threads[-1].start()
        return len(threads)

    monkeypatch.setattr(_thread, "start_new_thread", start)
    yield threads
    for thread in threads:
        thread.join()


@pytest.fixture
def lanes(fake: FakeRuntime) -> Lanes:
    return Lanes(fake, 0)


def array(fake: FakeRuntime, content: bytes, device: int = 0) -> FakeArray:
    return FakeArray(fake, device, content, "uint8", (len(content),))


def content_of(array: FakeArray) -> bytes:
    """Return what lies there at this moment, past all streams."""
    return ctypes.string_at(array.address, array.nbytes)


def whole(target: FakeArray, source: FakeArray) -> list[Copy]:
    return [Copy(target.address, source.address, source.nbytes)]


async def turns(count: int = 20) -> None:
    """Let everybody else on the loop have so many turns."""
    for _ in range(count):
        await asyncio.sleep(0)


async def until(condition: Callable[[], bool]) -> None:
    """Let the others have turns until something is so."""
    while not condition():  # noqa: ASYNC110 -- nobody would set an event
        await asyncio.sleep(0)


class Gate:
    """Holds a stream up until it is opened."""

    def __init__(self, fake: FakeRuntime, device: int = 0) -> None:
        self._open = threading.Event()
        self._passed = threading.Event()
        self.fake = fake
        self.stream = fake.make_stream(device)
        fake.run(self.stream, self._wait)

    def _wait(self) -> None:
        assert self._open.wait(10)

    def open(self) -> None:
        """Let the stream go on."""
        self._open.set()

    def pass_through(self) -> None:
        """Let the stream do all that it has been given by now."""
        self.fake.run(self.stream, self._passed.set)
        self.open()
        assert self._passed.wait(10)


class TestMarks:
    def test_are_over_when_the_stream_is_so_far(self, fake: FakeRuntime) -> None:
        gate = Gate(fake)
        mark = Mark(fake, 0, gate.stream)
        assert not mark.is_over()
        gate.open()
        mark.synchronize()
        assert mark.is_over()

    def test_hold_up_a_stream(self, fake: FakeRuntime) -> None:
        gate, other = Gate(fake), fake.make_stream(1)
        Mark(fake, 0, gate.stream).delay(other)  # and is gone at once
        after = Mark(fake, 1, other)
        assert not after.is_over()
        gate.open()
        after.synchronize()

    def test_destroy_their_events(self, fake: FakeRuntime) -> None:
        mark = Mark(fake, 0, 0)
        assert len(fake._events) == 1
        del mark
        gc.collect()
        assert fake._events == {}

    def test_destroy_their_events_once_when_they_cannot_be_recorded(self) -> None:
        class Refusing(FakeRuntime):
            def record(self, device: int, event: int, stream: int) -> None:
                raise GpuError("cuEventRecord", 400, "invalid resource handle")

            def destroy_event(self, device: int, event: int) -> None:
                destroyed.append(event)

        destroyed: list[int] = []
        with pytest.raises(GpuError, match="cuEventRecord"):
            Mark(Refusing([0]), 0, 0)
        gc.collect()
        assert len(destroyed) == 1

    def test_that_were_never_made_leave_nothing(self, fake: FakeRuntime) -> None:
        with pytest.raises(GpuError, match="no device 2"):
            Mark(fake, 2, 0)
        gc.collect()
        assert fake._events == {}

    def test_end_quietly_when_the_event_is_lost_with_its_device(self) -> None:
        class Lost(FakeRuntime):
            def destroy_event(self, device: int, event: int) -> None:
                tried.append(event)
                raise GpuError("cuEventDestroy", 700, LOST, is_sticky=True)

        tried: list[int] = []
        mark = Mark(Lost([0]), 0, 0)
        del mark
        gc.collect()
        assert len(tried) == 1


@pytest.mark.both_loops
class TestFinished:
    async def test_at_once(self, fake: FakeRuntime) -> None:
        gate = Gate(fake)
        mark = Mark(fake, 0, gate.stream)
        gate.pass_through()
        with pytest.raises(StopIteration):
            finished(mark).send(None)

    async def test_within_a_moment_without_a_thread(
        self,
        fake: FakeRuntime,
        monkeypatch: pytest.MonkeyPatch,
        sleepers: list[threading.Thread],
    ) -> None:
        monkeypatch.setattr(lanes_module, "MOMENT", NEVER)
        gate = Gate(fake)
        waiting = asyncio.create_task(finished(Mark(fake, 0, gate.stream)))
        await turns()
        assert not waiting.done()
        gate.pass_through()
        await waiting
        assert sleepers == []

    @pytest.mark.parametrize("moment", [AT_ONCE, lanes_module.MOMENT])
    async def test_by_a_thread_while_the_loop_turns(
        self,
        fake: FakeRuntime,
        monkeypatch: pytest.MonkeyPatch,
        sleepers: list[threading.Thread],
        moment: float,
    ) -> None:
        """The gate opens only after the loop has turned many times."""
        monkeypatch.setattr(lanes_module, "MOMENT", moment)
        gate = Gate(fake)
        waiting = asyncio.create_task(finished(Mark(fake, 0, gate.stream)))
        await until(lambda: len(sleepers) == 1)
        await turns(1000)
        assert not waiting.done()
        gate.open()
        await waiting
        assert len(sleepers) == 1

    async def test_one_thread_for_each(self, fake: FakeRuntime) -> None:
        """What is over first wakes its own, whatever was waited for first."""
        gates = [Gate(fake) for _ in range(3)]
        waiting = [asyncio.create_task(finished(Mark(fake, 0, gate.stream))) for gate in gates]
        for number in (2, 0, 1):
            gates[number].open()
            await waiting[number]
            assert sum(task.done() for task in waiting) == [2, 3, 1][number]

    async def test_an_error_at_once(self, fake: FakeRuntime, lanes: Lanes) -> None:
        mark = Mark(fake, 0, 0)
        await lose(fake, lanes)
        with pytest.raises(GpuError, match=LOST):
            finished(mark).send(None)

    @pytest.mark.parametrize("moment", [NEVER, AT_ONCE])
    async def test_an_error_within_a_moment_and_from_the_thread(
        self,
        fake: FakeRuntime,
        monkeypatch: pytest.MonkeyPatch,
        sleepers: list[threading.Thread],
        moment: float,
    ) -> None:
        monkeypatch.setattr(lanes_module, "MOMENT", moment)
        fake.faults.stall_at = fake.faults.fail_at = 1
        memory, stream = array(fake, bytes(8)), fake.make_stream(0)
        fake.copy(0, stream, whole(memory, memory))
        waiting = asyncio.create_task(finished(Mark(fake, 0, stream)))
        await turns()
        assert not waiting.done()
        fake.faults.release()
        with pytest.raises(GpuError, match=LOST) as caught:
            await waiting
        assert caught.value.is_sticky
        assert len(sleepers) == (moment == AT_ONCE)

    async def test_who_was_cancelled_is_not_woken(
        self,
        fake: FakeRuntime,
        monkeypatch: pytest.MonkeyPatch,
        sleepers: list[threading.Thread],
    ) -> None:
        monkeypatch.setattr(lanes_module, "MOMENT", AT_ONCE)
        troubles: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, what: troubles.append(what))
        gate = Gate(fake)
        waiting = asyncio.create_task(finished(Mark(fake, 0, gate.stream)))
        await until(lambda: len(sleepers) == 1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        gate.open()
        sleepers[0].join()
        await turns()
        assert troubles == []


def test_nobody_is_woken_on_a_loop_that_was_closed(
    fake: FakeRuntime, monkeypatch: pytest.MonkeyPatch, sleepers: list[threading.Thread]
) -> None:
    """An error in the thread would be a warning, which fails the test."""
    monkeypatch.setattr(lanes_module, "MOMENT", AT_ONCE)
    gate = Gate(fake)

    async def run() -> None:
        waiting = asyncio.create_task(finished(Mark(fake, 0, gate.stream)))
        await until(lambda: len(sleepers) == 1)
        waiting.cancel()

    asyncio.run(run())
    assert sleepers[0].is_alive()
    gate.open()
    sleepers[0].join()


async def lose(fake: FakeRuntime, lanes: Lanes) -> None:
    """Have a copy fail on the device."""
    fake.faults.fail_at = fake.faults.num_copies + 1
    memory = array(fake, b"lost")
    with pytest.raises(GpuError, match=LOST):
        await lanes.copy(whole(memory, memory))


@pytest.mark.both_loops
class TestCopy:
    async def test_arrives_whole(self, fake: FakeRuntime, lanes: Lanes) -> None:
        source, target = array(fake, b"contents", device=1), array(fake, bytes(16))
        begin, away = target.address, source.address
        await lanes.copy([Copy(begin + 8, away, 8), Copy(begin, away + 4, 4)])
        assert content_of(target) == b"ents\0\0\0\0contents"

    async def test_waits_for_no_other(self, fake: FakeRuntime, lanes: Lanes) -> None:
        fake.faults.stall_at = 1
        source, target, other = (array(fake, text) for text in (b"contents", bytes(8), bytes(8)))
        slow = asyncio.create_task(lanes.copy(whole(target, source)))
        await asyncio.to_thread(fake.faults.stalled.wait)
        for _ in range(5):
            await lanes.copy(whole(other, source))
        assert content_of(other) == b"contents"
        assert not slow.done()
        assert content_of(target) == bytes(8)
        assert len(fake._streams) == 2
        fake.faults.release()
        await slow
        assert content_of(target) == b"contents"

    async def test_waits_for_what_is_before(self, fake: FakeRuntime, lanes: Lanes) -> None:
        source, target = array(fake, bytes(8)), array(fake, bytes(8))
        gates = Gate(fake), Gate(fake, 1)
        fake.run(gates[1].stream, lambda: source.fill(b"contents"))
        marks = [Mark(fake, device, gate.stream) for device, gate in enumerate(gates)]
        copying = asyncio.create_task(lanes.copy(whole(target, source), marks))
        for gate in gates:
            await turns()
            assert not copying.done()
            gate.open()
        await copying
        assert content_of(target) == b"contents"

    async def test_of_nothing_waits_all_the_same(self, fake: FakeRuntime, lanes: Lanes) -> None:
        gate = Gate(fake)
        copying = asyncio.create_task(lanes.copy([], [Mark(fake, 0, gate.stream)]))
        await turns()
        assert not copying.done()
        gate.open()
        await copying
        assert fake.faults.num_copies == 0

    async def test_waits_in_line_when_too_many_are_at_it(
        self, fake: FakeRuntime, lanes: Lanes
    ) -> None:
        count, gate = MAX_LANES + 9, Gate(fake)
        source, target = array(fake, bytes(range(count))), array(fake, bytes(count))
        before = Mark(fake, 0, gate.stream)
        copying = [
            asyncio.create_task(
                lanes.copy([Copy(target.address + at, source.address + at, 1)], [before])
            )
            for at in range(count)
        ]
        await until(lambda: fake.faults.num_copies == MAX_LANES)
        await turns(200)
        assert fake.faults.num_copies == MAX_LANES
        assert not any(task.done() for task in copying)
        gate.open()
        await asyncio.gather(*copying)
        assert content_of(target) == bytes(range(count))
        assert len(fake._streams) == MAX_LANES + 1

    async def test_is_served_in_the_order_of_the_line(
        self, fake: FakeRuntime, lanes: Lanes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(lanes_module, "MAX_LANES", 1)
        fake.faults.stall_at = 1
        source, target, order = array(fake, b"x"), array(fake, bytes(1)), list[int]()

        async def copy(number: int) -> None:
            await lanes.copy(whole(target, source))
            order.append(number)

        copying = [asyncio.create_task(copy(number)) for number in range(6)]
        await asyncio.to_thread(fake.faults.stalled.wait)
        await turns()
        assert fake.faults.num_copies == 1
        fake.faults.release()
        await asyncio.gather(*copying)
        assert (order, len(fake._streams)) == (list(range(6)), 1)

    async def test_gives_its_lane_back_after_an_error(
        self, fake: FakeRuntime, lanes: Lanes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(lanes_module, "MAX_LANES", 1)
        fake.faults.refuse_at = 1
        source, target = array(fake, b"contents"), array(fake, bytes(8))
        results = await asyncio.gather(
            *(lanes.copy(whole(target, source)) for _ in range(3)), return_exceptions=True
        )
        assert [str(result) for result in results if result is not None] == [
            f"cuMemcpyAsync: {REFUSED} (1)"
        ]
        assert content_of(target) == b"contents"

    async def test_skips_in_line_who_has_closed_his_loop(
        self, fake: FakeRuntime, lanes: Lanes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(lanes_module, "MAX_LANES", 1)
        fake.faults.stall_at = 1
        closed = asyncio.new_event_loop()
        closed.close()
        source, target = array(fake, b"contents"), array(fake, bytes(8))
        copying = [asyncio.create_task(lanes.copy(whole(target, source)))]
        await asyncio.to_thread(fake.faults.stalled.wait)
        lanes._line.append((closed, asyncio.Future(loop=closed)))
        copying += [asyncio.create_task(lanes.copy(whole(target, source))) for _ in range(2)]
        await turns()
        fake.faults.release()
        await asyncio.gather(*copying)

    async def test_skips_in_line_who_was_cancelled(
        self, fake: FakeRuntime, lanes: Lanes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also if that happens when it is their turn already."""
        monkeypatch.setattr(lanes_module, "MAX_LANES", 1)
        fake.faults.stall_at = 1
        source, target = array(fake, b"contents"), array(fake, bytes(8))
        copying = [asyncio.create_task(lanes.copy(whole(target, source))) for _ in range(4)]
        await asyncio.to_thread(fake.faults.stalled.wait)
        await turns()
        for task in copying[1:3]:
            task.cancel()
        fake.faults.release()
        await asyncio.gather(copying[0], copying[3])
        assert [task.cancelled() for task in copying] == [False, True, True, False]
        assert (fake.faults.num_copies, len(fake._streams)) == (2, 1)

    async def test_on_a_lost_device_fails_every_time(self, fake: FakeRuntime, lanes: Lanes) -> None:
        await lose(fake, lanes)
        memory = array(FakeRuntime([0]), b"memory")
        for _ in range(2 * MAX_LANES):
            with pytest.raises(GpuError, match=LOST) as caught:
                await lanes.copy(whole(memory, memory))
            assert caught.value.is_sticky

    async def test_fails_each_one_under_way_when_the_device_is_lost(
        self, fake: FakeRuntime, lanes: Lanes
    ) -> None:
        fake.faults.stall_at = fake.faults.fail_at = 1
        gate, memory = Gate(fake), array(fake, b"memory")
        before = Mark(fake, 0, gate.stream)
        copying = [asyncio.create_task(lanes.copy(whole(memory, memory)))]
        copying += [
            asyncio.create_task(lanes.copy(whole(memory, memory), [before])) for _ in range(3)
        ]
        await asyncio.to_thread(fake.faults.stalled.wait)
        await turns()
        fake.faults.release()
        with pytest.raises(GpuError, match=LOST):
            await copying[0]
        gate.open()
        results = await asyncio.gather(*copying, return_exceptions=True)
        assert [type(result) for result in results] == [GpuError] * 4

    async def test_survives_that_no_stream_could_be_made(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(lanes_module, "MAX_LANES", 1)
        lanes = Lanes(Poor([0]), 0)
        with pytest.raises(GpuError, match="out of memory"):
            await lanes.copy([])
        async with asyncio.timeout(0.2):
            await lanes.copy([])


class Poor(FakeRuntime):
    """Has no memory for its first stream."""

    is_poor: bool = True

    def make_stream(self, device: int) -> int:
        if self.is_poor:
            self.is_poor = False
            raise GpuError("cuStreamCreate", 2, "out of memory")
        return super().make_stream(device)


class Halting(FakeRuntime):
    """Begins the first of several copies, and refuses the rest."""

    name: ClassVar[str] = "halting"

    def copy(self, device: int, stream: int, copies: Sequence[Copy]) -> None:
        super().copy(device, stream, copies[:1])
        if len(copies) > 1:
            raise GpuError("cuMemcpyAsync", 1, REFUSED)


class TestCopyThatIsRefusedHalfway:
    """It waits for the half that has begun: nothing lands after the error."""

    @pytest.fixture
    def halting(self) -> Halting:
        runtime = Halting([0])
        runtime.faults.stall_at = 1
        return runtime

    def halves(self, halting: Halting) -> tuple[FakeArray, list[Copy]]:
        """Return memory, and how its second half is copied to the first, in two pieces."""
        memory = array(halting, bytes(8) + b"contents")
        begin = memory.address
        return memory, [Copy(begin, begin + 8, 4), Copy(begin + 4, begin + 12, 4)]

    @pytest.mark.both_loops
    async def test_on_the_loop(self, halting: Halting) -> None:
        target, copies = self.halves(halting)
        copying = asyncio.create_task(Lanes(halting, 0).copy(copies))
        await asyncio.to_thread(halting.faults.stalled.wait)
        await turns()
        assert not copying.done()
        halting.faults.release()
        with pytest.raises(GpuError, match=REFUSED):
            await copying
        assert content_of(target)[:8] == b"cont\0\0\0\0"

    async def test_on_a_thread(self, halting: Halting) -> None:
        target, copies = self.halves(halting)
        copying = asyncio.ensure_future(asyncio.to_thread(Lanes(halting, 0).copy_now, copies))
        await asyncio.to_thread(halting.faults.stalled.wait)
        await turns()
        assert not copying.done()
        halting.faults.release()
        with pytest.raises(GpuError, match=REFUSED):
            await copying
        assert content_of(target)[:8] == b"cont\0\0\0\0"


class TestThreads:
    """`copy_now` and `copy_to_host`."""

    def test_copy_one_after_the_other_on_one_lane(self, fake: FakeRuntime, lanes: Lanes) -> None:
        source, target = array(fake, b"contents"), array(fake, bytes(8))
        for at in range(8):
            lanes.copy_now([Copy(target.address + at, source.address + at, 1)])
            assert content_of(target)[at] == b"contents"[at]
        assert len(fake._streams) == 1

    def test_wait_for_no_other(self, fake: FakeRuntime, lanes: Lanes) -> None:
        fake.faults.stall_at = 1
        source, target = array(fake, b"contents"), array(fake, bytes(8))
        slow = threading.Thread(target=lanes.copy_now, args=(whole(target, source),))
        slow.start()
        assert fake.faults.stalled.wait(10)
        other = array(fake, bytes(8))
        lanes.copy_now(whole(other, source))
        assert (content_of(other), content_of(target)) == (b"contents", bytes(8))
        assert slow.is_alive()
        fake.faults.release()
        slow.join()
        assert content_of(target) == b"contents"

    def test_are_not_counted_among_the_lanes(
        self, fake: FakeRuntime, lanes: Lanes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A thread takes its own stream where all are taken, and leaves it to those in line."""
        monkeypatch.setattr(lanes_module, "MAX_LANES", 1)
        gate = Gate(fake)
        source, target = array(fake, b"contents"), array(fake, bytes(8))

        async def run() -> None:
            held = lanes.copy(whole(target, source), [Mark(fake, 0, gate.stream)])
            copying = [asyncio.create_task(held)]
            copying.append(asyncio.create_task(lanes.copy(whole(target, source))))
            await until(lambda: fake.faults.num_copies == 1)
            await asyncio.to_thread(lanes.copy_now, whole(target, source))
            await copying[1]
            assert not copying[0].done()
            gate.open()
            await copying[0]

        asyncio.run(run())
        assert len(fake._streams) == 3

    def test_wait_for_what_is_before(self, fake: FakeRuntime, lanes: Lanes) -> None:
        source, target, gate = array(fake, bytes(8)), array(fake, bytes(8)), Gate(fake)
        fake.run(gate.stream, lambda: source.fill(b"contents"))
        before = [Mark(fake, 0, gate.stream)]
        copying = threading.Thread(target=lanes.copy_now, args=(whole(target, source), before))
        copying.start()
        gate.open()
        copying.join()
        assert content_of(target) == b"contents"

    @pytest.mark.parametrize("kind", [bytearray, lambda content: memoryview(bytearray(content))])
    def test_copy_to_the_host(
        self, fake: FakeRuntime, lanes: Lanes, kind: Callable[[bytes], bytearray | memoryview]
    ) -> None:
        source, gate, target = array(fake, bytes(8)), Gate(fake), kind(bytes(4))
        fake.run(gate.stream, lambda: source.fill(b"contents"))
        before = [Mark(fake, 0, gate.stream)]
        copying = threading.Thread(
            target=lanes.copy_to_host, args=(target, source.address + 2, before)
        )
        copying.start()
        gate.open()
        copying.join()
        assert bytes(target) == b"nten"
        assert fake.copied == {"DtoH": 4}

    def test_copy_nothing_to_the_host_at_once(self, fake: FakeRuntime, lanes: Lanes) -> None:
        lanes.copy_to_host(bytearray(), array(fake, b"contents").address)
        assert (fake._streams, fake.faults.num_copies) == ({}, 0)

    def test_see_errors(self, fake: FakeRuntime, lanes: Lanes) -> None:
        memory = array(fake, b"memory")
        fake.faults.refuse_at, fake.faults.fail_at = 1, 3
        with pytest.raises(GpuError, match=REFUSED):
            lanes.copy_to_host(bytearray(6), memory.address)
        lanes.copy_now(whole(memory, memory))
        for _ in range(2):
            with pytest.raises(GpuError, match=LOST):
                lanes.copy_now(whole(memory, memory))
        assert len(fake._streams) == 1


def test_lanes_are_those_of_the_device(fake: FakeRuntime) -> None:
    lanes = lanes_of(fake, 0)
    assert lanes_of(fake, 0) is lanes
    assert lanes_of(fake, 1) is not lanes
    assert lanes_of(FakeRuntime([0]), 0) is not lanes
