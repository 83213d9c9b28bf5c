"""How an endpoint begins and ends, as its user sees it."""

from __future__ import annotations

import asyncio
import warnings
from types import TracebackType
from typing import Any, Self

from .base import Driver

__all__ = ["Lifecycle"]


class Lifecycle:
    """What a Sender and a Receiver have in common.

    First use starts them; entering `async with` is better, since it also closes them.
    """

    _driver: Driver[Any]

    async def start(self) -> None:
        """Make what is needed (a receiver: its pool) and bind; again is harmless.

        One that could not start stays so: make a new one.

        Raises:
            OSError: the address cannot be bound.
            PlaneUnavailable: no plane can be used, or there is no memory for the pool.
            PoolClosed: this endpoint was closed.
        """
        await asyncio.shield(self._driver.ensure_started())

    async def aclose(self) -> None:
        """Abort what is not done, wait until no write can land any more, and part. Idempotent.

        It takes at most about `close_timeout` seconds. Leases that are held stay readable.
        """
        await self._driver.aclose()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        driver = getattr(self, "_driver", None)
        if driver is not None and driver.is_started and not driver.is_closing:
            warnings.warn(f"{self!r} was never closed", ResourceWarning, source=self, stacklevel=2)
