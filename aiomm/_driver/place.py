"""Where an endpoint's planes listen: where its control channel does, as far as it does."""

from __future__ import annotations

from collections.abc import Iterable

from ..control.address import TcpAddress, parse_address
from ..planes.base import Place

__all__ = ["place_of"]


def place_of(bind: str | None, contacts: Iterable[str], advertise: str) -> Place:
    """Return the place of an endpoint.

    An endpoint that listens does so for its planes, too. One that only connects listens on the
    address that leads to the first peer off this host. All others stay on loopback.

    Args:
        bind: where the control channel listens, or None.
        contacts: addresses to connect to, as far as they are known from the beginning.
        advertise: the host that peers are told; found out if it is empty.

    Raises:
        ValueError: an address is malformed.
    """
    bound = parse_address(bind) if bind is not None else None
    if isinstance(bound, TcpAddress):
        host = "127.0.0.1" if bound.host == "localhost" else bound.own_host()
        return Place(bound.host if bound.is_any else host, advertise or host)
    for contact in map(parse_address, contacts):
        if isinstance(contact, TcpAddress) and not contact.is_loopback:
            host = contact.local_host()
            return Place(host, advertise or host)
    return Place(advertise, advertise) if advertise else Place()
