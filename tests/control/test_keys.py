"""Key files and settings: what is accepted, and what is said about the rest."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import zmq
from zmq.auth import create_certificates, load_certificate
from zmq.utils import z85

from aiomm.config import EndpointSettings, settings_from
from aiomm.control.address import TcpAddress
from aiomm.control.keys import KeyPair, Keys, keys_from, write_key_pair


def settings(**values: str) -> EndpointSettings:
    return settings_from(EndpointSettings, values, {})


def keys_of(**values: str) -> Keys:
    keys = keys_from(settings(**values))
    assert keys is not None
    return keys


def test_a_new_pair_is_for_its_owner_alone_and_read_again(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        secret, public = write_key_pair(tmp_path / "host-a")
    finally:
        os.umask(before)
    assert (secret.name, public.name) == ("host-a.key_secret", "host-a.key")
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert stat.S_IMODE(public.stat().st_mode) == 0o644
    assert load_certificate(public)[1] is None
    keys = keys_of(key_file=str(secret))
    assert (keys.own.public, keys.own.secret) == load_certificate(secret)
    assert {each.public for each in keys.known} == {keys.own.public}


def test_a_pair_is_never_replaced(tmp_path: Path) -> None:
    secret, public = write_key_pair(tmp_path / "a.b")
    content = secret.read_text()
    public.unlink()
    with pytest.raises(FileExistsError, match="not replaced"):
        write_key_pair(tmp_path / "a.b")
    assert secret.read_text() == content
    assert not public.exists()


def test_files_that_pyzmq_makes_are_read(tmp_path: Path) -> None:
    _, secret = create_certificates(tmp_path, "theirs")
    os.chmod(secret, 0o600)
    assert keys_of(key_file=secret).own.public == load_certificate(secret)[0]


def test_no_keys() -> None:
    assert keys_from(settings()) is None


def test_a_secret_out_of_a_store() -> None:
    public, secret = zmq.curve_keypair()
    assert keys_of(secret_key=secret.decode()).own == KeyPair(public, secret)


def test_nobody_sees_a_secret() -> None:
    secret = zmq.curve_keypair()[1].decode()
    assert secret not in repr(settings(secret_key=secret))
    assert secret not in repr(keys_of(secret_key=secret))
    assert "name='x'" in repr(settings(name="x"))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_secret_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    secret, _ = write_key_pair(tmp_path / "host")
    secret.chmod(mode)
    with pytest.raises(ValueError, match="chmod 600"):
        keys_from(settings(key_file=str(secret)))


def test_a_public_file_is_told_whatever_its_mode_is(tmp_path: Path) -> None:
    """Open to everybody is what it should be: that is not what is wrong."""
    _, public = write_key_pair(tmp_path / "host")
    for mode in (0o644, 0o600):
        public.chmod(mode)
        with pytest.raises(ValueError, match=r"host\.key has the public half alone"):
            keys_from(settings(key_file=str(public)))


def test_what_is_wrong_with_a_key_is_said(tmp_path: Path) -> None:
    secret, public = write_key_pair(tmp_path / "host")
    mixed = tmp_path / "mixed"
    mixed.write_text(secret.read_text().replace(_public(secret), _public(_other(tmp_path))))
    broken = tmp_path / "broken"
    broken.write_text("curve\n")
    for file in (mixed, broken):
        file.chmod(0o600)
    (tmp_path / "empty").mkdir()
    own = str(secret)
    for values, message in (
        ({"key_file": str(tmp_path / "none")}, "No such file.*aiomm keygen"),
        ({"key_file": str(mixed)}, "do not belong together"),
        ({"key_file": str(broken)}, "No public key"),
        ({"key_file": own, "secret_key": "x" * 40}, "not both"),
        ({"secret_key": "short"}, "not a secret key"),
        ({"secret_key": "~" * 40}, "not a secret key"),
        ({"known_keys": str(public)}, "of one's own"),
        ({"key_file": own, "known_keys": str(tmp_path / "none")}, "none"),
        ({"key_file": own, "known_keys": str(tmp_path / "empty")}, "no .*key file"),
        ({"key_file": own, "known_keys": "~" * 40}, "not a public key"),
        ({"key_file": own, "known_keys": "#" * 40}, "not a public key"),
        ({"key_file": own, "known_keys": str(broken)}, "No public key"),
    ):
        with pytest.raises(ValueError, match=message):
            keys_from(settings(**values))


def test_known_keys_are_files_folders_and_keys(tmp_path: Path) -> None:
    (tmp_path / "many").mkdir()
    files = [
        write_key_pair(tmp_path / name)[1] for name in ("own", "one", "many/two", "many/three")
    ]
    four = zmq.curve_keypair()[0].decode()
    known = f"{files[1]}, {tmp_path / 'many'},{four},"
    keys = keys_of(key_file=str(tmp_path / "own.key_secret"), known_keys=known)
    assert {each.name for each in keys.known} == {"one", "two", "three", ""}
    assert all(keys.knows(_public(file).encode()) for file in files[1:])
    assert keys.knows(four.encode())
    assert not keys.knows(keys.own.public)


def test_peers_come_and_go_without_a_restart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "peers").mkdir()
    own, _ = write_key_pair(tmp_path / "own")
    first = write_key_pair(tmp_path / "peers" / "first")[1]
    keys = keys_of(key_file=str(own), known_keys=str(tmp_path / "peers"))
    second = write_key_pair(tmp_path / "peers" / "second")[1]
    key = _public(second)
    assert keys.knows(key.encode())
    assert keys.key_of(TcpAddress("second", 7)) == key.encode()
    second.write_text("half a file")
    assert keys.knows(key.encode())
    assert keys.knows(key.encode())
    assert caplog.text.count("the known keys stay as they were") == 1
    second.unlink()
    assert not keys.knows(key.encode())
    assert keys.knows(_public(first).encode())


def test_whose_key_an_address_has(tmp_path: Path) -> None:
    for name in ("own", "host-a", "10.0.0.2", "fd77::2"):
        write_key_pair(tmp_path / name)
    key_file, known = str(tmp_path / "own.key_secret"), str(tmp_path)
    keys = keys_of(key_file=key_file, known_keys=known)
    for host in ("host-a", "10.0.0.2", "fd77::2"):
        public = _public(tmp_path / f"{host}.key").encode()
        assert keys.key_of(TcpAddress(host, 7)) == public
        told = z85.decode(public).hex()
        assert keys.key_of(TcpAddress("10.0.0.9", 7, told)) == public
    with pytest.raises(ValueError, match="which of 4 known keys belongs to"):
        keys.key_of(TcpAddress("10.0.0.9", 7))
    with pytest.raises(ValueError, match="not among the known keys"):
        keys.key_of(TcpAddress("host-a", 7, "00" * 32))
    alone = keys_of(key_file=key_file, known_keys=str(tmp_path / "host-a.key"))
    assert alone.key_of(TcpAddress("anywhere", 7)) == _public(tmp_path / "host-a.key").encode()


def _public(file: Path) -> str:
    return load_certificate(file)[0].decode()


def _other(folder: Path) -> Path:
    return write_key_pair(folder / "other")[1]
