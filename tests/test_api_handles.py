"""The handles that a user holds: Transfer, Lease, their figures, and what is left of them."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import pytest

from aiomm import (
    AiommError,
    Cancelled,
    IncompatibleSchema,
    PoolClosed,
    Receiver,
    Rejected,
    Sender,
    State,
    Transfer,
    TransferTimeout,
)
from aiomm.planes.memory import Faults

from .support import (
    ANYWHERE,
    SCHEMA,
    SMALL_POOL,
    assert_idle,
    error_of,
    faulty_pair,
    free_blocks,
    frozen_imports,  # noqa: F401
    granted,
    pair,
    same,
    tensors_of,
    until,
)

pytestmark = pytest.mark.usefixtures("no_leaks")


async def test_the_figures_of_both_sides() -> None:
    """Plane, chunks, resumes, bytes, states with ascending times; block indices at the receiver."""
    async with pair() as (receiver, sender):
        transfer = await granted(sender.claim(receiver.expect("r")))
        transfer.send(tensors_of(50))
        async with receiver.receive("r") as lease:
            received = lease.stats
        sent = await transfer
        for stats in (sent, received):
            assert stats.request_id == "r"
            assert stats.plane == "shm"
            assert (stats.num_tokens, stats.nbytes) == (50, 50 * SCHEMA.token_nbytes)
            assert stats.buffered_chunks == (32, 18)
            assert stats.resumes == 1
            names, times = zip(*stats.states, strict=True)
            assert names == ("ALLOC", "SENDING", "AWAITING_RESUME", "SENDING", "DONE")
            assert times[0] == 0
            assert list(times) == sorted(times)
            assert stats.seconds == times[-1]
        assert received.block_indices == ((0, 1), (2, 3))
        assert received.start_offsets == (0, 32)
        assert sent.refused_planes == ()


@pytest.mark.both_loops
async def test_a_transfer_is_awaited_as_often_as_one_likes() -> None:
    """At once, again, and after it is over; the same result or the same error."""
    async with pair() as (receiver, sender):
        transfer = sender.claim(receiver.expect("r"))
        waiting = [asyncio.ensure_future(wait_for(transfer)) for _ in range(3)]
        await asyncio.sleep(0)
        transfer.send(tensors_of(5))
        first, *others = await asyncio.gather(*waiting)
        assert all(other is first for other in others)
        assert await transfer is first
        assert transfer.done()
        assert transfer.exception() is None
        (await receiver.receive("r")).release()

        failed = sender.claim(receiver.expect("f"))
        failed.cancel("no")
        error = await error_of(failed)
        assert await error_of(failed) is error
        assert failed.exception() is error


async def wait_for(transfer: Transfer) -> object:
    return await transfer


async def test_shielded_one_only_stops_waiting() -> None:
    """Cancelling an await cancels the transfer, as with a task; `shield` is the way not to."""
    async with pair() as (receiver, sender):
        transfer = sender.claim(receiver.expect("r"))
        waiting = asyncio.ensure_future(asyncio.shield(wait_for(transfer)))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        await transfer.send(tensors_of(5))
        (await receiver.receive("r")).release()


async def test_done_callbacks() -> None:
    """Called once each, with the transfer, before and after the end, and also for a failure."""
    async with pair() as (receiver, sender):
        called: asyncio.Queue[Transfer] = asyncio.Queue()
        transfer = sender.claim(receiver.expect("r"))
        transfer.add_done_callback(called.put_nowait)
        transfer.send(tensors_of(5))
        assert await called.get() is transfer
        assert transfer.state is State.DONE
        transfer.add_done_callback(called.put_nowait)
        assert await called.get() is transfer
        (await receiver.receive("r")).release()

        failing = sender.claim(receiver.expect("f"))
        failing.add_done_callback(called.put_nowait)
        failing.cancel()
        assert await called.get() is failing
        assert isinstance(failing.exception(), Cancelled)
        assert called.empty()


async def test_the_events_of_a_transfer() -> None:
    """Every state once, whether one follows from the beginning or asks at the end."""
    async with pair() as (receiver, sender):
        transfer = sender.claim(receiver.expect("r"))
        followed = asyncio.ensure_future(states_of(transfer))
        await granted(transfer)
        transfer.send(tensors_of(50))
        (await receiver.receive("r")).release()
        await transfer
        expected = ["ALLOC", "SENDING", "AWAITING_RESUME", "SENDING", "DONE"]
        assert await followed == expected
        assert await states_of(transfer) == expected
        failing = sender.claim(receiver.expect("f"))
        failing.cancel()
        assert await states_of(failing) == ["ALLOC", "FAILED"]


async def test_who_follows_slowly_misses_no_event() -> None:
    """All others happen while the first one is looked at; each follower has its own pace."""
    async with pair() as (receiver, sender):
        transfer = sender.claim(receiver.expect("r"))
        slow, quick = transfer.events(), asyncio.ensure_future(states_of(transfer))
        seen = [await anext(slow)]
        await granted(transfer)
        transfer.send(tensors_of(50))
        (await receiver.receive("r")).release()
        await transfer
        seen += [state async for state in slow]
        assert seen == ["ALLOC", "SENDING", "AWAITING_RESUME", "SENDING", "DONE"]
        assert await quick == seen


async def test_one_of_many_followers_may_leave() -> None:
    async with pair() as (receiver, sender):
        transfer = sender.claim(receiver.expect("r"))
        await granted(transfer)
        leaving, staying = (asyncio.ensure_future(states_of(transfer)) for _ in range(2))
        await asyncio.sleep(0)
        leaving.cancel()
        transfer.send(tensors_of(5))
        assert await staying == ["ALLOC", "SENDING", "DONE"]
        assert leaving.cancelled()
        (await receiver.receive("r")).release()


async def test_the_events_of_a_transfer_that_never_began() -> None:
    """It is cancelled before its sender has started."""
    async with pair() as (receiver, _):
        sender = Sender(SCHEMA)
        transfer = sender.claim(receiver.expect("r"))
        transfer.cancel()
        assert await states_of(transfer) == ["ALLOC", "FAILED"]
        await sender.aclose()


async def states_of(transfer: Transfer) -> list[str]:
    return [state.value async for state in transfer.events()]


async def test_the_reprs() -> None:
    """Each says what it is, which request, and how far it is."""
    faults = Faults(stall_at=2)
    async with faulty_pair(faults, name="lm") as (receiver, sender):
        transfer = sender.claim(receiver.expect("r"))
        assert repr(transfer) == "<Transfer 'r' ALLOC: 0 of ? tokens>"
        await granted(transfer)
        transfer.send(tensors_of(50))
        await faults.stalled.wait()
        assert repr(transfer) == "<Transfer 'r' SENDING: 32 of 50 tokens>"
        faults.release()
        lease = await receiver.receive("r")
        assert repr(lease) == "<Lease 'r': 50 tokens in chunks [32, 18], view>"
        assert repr(receiver) == (
            f"<Receiver lm at {receiver.address}: <BlockPool 8 x 16 tokens: 4 free, 4 leased>>"
        )
        lease.release()
        assert repr(lease) == "<Lease 'r': 50 tokens in chunks [32, 18], released>"
        await transfer
        assert repr(transfer) == "<Transfer 'r' DONE: 50 of 50 tokens>"
        assert "0 live" in repr(sender)


async def test_wrong_tensors_do_not_end_a_claim() -> None:
    """The call raises, the transfer goes on; the right ones can be sent, and only once."""
    async with pair() as (receiver, sender):
        transfer = sender.claim(receiver.expect("r"), num_tokens=5)
        with pytest.raises(IncompatibleSchema, match="5 tokens were announced, got 6"):
            transfer.send(tensors_of(6))
        transfer.send(tensors_of(5))
        with pytest.raises(Rejected, match="the tensors of 'r' were given before"):
            transfer.send(tensors_of(5))
        await transfer
        (await receiver.receive("r")).release()


async def test_cancel_before_anything_is_started() -> None:
    """A claim that is cancelled in the same breath; nobody is told anything but the receiver."""
    async with pair() as (receiver, sender):
        transfer = sender.claim(receiver.expect("r"))
        transfer.cancel("changed my mind")
        assert (await error_of(transfer)).message == "changed my mind"
        assert (await error_of(receiver.receive("r"))).message == "changed my mind"
        transfer.cancel()
        assert_idle(receiver, sender)


# Leases.


async def test_a_lease_is_released_once_however_often() -> None:
    """Twice, out of order, and by the block as well."""
    async with pair() as (receiver, sender):
        leases = []
        for name in "abc":
            await sender.send(receiver.expect(name), tensors_of(20, seed=ord(name)))
            leases.append(await receiver.receive(name))
        a, b, c = leases
        b.release()
        b.release()
        assert free_blocks(receiver) == 4
        with c:
            c.release()
        assert same(dict(a), tensors_of(20, seed=ord("a")))
        a.release()
        assert_idle(receiver, sender)


async def test_a_released_lease_is_not_read() -> None:
    """Its blocks are others' by now: an error, not their bytes. What describes it stays."""
    async with pair() as (receiver, sender):
        await sender.send(receiver.expect("r"), tensors_of(20), metadata={"k": [1]})
        async with receiver.receive("r") as lease:
            assert list(lease) == list(SCHEMA)
            assert len(lease) == 3
        with pytest.raises(PoolClosed, match="the lease of 'r' was released"):
            lease["fill_ids"]
        with pytest.raises(PoolClosed):
            lease.detach()
        assert (lease.num_tokens, lease.metadata) == (20, {"k": [1]})


async def test_a_field_that_is_not_in_the_schema() -> None:
    """A lease is a mapping: KeyError, `in` and `get` do as with any."""
    async with pair() as (receiver, sender):
        await sender.send(receiver.expect("r"), tensors_of(2))
        async with receiver.receive("r") as lease:
            assert "pixels" not in lease
            assert lease.get("pixels") is None
            with pytest.raises(KeyError):
                lease["pixels"]


@pytest.mark.parametrize("num_tokens", [20, 300], ids=["view", "joined"])
async def test_detached_tensors_outlive_the_lease(num_tokens: int) -> None:
    """The blocks are free at once and used again, and the tensors keep their bytes."""
    async with pair() as (receiver, sender):
        transfer = sender.claim(receiver.expect("r")).send(tensors_of(num_tokens, seed=1))
        detached = (await receiver.receive("r")).detach()
        await transfer
        assert free_blocks(receiver) == 8
        other = sender.claim(receiver.expect("s"), num_tokens=128).send(tensors_of(128, seed=2))
        async with receiver.receive("s"):
            assert same(detached, tensors_of(num_tokens, seed=1))
        await other


async def test_detach_in_a_thread() -> None:
    """Large copies are made beside the loop; the blocks come back on the loop."""
    async with pair() as (receiver, sender):
        await sender.send(receiver.expect("r"), tensors_of(100))
        lease = await receiver.receive("r")
        detached = await asyncio.to_thread(lease.detach)
        await asyncio.sleep(0)
        assert free_blocks(receiver) == 8
        assert same(detached, tensors_of(100))


async def test_a_wait_for_the_next_state_that_is_cancelled_leaves_nothing() -> None:
    """Whoever polls with `wait_for` does so as often as he likes."""
    async with pair() as (receiver, sender):
        transfer = await granted(sender.claim(receiver.expect("r")))
        for _ in range(10):
            states = transfer.events()
            assert [await anext(states) for _ in "ab"] == [State.ALLOC, State.SENDING]
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(states), 0.001)
        assert not transfer._watching
        transfer.cancel()
        receiver.cancel("r")


async def test_leases_are_released_by_any_thread() -> None:
    """While the loop goes on with other transfers: no block is lost, nothing is given twice."""
    async with pair() as (receiver, sender):

        async def move(number: int) -> None:
            name = f"{number}"
            sending = asyncio.ensure_future(sender.send(receiver.expect(name), tensors_of(20)))
            lease = await receiver.receive(name)
            await asyncio.gather(*(asyncio.to_thread(lease.release) for _ in "ab"))
            await sending

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            await asyncio.gather(*map(move, range(200)))
        finally:
            sys.setswitchinterval(interval)
        assert free_blocks(receiver) == 8


async def test_a_dropped_lease_warns() -> None:
    """Its blocks stay taken, since nobody knows whether views of them are held somewhere."""
    async with pair() as (receiver, sender):
        await sender.send(receiver.expect("r"), tensors_of(20))
        with pytest.warns(ResourceWarning, match="<Lease 'r'.*was never released"):
            await drop(receiver.receive("r"))
        assert free_blocks(receiver) == 6


async def drop(reception: Any) -> None:
    await reception
    gc.collect()


async def test_an_endpoint_that_is_never_closed_warns() -> None:
    """The warning names it. Here it is closed all the same, for the sake of the other tests."""
    async with pair(name="forgotten") as (receiver, sender):
        with pytest.warns(ResourceWarning, match="<Receiver forgotten.*was never closed"):
            receiver.__del__()
        with pytest.warns(ResourceWarning, match="<Sender .*was never closed"):
            sender.__del__()


# Receiving twice.


async def test_one_request_is_received_by_one() -> None:
    """A second call for a request that is being received is refused; the first goes on."""
    async with pair() as (receiver, sender):
        first = asyncio.ensure_future(receive(receiver, "r"))
        await asyncio.sleep(0)
        with pytest.raises(Rejected, match="'r' is being received already"):
            await receiver.receive("r")
        await sender.send("r", tensors_of(7), to=receiver.address)
        with await first as lease:
            assert lease.num_tokens == 7
        assert_idle(receiver, sender)


async def receive(receiver: Any, request_id: str) -> Any:
    return await receiver.receive(request_id)


async def test_a_request_that_was_taken_is_another_one_when_asked_for_again() -> None:
    """It waits, under its deadline, for a sender to come with that id; nothing old comes back."""
    async with pair() as (receiver, sender):
        await sender.send(receiver.expect("r"), tensors_of(7))
        (await receiver.receive("r")).release()
        error = await error_of(receiver.receive("r", timeout=0.05))
        assert "no sender has claimed it" in error.message
        assert_idle(receiver, sender)


async def test_a_task_of_either_handle() -> None:
    """They are awaitables and no coroutines: `ensure_future` takes them."""
    async with pair() as (receiver, sender):
        transfer = sender.claim(receiver.expect("r"))
        sending = asyncio.ensure_future(transfer)
        receiving = asyncio.ensure_future(receiver.receive("r"))
        transfer.send(tensors_of(5))
        (await receiving).release()
        assert (await sending).num_tokens == 5


async def test_a_reception_that_is_never_awaited_is_nothing() -> None:
    """`receive` begins when it is awaited or entered."""
    async with pair() as (receiver, sender):
        receiver.receive("r")
        assert receiver.metrics()["requests_open"] == 0
        assert_idle(receiver, sender)


# Failures that nobody awaits.

Failures: TypeAlias = "asyncio.Queue[tuple[str, AiommError]]"


@asynccontextmanager
async def telling_pair(**settings: Any) -> AsyncIterator[tuple[Receiver, Sender, Failures]]:
    """Yield a pair, and what its receiver tells of failures."""
    told: Failures = asyncio.Queue()
    async with pair(on_failure=lambda *failure: told.put_nowait(failure), **settings) as endpoints:
        yield *endpoints, told


@pytest.mark.both_loops
async def test_a_failure_that_nobody_asked_for_is_told_once() -> None:
    """When it happens, and not again at the deadline; until then it can be asked for, too."""
    async with telling_pair() as (receiver, sender, told):
        for name in "ab":
            (await granted(sender.claim(name, to=receiver.address))).cancel("no")
            request_id, error = await told.get()
            assert (request_id, type(error), error.message) == (name, Cancelled, "no")
        assert await error_of(receiver.receive("b")) is error
        receiver.cancel("a")
        transfer = sender.claim(receiver.expect("c", timeout=0.5))
        (await granted(transfer)).cancel("no")
        assert (await told.get())[0] == "c"
        results = receiver._driver.results
        if results._errors:
            await until(lambda: not results._errors, results, "drop")
        await asyncio.sleep(0)
        assert told.empty()
        assert_idle(receiver, sender)


async def test_an_expected_request_that_nobody_awaits_is_told_at_its_deadline() -> None:
    """Whether it was never claimed, or has arrived and nobody takes it."""
    async with telling_pair() as (receiver, sender, told):
        receiver.expect("unclaimed", timeout=0.01)
        request_id, error = await told.get()
        assert (request_id, type(error)) == ("unclaimed", TransferTimeout)
        assert "no sender has claimed it" in error.message

        await sender.send(receiver.expect("untaken", timeout=0.5), tensors_of(5))
        request_id, error = await told.get()
        assert (request_id, type(error)) == ("untaken", TransferTimeout)
        assert "nobody asked for the result" in error.message
        assert_idle(receiver, sender)


async def test_what_is_awaited_is_not_told() -> None:
    """Who awaits it hears of it: from the sender, at the deadline, and by giving up himself."""
    async with telling_pair() as (receiver, sender, told):
        transfer = sender.claim(receiver.expect("r"))
        waiting = asyncio.ensure_future(receiver.receive("r"))
        await granted(transfer)
        transfer.cancel("no")
        assert (await error_of(waiting)).message == "no"

        assert isinstance(await error_of(receiver.receive("s", timeout=0.01)), TransferTimeout)

        for by_name in (True, False):
            waiting = asyncio.ensure_future(receiver.receive("t"))
            await asyncio.sleep(0)
            receiver.cancel("t") if by_name else waiting.cancel()
            await asyncio.wait([waiting])
        await asyncio.sleep(0)
        assert told.empty()
        assert_idle(receiver, sender)


async def test_what_this_side_gives_up_is_told_like_the_rest() -> None:
    """By name, or with all others by the close, which has told everything when it returns."""
    async with telling_pair() as (receiver, _, told):
        for name in "abc":
            receiver.expect(name)
        receiver.cancel("a", "enough")
        await receiver.aclose()
        failures = [told.get_nowait() for _ in "abc"]
        assert [name for name, _ in failures] == ["a", "b", "c"]
        assert [type(error) for _, error in failures] == [Cancelled, PoolClosed, PoolClosed]
        assert told.empty()


async def test_an_endpoint_is_called_on_its_own_loop() -> None:
    """Elsewhere it raises, instead of arming timers that wake nobody; nothing has happened then."""
    async with pair() as (receiver, sender):
        ticket = receiver.expect("r")
        transfer = sender.claim(ticket)
        calls: list[Callable[[], object]] = [
            lambda: receiver.expect("other"),
            lambda: receiver.cancel("r"),
            lambda: sender.claim(ticket),
            lambda: transfer.send(tensors_of(3)),
            transfer.cancel,
            lambda: sender.offer("r", tensors_of(3)),
        ]
        for call in calls:
            with pytest.raises(RuntimeError, match="belongs to another event loop"):
                await asyncio.to_thread(call)
            with pytest.raises(RuntimeError, match="belongs to another event loop"):
                await asyncio.to_thread(asyncio.run, _called(call))
        for endpoint in (sender, receiver):
            with pytest.raises(RuntimeError, match="belongs to another event loop"):
                await asyncio.to_thread(asyncio.run, endpoint.aclose())
        await transfer.send(tensors_of(3))
        (await receiver.receive("r")).release()
        assert_idle(receiver, sender)


def test_an_endpoint_whose_loop_runs_on_another_thread_by_now() -> None:
    """Where it was started does not count; between two runs it may be called."""
    loop = asyncio.new_event_loop()
    receiver = Receiver(SCHEMA, bind=ANYWHERE, **SMALL_POOL)
    loop.run_until_complete(receiver.start())
    receiver.expect("a")
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result()
    with pytest.raises(RuntimeError, match="belongs to another event loop"):
        receiver.expect("b")
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.run_until_complete(receiver.aclose())
    loop.close()


async def _called(call: Callable[[], object]) -> None:
    call()


async def test_an_encoder_that_is_cancelled_in_the_middle() -> None:
    """The receiver is told so, and at once."""
    async with pair() as (receiver, sender):
        is_claimed = asyncio.Event()

        async def encode() -> None:
            with sender.claim(receiver.expect("r")):
                is_claimed.set()
                await asyncio.Event().wait()

        encoding = asyncio.ensure_future(encode())
        await is_claimed.wait()
        encoding.cancel()
        error = await error_of(receiver.receive("r"))
        assert isinstance(error, Cancelled)
        assert error.message == "the encoder was cancelled"


async def test_the_metrics_of_a_sender() -> None:
    """Under the same names from the beginning, like those of a receiver."""
    async with pair() as (receiver, sender):
        before, names = sender.metrics(), receiver.metrics().keys()
        assert set(before.values()) == {0}
        assert "ignored_violations" in before.keys() & names
        waiting = sender.claim("nobody asks for it")
        granted_one = await granted(sender.claim(receiver.expect("request")))
        metrics = sender.metrics()
        assert metrics.keys() == before.keys()
        assert (metrics["transfers_open"], metrics["transfers_waiting_for_a_receiver"]) == (2, 1)
        assert metrics["peers"] == receiver.metrics()["peers"] == 1
        for each in (waiting, granted_one):
            each.cancel()
        assert receiver.metrics().keys() == names


async def test_results_that_nobody_took_end_with_the_close() -> None:
    """Told like all others that fail; nothing of them is kept."""
    told = list[tuple[str, AiommError]]()
    async with pair(on_failure=lambda *failure: told.append(failure)) as (receiver, sender):
        await sender.send(receiver.expect("joined"), tensors_of(300))
        await sender.send(receiver.expect("view"), tensors_of(3))
        await receiver.aclose()
        await asyncio.sleep(0)
        assert sorted(request_id for request_id, _ in told) == ["joined", "view"]
        assert all(isinstance(error, PoolClosed) for _, error in told)
        metrics = receiver.metrics()
        assert (metrics["blocks_free"], metrics["requests_open"], metrics["bytes_buffered"]) == (
            receiver.settings.blocks,
            0,
            0,
        )


async def test_a_callback_that_raises_costs_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    """It is logged, and called again for the next failure."""
    called: asyncio.Queue[str] = asyncio.Queue()

    def raise_for(request_id: str, error: AiommError) -> None:
        called.put_nowait(request_id)
        raise RuntimeError(f"bad day for {request_id}")

    async with pair(on_failure=raise_for) as (receiver, sender):
        for name in "ab":
            (await granted(sender.claim(name, to=receiver.address))).cancel()
            assert await called.get() == name
            assert f"on_failure could not take the failure of '{name}'" in caplog.text
            assert f"bad day for {name}" in caplog.text
            assert isinstance(await error_of(receiver.receive(name)), Cancelled)
        await sender.send(receiver.expect("r"), tensors_of(5))
        (await receiver.receive("r")).release()
        assert_idle(receiver, sender)
