"""Keys of the control channel: CURVE key pairs, and whose public keys are known.

An endpoint with keys speaks CURVE on every TCP address: frames are encrypted, and only peers
whose public key is known get in, in both directions. The files are ZeroMQ's certificates, as
`aiomm keygen` and `zmq.auth` write them: `NAME.key_secret` with both halves, for this user
alone, and `NAME.key` with the public half, for everybody.
"""

from __future__ import annotations

import logging
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import zmq
from zmq.utils import z85

from ..config import EndpointSettings
from .address import TcpAddress

__all__ = ["KeyPair", "Keys", "KnownKey", "keys_from", "write_key_pair"]

logger = logging.getLogger("aiomm.control")

KEY_LENGTH = 40
KEY_NBYTES = 32


@dataclass(frozen=True, slots=True)
class KeyPair:
    """Both halves of one endpoint's key, in ZeroMQ's 40 characters (Z85)."""

    public: bytes
    secret: bytes = field(repr=False)


class KnownKey(NamedTuple):
    """The public key of a peer."""

    name: str
    """The name of its file: the peer's host, where the key shall be found by it."""
    public: bytes


class Keys:
    """An endpoint's own key, and the public keys it accepts on the other side.

    Args:
        own: the key pair.
        known: the public keys of peers.
        source: the setting that `known` was read from. Its files are read again when they have
            changed, so that peers come and go without a restart.
    """

    def __init__(self, own: KeyPair, known: Iterable[KnownKey], source: str = "") -> None:
        self.own = own
        self._known = frozenset(known)
        self._source = source
        self._state = _state_of(source)

    @property
    def known(self) -> frozenset[KnownKey]:
        """The public keys of peers, as their files are now; unusable ones change nothing."""
        state = _state_of(self._source)
        if state != self._state:
            self._state = state
            try:
                self._known = frozenset(_known(self._source))
            except ValueError as exc:
                logger.warning("! the known keys stay as they were: %s", exc)
        return self._known

    def knows(self, public: bytes) -> bool:
        """Whether a peer with this public key may talk to this endpoint."""
        return any(each.public == public for each in self.known)

    def key_of(self, address: TcpAddress) -> bytes:
        """Return the public key that whoever listens at `address` must have.

        The address says it (those in tickets do), or a known key has the name of the address's
        host, or only one is known.

        Raises:
            ValueError: the key is not known, or it cannot be told which of the known ones it is.
        """
        if address.key:
            public: bytes = z85.encode(bytes.fromhex(address.key))
            if not self.knows(public):
                raise ValueError(f"the key of {address} is not among the known keys")
            return public
        known = self.known
        named = {each.public for each in known if each.name == address.host}
        candidates = named or {each.public for each in known}
        if len(candidates) != 1:
            raise ValueError(
                f"which of {len(candidates)} known keys belongs to {address}? Name its file "
                f"{address.host}.key, or use a ticket, which says it"
            )
        return candidates.pop()


def keys_from(settings: EndpointSettings) -> Keys | None:
    """Return the keys that `settings` name; None if they name none.

    Raises:
        ValueError: a key or file is not usable, and why.
    """
    if settings.key_file and settings.secret_key:
        raise ValueError("give key_file or secret_key, not both")
    if settings.key_file:
        own = _read_pair(Path(settings.key_file))
    elif settings.secret_key:
        own = _pair_of(settings.secret_key.encode(), "secret_key")
    elif settings.known_keys:
        raise ValueError(
            "known_keys are of no use without a key of one's own: key_file or secret_key"
        )
    else:
        return None
    if not settings.known_keys:
        return Keys(own, [KnownKey("own", own.public)])
    return Keys(own, _known(settings.known_keys), settings.known_keys)


def write_key_pair(path: Path) -> tuple[Path, Path]:
    """Make a new key pair; return its files `PATH.key_secret` (mode 0600) and `PATH.key`.

    Raises:
        FileExistsError: there is such a file; it is not replaced.
    """
    public, secret = (key.decode() for key in zmq.curve_keypair())
    files = path.with_name(f"{path.name}.key_secret"), path.with_name(f"{path.name}.key")
    for file in files:
        if file.exists():
            raise FileExistsError(f"{file} exists and is not replaced")
    half = f'curve\n    public-key = "{public}"\n'
    _write(files[0], f'# Secret. Keep it to its owner.\n{half}    secret-key = "{secret}"\n', 0o600)
    _write(files[1], f"# Public: for the known_keys of peers.\n{half}", 0o644)
    return files


def _write(file: Path, text: str, mode: int) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "w") as stream:
        os.fchmod(descriptor, mode)  # whatever the umask says
        stream.write(text)


def _read_pair(file: Path) -> KeyPair:
    try:
        status = file.stat()
    except OSError as exc:
        raise ValueError(f"key_file {file}: {exc.strerror}; `aiomm keygen` makes one") from exc
    public, secret = _load(file)
    if secret is None:  # said first: the mode of a public file is as it should be
        raise ValueError(f"key_file {file} has the public half alone; give its .key_secret")
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise ValueError(f"key_file {file} is open to other users: chmod 600 {file}")
    pair = _pair_of(secret, str(file))
    if pair.public != public:
        raise ValueError(f"key_file {file}: its two halves do not belong together")
    return pair


def _pair_of(secret: bytes, where: str) -> KeyPair:
    try:
        return KeyPair(zmq.curve_public(secret), secret)
    except (ValueError, zmq.ZMQError) as exc:
        raise ValueError(
            f"{where}: not a secret key, which is {KEY_LENGTH} characters of Z85"
        ) from exc


def _parts(source: str) -> Iterator[str]:
    """Return the keys, files and folders of a list, which are separated by commas."""
    return (part.strip() for part in source.split(",") if part.strip())


def _state_of(source: str) -> list[tuple[Path, int, int]]:
    """Return what changes when any of the files and folders of `source` does."""
    paths = [Path(each) for each in _parts(source)]
    files = [file for path in paths if path.is_dir() for file in path.glob("*.key")]
    state = []
    for path in sorted({*paths, *files}):
        try:
            status = path.stat()
        except OSError:  # a key that is no file, or one that has just gone
            continue
        state.append((path, status.st_mtime_ns, status.st_size))
    return state


def _known(source: str) -> Iterator[KnownKey]:
    """Return the keys that `source` names."""
    for each in _parts(source):
        path = Path(each)
        if path.is_dir():
            files = sorted(path.glob("*.key"))
            if not files:
                raise ValueError(f"known_keys: there is no *.key file in {path}")
            for file in files:
                yield KnownKey(file.stem, _public(_load(file)[0], str(file)))
        elif path.exists() or len(each) != KEY_LENGTH:
            yield KnownKey(path.stem, _public(_load(path)[0], str(path)))
        else:
            yield KnownKey("", _public(each.encode(), f"known_keys {each!r}"))


def _public(key: bytes, where: str) -> bytes:
    try:
        if len(z85.decode(key)) == KEY_NBYTES:
            return key
    except (ValueError, KeyError, struct.error):  # z85 raises all of them for bad characters
        pass
    raise ValueError(f"{where}: not a public key, which is {KEY_LENGTH} characters of Z85")


def _load(file: Path) -> tuple[bytes, bytes | None]:
    from zmq.auth import load_certificate

    try:
        return load_certificate(file)
    except (OSError, ValueError) as exc:
        raise ValueError(f"{file}: {exc}") from exc
