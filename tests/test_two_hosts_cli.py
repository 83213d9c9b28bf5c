"""`aiomm send` and `aiomm recv` on two hosts, with keys, over either plane and either address."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch

from aiomm.planes.registry import known_planes
from tests.command import command, outcome_of
from tests.hosts import Hosts, two_hosts, unusable

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(180),
    pytest.mark.skipif(bool(unusable()), reason=unusable()),
]


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with two_hosts() as hosts:
        yield hosts


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return a file of 2000 tokens and one of 200 MB."""
    folder = tmp_path_factory.mktemp("files")
    tokens = torch.arange(2000 * 3584, dtype=torch.int32).reshape(2000, 3584)
    safetensors.torch.save_file({"embeddings": tokens.bfloat16()}, folder / "small.safetensors")
    noise = torch.randint(-128, 128, (200, 1 << 20), dtype=torch.int8)
    safetensors.torch.save_file({"embeddings": noise}, folder / "large.safetensors")
    return [folder / "small.safetensors", folder / "large.safetensors"]


async def keygen(folder: Path, name: str) -> Path:
    """Make a key pair by the command and return the secret file."""
    made = await outcome_of("keygen", str(folder / name))
    assert made.code == 0
    secret, public = made.output.splitlines()
    assert Path(public).suffix == ".key"
    return Path(secret)


@pytest.mark.parametrize("plane", ["tcp", "mooncake"])
@pytest.mark.parametrize("version", ["ipv4", "ipv6"])
async def test_files_travel_with_keys(
    hosts: Hosts, files: list[Path], tmp_path: Path, plane: str, version: str
) -> None:
    _skip_without(plane)
    encoder, language = await keygen(tmp_path, "encoder"), await keygen(tmp_path, "language")
    out = tmp_path / "out"
    where = hosts.far.ipv4 if version == "ipv4" else f"[{hosts.far.ipv6}]"
    address = f"tcp://{where}:7001"
    receiving = ("recv", "--bind", address, "--out", str(out), "--count", "2", "--plane", plane)
    sending = ("send", *map(str, files), "--connect", address, "--plane", plane)
    knowing = ("--key-file", str(language), "--known-keys", str(encoder.with_suffix(".key")))
    known = ("--key-file", str(encoder), "--known-keys", str(language.with_suffix(".key")))
    async with command(*receiving, *knowing, on=hosts.far) as recv:
        assert address in await recv.says("receiving at ")
        async with command(*sending, *known, on=hosts.near) as send:
            sent = await send.end()
        assert (sent.code, sent.errors.count(f"over {plane}")) == (0, 2), sent.errors
        received = await recv.end()
    assert (received.code, received.errors.count(f"over {plane}")) == (0, 2), received.errors
    for file in files:
        assert (out / file.name).read_bytes() == file.read_bytes()


async def test_who_has_no_key_is_told_so_and_harms_nobody(
    hosts: Hosts, files: list[Path], tmp_path: Path
) -> None:
    ours, theirs = await keygen(tmp_path, "ours"), await keygen(tmp_path, "theirs")
    address = f"tcp://{hosts.far.ipv4}:7002"
    small = str(files[0])
    sending = ("send", small, "--connect", address)
    stranger = ("--key-file", str(theirs), "--known-keys", str(ours.with_suffix(".key")))
    receiving = ("recv", "--bind", address, "--out", str(tmp_path / "out"), "--count", "1")
    async with command(*receiving, "--key-file", str(ours), on=hosts.far) as recv:
        await recv.says("receiving at ")
        without = await outcome_of(*sending, on=hosts.near)
        assert without.code == 2
        assert "aiomm keygen" in without.errors
        insecure = await outcome_of(*sending, "--insecure", on=hosts.near)
        assert insecure.code == 1
        assert "PeerLost" in insecure.errors
        unknown = await outcome_of(*sending, *stranger, on=hosts.near)
        assert unknown.code == 1
        assert "key is not among those that the peer knows" in unknown.errors
        known = await outcome_of(*sending, "--key-file", str(ours), on=hosts.near)
        assert known.code == 0, known.errors
        received = await recv.end()
    assert received.code == 0
    assert (tmp_path / "out" / files[0].name).read_bytes() == files[0].read_bytes()


async def test_a_secret_that_others_can_read_is_refused(tmp_path: Path) -> None:
    secret = await keygen(tmp_path, "open")
    secret.chmod(0o644)
    bound = ("recv", "--bind", "tcp://0.0.0.0:*", "--key-file", str(secret))
    refused = await outcome_of(*bound)
    assert refused.code == 2
    assert "chmod 600" in refused.errors.replace("\n", " ")


def _skip_without(plane: str) -> None:
    reason = known_planes()[plane]()().unusable() if plane in known_planes() else "no such plane"
    if reason is not None:
        pytest.skip(reason)
