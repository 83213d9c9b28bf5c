"""How a command reaches the other side: the options that `send` and `recv` share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import typer

from ..config import EndpointSettings, settings_from
from ..errors import PlaneUnavailable
from ..types import Schema
from .running import Unusable

if TYPE_CHECKING:
    from .._driver.lifecycle import Lifecycle

__all__ = ["EndpointOptions"]

_Endpoint = TypeVar("_Endpoint", bound="Lifecycle")


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

    @asynccontextmanager
    async def opened(
        self, kind: Callable[..., _Endpoint], schema: Schema, **arguments: Any
    ) -> AsyncIterator[_Endpoint]:
        """Start a Sender or a Receiver, and close it in the end.

        Args:
            kind: which of them.
            schema: of its transfers.
            arguments: what it is told besides what both are told alike.

        Raises:
            Unusable: it cannot listen there, or its plane cannot be used here.
        """
        planes = "auto" if self.plane == "auto" else [self.plane]
        try:
            endpoint = kind(schema, bind=self.bind, planes=planes, **self._settings(), **arguments)
            await endpoint.start()
        except OSError as exc:
            what = "cannot start" if self.bind is None else f"cannot listen at {self.bind}"
            raise Unusable(f"{what}: {exc.strerror or exc}") from exc
        except PlaneUnavailable as exc:
            raise Unusable(exc.message) from exc
        async with endpoint:
            yield endpoint

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
