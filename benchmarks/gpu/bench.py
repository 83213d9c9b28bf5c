"""What a check is given: children, a place for what it finds, and three ways to end."""

from __future__ import annotations

import asyncio
import os
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from aiomm.gpu.choice import VARIABLE
from benchmarks.gpu.content import ONE_FIELD, Fields
from benchmarks.gpu.facts import NOT_INSTALLED
from benchmarks.gpu.peers import Died, Peer, Told

__all__ = ["Bench", "Check", "Failed", "Outcome", "Skipped", "Timing", "require", "until"]

GRACE_SECONDS = 30.0
"""How long after its check a child ends itself, should this process have been killed."""


class Failed(Exception):
    """A check has found what must not be."""


class Skipped(Exception):
    """A check cannot be done here."""


class Timing(NamedTuple):
    """How long one thing takes."""

    check: str
    name: str
    nbytes: int
    """Of the memory that it is about; 0 if it is about none."""
    seconds: list[float]
    has_rate: bool
    """Whether these bytes are moved in that time."""


@dataclass
class Outcome:
    """What one check has come to."""

    name: str
    status: str
    """`passed`, `failed` or `skipped`."""
    detail: str
    seconds: float
    findings: dict[str, Any] = field(default_factory=dict)


class Check(NamedTuple):
    """One check."""

    name: str
    run: Callable[[Bench], Awaitable[str]]
    """Returns what is to be told of a success."""
    limit: float
    """Seconds after which it has failed."""


class Bench:
    """Runs one check after the other.

    Args:
        gpus: what there is; see :func:`.facts.gpus`.
        is_dry: nothing is real.
        is_quick: do everything less often.
    """

    def __init__(self, gpus: Mapping[str, Any], *, is_dry: bool, is_quick: bool) -> None:
        self.gpus = gpus
        self.is_dry = is_dry
        self.is_quick = is_quick
        self.timings: list[Timing] = []
        self.answers: dict[str, str] = {}
        """To the questions that were open, by letter."""
        self.findings: dict[str, Any] = {}
        """Of the check that runs."""
        self._check: Check | None = None
        self._peers: list[Peer] = []

    @property
    def num_devices(self) -> int:
        """How many GPUs there are."""
        return len(self.gpus["devices"])

    def has(self, package: str) -> bool:
        """Whether a package that a run can do without is installed; in a dry run none is."""
        return bool(self.gpus["versions"].get(package, NOT_INSTALLED) != NOT_INSTALLED)

    def number(self, full: int, quick: int, dry: int) -> int:
        """Return how many, or how large, in a run of this kind."""
        return dry if self.is_dry else quick if self.is_quick else full

    def only_real(self, what: str) -> None:
        """Skip in a dry run."""
        if self.is_dry:
            raise Skipped(f"dry run: {what}")

    async def run(self, check: Check) -> Outcome:
        """Run a check; whatever happens is its outcome."""
        self._check, self.findings = check, {}
        began = time.monotonic()
        try:
            async with asyncio.timeout(check.limit):
                detail = await check.run(self)
                await self._close()
            status = "passed"
        except Skipped as exc:
            status, detail = "skipped", str(exc)
        except Failed as exc:
            status, detail = "failed", str(exc)
        except TimeoutError:
            status, detail = "failed", f"not done within {check.limit:g} s"
            await self._stop(ask=True)
            self.findings["children"] = {peer.role: peer.tail() for peer in self._peers}
        except (Told, Died) as exc:
            status, detail = "failed", str(exc)
            self.findings["notes"] = getattr(exc, "__notes__", [])
        except Exception as exc:
            status, detail = "failed", f"the check itself: {type(exc).__name__}: {exc}"
            self.findings["traceback"] = traceback.format_exc()
        if status == "failed":
            self.findings.setdefault("children", {peer.role: peer.tail() for peer in self._peers})
        await self._stop(ask=False)
        seconds = round(time.monotonic() - began, 1)
        return Outcome(check.name, status, detail, seconds, self.findings)

    async def peer(
        self,
        role: str,
        environ: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
        **settings: Any,
    ) -> Peer:
        """Start a child for this check; see :class:`.peers.Peer`."""
        assert self._check is not None
        limit = self._check.limit + GRACE_SECONDS
        variables = {VARIABLE: os.environ.get(VARIABLE, "auto"), **(environ or {})}
        peer = await Peer.start(role, limit, settings, variables, prefix)
        self._peers.append(peer)
        return peer

    async def pair(
        self,
        fields: Fields = ONE_FIELD,
        sender: Mapping[str, Any] | None = None,
        **receiver: Any,
    ) -> tuple[Peer, Peer]:
        """Start a sender and a receiver, both at once."""
        first = self.peer("sender", fields=fields, **(sender or {}))
        second = self.peer("receiver", fields=fields, **receiver)
        sending, receiving = await asyncio.gather(first, second, return_exceptions=True)
        for each in (sending, receiving):
            if isinstance(each, BaseException):
                raise each
        assert isinstance(sending, Peer)
        assert isinstance(receiving, Peer)
        return sending, receiving

    def time(
        self, name: str, seconds: Sequence[float], nbytes: int = 0, *, has_rate: bool = True
    ) -> None:
        """Keep how long something takes."""
        assert self._check is not None
        timing = Timing(self._check.name, name, nbytes, list(seconds), has_rate and nbytes > 0)
        self.timings.append(timing)

    async def _close(self) -> None:
        """Have all children close, and see what the fake runtime has to complain of."""
        for peer in self._peers:
            if self.is_dry and peer.is_alive:
                violations = await peer.call("violations")
                require(not violations, f"the {peer.role} did: {violations}")
        await asyncio.gather(*(peer.close() for peer in self._peers))
        self._peers.clear()

    async def _stop(self, *, ask: bool) -> None:
        await asyncio.gather(*(peer.abort(ask=ask) for peer in self._peers))
        if not ask:
            self._peers.clear()


def require(condition: object, otherwise: str) -> None:
    """Go on if something holds.

    Raises:
        Failed: it does not.
    """
    if not condition:
        raise Failed(otherwise)


async def until(condition: Callable[[], Awaitable[bool]], seconds: float, otherwise: str) -> float:
    """Return how long it takes until `condition` holds, looked at every 20 ms.

    Raises:
        Failed: it does not, within `seconds`.
    """
    began = time.monotonic()
    while not await condition():
        require(time.monotonic() - began < seconds, otherwise)
        await asyncio.sleep(0.02)
    return time.monotonic() - began
