"""Fills the generated regions of README.md and docs/*.md from the code.

    python docs/generate.py            writes what has changed
    python docs/generate.py --check    only says what is out of date; exit status 1 if anything is

A region is what stands between `<!-- generated: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from inspect import getdoc
from pathlib import Path
from typing import Any, get_args

import msgspec
from conversation import to_mermaid as request_to_mermaid

from aiomm.buffers import pool
from aiomm.config import (
    EndpointSettings,
    ReceiverSettings,
    SenderSettings,
    variables_of,
)
from aiomm.errors import AiommError
from aiomm.protocol import commands, events, frames
from aiomm.protocol.states import to_mermaid as states_to_mermaid

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
REGION = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def states() -> str:
    """Draw the state machine."""
    return fenced("mermaid", states_to_mermaid())


def request() -> str:
    """Draw one request from end to end."""
    return fenced("mermaid", request_to_mermaid())


def blocks() -> str:
    """Draw the life of a block, from the moves that the pool allows."""
    lines = ["stateDiagram-v2", "    [*] --> FREE", "    FREE --> GRANTED: allocate"]
    for operation, moves in pool._MOVES.items():
        for before, after in moves.items():
            if before is not after:
                lines.append(f"    {before.name} --> {after.name}: {operation}")
    return fenced("mermaid", "\n".join(lines))


def floors() -> str:
    """Draw the floors that imports only go down."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contract = pyproject["tool"]["importlinter"]["contracts"][0]
    lines = ["flowchart TD"]
    for number, layer in enumerate(contract["layers"]):
        names = re.sub(r"[()]", "", layer).replace(" | ", "   ")
        lines.append(f'    floor{number}["{names}"]')
        if number:
            lines.append(f"    floor{number - 1} --> floor{number}")
    return fenced("mermaid", "\n".join(lines))


def modules() -> str:
    """List every module with the idea it stands for."""
    rows = [
        (f"`{path.relative_to(ROOT)}`", first_line(ast.get_docstring(ast.parse(path.read_text()))))
        for path in sorted((ROOT / "aiomm").rglob("*.py"), key=lambda path: (path.parent, path))
        if path.stat().st_size
    ]
    return table(("module", "idea"), rows)


def settings() -> str:
    """List every setting of both endpoints."""
    tree = ast.parse((ROOT / "aiomm" / "config.py").read_text())
    own = {field.name for field in msgspec.structs.fields(EndpointSettings)}
    meanings = attribute_docs(tree)
    rows = []
    for kind in (SenderSettings, ReceiverSettings):
        for field in msgspec.structs.fields(kind):
            if kind is ReceiverSettings and field.name in own:
                continue
            side = "both" if field.name in own else kind.__name__.removesuffix("Settings")
            names = variables_of(field.name)
            variables = ", ".join(f"`{name}`" for name in names)
            default = f"`{field.default!r}`".replace("'", '"')
            rows.append((f"`{field.name}`", side, default, variables, meanings[field.name]))
    return table(("setting", "of", "default", "environment", "meaning"), rows)


def errors() -> str:
    """Draw the tree of errors with who may try again."""
    kinds = AiommError.__subclasses__()
    width = max(len(kind.__name__) for kind in kinds)
    lines = ["AiommError"]
    for kind in kinds:
        branch = "└──" if kind is kinds[-1] else "├──"
        again = "retry" if kind.retryable else "     "
        lines.append(f"{branch} {kind.__name__:{width}}  {again}  {first_line(getdoc(kind))}")
    return fenced("text", "\n".join(lines))


def frame_table() -> str:
    """List the control frames."""
    return described(get_args(frames.Frame))


def event_table() -> str:
    """List the events of a transfer."""
    return described(get_args(events.Event), "event")


def command_table() -> str:
    """List the commands that a driver carries out."""
    return described(get_args(commands.Command), "command")


def extras() -> str:
    """List the extras that can be installed."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    given = pyproject["project"]["optional-dependencies"]
    rows = [
        (f"`aiomm[{name}]`", ", ".join(f"`{requirement.split(';')[0]}`" for requirement in wanted))
        for name, wanted in given.items()
    ]
    core = ", ".join(f"`{requirement}`" for requirement in pyproject["project"]["dependencies"])
    return table(("install", "brings"), [("`aiomm`", core), *rows])


REGIONS: Mapping[str, Callable[[], str]] = {
    "states": states,
    "request": request,
    "blocks": blocks,
    "floors": floors,
    "modules": modules,
    "settings": settings,
    "errors": errors,
    "frames": frame_table,
    "events": event_table,
    "commands": command_table,
    "extras": extras,
}


def fenced(language: str, text: str) -> str:
    """Return `text` as a code block."""
    return f"```{language}\n{text}\n```"


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    escaped = [tuple(cell.replace("|", "\\|") for cell in row) for row in rows]
    lines = [head, tuple("---" for _ in head), *escaped]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def described(kinds: Any, head: str = "frame") -> str:
    """Return a table of classes and the first paragraphs of their docstrings."""
    rows = [(f"`{kind.__name__}`", first_paragraph(getdoc(kind))) for kind in kinds]
    return table((head, "meaning"), rows)


def first_line(docstring: str | None) -> str:
    """Return what a docstring says first."""
    return plain((docstring or "").partition("\n")[0])


def first_paragraph(docstring: str | None) -> str:
    """Return the first paragraph of a docstring on one line."""
    return plain(" ".join((docstring or "").partition("\n\n")[0].split()))


def plain(text: str) -> str:
    """Return `text` without the marks of reStructuredText."""
    return re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text)


def attribute_docs(tree: ast.Module) -> dict[str, str]:
    """Return the strings that stand under the attributes of all classes."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            for attribute, below in zip(node.body, node.body[1:], strict=False):
                if isinstance(attribute, ast.AnnAssign) and isinstance(below, ast.Expr):
                    value = ast.literal_eval(below.value)
                    found[ast.unparse(attribute.target)] = plain(" ".join(value.split()))
    return found


def filled(text: str) -> str:
    """Return a page with every region as the code has it now."""

    def fill(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        return f"{begin}{REGIONS[name]()}\n{end}"

    return REGION.sub(fill, text)


def stale() -> Iterator[tuple[Path, str]]:
    """Yield the pages that are out of date, and what they should be."""
    for page in PAGES:
        text = page.read_text()
        wanted = filled(text)
        if wanted != text:
            yield page, wanted


def main() -> None:
    """Fill the regions, or with `--check` say which pages are out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args()
    changed = list(stale())
    for page, wanted in changed:
        print(f"{page.relative_to(ROOT)} is out of date")
        if not options.check:
            page.write_text(wanted)
    if changed and options.check:
        print("run: python docs/generate.py")
        sys.exit(1)


if __name__ == "__main__":
    main()
