"""What users give, as the plain values that a frame can carry.

MessagePack does not encode numbers of numpy and torch, nor subclasses of `str`: one of them in a
frame would stop the link on which it travels.
"""

from __future__ import annotations

import operator
from typing import SupportsFloat, SupportsIndex

from .errors import ProtocolError, Rejected
from .types import MAX_TOKENS, Ticket

__all__ = ["length_of", "request_id_of", "request_of", "seconds_of"]


def request_of(
    request: Ticket | str | bytes, address: str | None = None
) -> tuple[str, Ticket | None]:
    """Return the request id, and the ticket unless a bare request id was given.

    A string whose first character but spaces is "{" is the JSON of a ticket, and no request id.

    Raises:
        ProtocolError: this is no ticket.
        Rejected: an `address` is given beside a ticket, which names its own.
        TypeError: this is neither a ticket nor a request id, or the address is no string.
    """
    if address is not None and not isinstance(address, str):
        raise TypeError(f"an address is a string, not {address!r}")
    if isinstance(request, str) and not request.lstrip().startswith("{"):
        return request_id_of(request), None
    if isinstance(request, str):
        ticket = Ticket.from_json(request)
    elif isinstance(request, Ticket):
        ticket = _checked(request)
    elif isinstance(request, bytes | bytearray | memoryview):
        ticket = Ticket.from_bytes(request)
    else:
        raise TypeError(f"not a ticket or a request id: {request!r}")
    if address is not None:
        raise Rejected(f"the ticket names the address of its issuer: {address!r} is one too many")
    return ticket.request_id, ticket


def request_id_of(request_id: str) -> str:
    """Return a plain string.

    Raises:
        TypeError: it is no string.
    """
    if not isinstance(request_id, str):
        raise TypeError(f"a request id is a string, not {request_id!r}")
    return str(request_id)


def seconds_of(timeout: SupportsFloat | None, default: float) -> float:
    """Return the seconds of a timeout.

    Raises:
        TypeError: it is no number.
    """
    if timeout is None:
        return default
    if isinstance(timeout, str) or not isinstance(timeout, SupportsFloat | SupportsIndex):
        raise TypeError(f"a timeout is a number of seconds, not {timeout!r}")
    return float(timeout)


def length_of(num_tokens: SupportsIndex | None) -> int | None:
    """Return the number of tokens, if it is known.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is out of bounds.
    """
    if num_tokens is None:
        return None
    try:
        length = operator.index(num_tokens)
    except TypeError as exc:
        raise TypeError(f"num_tokens is a whole number, not {num_tokens!r}") from exc
    if not 0 <= length <= MAX_TOKENS:
        raise ValueError(f"num_tokens is 0 to {MAX_TOKENS}, not {length}")
    return length


def _checked(ticket: Ticket) -> Ticket:
    """Return a ticket that may have been made by hand, as if it had been read."""
    try:
        return Ticket.from_bytes(ticket.to_bytes())
    except (TypeError, ValueError, OverflowError) as exc:
        raise ProtocolError(f"not a ticket: {exc}") from exc
