"""How requests end for their user: who waits, and what is kept for whoever asks later."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

from ..errors import AiommError
from ..protocol.receive_transfer import ReceiveTransfer
from ..protocol.receiving import ReceiveEndpoint
from ..types import Allocation, Extent
from .memory import Joined

__all__ = ["Delivery", "OnFailure", "Results"]

logger = logging.getLogger("aiomm.receiver")

OnFailure: TypeAlias = Callable[[str, AiommError], object]
"""The user's own, called with a request id and an error."""

UNASKED_ERRORS = 4
"""Failures of what senders began unasked have at most this part (1/4) of the places for requests:
a sender that fails again and again must not keep the others out."""


class Delivery:
    """A finished transfer, and the blocks or the tensors that hold it."""

    def __init__(
        self,
        transfer: ReceiveTransfer,
        allocations: tuple[Allocation, ...],
        extents: tuple[Extent, ...],
        joined: Joined | None,
    ) -> None:
        self.is_taken = False
        """The user has it, or nobody will."""
        self.transfer = transfer
        self.allocations = allocations
        self.extent = extents[0] if extents else Extent(0, 0)
        """Where the tokens lie in the pool, if they do."""
        self.joined = joined
        """The tensors outside the pool, if they stand there."""


class Results:
    """What becomes of requests: passed on to who waits, else kept until somebody asks.

    Args:
        endpoint: of the receiver; it is told what is over for the user, too.
        loop: returns the receiver's, which has started by then.
        discard: takes a delivery back that nobody wants.
        on_failure: told, once each, of what fails while nobody waits for it.
        max_requests: that may be open.
    """

    def __init__(
        self,
        endpoint: ReceiveEndpoint,
        loop: Callable[[], asyncio.AbstractEventLoop],
        discard: Callable[[Delivery], None],
        on_failure: OnFailure | None,
        max_requests: int,
    ) -> None:
        self._endpoint = endpoint
        self._loop = loop
        self._discard = discard
        self._on_failure = on_failure
        self._max_unasked_errors = max_requests // UNASKED_ERRORS
        self._waiting: dict[int, asyncio.Future[Delivery]] = {}
        self._deliveries: dict[int, Delivery] = {}
        self._errors: dict[int, AiommError] = {}
        self._unasked_errors: dict[int, None] = {}
        """Those of requests that nobody here has ever spoken of, the oldest first."""
        self.arrival = asyncio.Event()
        """Set when there is more to ask for, or will never be."""

    # The user asks.

    def awaited(self) -> Iterable[int]:
        """Return the requests that somebody waits for."""
        return self._waiting

    def untaken(self) -> Iterator[Delivery]:
        """Return what has arrived and nobody has asked for yet, the oldest first."""
        return iter(self._deliveries.values())

    def take(self, number: int) -> Delivery | None:
        """Return what is kept of a request, which is over with that; None if it goes on.

        Raises:
            AiommError: it has failed.
        """
        if number not in self._deliveries and number not in self._errors:
            return None
        self._endpoint.taken(number)
        error = self._forget_error(number)
        if error is not None:
            raise error
        return self._deliveries.pop(number)

    def begin_waiting(self, number: int) -> asyncio.Future[Delivery]:
        """Return what will be done when the request is; nobody waits for it yet."""
        self._waiting[number] = future = self._loop().create_future()
        return future

    def stop_waiting(self, number: int) -> None:
        """Nobody waits for the request any more."""
        self._waiting.pop(number, None)

    def drop(self, number: int) -> None:
        """End a request for which nobody waits; what was kept of it is nobody's any more."""
        self._endpoint.taken(number)
        self._forget_error(number)
        kept = self._deliveries.pop(number, None)
        if kept is not None:
            self._discard(kept)

    # The driver reports.

    def ended(self, number: int, result: Delivery | AiommError) -> None:
        """Pass a result on to who waits for it, or keep it. Its blocks are the user's now."""
        waiting = self._waiting.pop(number, None)
        if waiting is None and self._endpoint.is_wanted(number):
            self._keep(number, result)
            return
        self.drop(number)
        if waiting is None or waiting.done():  # cancelled, and its task has not run yet
            if isinstance(result, Delivery):
                self._discard(result)
        elif isinstance(result, AiommError):
            waiting.set_exception(result)
        else:
            waiting.set_result(result)

    def failed(self, number: int, request_id: str, error: AiommError) -> None:
        """Pass a failure on to who waits for it, or keep it, and tell of it."""
        if number not in self._waiting and number not in self._errors:
            self.tell(request_id, error)
        self.ended(number, error)

    def tell(self, request_id: str, error: AiommError) -> None:
        """Call `on_failure`, if there is one, when all else of this turn is done."""
        if self._on_failure is not None:
            self._loop().call_soon(_call, self._on_failure, request_id, error)

    def _keep(self, number: int, result: Delivery | AiommError) -> None:
        if isinstance(result, Delivery):
            self._deliveries[number] = result
            self.arrival.set()
            return
        self._errors[number] = result
        if self._endpoint.is_unasked(number):
            self._unasked_errors[number] = None
            if len(self._unasked_errors) > self._max_unasked_errors:
                self.drop(next(iter(self._unasked_errors)))

    def _forget_error(self, number: int) -> AiommError | None:
        self._unasked_errors.pop(number, None)
        return self._errors.pop(number, None)


def _call(on_failure: OnFailure, request_id: str, error: AiommError) -> None:
    try:
        on_failure(request_id, error)
    except Exception:  # the user's own: it costs nobody anything else
        logger.exception("! on_failure could not take the failure of %r", request_id)
