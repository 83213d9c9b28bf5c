"""Settings: from arguments, else from the environment, else the default.

`AIOMM_BLOCK_SIZE=128` in the environment stands for `block_size=128` in the call, and so for
every field. The names that SGLang deployments export already are read too, behind ours.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

__all__ = ["ReceiverSettings", "SenderSettings", "settings_from", "variables_of"]

PREFIX = "AIOMM_"
VARIABLES: Mapping[str, tuple[str, ...]] = {
    "blocks": ("AIOMM_POOL_BLOCKS", "AIOMM_BLOCKS", "SGLANG_EMBEDDING_CACHE_BUFFER_SIZE"),
    "block_size": ("AIOMM_BLOCK_SIZE", "SGLANG_MULTIMODAL_BLOCK_SIZE"),
    "default_blocks": ("AIOMM_DEFAULT_BLOCKS", "SGLANG_DEFAULT_MULTIMODAL_BLOCKS"),
}
"""Where a field has other names than its own in capitals; the first that is set counts."""

_Positive = Annotated[int, Meta(ge=1, le=2**31)]
_Seconds = Annotated[float, Meta(gt=0, le=1e9)]
_Settings = TypeVar("_Settings", bound="EndpointSettings")


class EndpointSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What both endpoints can be told."""

    name: Annotated[str, Meta(max_length=64)] = ""
    """Who this is, in logs and in the peer's errors; a default is made from the process id."""
    timeout: _Seconds = 30.0
    """Seconds for a request that is given no timeout of its own."""
    close_timeout: _Seconds = 5.0
    """Seconds that `aclose()` waits for running transfers and for peers to drain."""
    control: Literal["auto", "zmq", "aiozmq"] = "auto"
    """`auto`: ZeroMQ, and the Unix stream with peers on this host. The others stay on ZeroMQ."""
    strict: bool = False
    """Use the first plane of `planes` or fail; never fall back to a slower one."""
    key_file: str = ""
    """This endpoint's key pair, from `aiomm keygen`; readable by nobody else. With it every TCP
    address needs keys, and addresses off this host are allowed."""
    secret_key: str = ""
    """The same as 40 characters, where a secret comes out of a store and not from a file."""
    known_keys: str = ""
    """Public keys that peers may have: keys, `.key` files and folders of them, separated by
    commas. Without it: this endpoint's own, for hosts that share one key file."""
    insecure: bool = False
    """Allow control addresses off this host without keys: anybody who reaches them can talk."""
    advertise: Annotated[str, Meta(max_length=255)] = ""
    """The host name or address by which other hosts reach this one. Without it: what `bind`
    names, or for a wildcard or an endpoint that only connects, what the route out uses."""
    peer_timeout: _Seconds = 15.0
    """Seconds of silence after which a peer counts as lost. Encoders hold their loop for long."""
    max_peers: Annotated[int, Meta(ge=1, le=65536)] = 1024
    """More peers than this are refused."""
    max_waiting: _Positive = 4096
    """Requests that may wait (for blocks, for a peer, to be taken); more are rejected."""

    def __repr__(self) -> str:
        shown = {name: getattr(self, name) for name in self.__struct_fields__}
        if self.secret_key:
            shown["secret_key"] = "..."
        values = ", ".join(f"{name}={value!r}" for name, value in shown.items())
        return f"{type(self).__name__}({values})"


class SenderSettings(EndpointSettings, frozen=True, kw_only=True):
    """What a Sender can be told."""

    checksum: bool = False
    """Send a checksum of every chunk, which the receiver verifies; needs `aiomm[checksum]`."""


class ReceiverSettings(EndpointSettings, frozen=True, kw_only=True):
    """What a Receiver can be told."""

    blocks: Annotated[int, Meta(ge=1, le=2**22)] = 64
    """Blocks of the pool."""
    block_size: _Positive = 128
    """Tokens per block."""
    default_blocks: _Positive = 8
    """Blocks reserved for a request of unknown length: 8 x 128 = 1024 tokens."""
    max_tokens: _Positive = 2**24
    """Longest request that is accepted, in tokens."""
    max_buffered_bytes: Annotated[int, Meta(ge=0, le=2**62)] = 8 * 2**30
    """Bytes that transfers longer than the pool, and results that nobody takes, may hold
    outside it, all together."""
    max_spare_bytes: Annotated[int, Meta(ge=0, le=2**62)] = 2**30
    """Bytes that are kept of such transfers when nobody uses them any more, for those to come;
    the kernel may have their pages when it is short of memory."""


def settings_from(
    kind: type[_Settings], arguments: Mapping[str, Any], environ: Mapping[str, str] | None = None
) -> _Settings:
    """Return the settings of `kind`: arguments that are not None win over the environment.

    Raises:
        ValueError: a value is out of range or not of its type; says which, and where it stands.
        TypeError: there is no setting of that name.
    """
    unknown = sorted(arguments.keys() - set(kind.__struct_fields__))
    if unknown:
        raise TypeError(f"{', '.join(unknown)}: no such setting; {kind.__name__} lists them")
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    for field in msgspec.structs.fields(kind):
        given = arguments.get(field.name)
        if given is not None:
            values[field.name] = _checked(field, given, f"argument {field.name}", strict=True)
            continue
        for variable in variables_of(field.name):
            if environ.get(variable):
                text = environ[variable]
                values[field.name] = _checked(field, text, f"variable {variable}", strict=False)
                break
    return kind(**values)


def variables_of(setting: str) -> tuple[str, ...]:
    """Return the environment variables of a setting; the first that is set counts."""
    return VARIABLES.get(setting, (PREFIX + setting.upper(),))


def _checked(field: msgspec.structs.FieldInfo, value: object, where: str, *, strict: bool) -> Any:
    try:
        return msgspec.convert(value, field.type, strict=strict)
    except msgspec.ValidationError as exc:
        raise ValueError(f"{where}={value!r}: {exc}") from exc
