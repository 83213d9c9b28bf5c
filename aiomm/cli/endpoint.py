"""How a command reaches the other side: the options that `send` and `recv` share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import typer

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
        """Check that an endpoint can be made of this.

        Raises:
            typer.BadParameter: no; names the option.
        """
        from ..control.keys import keys_from
        from ..control.zeromq import ZmqChannel

        with _told_of(None):  # the message names it
            settings = settings_from(EndpointSettings, self._settings())
        with _told_of("--key-file"):
            keys_from(msgspec.structs.replace(settings, known_keys=""))
        with _told_of("--known-keys"):
            keys = keys_from(settings)
        with _told_of("--bind" if self.connect is None else "--connect"):
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


@contextmanager
def _told_of(option: str | None) -> Iterator[None]:
    """Turn ValueError into what the command line says of `option`, in its words."""
    try:
        yield
    except ValueError as exc:
        message = str(exc).replace("pass insecure=True", "give --insecure")
        for setting in ("key_file", "known_keys"):
            message = message.replace(f"{setting}=", f"--{setting.replace('_', '-')}")
        raise typer.BadParameter(message, param_hint=option) from exc
