"""The encoder's side: claim a ticket early, send the tensors when they are there."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Generator, Mapping, Sequence
from secrets import token_bytes
from types import TracebackType
from typing import Any, Self, SupportsFloat, SupportsIndex

import msgspec

from ._driver.lifecycle import Lifecycle
from ._driver.place import place_of
from ._driver.routes import Route
from ._driver.sending import SendDriver, Watcher
from .arguments import length_of, request_id_of, request_of, seconds_of
from .buffers.device_rows import stream_of
from .buffers.tensors import memory_of, rows_of
from .config import SenderSettings, settings_from
from .errors import AiommError, Failure, IncompatibleSchema, Reason, Rejected, error_from
from .planes.base import Plane
from .planes.registry import make_planes
from .protocol.events import TokensReady
from .protocol.frames import MAX_METADATA_NBYTES
from .protocol.send_transfer import SendTransfer
from .protocol.states import State
from .types import Schema, Ticket, TransferStats

__all__ = ["OfferedTicket", "Sender", "Transfer"]

logger = logging.getLogger("aiomm.sender")


class Transfer:
    """One transfer: a handle, and awaitable as often as one likes.

    Awaiting it returns :class:`TransferStats` or raises the typed error. As with a task,
    cancelling the await cancels the transfer; use `asyncio.shield` to only stop waiting.

    In `with sender.claim(ticket) as transfer:` around the encoder, an exception cancels the
    transfer, and so does an exit before the tensors were given: the receiver learns it at once.
    """

    def __init__(self, sender: Sender, request_id: str, announced: int | None = None) -> None:
        sender._driver.check_loop()
        self._sender = sender
        self._announced = announced
        self._loop = asyncio.get_running_loop()
        self._future: asyncio.Future[TransferStats] = self._loop.create_future()
        self._future.add_done_callback(_retrieve)
        self._core: SendTransfer | None = None
        self._tensors: tuple[int, bytes] | None = None
        self._cancelled_with: Failure | None = None
        self._rows: Mapping[str, Any] = {}
        self._watching: list[asyncio.Future[None]] = []
        """Those who wait for the next change."""
        self.request_id = request_id

    @property
    def state(self) -> State:
        """ALLOC, SENDING, AWAITING_RESUME, DONE or FAILED."""
        if self._core is not None:
            return self._core.state
        return State.FAILED if self._future.done() else State.ALLOC

    @property
    def transferred_tokens(self) -> int:
        """Tokens that have landed at the receiver."""
        return 0 if self._core is None else self._core.transferred_tokens

    def send(
        self,
        tensors: Mapping[str, object],
        *,
        metadata: Mapping[str, Any] | None = None,
        stream: object = None,
    ) -> Transfer:
        """Give the tensors, `[num_tokens, *shape]` per field; returns at once.

        The tensors must not change until the transfer is over. Torch tensors, numpy arrays,
        anything with DLPack, cupy arrays, and bytes are taken, dense or strided. Up to 4 MiB, with
        few processors 8 MiB, are copied in this call where the receiver's pool is within reach
        and blocks are granted.

        Args:
            tensors: one per field of the schema, all with the same number of tokens.
            metadata: plain values (JSON-like) that the receiver finds in its lease, up to
                32 KiB encoded.
            stream: of CUDA, on which tensors of a GPU are being made (of torch, cupy or
                cuda.core, or CUDA's handle); by default the current one. They are read when it
                has done all that it has been given by now.

        Raises:
            IncompatibleSchema: the tensors do not match the schema. The transfer goes on: send
                the right ones, or cancel it.
            PlaneUnavailable: tensors are on a GPU, and CUDA fails.
            Rejected: tensors were given before, or the metadata is too large.
        """
        if self._tensors is not None:
            raise Rejected(f"the tensors of {self.request_id!r} were given before")
        self._sender._driver.check_loop()
        encoded = _encode_metadata(metadata)
        rows = rows_of(self._sender.schema, tensors, stream=stream_of(stream))
        num_tokens = _num_tokens(rows)
        if self._announced not in (None, num_tokens):
            raise IncompatibleSchema(f"{self._announced} tokens were announced, got {num_tokens}")
        self._rows, self._tensors = rows, (num_tokens, encoded)
        if self._core is not None:
            self._give_tensors(self._core)
        return self

    def cancel(self, reason: object = "cancelled by the sender") -> None:
        """Give the transfer up and tell the receiver at once. Harmless when it is over.

        Args:
            reason: a sentence or an exception, which both sides are told.
        """
        self._sender._driver.check_loop()
        failure = Failure(Reason.CANCELLED, str(reason))
        if self._core is None:
            self._cancelled_with = failure
            self._ended(error_from(failure), None)
        elif not self._future.done():
            driver = self._sender._driver
            driver.endpoint.fail(self._core.id.generation, failure, driver.now())
            driver.pump()

    def add_done_callback(self, callback: Callable[[Transfer], object]) -> None:
        """Call `callback(transfer)` from the loop when the transfer is over."""
        self._future.add_done_callback(lambda _: callback(self))

    def done(self) -> bool:
        """Whether the transfer is over."""
        return self._future.done()

    def exception(self) -> BaseException | None:
        """Return what awaiting raises, or None; only when :meth:`done`."""
        return self._future.exception()

    async def events(self) -> AsyncIterator[State]:
        """Yield every state from ALLOC on, until DONE or FAILED."""
        told = 0
        while True:
            history = [(State.ALLOC, 0.0)] if self._core is None else self._core.history
            if told < len(history):
                state, _ = history[told]
                told += 1
                yield state
            elif not self._future.done():
                change = self._loop.create_future()
                self._watching.append(change)
                try:
                    await change
                except BaseException:  # cancelled: nobody waits for it any more
                    if change in self._watching:
                        self._watching.remove(change)
                    raise
            else:
                if self._core is None:
                    yield State.FAILED
                return

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(exc, asyncio.CancelledError):
            self.cancel("the encoder was cancelled")
        elif exc is not None:
            self.cancel(f"the encoder raised {type(exc).__name__}: {exc}")
        elif self._tensors is None:
            self.cancel("the encoder gave no tensors")

    def __await__(self) -> Generator[Any, None, TransferStats]:
        return self._wait().__await__()

    async def _wait(self) -> TransferStats:
        try:
            return await asyncio.shield(self._future)
        except asyncio.CancelledError:
            self.cancel("the sender's await was cancelled")
            raise

    def __repr__(self) -> str:
        total = "?" if self._core is None or self._core.total is None else self._core.total
        return (
            f"<Transfer {self.request_id!r} {self.state}: "
            f"{self.transferred_tokens} of {total} tokens>"
        )

    def _open(self, core: SendTransfer) -> None:
        """Take the protocol's transfer, now that the endpoint is up."""
        self._core = core
        watcher = Watcher(self._changed, self._ended)
        self._sender._driver.watchers[core.id.generation] = watcher
        if self._cancelled_with is not None:
            driver = self._sender._driver
            driver.endpoint.fail(core.id.generation, self._cancelled_with, driver.now())
        elif self._tensors is not None:
            self._sender._driver.sources[core.id.generation] = self._rows

    def _changed(self) -> None:
        """Wake who waits for the next state."""
        watching, self._watching = self._watching, []
        for change in watching:
            if not change.done():
                change.set_result(None)

    def _ended(self, error: AiommError | None, route: Route | None) -> None:
        """Resolve the handle."""
        self._rows = {}
        self._changed()
        if self._future.done():
            return
        if error is not None:
            self._future.set_exception(error)
        elif self._core is not None:
            self._future.set_result(_stats(self._core, self._sender.schema, route))

    def _ready(self) -> TokensReady | None:
        """What is known of the tokens by now."""
        if self._tensors is not None:
            num_tokens, metadata = self._tensors
            return TokensReady(num_tokens, num_tokens, metadata)
        return None if self._announced is None else TokensReady(0, self._announced)

    def _give_tensors(self, core: SendTransfer) -> None:
        driver, generation = self._sender._driver, core.id.generation
        ready = self._ready()
        if ready is not None and driver.endpoint.has(generation):
            driver.sources[generation] = self._rows
            driver.endpoint.tokens_ready(generation, ready, driver.now())
            driver.pump()


class OfferedTicket:
    """Tensors on offer: the ticket to give away, and a handle that ends with the offer.

    Awaiting it returns how often it was redeemed to the end, once the offer has ended (by
    :meth:`withdraw`, by its timeout, or with the sender) and no transfer of it runs any more.
    """

    def __init__(self, sender: Sender, ticket: Ticket) -> None:
        self._sender = sender
        self._future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.ticket = ticket
        self._num_running = 0
        self._is_standing = True
        self.redeemed = 0
        """Transfers of this offer that a receiver has accepted whole."""

    def withdraw(self) -> None:
        """End the offer. Transfers that have begun go on. Idempotent."""
        self._sender._driver.check_loop()
        self._sender._withdraw(self.ticket.request_id, self)

    def to_bytes(self) -> bytes:
        """Return the ticket as MessagePack."""
        return self.ticket.to_bytes()

    def to_json(self) -> str:
        """Return the ticket as JSON."""
        return self.ticket.to_json()

    def _began(self) -> Watcher:
        """A receiver redeems the offer: watch the transfer."""
        self._num_running += 1
        return Watcher(lambda: None, self._ended)

    def _ended(self, error: AiommError | None, route: Route | None) -> None:
        """Count a transfer of the offer that is over."""
        if error is None:
            self.redeemed += 1
        else:
            logger.info("! a redemption of %r failed: %s", self.ticket.request_id, error)
        self._num_running -= 1
        self._resolve()

    def _end(self) -> None:
        """The offer stands no more."""
        self._is_standing = False
        self._resolve()

    def _resolve(self) -> None:
        if not (self._is_standing or self._num_running or self._future.done()):
            self._future.set_result(self.redeemed)

    def __await__(self) -> Generator[Any, None, int]:
        return asyncio.shield(self._future).__await__()

    def __repr__(self) -> str:
        over = "standing" if self._is_standing else "ended"
        return f"<Offer {self.ticket.request_id!r} {over}: redeemed {self.redeemed} times>"


class Sender(Lifecycle):
    """Sends tensors into receivers' pools.

    Args:
        schema: the fields of every transfer.
        bind: where receivers may connect to this sender, such as `tcp://127.0.0.1:*`; needed
            for :meth:`offer` and for receivers that ask by `source=`.
        planes: `"auto"`, or names and :class:`~aiomm.planes.base.Plane` objects in
            order of preference.
        settings: the fields of :class:`~aiomm.config.SenderSettings`: `timeout`, `strict`,
            `checksum` and others.

    Raises:
        ValueError: a setting or the address is wrong.
        TypeError: there is no setting of that name.
        PlaneUnavailable: a plane is not known.
        ImportError: `checksum=True` without the extra `aiomm[checksum]`.
    """

    _driver: SendDriver

    def __init__(
        self,
        schema: Schema,
        *,
        bind: str | None = None,
        planes: str | Plane | Sequence[str | Plane] = "auto",
        **settings: Any,
    ) -> None:
        self.schema = schema
        self.settings = settings_from(SenderSettings, settings)
        name = self.settings.name or f"sender-{os.getpid()}"
        place = place_of(bind, (), self.settings.advertise)
        self._driver = SendDriver(schema, self.settings, bind, make_planes(planes, place), name)
        self._offers: dict[str, tuple[OfferedTicket, asyncio.TimerHandle]] = {}

    @property
    def address(self) -> str | None:
        """Where receivers reach this sender, with the real port; None if it does not listen."""
        return self._driver.channel.address

    async def aclose(self) -> None:
        """Withdraw all offers, then close; see :meth:`Lifecycle.aclose`."""
        self._driver.check_loop()
        for offer, _ in list(self._offers.values()):
            offer.withdraw()
        await super().aclose()

    def claim(
        self,
        ticket: Ticket | str | bytes,
        *,
        to: str | None = None,
        num_tokens: SupportsIndex | None = None,
        timeout: SupportsFloat | None = None,
    ) -> Transfer:
        """Ask for the grant now, before the tensors are there; returns at once.

        Args:
            ticket: from `receiver.expect()`, or its JSON or bytes; or a bare request id.
            to: the receiver's address, for a bare request id; see :meth:`send`.
            num_tokens: the length, if it is known by now: then the grant is exact.
            timeout: seconds for the whole transfer.

        Raises:
            ProtocolError: this is no ticket.
            ValueError: `num_tokens` is out of bounds.
            Rejected: it is the ticket of an offer, or comes with an address.
            PoolClosed: the sender is closed.
            RuntimeError: it belongs to another event loop or thread.

        All else is raised where the transfer is awaited.
        """
        request_id, known = request_of(ticket, to)
        if known is not None and known.kind != "expect":
            raise Rejected("this ticket is an offer: a receiver redeems it")
        transfer = Transfer(self, request_id, length_of(num_tokens))
        return self._open(transfer, timeout, ticket=known, to=to)

    async def send(
        self,
        request: Ticket | str | bytes,
        tensors: Mapping[str, object],
        *,
        to: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        stream: object = None,
        timeout: SupportsFloat | None = None,
    ) -> TransferStats:
        """Send the tensors of one request, and return when the receiver has them.

        Args:
            request: a ticket (or its JSON or bytes), or a bare request id.
            tensors: see :meth:`Transfer.send`.
            to: the receiver's address, for a bare request id. Without it the transfer goes to
                the receiver that asks for it, or to one that takes anything.
            metadata: see :meth:`Transfer.send`.
            stream: see :meth:`Transfer.send`.
            timeout: seconds for the whole transfer.

        Raises:
            AiommError: one of those in :mod:`aiomm.errors`; the README draws their tree.
        """
        request_id, ticket = request_of(request, to)
        transfer = Transfer(self, request_id)
        transfer.send(tensors, metadata=metadata, stream=stream)
        return await self._open(transfer, timeout, ticket=ticket, to=to)

    async def register(self, tensor: object) -> None:
        """Tell the planes of a long-lived tensor, out of which many transfers will be sent.

        Rows of it are then read from where they are, also by hardware that reads only memory it
        was told of (RDMA); without this they are copied once more. Other planes do nothing.

        Args:
            tensor: dense, on the host or a GPU. It must stay until :meth:`unregister` or the end.

        Raises:
            IncompatibleSchema: it is not one writable piece of memory.
            PlaneUnavailable: a plane refuses it. Transfers work all the same.
        """
        memory = memory_of(tensor)
        for plane in self._driver.planes:
            await plane.register(memory)

    async def unregister(self, tensor: object) -> None:
        """Take back :meth:`register`, after the last transfer out of `tensor`. Idempotent."""
        memory = memory_of(tensor)
        for plane in self._driver.planes:
            await plane.unregister(memory)

    def offer(
        self,
        request_id: str,
        tensors: Mapping[str, object],
        *,
        metadata: Mapping[str, Any] | None = None,
        stream: object = None,
        timeout: SupportsFloat | None = None,
    ) -> OfferedTicket:
        """Let receivers redeem tensors by a ticket, until it is withdrawn or `timeout` passes.

        The sender must be bound and started. The tensors must not change meanwhile.

        Raises:
            Rejected: the request id is on offer already, the sender does not listen, or the
                metadata is too large.
            ValueError: the request id or the timeout is out of bounds.
            IncompatibleSchema: the tensors do not match the schema.
            PlaneUnavailable: tensors are on a GPU, and CUDA fails.
            PoolClosed: the sender is closed.
        """
        self._driver.check_open()
        self._driver.check_loop()
        if self.address is None:
            raise Rejected("only a started sender with bind= can offer")
        encoded = _encode_metadata(metadata)
        rows = rows_of(self.schema, tensors, stream=stream_of(stream))
        request_id, seconds = request_id_of(request_id), seconds_of(timeout, self.settings.timeout)
        key, total = token_bytes(16), _num_tokens(rows)
        driver = self._driver
        driver.endpoint.offer(request_id, key, total, encoded, seconds)
        ticket = Ticket(
            kind="offer",
            request_id=request_id,
            address=driver.channel.told(self.address),
            epoch=driver.endpoint.epoch,
            key=key,
            num_tokens=total,
        )
        offered = OfferedTicket(self, ticket)
        driver.offers[request_id] = (rows, offered._began)
        expiry = driver.loop.call_later(seconds, offered.withdraw)
        self._offers[request_id] = (offered, expiry)
        return offered

    def metrics(self) -> dict[str, int]:
        """Return figures of this moment: transfers, offers, links, what was ignored."""
        endpoint = self._driver.endpoint
        return {
            "transfers_open": endpoint.num_live,
            "transfers_waiting_for_a_receiver": endpoint.num_waiting,
            "offers": len(self._offers),
            **self._driver.metrics_of_links(),
        }

    def _withdraw(self, request_id: str, offered: OfferedTicket) -> None:
        standing = self._offers.get(request_id)
        if standing is not None and standing[0] is offered:
            del self._offers[request_id]
            standing[1].cancel()
            self._driver.endpoint.withdraw(request_id)
            self._driver.offers.pop(request_id, None)
        offered._end()

    def _open(
        self,
        transfer: Transfer,
        timeout: SupportsFloat | None,
        *,
        ticket: Ticket | None = None,
        to: str | None = None,
    ) -> Transfer:
        self._driver.check_open()
        seconds = seconds_of(timeout, self.settings.timeout)

        def begin() -> None:
            try:
                self._begin(transfer, ticket, to, seconds)
            except AiommError as exc:
                transfer._ended(exc, None)
            except ValueError as exc:  # an address that is none, or no descriptor is free
                transfer._ended(Rejected(str(exc)), None)
            except Exception as exc:  # a bug must not leave the handle waiting for ever
                logger.exception("! %r cannot be begun", transfer.request_id)
                transfer._ended(Rejected(f"cannot be begun: {exc!r}"), None)

        self._driver.when_started(begin, lambda failure: transfer._ended(error_from(failure), None))
        return transfer

    def _begin(
        self, transfer: Transfer, ticket: Ticket | None, to: str | None, timeout: float
    ) -> None:
        driver = self._driver
        address = to if ticket is None else ticket.address
        life = 0 if ticket is None else ticket.epoch
        core = driver.endpoint.open(
            transfer.request_id,
            timeout=timeout,
            now=driver.now(),
            path=driver.path_to(address, life, timeout),
            life=life,
            key=b"" if ticket is None else ticket.key,
            ready=transfer._ready(),
        )
        transfer._open(core)
        driver.pump()

    def __repr__(self) -> str:
        return f"<Sender {self._driver.name} at {self.address}: {len(self._driver.watchers)} live>"


def _num_tokens(rows: Mapping[str, Any]) -> int:
    return int(next(iter(rows.values())).num_tokens)


def _encode_metadata(metadata: Mapping[str, Any] | None) -> bytes:
    if not metadata:
        return b""
    if not all(isinstance(key, str) for key in metadata):
        raise Rejected(f"the keys of metadata must be strings: {list(metadata)}")
    try:
        encoded = msgspec.msgpack.encode(dict(metadata))
    except (TypeError, ValueError, OverflowError, RecursionError) as exc:
        raise Rejected(f"metadata must be plain values: {exc}") from exc
    if len(encoded) > MAX_METADATA_NBYTES:
        raise Rejected(
            f"metadata has {len(encoded)} bytes, over the {MAX_METADATA_NBYTES} that a frame "
            "carries: make it a field of the schema"
        )
    return encoded


def _stats(core: SendTransfer, schema: Schema, route: Route | None) -> TransferStats:
    began = core.history[0][1]
    return TransferStats(
        request_id=core.id.request_id,
        plane="" if route is None else route.plane,
        refused_planes=() if route is None else route.refused,
        num_tokens=core.transferred_tokens,
        nbytes=core.transferred_tokens * schema.token_nbytes,
        buffered_chunks=tuple(core.chunks),
        resumes=core.resumes,
        seconds=core.history[-1][1] - began,
        states=tuple((state.value, at - began) for state, at in core.history),
    )


def _retrieve(future: asyncio.Future[Any]) -> None:
    """A failed transfer that nobody awaits is no unhandled exception: its peer was told."""
    if not future.cancelled():
        future.exception()
