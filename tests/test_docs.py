"""README and docs say what is true: examples run, links lead somewhere, drawings are the code's."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import aiomm
from aiomm.protocol.states import to_mermaid

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS: list[str] = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")


def start(source: str) -> subprocess.Popen[str]:
    """Run a block of the README with warnings as errors."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-W", "error", "-c", source]
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def named(file: str) -> str:
    """Return the block whose first line names `file`."""
    (block,) = [block for block in BLOCKS if block.startswith(f"# {file}\n")]
    return block


def outputs() -> list[str]:
    """Return the blocks of output that stand right below a block of Python."""
    return re.findall(
        r"^```python\n[^`]*?^```\n\n^```\n(.*?)^```$", README, re.DOTALL | re.MULTILINE
    )


@pytest.mark.slow
def test_the_first_example_prints_what_stands_below_it() -> None:
    with start(BLOCKS[0]) as process:
        output, errors = process.communicate(timeout=30)
    assert (output, errors) == (outputs()[0], "")


@pytest.mark.slow
def test_the_two_processes_of_the_readme_meet() -> None:
    assert len(BLOCKS) == 3
    with start(named("language.py")) as language:
        assert language.stdout is not None
        ticket = language.stdout.readline()
        with start(named("encoder.py")) as encoder:
            sent, errors = encoder.communicate(ticket, timeout=30)
            assert errors == ""
        received, errors = language.communicate(timeout=30)
    assert errors == ""
    assert received == "500 torch.bfloat16 shm\n"
    assert "num_tokens=500" in sent


@pytest.mark.slow
def test_generated_regions_are_current() -> None:
    command = [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_diagram_of_the_readme_is_the_table_of_states() -> None:
    assert f"```mermaid\n{to_mermaid()}\n```" in README


@pytest.mark.slow
@pytest.mark.parametrize("command", ["demo", "recv", "send", "doctor", "bench"])
def test_options_of_the_command_line_exist(command: str) -> None:
    """What README tells of a command is in its help."""
    told = {
        option
        for line in README.splitlines()
        if f"aiomm {command}" in line
        for option in re.findall(r"--[a-z-]+", line)
    }
    environment = os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    arguments = [sys.executable, "-m", "aiomm", command, "--help"]
    output = subprocess.run(arguments, env=environment, capture_output=True, check=True, text=True)
    assert told <= set(re.findall(r"--[a-z-]+", output.stdout))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_files_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as code hosts make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    assert all(f"]({page.name})" in index for page in (ROOT / "docs").glob("[!R]*.md"))


def test_files_and_modules_that_are_named_exist() -> None:
    """What stands in backquotes and looks like a path of this repository is one."""
    path = re.compile(r"`((?:aiomm|tests|examples|docs|benchmarks)/[\w./]+)")
    named = {(page, name) for page in PAGES for name in path.findall(page.read_text())}
    missing = [f"{page.name}: {name}" for page, name in named if not (ROOT / name).exists()]
    assert not missing


@pytest.mark.parametrize("name", aiomm.__all__)
def test_every_public_name_is_told(name: str) -> None:
    assert any(re.search(rf"\b{name}\b", page.read_text()) for page in PAGES)


def names_in(module: Path) -> set[str]:
    """Return what a module defines: classes, functions, and names that are assigned."""
    names = set()
    for node in ast.walk(ast.parse(module.read_text())):
        match node:
            case ast.ClassDef(name) | ast.FunctionDef(name) | ast.AsyncFunctionDef(name):
                names.add(name)
            case ast.Name(name, ast.Store()) | ast.Attribute(_, name, ast.Store()):
                names.add(name)
    return names


def test_each_rule_is_enforced_where_the_architecture_says() -> None:
    """Every name in that table is defined in the module before it; without one, in any."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text.split("## Where each rule is enforced")[1].split("\n## ")[0]
    modules = {module: names_in(module) for module in (ROOT / "aiomm").rglob("*.py")}
    missing = []
    for row in re.findall(r"^\| .+ \| (.+) \|$", table, re.MULTILINE)[1:]:
        known = set[str]().union(*modules.values())
        for word in re.findall(r"`([\w./]+)`", row):
            if word.endswith(".py"):
                at = [names for path, names in modules.items() if str(path).endswith("/" + word)]
                known = set[str]().union(*at)
            elif not set(word.split(".")) <= known:
                missing.append(word)
    assert not missing
