"""The runtime is chosen once, by what is installed or by the environment."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace

import pytest

from aiomm.errors import PlaneUnavailable
from aiomm.gpu.choice import (
    VARIABLE,
    check_device,
    device_ordinal,
    gpu_runtime,
    is_in_use,
    use_runtime,
)
from aiomm.gpu.fake import FakeRuntime
from aiomm.gpu.runtime import Device, GpuError


class Bindings(FakeRuntime):
    """Stands for the runtime of cuda-bindings."""


class Cupy(FakeRuntime):
    """Stands for cupy's."""


class Broken(FakeRuntime):
    """Stands for one whose library lacks a library of its own."""

    def __init__(self) -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin without a choice, and end without one."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr("aiomm.gpu.choice._chosen", None)


def install(monkeypatch: pytest.MonkeyPatch, **runtimes: type[FakeRuntime] | None) -> None:
    """Let these be what is installed; None is not."""
    for name, runtime in runtimes.items():
        module: ModuleType | None = None
        if runtime is not None:
            module = ModuleType(name)
            setattr(module, f"{name.capitalize()}Runtime", runtime)
        monkeypatch.setitem(sys.modules, f"aiomm.gpu.{name}", module)


class TestRuntime:
    @pytest.mark.parametrize("wanted", [None, "", "auto"])
    @pytest.mark.parametrize(
        ("bindings", "cupy", "expected"),
        [
            (Bindings, Cupy, Bindings),
            (Bindings, None, Bindings),
            (None, Cupy, Cupy),
            (Broken, Cupy, Cupy),
        ],
    )
    def test_is_the_first_that_is_installed(
        self,
        monkeypatch: pytest.MonkeyPatch,
        wanted: str | None,
        bindings: type[FakeRuntime] | None,
        cupy: type[FakeRuntime] | None,
        expected: type[FakeRuntime],
    ) -> None:
        if wanted is not None:
            monkeypatch.setenv(VARIABLE, wanted)
        install(monkeypatch, bindings=bindings, cupy=cupy)
        assert type(gpu_runtime()) is expected

    @pytest.mark.parametrize(
        ("wanted", "expected"), [("bindings", Bindings), ("cupy", Cupy), ("fake", FakeRuntime)]
    )
    def test_is_that_which_the_environment_names(
        self, monkeypatch: pytest.MonkeyPatch, wanted: str, expected: type[FakeRuntime]
    ) -> None:
        monkeypatch.setenv(VARIABLE, wanted)
        install(monkeypatch, bindings=Bindings, cupy=Cupy)
        assert type(gpu_runtime()) is expected

    def test_is_the_same_each_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(VARIABLE, "fake")
        chosen = gpu_runtime()
        monkeypatch.setenv(VARIABLE, "bindings")
        assert gpu_runtime() is chosen

    def test_is_never_the_fake_by_itself(self, monkeypatch: pytest.MonkeyPatch) -> None:
        install(monkeypatch, bindings=None, cupy=None)
        with pytest.raises(PlaneUnavailable, match="needs cuda-bindings or cupy: pip install"):
            gpu_runtime()

    def test_is_missing_for_every_reason(self, monkeypatch: pytest.MonkeyPatch) -> None:
        install(monkeypatch, bindings=Broken, cupy=None)
        with pytest.raises(PlaneUnavailable) as caught:
            gpu_runtime()
        assert "bindings: libcuda.so.1: cannot open shared object file; cupy: " in str(caught.value)

    def test_that_is_named_is_not_replaced_by_another(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(VARIABLE, "bindings")
        install(monkeypatch, bindings=None, cupy=Cupy)
        with pytest.raises(PlaneUnavailable) as caught:
            gpu_runtime()
        assert "(bindings: " in str(caught.value)
        assert "cupy: " not in str(caught.value).partition("aiomm[cuda]")[2]

    def test_that_was_missing_is_looked_for_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        install(monkeypatch, bindings=None, cupy=None)
        with pytest.raises(PlaneUnavailable):
            gpu_runtime()
        install(monkeypatch, cupy=Cupy)
        assert type(gpu_runtime()) is Cupy

    def test_nobody_knows_is_refused_by_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(VARIABLE, "rocm")
        known = "auto, bindings, cupy, fake"
        with pytest.raises(PlaneUnavailable, match=f"AIOMM_GPU_RUNTIME=rocm: known are {known}"):
            gpu_runtime()

    def test_can_be_given_and_chosen_anew(self, monkeypatch: pytest.MonkeyPatch) -> None:
        given = FakeRuntime()
        use_runtime(given)
        assert gpu_runtime() is given
        use_runtime(None)
        install(monkeypatch, bindings=Bindings)
        assert type(gpu_runtime()) is Bindings


def torch_with(*, is_initialized: bool) -> SimpleNamespace:
    return SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: is_initialized))


class TestUse:
    @pytest.mark.parametrize(
        ("torch", "expected"),
        [
            (None, False),
            (torch_with(is_initialized=False), False),
            (torch_with(is_initialized=True), True),
        ],
    )
    @pytest.mark.parametrize("wanted", [None, "bindings"])
    def test_is_what_torch_says(
        self,
        monkeypatch: pytest.MonkeyPatch,
        torch: SimpleNamespace | None,
        expected: bool,
        wanted: str | None,
    ) -> None:
        if wanted is not None:
            monkeypatch.setenv(VARIABLE, wanted)
        monkeypatch.setitem(sys.modules, "torch", torch)
        assert is_in_use() is expected

    def test_is_none_while_nobody_has_imported_torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delitem(sys.modules, "torch", raising=False)
        assert not is_in_use()
        assert "torch" not in sys.modules

    def test_begins_with_the_choice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "torch", None)
        use_runtime(FakeRuntime())
        assert is_in_use()
        use_runtime(None)
        assert not is_in_use()

    def test_is_said_of_the_fake_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(VARIABLE, "fake")
        monkeypatch.setitem(sys.modules, "torch", None)
        assert is_in_use()

    def test_is_none_while_a_thread_is_importing_torch(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))
        assert not is_in_use()


class TestDevices:
    @pytest.mark.parametrize(
        ("name", "ordinal"), [("cuda", 0), ("cuda:0", 0), ("cuda:1", 1), ("cuda:15", 15)]
    )
    def test_are_named_as_torch_names_them(self, name: str, ordinal: int) -> None:
        assert device_ordinal(name) == ordinal

    @pytest.mark.parametrize(
        "name", ["", "cpu", "cuda:", "cuda:-1", "cuda:x", "cuda:0:1", "cuda: 0", "CUDA:0", "0"]
    )
    def test_have_no_other_names(self, name: str) -> None:
        with pytest.raises(ValueError, match="expected 'cpu', 'cuda' or 'cuda:0'"):
            device_ordinal(name)

    def test_are_as_many_as_there_are(self) -> None:
        runtime = FakeRuntime([0, 1])
        check_device(runtime, 0)
        check_device(runtime, 1)
        with pytest.raises(PlaneUnavailable, match="cuda:2: there are 2 GPUs here"):
            check_device(runtime, 2)

    def test_are_none_where_there_are_none(self) -> None:
        with pytest.raises(PlaneUnavailable, match="cuda:1: there are 0 GPUs here"):
            check_device(FakeRuntime([]), 1)

    def test_are_none_where_cuda_fails(self) -> None:
        class Broken(FakeRuntime):
            def devices(self) -> Sequence[Device]:
                raise GpuError("cuInit", 100, "there is no device")

        with pytest.raises(PlaneUnavailable, match="cuda:1: cuInit: there is no device"):
            check_device(Broken(), 1)
