"""The promises of the project as a whole: light imports, floors, docstrings, clean files."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = [path for path in sorted((ROOT / "aiomm").rglob("*.py")) if path.stat().st_size]
"""Every module that says anything; an empty `__init__.py` needs no docstring."""
HEAVY = ("torch", "numpy", "transformers", "safetensors", "rich", "typer", "mooncake", "cupy")
IMPORT_LIMIT = 0.150
"""Seconds that `import aiomm` may take, interpreter start not counted."""
MEASURE_IMPORT = """
import sys, time
started = time.perf_counter()
import aiomm
print(time.perf_counter() - started, *sorted(sys.modules))
"""


def python(source: str) -> list[str]:
    """Run `source` in a fresh interpreter with warnings as errors; the words it prints."""
    command = [sys.executable, "-W", "error", "-c", source]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()


def tracked_files() -> list[Path]:
    """Return the text files that git tracks, or skip outside a checkout."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_importing_aiomm_is_fast() -> None:
    """The best of five counts: the first may compile, and the machine may be busy."""
    seconds = min(float(python(MEASURE_IMPORT)[0]) for _ in range(5))
    assert seconds < IMPORT_LIMIT


def test_importing_aiomm_loads_nothing_heavy() -> None:
    _, *modules = python(MEASURE_IMPORT)
    assert "aiomm" in modules
    assert not set(modules) & set(HEAVY)


def test_imports_only_go_down() -> None:
    """The contracts of pyproject.toml hold; the output names the offending line.

    In a process of its own: the tool turns off the loggers of whoever calls it.
    """
    tool = Path(sys.executable).parent / "lint-imports"
    run = subprocess.run([tool, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_module_says_its_idea_in_one_sentence(module: Path) -> None:
    docstring = ast.get_docstring(ast.parse(module.read_text()))
    assert docstring, "no docstring"
    assert docstring.splitlines()[0].endswith("."), docstring.splitlines()[0]


def test_the_changelog_keeps_its_form() -> None:
    """Unreleased first, then versions with dates; only the six known sections; no empty one."""
    lines = (ROOT / "CHANGELOG.md").read_text().splitlines()
    assert lines[0] == "# Changelog"
    releases = [line for line in lines if line.startswith("## ")]
    assert releases[0] == "## [Unreleased]"
    for release in releases[1:]:
        assert re.fullmatch(r"## \[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", release)
    known = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert {line[4:] for line in lines if line.startswith("### ")} <= known
    entries = [line for line in lines[lines.index(releases[0]) :] if line and line[0] != "#"]
    assert entries
    assert all(line.startswith(("- ", "  ")) for line in entries)


def test_no_file_names_a_machine_path() -> None:
    machine_path = re.compile(r"(?<![\w.$}~-])/(?:work|root|home/\w+)/")
    this = Path(__file__)
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in tracked_files()
        if path != this and path.suffix in {".py", ".md", ".toml", ".txt", ".json", ".yml", ""}
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if machine_path.search(line)
    ]
    assert not found


def test_nothing_is_unpickled() -> None:
    """Bytes from the network never reach pickle or its like."""
    unsafe = re.compile(r"^\s*(?:import|from)\s+(?:pickle|cloudpickle|dill|marshal|shelve)\b", re.M)
    found = [path.name for path in MODULES if unsafe.search(path.read_text())]
    found += [path.name for path in MODULES if "torch.load(" in path.read_text()]
    assert not found


def test_each_dependency_is_pinned_to_an_exact_version() -> None:
    """All but the extra that needs a GPU, which nobody installs by `make setup`."""
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", pin) for pin in pins)
    pinned = [pin.partition("==")[0] for pin in pins]
    assert pinned == sorted(set(pinned))
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = pyproject["project"]["optional-dependencies"]
    groups = [extras[name] for name in extras if name != "cuda"]
    groups += [pyproject["project"]["dependencies"], pyproject["dependency-groups"]["dev"]]
    named = {re.split(r"[>=<;\s]", requirement)[0] for group in groups for requirement in group}
    assert named <= set(pinned)
