"""What `aiomm doctor` found, for a person."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = ["show_findings"]

COPIES = {
    "streaming": "past the caches",
    "libc": "[yellow]libc's, which are slower: no C compiler when aiomm was installed, "
    "or not x86-64[/yellow]",
}


def show_findings(findings: Mapping[str, Any], console: Console) -> None:
    """Print what was found, the problems last."""
    planes = Table("plane", "usable", "why", title="Planes", title_justify="left")
    for name, plane in findings["planes"].items():
        usable = "[green]yes[/green]" if plane["usable"] else "[red]no[/red]"
        trial = f"moved 1 MiB in {plane['trial_seconds'] * 1e3:.1f} ms, with set-up"
        why = "; ".join(filter(None, [plane["usable"] and trial, plane["reason"]]))
        planes.add_row(name, usable, escape(why))
    console.print(planes)
    console.print(_gpus(findings["gpus"]))
    console.print(_facts(findings))
    console.print(_variables(findings["environment"]))
    for problem in findings["problems"]:
        console.print(f"[red]problem:[/red] {escape(problem)}", soft_wrap=True)
    if not findings["problems"]:
        console.print("[green]no problem found[/green]")


def _gpus(gpus: Mapping[str, Any]) -> Table:
    versions = ", ".join(f"{name} {number}" for name, number in gpus["versions"].items())
    table = Table("device", "IPC", "what", title="GPUs", title_justify="left")
    if not gpus["devices"]:
        table.add_row("none", "", escape(gpus["reason"] or "this process sees none"))
    for device in gpus["devices"]:
        ipc = "[green]yes[/green]" if device["ipc"] else "[red]no[/red]"
        what = [device["name"], _size(device["total_bytes"]), f"{gpus['runtime']}: {versions}"]
        table.add_row(
            device["device"], ipc, escape(", ".join([*what, *filter(None, [device["reason"]])]))
        )
    return table


def _facts(findings: Mapping[str, Any]) -> Table:
    facts = Table(title="Machine", title_justify="left", show_header=False)
    versions = ", ".join(
        f"{name} {number}" if number else f"[dim]no {name}[/dim]"
        for name, number in findings["versions"].items()
    )
    kernel = ", ".join(
        _fact(name, value) for name, value in findings["kernel"].items() if name != "system"
    )
    shared = findings["shared_memory"]
    facts.add_row("versions", versions)
    facts.add_row("event loop", findings["loop"])
    facts.add_row("long copies", COPIES[findings["copies"]])
    facts.add_row("kernel", f"{findings['kernel']['system']}: {kernel}")
    facts.add_row(
        "/dev/shm", f"{_size(shared['free_bytes'])} free of {_size(shared['total_bytes'])}"
    )
    for name, limit in findings["limits"].items():
        facts.add_row(
            name.replace("_", " "), f"{_number(limit['soft'])} of {_number(limit['hard'])}"
        )
    return facts


def _fact(name: str, value: object) -> str:
    if value is True:
        return name
    return f"[red]no {name}[/red]" if value in (False, None) else f"{value} {name}"


def _variables(environment: Mapping[str, Mapping[str, Any]]) -> Table:
    variables = Table("variable", "setting", "value", title="Environment", title_justify="left")
    for name, variable in environment.items():
        value = variable["value"]
        shown = "[dim]not set[/dim]" if value is None else escape(value)
        variables.add_row(name, variable["setting"], shown)
    return variables


def _size(nbytes: int | None) -> str:
    return "none" if nbytes is None else f"{nbytes / 2**20:,.0f} MiB"


def _number(limit: int | None) -> str:
    return "unlimited" if limit is None else f"{limit:,}"
