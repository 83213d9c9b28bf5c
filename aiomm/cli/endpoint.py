"""How a command reaches the other side: the options that `send` and `recv` share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..config import EndpointSettings, settings_from

__all__ = ["EndpointOptions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointOptions:
    """Where to listen or connect, and on which terms."""

    connect: str | None
    bind: str | None
    plane: str
    timeout: float
    key_file: str | None
    known_keys: str | None
    advertise: str | None
    insecure: bool

    def check(self) -> None:
        """Raise ValueError unless an endpoint can be made of this."""
        from ..control.keys import keys_from
        from ..control.zeromq import ZmqChannel

        settings = settings_from(EndpointSettings, self._settings())
        keys = keys_from(settings)
        channel = ZmqChannel(self.bind, keys=keys, insecure=settings.insecure, name="aiomm")
        if self.connect is not None:
            channel.check(self.connect)

    def arguments(self) -> dict[str, Any]:
        """Return what a Sender and a Receiver are told alike."""
        planes = "auto" if self.plane == "auto" else [self.plane]
        return {"bind": self.bind, "planes": planes, **self._settings()}

    def _settings(self) -> dict[str, Any]:
        return {
            "timeout": self.timeout,
            "key_file": self.key_file,
            "known_keys": self.known_keys,
            "advertise": self.advertise,
            "insecure": self.insecure or None,
        }
