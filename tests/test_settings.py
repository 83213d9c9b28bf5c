"""Settings: arguments win over the environment, both spellings, and errors name their place."""

from __future__ import annotations

import pytest

from aiomm import Receiver, Sender
from aiomm.config import VARIABLES, ReceiverSettings, SenderSettings, settings_from

from .support import SCHEMA


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take variables of the machine that runs the tests out of the way."""
    for names in VARIABLES.values():
        for name in names:
            monkeypatch.delenv(name, raising=False)


def test_the_defaults() -> None:
    """64 blocks of 128 tokens, of which a request of unknown length gets 8: 1024 tokens."""
    settings = settings_from(ReceiverSettings, {}, {})
    assert (settings.blocks, settings.block_size, settings.default_blocks) == (64, 128, 8)


@pytest.mark.parametrize(
    ("variable", "field"),
    [
        ("AIOMM_BLOCK_SIZE", "block_size"),
        ("SGLANG_MULTIMODAL_BLOCK_SIZE", "block_size"),
        ("AIOMM_DEFAULT_BLOCKS", "default_blocks"),
        ("SGLANG_DEFAULT_MULTIMODAL_BLOCKS", "default_blocks"),
        ("AIOMM_POOL_BLOCKS", "blocks"),
        ("SGLANG_EMBEDDING_CACHE_BUFFER_SIZE", "blocks"),
        ("AIOMM_MAX_WAITING", "max_waiting"),
    ],
)
def test_every_spelling_in_the_environment(variable: str, field: str) -> None:
    """Each name sets its field; an argument wins over it."""
    settings = settings_from(ReceiverSettings, {}, {variable: "12"})
    assert getattr(settings, field) == 12
    settings = settings_from(ReceiverSettings, {field: 5}, {variable: "12"})
    assert getattr(settings, field) == 5


def test_our_spelling_wins_over_that_of_others() -> None:
    """A deployment that exports both means ours."""
    environ = {"SGLANG_MULTIMODAL_BLOCK_SIZE": "32", "AIOMM_BLOCK_SIZE": "64"}
    assert settings_from(ReceiverSettings, {}, environ).block_size == 64


def test_the_endpoints_read_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is exported reaches a Receiver and a Sender, and arguments still win."""
    monkeypatch.setenv("SGLANG_MULTIMODAL_BLOCK_SIZE", "32")
    monkeypatch.setenv("AIOMM_POOL_BLOCKS", "6")
    monkeypatch.setenv("AIOMM_TIMEOUT", "2.5")
    monkeypatch.setenv("AIOMM_STRICT", "true")
    receiver = Receiver(SCHEMA, blocks=4)
    assert (receiver.settings.blocks, receiver.settings.block_size) == (4, 32)
    assert Sender(SCHEMA).settings.timeout == 2.5
    assert Sender(SCHEMA).settings.strict
    assert not Sender(SCHEMA, strict=False).settings.strict


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("AIOMM_BLOCK_SIZE", "many"),
        ("SGLANG_MULTIMODAL_BLOCK_SIZE", "0"),
        ("SGLANG_DEFAULT_MULTIMODAL_BLOCKS", "-8"),
        ("AIOMM_POOL_BLOCKS", "1.5"),
        ("AIOMM_TIMEOUT", "0"),
        ("AIOMM_TIMEOUT", "nan"),
        ("AIOMM_CONTROL", "carrier pigeon"),
        ("AIOMM_STRICT", "perhaps"),
    ],
)
def test_a_wrong_variable_is_named(variable: str, value: str) -> None:
    """The message says which variable, and what stands in it."""
    with pytest.raises(ValueError, match=f"variable {variable}={value!r}"):
        settings_from(ReceiverSettings, {}, {variable: value})


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("block_size", 0),
        ("block_size", "128"),
        ("blocks", 2.5),
        ("timeout", -1),
        ("timeout", float("nan")),
        ("max_waiting", True),
        ("name", "n" * 65),
        ("control", "tcp"),
    ],
)
def test_a_wrong_argument_is_named(argument: str, value: object) -> None:
    """The message says which argument, and what was given; no conversion by guessing."""
    with pytest.raises(ValueError, match=f"argument {argument}="):
        Receiver(SCHEMA, **{argument: value})  # type: ignore[arg-type]


def test_an_empty_variable_is_none() -> None:
    """`AIOMM_BLOCK_SIZE=` in a unit file means the default."""
    assert settings_from(ReceiverSettings, {}, {"AIOMM_BLOCK_SIZE": ""}).block_size == 128


@pytest.mark.parametrize("endpoint", [Receiver, Sender])
def test_an_argument_that_does_not_exist(endpoint: type[Receiver] | type[Sender]) -> None:
    """A misspelt setting is an error, as with any function."""
    with pytest.raises(TypeError, match="blok_size"):
        endpoint(SCHEMA, blok_size=3)


def test_a_sender_has_no_pool() -> None:
    """The receiver's settings are no arguments of a Sender."""
    with pytest.raises(TypeError, match="blocks"):
        Sender(SCHEMA, blocks=3)
    assert not hasattr(settings_from(SenderSettings, {}, {"AIOMM_POOL_BLOCKS": "7"}), "blocks")
