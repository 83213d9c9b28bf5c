"""The command line as such: what is refused and why, what is missing, and what doctor finds."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from aiomm import Field
from aiomm.buffers.memcpy import is_streaming
from aiomm.cli import doctor
from aiomm.cli.doctor import OTHER_VARIABLES
from aiomm.cli.files import field_from, field_option, file_stem
from aiomm.control.keys import write_key_pair
from tests.command import outcome_of

WITHOUT = """
import sys
sys.modules[sys.argv.pop(1)] = None
from aiomm.cli import main
main()
"""
LOADED = """
import sys
from aiomm.cli import app
print(*sorted({"numpy", "torch", "safetensors", "transformers", "zmq"} & set(sys.modules)))
"""
DEAF = ("--connect", "tcp://127.0.0.1:9")
"""Nobody is there; a command that tries it would wait for long."""


def python(source: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `source` in a fresh interpreter."""
    call = [sys.executable, "-W", "error", "-c", source, *arguments]
    return subprocess.run(call, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("package", ["typer", "rich", "safetensors"])
def test_without_its_extra_the_command_names_it(package: str) -> None:
    done = python(WITHOUT, package, "demo")
    assert done.returncode == 2
    assert done.stderr == (
        f"the aiomm command needs {package}: python -m pip install 'aiomm[cli]'\n"
    )


def test_help_loads_nothing_heavy() -> None:
    done = python(LOADED)
    assert (done.stdout, done.stderr) == ("\n", "")


@pytest.mark.parametrize("name", ["demo", "send", "recv", "doctor", "bench"])
def test_every_command_tells_its_exit_codes(name: str) -> None:
    from typer.testing import CliRunner

    from aiomm.cli.app import app

    shown = CliRunner().invoke(app, [name, "--help"])
    assert shown.exit_code == 0
    assert "130 interrupted" in " ".join(shown.output.split())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["demo", "--tokens", "-1"], "--tokens"),
        (["demo", "--plane", "pigeon"], "pigeon"),
        (["demo", "--image", "no such picture"], "does not exist"),
        (["recv"], "give one of them"),
        (["recv", "--bind", "tcp://127.0.0.1:0", *DEAF], "give one of them"),
        (["recv", "--bind", "nonsense"], "tcp://host:port"),
        (["recv", "--bind", "tcp://0.0.0.0:0"], "--insecure"),
        (["recv", *DEAF, "--field", "embeddings"], "NAME=DTYPE[:DIMS]"),
        (["recv", *DEAF, "--field", "embeddings=bfloat17:4"], "unknown dtype 'bfloat17'"),
        (["recv", *DEAF, "--field", "embeddings=bfloat16:4x"], "NAME=DTYPE[:DIMS]"),
        (["recv", *DEAF, "--field", "embeddings=bfloat16:0"], "positive"),
        (["recv", *DEAF, "--field", "a=int8", "--field", "a=int8"], "given twice"),
        (["recv", *DEAF, "--count", "0"], "--count"),
        (["send", *DEAF], "Missing argument"),
        (["send", "a", "b", "--request-id", "c", *DEAF], "--request-id"),
        (["send", "a", "--request-id", "{c}", *DEAF], "512 characters"),
    ],
)
def test_a_wrong_command_line_is_refused_with_2(arguments: list[str], complaint: str) -> None:
    from typer.testing import CliRunner

    from aiomm.cli.app import app

    refused = CliRunner(env={"COLUMNS": "300"}).invoke(app, arguments)
    assert refused.exit_code == 2
    assert complaint in " ".join(refused.output.split())


@pytest.mark.parametrize(
    ("options", "option"),
    [
        (["--key-file", "own.key"], "--key-file: key_file own.key has the public half alone"),
        (["--key-file", "none"], "--key-file: key_file none: No such file"),
        (["--known-keys", "own.key"], "--known-keys: known_keys are of no use without a key"),
        (["--key-file", "own.key_secret", "--known-keys", "none"], "--known-keys: none: "),
        (["--advertise", 256 * "x"], "Invalid value: argument advertise="),
        (["--insecure", "--connect", "tcp://nowhere"], "--connect: "),
    ],
)
@pytest.mark.parametrize("command", [["recv"], ["send", "x"]], ids=["recv", "send"])
def test_the_option_that_is_wrong_is_named(
    command: list[str],
    options: list[str],
    option: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from typer.testing import CliRunner

    from aiomm.cli.app import app

    monkeypatch.chdir(tmp_path)
    write_key_pair(Path("own"))
    connect = [] if "--connect" in options else DEAF
    refused = CliRunner(env={"COLUMNS": "600"}).invoke(app, [*command, *connect, *options])
    assert refused.exit_code == 2
    assert option in " ".join(refused.output.split())


@pytest.mark.parametrize("arguments", [["demo"], ["recv", *DEAF], ["send", "x", *DEAF]])
def test_a_wrong_variable_is_refused_with_2(arguments: list[str]) -> None:
    from typer.testing import CliRunner

    from aiomm.cli.app import app

    refused = CliRunner(env={"AIOMM_PEER_TIMEOUT": "long"}).invoke(app, arguments)
    assert refused.exit_code == 2
    assert "variable AIOMM_PEER_TIMEOUT='long'" in refused.output


class TestNothingWasTried:
    """What cannot even begin is no failed transfer: 2, and what is in the way."""

    def refuse(self, *arguments: str) -> str:
        from typer.testing import CliRunner

        from aiomm.cli.app import app

        refused = CliRunner(env={"COLUMNS": "300"}).invoke(app, arguments)
        assert refused.exit_code == 2, refused.output
        return " ".join(refused.output.split())

    def test_a_port_in_use(self, tmp_path: Path) -> None:
        safetensors.torch.save_file({"a": torch.zeros(2)}, tmp_path / "a")
        with socket.create_server(("127.0.0.1", 0)) as taken:
            address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
            for command in (["recv", "--out", str(tmp_path)], ["send", str(tmp_path / "a")]):
                told = self.refuse(*command, "--bind", address)
                assert f"cannot listen at {address}: Address already in use" in told

    def test_a_path_that_others_could_take(self) -> None:
        told = self.refuse("recv", "--bind", "ipc:///proc/x")
        assert "cannot listen at ipc:///proc/x: the directory" in told

    def test_a_folder_that_cannot_be_made(self) -> None:
        told = self.refuse("recv", "--bind", "tcp://127.0.0.1:0", "--out", "/proc/x")
        assert "--out /proc/x: No such file or directory" in told

    def test_a_plane_that_does_not_write_into_the_pool(self, tmp_path: Path) -> None:
        listening = ("--bind", "tcp://127.0.0.1:0", "--out", str(tmp_path))
        told = self.refuse("recv", *listening, "--plane", "cuda_ipc")
        assert "cuda_ipc: does not write into a pool on cpu" in told
        for command in ("demo", "bench"):
            told = self.refuse(command, "--plane", "cuda_ipc")
            assert "--plane cuda_ipc: it does not write into a pool on cpu" in told


class TestFiles:
    """Files that cannot be sent are told apart before anybody is asked to receive them."""

    def refuse(self, *arguments: str) -> str:
        from typer.testing import CliRunner

        from aiomm.cli.app import app

        refused = CliRunner().invoke(app, ["send", *arguments, *DEAF])
        assert refused.exit_code == 2, refused.output
        return " ".join(refused.output.split())

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        assert "no safetensors file" in self.refuse(str(tmp_path / "none.safetensors"))

    def test_a_file_of_another_kind(self, tmp_path: Path) -> None:
        path = tmp_path / "other.safetensors"
        path.write_bytes(b"GIF89a and more")
        assert "other.safetensors is no safetensors file" in self.refuse(str(path))

    def test_the_second_file_is_looked_at_before_the_first_is_sent(self, tmp_path: Path) -> None:
        safetensors.torch.save_file({"a": torch.zeros(2)}, tmp_path / "good")
        assert "none" in self.refuse(str(tmp_path / "good"), str(tmp_path / "none"))

    def test_two_files_of_one_name(self, tmp_path: Path) -> None:
        paths = [tmp_path / folder / "x.safetensors" for folder in "ab"]
        assert "request id x" in self.refuse(*map(str, paths))

    @pytest.mark.parametrize(
        ("field", "complaint"),
        [
            ("a=float32", "'b'"),
            ("missing=float32", "has no tensor 'missing'"),
            ("b=float32", "b is float32[2], expected float32"),
            ("scalar=float32", "'scalar' is a scalar"),
        ],
    )
    def test_a_file_without_the_fields_asked_for(
        self, tmp_path: Path, field: str, complaint: str
    ) -> None:
        path = tmp_path / "x.safetensors"
        tensors = {"a": torch.zeros(2), "b": torch.zeros(3, 2), "scalar": torch.tensor(1.0)}
        safetensors.torch.save_file(tensors, path)
        fields = ["--field", field]
        if field == "a=float32":
            fields += ["--field", "b=float32:2"]
            complaint = "first dimension must be the same in all tensors; a has 2, b has 3"
        assert complaint in self.refuse(str(path), *fields)


def test_a_field_is_read_as_it_is_written() -> None:
    for text, field in {
        "ids=int32": Field("int32"),
        "positions=int32:3": Field("int32", 3),
        "deepstack=bfloat16:4x2048": Field("bfloat16", 4, 2048),
    }.items():
        name, read = field_from(text)
        assert read == field
        assert field_option(name, read) == f"--field {text}"


@pytest.mark.parametrize(
    ("request_id", "stem"),
    [
        ("req-1", "req-1"),
        ("../../etc/passwd", "%2E.%2F..%2Fetc%2Fpasswd"),
        (".", "%2E"),
        ("..", "%2E."),
        (".hidden", "%2Ehidden"),
        ("a b\0c\n", "a%20b%00c%0A"),
        ("100%", "100%25"),
        ("图像", "图像"),
    ],
)
def test_a_file_name_stays_in_its_folder(request_id: str, stem: str) -> None:
    assert file_stem(request_id) == stem
    assert Path("out", stem + ".safetensors").parent == Path("out")


def test_a_long_request_id_has_a_file_name_of_its_own(tmp_path: Path) -> None:
    ids = ["图" * 511 + end for end in "ab"]
    stems = [file_stem(each) for each in ids]
    assert len(set(stems)) == 2
    for stem in stems:
        (tmp_path / f"{stem}.safetensors").touch()


GOOGLE_LOG = r"^WARNING: Logging before|Local segment descriptor not found$"


@pytest.mark.slow
@pytest.mark.timeout(90)
async def test_doctor_tries_the_planes_and_tells_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_MULTIMODAL_BLOCK_SIZE", "256")
    monkeypatch.setenv("AIOMM_BLOKS", "")  # as good as not set
    for name, value in zip(OTHER_VARIABLES, ("auto", "1", "P2PHANDSHAKE"), strict=True):
        monkeypatch.setenv(name, value)
    for name in [name for name in os.environ if name.startswith("AIOMM_SIMULATION_")]:
        monkeypatch.delenv(name)  # our own tests' alone
    done = await outcome_of("doctor", "--json")
    # Mooncake's engine logs one line whenever it begins, and a warning that it logs there.
    errors = [line for line in done.errors.splitlines() if not re.search(GOOGLE_LOG, line)]
    assert (done.code, errors) == (0, [])
    found: dict[str, Any] = json.loads(done.output)
    assert found["planes"]["shm"] | {"trial_seconds": 0} == {
        "usable": True,
        "reason": None,
        "trial_seconds": 0,
    }
    assert found["planes"]["tcp"]["usable"]
    assert found["versions"]["python"].startswith(f"{sys.version_info.major}.")
    assert set(found["versions"]) > {"aiomm", "pyzmq", "libzmq", "msgspec", "torch", "aiozmq"}
    assert found["kernel"]["memfd"] is found["kernel"]["pidfd"] is True
    assert found["copies"] == ("streaming" if is_streaming else "libc")
    assert found["limits"]["open_files"]["soft"] > 0
    assert found["environment"]["SGLANG_MULTIMODAL_BLOCK_SIZE"] == {
        "setting": "block_size",
        "value": "256",
    }
    assert found["shared_memory"]["total_bytes"] == (
        os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize
    )
    assert found["problems"] == []


@pytest.mark.slow
@pytest.mark.timeout(90)
async def test_doctor_finds_a_wrong_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIOMM_POOL_BLOCKS", "many")
    monkeypatch.setenv("AIOMM_BLOKS", "3")
    done = await outcome_of("doctor")
    assert done.code == 1
    assert "variable AIOMM_POOL_BLOCKS='many'" in done.output
    unread = "variable AIOMM_BLOKS: nothing reads it; the nearest known one is AIOMM_BLOCKS"
    assert unread in done.output


def test_doctor_knows_every_variable_that_is_read() -> None:
    package = Path(doctor.__file__).parents[1]
    sources = [path.read_text() for path in package.rglob("*.py")]
    named = {name for each in sources for name in re.findall(r'VARIABLE = "(AIOMM_\w+)"', each)}
    assert named == set(OTHER_VARIABLES)
