"""The language model's side: reserve early, receive into the pool, give the blocks back."""

from __future__ import annotations

import asyncio
import logging
import os
import warnings
from collections.abc import (
    AsyncIterator,
    Callable,
    Generator,
    Iterator,
    Mapping,
    Sequence,
)
from functools import cached_property
from secrets import token_bytes
from types import TracebackType
from typing import Any, Self, SupportsFloat

import msgspec

from ._driver.lifecycle import Lifecycle
from ._driver.place import place_of
from ._driver.receiving import ReceiveDriver
from ._driver.results import Delivery, OnFailure
from .arguments import request_id_of, request_of, seconds_of
from .buffers.arrays import Array
from .buffers.cuda import CudaArena
from .buffers.device_rows import stream_of
from .config import ReceiverSettings, settings_from
from .control.address import TcpAddress, parse_address
from .errors import Failure, PoolClosed, ProtocolError, Reason, Rejected
from .gpu.choice import device_ordinal
from .gpu.lanes import Mark
from .gpu.runtime import GpuError
from .planes.base import Plane
from .planes.registry import make_planes
from .types import Schema, Ticket, TransferStats

__all__ = ["Lease", "Receiver", "Reception"]

logger = logging.getLogger("aiomm.receiver")


class Lease(Mapping[str, Array]):
    """Received tensors, for as long as the lease is held.

    A mapping from field name to tensor `[num_tokens, *shape]`: a view of the pool if the
    tokens lie in one run there, else memory of its own. After :meth:`release` the blocks
    belong to others: do not touch views of them any more. Use it in `with`, release it, or
    :meth:`detach` from it; a lease that is only dropped keeps its blocks, with a warning.
    """

    def __init__(self, driver: ReceiveDriver, delivery: Delivery) -> None:
        transfer = delivery.transfer
        assert transfer.id is not None
        try:
            self.metadata = _decoded(transfer.metadata)
            """What the sender gave along with the tensors."""
        except ProtocolError:
            driver.discard(delivery)
            raise
        self._driver = driver
        self._delivery = delivery
        self._is_released = False
        self._streams: list[int] = []
        """CUDA streams that read the tensors."""
        self._pool = driver.memory.tensors
        self._joined = None if delivery.joined is None else delivery.joined.tensors()
        self.request_id = transfer.id.request_id
        self.num_tokens = transfer.transferred_tokens
        self.buffered_chunks = tuple(transfer.chunks)
        """Tokens that arrived under each grant."""
        driver.take(delivery)

    @cached_property
    def stats(self) -> TransferStats:
        """Plane, bytes, chunks, and the seconds in each state."""
        return _stats(self._delivery, self._driver.schema)

    @property
    def is_view(self) -> bool:
        """The tensors are views of the pool; else they have memory of their own."""
        return self._joined is None

    def __getitem__(self, name: str) -> Array:
        if self._is_released and self.is_view:
            raise PoolClosed(
                f"the lease of {self.request_id!r} was released: its blocks are others'"
            )
        if self._joined is not None:
            return self._joined[name]
        return self._pool.view(name, self._delivery.extent)

    def __iter__(self) -> Iterator[str]:
        return iter(self._driver.schema)

    def __len__(self) -> int:
        return len(self._driver.schema)

    def release(self, stream: object = None) -> None:
        """Give the blocks back: on the loop's thread at once, from another one soon. Idempotent.

        A pool on a GPU gives them to others only when `stream` (by default the current one of
        torch or cupy), and those told to :meth:`wait_stream`, have done all that they have been
        given by now.

        Args:
            stream: of torch, cupy or cuda.core, or CUDA's handle; for a pool on a GPU.
        """
        if not self._is_released:
            self._is_released = True
            try:
                readers = self._readers(stream) if self.is_view else ()
            except GpuError as exc:  # who still reads them is not known any more
                logger.error("! the blocks of %r stay leased: %s", self.request_id, exc)
                return
            if _runs_here(loop := self._driver.loop) or loop.is_closed():
                self._give_back(readers)
            else:
                loop.call_soon_threadsafe(self._give_back, readers)

    def wait_stream(self, stream: object) -> None:
        """Let one more stream read the tensors: :meth:`release` waits for it, too."""
        handle = stream_of(stream)
        if handle is not None:
            self._streams.append(handle)

    def _readers(self, stream: object) -> Sequence[Mark]:
        """Return how far the reading streams have to come; nothing for a pool on the host."""
        arena = self._driver.memory.arena
        if not isinstance(arena, CudaArena):
            return ()
        handle = stream_of(stream)
        if handle is None:
            handle = arena.runtime.current_stream(arena.ordinal)
        streams = dict.fromkeys([handle, *self._streams])
        marks = [Mark(arena.runtime, arena.ordinal, each) for each in streams]
        return [mark for mark in marks if not mark.is_over()]

    def detach(self) -> dict[str, Array]:
        """Return tensors that outlive the lease, and release it.

        It copies once where the tensors are views of the pool; large ones take milliseconds,
        for which `asyncio.to_thread` is the place. Do not use it from two threads.
        """
        if self._joined is not None:
            tensors = dict(self._joined)
        else:
            tensors = {name: _copy(tensor) for name, tensor in self.items()}
        self.release()
        return tensors

    def _give_back(self, readers: Sequence[Mark]) -> None:
        """Release on the loop, once, also if two threads have done it at the same time."""
        allocations, self._delivery.allocations = self._delivery.allocations, ()
        self._driver.release(allocations, readers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        kind = "released" if self._is_released else "view" if self.is_view else "joined"
        return (
            f"<Lease {self.request_id!r}: {self.num_tokens} tokens in chunks "
            f"{list(self.buffered_chunks)}, {kind}>"
        )

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def __del__(self) -> None:
        if not getattr(self, "_is_released", True) and self._delivery.allocations:
            warnings.warn(
                f"{self!r} was never released", ResourceWarning, source=self, stacklevel=2
            )


class Reception:
    """What :meth:`Receiver.receive` returns: `await` it, or enter it with `async with`."""

    def __init__(self, wait: Callable[[], Any]) -> None:
        self._wait = wait
        self._lease: Lease | None = None

    def __await__(self) -> Generator[Any, None, Lease]:
        return self._wait().__await__()  # type: ignore[no-any-return]

    async def __aenter__(self) -> Lease:
        self._lease = await self
        return self._lease

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._lease is not None:
            self._lease.release()


class Receiver(Lifecycle):
    """Receives tensors into a pool of blocks that it owns.

    Args:
        schema: the fields of every transfer.
        bind: where senders connect, such as `tcp://127.0.0.1:8001` (port 0 or `*`: any).
        connect: addresses of senders that listen; they may send here what has no other
            destination.
        device: where the pool lies: `"cpu"`, or a GPU such as `"cuda:0"`. CUDA is initialised
            when the receiver starts.
        planes: `"auto"`, or names and :class:`~aiomm.planes.base.Plane` objects in
            order of preference.
        on_failure: called with the request id and the error of a request that has failed and
            that nobody awaits; from the loop, once each. The cause may be the sender, the deadline
            (also if it had arrived and nobody took it), :meth:`cancel` or the close. Until its
            deadline :meth:`receive` raises the error, too.
        settings: the fields of :class:`~aiomm.config.ReceiverSettings`: `blocks`,
            `block_size`, `default_blocks`, `timeout` and others.

    Raises:
        ValueError: a setting, an address, or the name of the device is wrong.
        TypeError: there is no setting of that name.
        PlaneUnavailable: a plane is not known. A device that is missing is told by the start.
    """

    _driver: ReceiveDriver

    def __init__(
        self,
        schema: Schema,
        *,
        bind: str | None = None,
        connect: str | Sequence[str] = (),
        device: str = "cpu",
        planes: str | Plane | Sequence[str | Plane] = "auto",
        on_failure: OnFailure | None = None,
        **settings: Any,
    ) -> None:
        if device != "cpu":
            device = f"cuda:{device_ordinal(device)}"
        self.schema = schema
        self.settings = settings_from(ReceiverSettings, settings)
        contacts = frozenset((connect,) if isinstance(connect, str) else connect)
        self._driver = ReceiveDriver(
            schema,
            self.settings,
            bind,
            make_planes(planes, place_of(bind, contacts, self.settings.advertise)),
            self.settings.name or f"receiver-{os.getpid()}",
            device=device,
            takes_any=bool(contacts),
            on_failure=on_failure,
        )
        for address in contacts:
            self._driver.channel.check(address)
        self._driver.standing_contacts = contacts

    @property
    def address(self) -> str | None:
        """Where senders reach this receiver, with the real port; None if it does not listen.

        Before the start it is known only if `bind` names a port.
        """
        if self._driver.channel.address is not None or self._driver.bind is None:
            return self._driver.channel.address
        planned = parse_address(self._driver.bind)
        if not isinstance(planned, TcpAddress):
            return str(planned)
        advertise = self.settings.advertise
        return str(planned.reachable(planned.port, advertise)) if planned.port else None

    async def aclose(self) -> None:
        """Close, and end every iteration over arrivals; see :meth:`Lifecycle.aclose`."""
        try:
            await super().aclose()
        finally:  # cancelled, one stops waiting; it closes all the same
            self._driver.results.arrival.set()

    def expect(self, request_id: str, *, timeout: SupportsFloat | None = None) -> Ticket:
        """Reserve the default allocation as soon as it is free, and return the ticket at once.

        Args:
            request_id: 1 to 512 characters, the first no "{"; used by no other open request.
            timeout: seconds until the request is given up if it is not done and received.

        Raises:
            Rejected: the request id is in use, or (retryable) too many requests are open.
            ValueError: the request id or the timeout is out of bounds.
            PoolClosed: the receiver is closed, or could not start.
            RuntimeError: it belongs to another event loop or thread.
        """
        driver = self._driver
        starting = driver.ensure_started()
        driver.check_startable()
        if self.address is None and driver.bind is not None and not starting.done():
            raise Rejected("bind to a port of your choice, or start the receiver before expect()")
        key = token_bytes(16)
        request_id, seconds = request_id_of(request_id), seconds_of(timeout, self.settings.timeout)
        driver.endpoint.expect(request_id, key, seconds, driver.now())
        driver.pump()
        return Ticket(
            kind="expect",
            request_id=request_id,
            address=driver.channel.told(self.address or ""),
            epoch=driver.endpoint.epoch,
            key=key,
        )

    def receive(
        self,
        request: str | Ticket | bytes,
        *,
        source: str | None = None,
        timeout: SupportsFloat | None = None,
    ) -> Reception:
        """Wait until the request is done; `async with` gives the lease, and takes it back.

        Cancelling the wait gives the request up, and tells the sender.

        Args:
            request: a request id (expected, arriving, or still to come), or a sender's ticket
                (or its JSON or bytes), which this redeems.
            source: with a bare request id: the address of the sender to ask for it.
            timeout: seconds for a request that begins here; one that was expected keeps its
                own.

        Raises:
            AiommError: when awaited, one of those in :mod:`aiomm.errors`.
        """
        return Reception(lambda: self._receive(request, source, timeout))

    def cancel(self, request_id: str, reason: object = "cancelled by the receiver") -> None:
        """Give a request up and tell its sender at once. Harmless when there is none.

        Who waits for it gets Cancelled, also by a ticket or a `source`; a result that nobody has
        taken is dropped. The request id is free again.

        Args:
            request_id: which one.
            reason: a sentence or an exception, which both sides are told.
        """
        driver = self._driver
        driver.check_loop()
        for number in driver.endpoint.numbers_of(request_id):
            driver.endpoint.fail(number, Failure(Reason.CANCELLED, str(reason)), driver.now())
            if number not in driver.results.awaited():
                driver.results.drop(number)
        driver.pump()

    def metrics(self) -> dict[str, int]:
        """Return figures of this moment: blocks in each state, requests, what was ignored."""
        driver = self._driver
        blocks = {f"blocks_{state.value}": n for state, n in driver.pool.counts().items()}
        return {
            **blocks,
            "requests_open": len(driver.endpoint.numbers()),
            "requests_waiting_for_blocks": driver.queue.num_waiting,
            "bytes_buffered": driver.buffered_bytes,
            "bytes_spare": driver.memory.spare_nbytes,
            **driver.metrics_of_links(),
        }

    def __aiter__(self) -> AsyncIterator[Lease]:
        """Iterate over what arrives and nobody awaits by its id, expected or not, until the close.

        Requests that fail are passed over; `on_failure` is told of them.
        """
        return self._arrivals()

    async def _arrivals(self) -> AsyncIterator[Lease]:
        """Yield what arrives and nobody asks for by its id, until the receiver is closed."""
        await self.start()
        results = self._driver.results
        while not self._driver.is_closing:
            arrived = next(results.untaken(), None)
            if arrived is None:
                results.arrival.clear()
                await results.arrival.wait()
                continue
            results.take(arrived.transfer.number)
            try:
                lease = Lease(self._driver, arrived)
            except ProtocolError as exc:  # one sender's metadata: no reason to end for all
                logger.warning("! an arrival is dropped: %s", exc)
                assert arrived.transfer.id is not None
                results.tell(arrived.transfer.id.request_id, exc)
                continue
            yield lease

    async def _receive(
        self, request: str | Ticket | bytes, source: str | None, timeout: SupportsFloat | None
    ) -> Lease:
        await self.start()
        self._driver.check_open()
        number = self._begin(request, source, seconds_of(timeout, self.settings.timeout))
        results = self._driver.results
        delivery = results.take(number)
        if delivery is not None:
            return Lease(self._driver, delivery)
        if number in results.awaited():
            raise Rejected(f"request {request!r} is being received already")
        future = results.begin_waiting(number)
        self._driver.pump()
        self._driver.make_room()
        try:
            return Lease(self._driver, await future)
        except asyncio.CancelledError:
            self._give_up(number, future)
            raise

    def _begin(self, request: str | Ticket | bytes, source: str | None, timeout: float) -> int:
        driver, now = self._driver, self._driver.now()
        request_id, ticket = request_of(request, source)
        if ticket is None and source is None:
            return driver.endpoint.receive(request_id, timeout, now)
        key, life, address = b"", 0, source
        if ticket is not None:
            if ticket.kind != "offer":
                raise Rejected("this ticket is for a sender to claim; receive its request id")
            key, life, address = ticket.key, ticket.epoch, ticket.address
        path = driver.path_to(address, life, timeout)
        return driver.endpoint.redeem(
            request_id, key, path=path, life=life, timeout=timeout, now=now
        )

    def _give_up(self, number: int, future: asyncio.Future[Delivery]) -> None:
        driver = self._driver
        if future.done() and not future.cancelled() and future.exception() is None:
            driver.discard(future.result())
            return
        failure = Failure(Reason.CANCELLED, "the receiver's await was cancelled")
        driver.endpoint.fail(number, failure, driver.now())
        driver.endpoint.taken(number)
        driver.pump()
        driver.results.stop_waiting(number)  # until here it was awaited: nobody else is told

    def __repr__(self) -> str:
        return f"<Receiver {self._driver.name} at {self.address}: {self._driver.pool!r}>"


def _decoded(metadata: bytes) -> dict[str, Any]:
    try:
        return msgspec.msgpack.decode(metadata, type=dict[str, Any]) if metadata else {}
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as exc:
        raise ProtocolError(f"the sender's metadata is malformed: {exc}") from exc


def _runs_here(loop: asyncio.AbstractEventLoop) -> bool:
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False


def _copy(tensor: Any) -> Array:
    copied: Array = tensor.clone() if hasattr(tensor, "clone") else tensor.copy()
    return copied


def _stats(delivery: Delivery, schema: Schema) -> TransferStats:
    transfer = delivery.transfer
    assert transfer.id is not None
    began = transfer.history[0][1]
    return TransferStats(
        request_id=transfer.id.request_id,
        plane=transfer.plane,
        refused_planes=(),
        num_tokens=transfer.transferred_tokens,
        nbytes=transfer.transferred_tokens * schema.token_nbytes,
        buffered_chunks=tuple(transfer.chunks),
        resumes=transfer.resumes,
        seconds=transfer.history[-1][1] - began,
        states=tuple((state.value, at - began) for state, at in transfer.history),
        block_indices=tuple(blocks for blocks, _ in transfer.grants),
        start_offsets=tuple(extents[0].start if extents else 0 for _, extents in transfer.grants),
    )
