"""How a sender finds the plane that reaches a receiver: by trying, best first.

For each plane that both sides have, in the sender's order of preference: attach to the
receiver's offer, write a nonce through it, and ask the receiver whether the nonce has arrived.
The first that passes is the route; why the others did not is kept with it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..buffers.layout import PROBE_NBYTES, Layout
from ..buffers.tensors import TokenRows
from ..errors import PlaneUnavailable
from ..planes.base import GrantKey, Plane, RemoteArena, Run
from ..protocol.frames import Hello
from ..types import Field

__all__ = ["Route", "find_route"]

PROBE_SECONDS = 10
"""For attaching and for the receiver's answer; both may hold their loops for long."""

logger = logging.getLogger("aiomm.sender")

_NONCE = Field("uint8", PROBE_NBYTES)


@dataclass(frozen=True, slots=True)
class Route:
    """A plane that has been proven to reach a receiver's arena."""

    plane: str
    arena: RemoteArena
    layout: Layout
    link: int
    """The receiver's number for the link, which its grants are filed under."""
    refused: tuple[str, ...]
    """Why each better plane was not taken."""


async def find_route(
    hello: Hello,
    planes: Sequence[Plane],
    *,
    strict: bool,
    probe: Callable[[str, bytes], asyncio.Future[bool]],
) -> Route:
    """Return the first route that works.

    Args:
        hello: the receiver's.
        planes: in order of preference.
        strict: try the first plane only.
        probe: asks the receiver whether the nonce has arrived through the plane.

    Raises:
        PlaneUnavailable: none works; says why for each.
    """
    layout = Layout(hello.schema, hello.pool_tokens, hello.num_probes)
    offers = {each.plane: each.offer for each in hello.planes}
    refused: list[str] = []
    for plane in planes[:1] if strict else planes:
        if hello.pool_device == "cpu" and not plane.writes_into("cpu") and not strict:
            continue  # not a way that is closed: there is none
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                arena = await _try(plane, offers.get(plane.name), layout, hello.link, probe)
        except TimeoutError:
            refused.append(f"{plane.name}: no answer to its probe within {PROBE_SECONDS} s")
            continue
        except PlaneUnavailable as exc:
            refused.append(
                str(exc) if exc.message.startswith(plane.name) else f"{plane.name}: {exc}"
            )
            continue
        logger.info("= plane %s to receiver %s; refused: %s", plane.name, hello.name, refused)
        return Route(plane.name, arena, layout, hello.link, tuple(refused))
    which = "the plane asked for does not reach" if strict else "no plane reaches"
    raise PlaneUnavailable(f"{which} receiver {hello.name!r}: {'; '.join(refused)}")


async def _try(
    plane: Plane,
    offer: bytes | None,
    layout: Layout,
    link: int,
    probe: Callable[[str, bytes], asyncio.Future[bool]],
) -> RemoteArena:
    reason = plane.unusable()
    if reason is not None:
        raise PlaneUnavailable(reason)
    if offer is None:
        raise PlaneUnavailable("the receiver does not have it")
    arena = await plane.attach(offer)
    try:
        nonce = secrets.token_bytes(PROBE_NBYTES)
        rows = TokenRows.of("nonce", _NONCE, nonce)
        slot = layout.probe_range(link)
        await arena.write(GrantKey.of_probe(link), [Run(rows, 0, 1, slot.start)])
        if not await probe(plane.name, nonce):
            raise PlaneUnavailable("what was written did not arrive in the receiver's pool")
    except BaseException:
        await _close(arena)
        raise
    return arena


async def _close(arena: RemoteArena) -> None:
    """Close `arena` to the end, however often this search is cancelled while it does."""
    closing = asyncio.ensure_future(arena.aclose())
    cancelled = None
    while not closing.done():
        try:
            await asyncio.wait([closing])
        except asyncio.CancelledError as exc:
            cancelled = exc
    closing.result()
    if cancelled is not None:
        raise cancelled
