"""How a command runs: on the best loop, with a clean end on Ctrl-C and an exit code."""

from __future__ import annotations

from collections.abc import Coroutine
from enum import IntEnum
from typing import Any

import typer
from rich.console import Console

from ..demo.loops import run
from ..errors import AiommError

__all__ = ["Exit", "Unusable", "fail", "finish"]


class Exit(IntEnum):
    """What a script learns from the exit code."""

    OK = 0
    FAILED = 1
    """A transfer failed, or what arrived is not what was sent."""
    USAGE = 2
    """The command line, or a file, address or plane on it, is not usable, or an extra is missing;
    no transfer was tried."""
    INTERRUPTED = 130
    """Ctrl-C; the other side was told."""


class Unusable(Exception):
    """What the user gave cannot be used, and nothing was sent or received because of it."""


def fail(message: str, code: Exit, *, errors: Console) -> typer.Exit:
    """Tell the person why the command ends; return what to raise."""
    errors.print(f"[red]aiomm:[/red] {_escaped(message)}", soft_wrap=True, highlight=False)
    return typer.Exit(code)


def finish(work: Coroutine[Any, Any, Exit], *, errors: Console) -> None:
    """Run the command's coroutine and leave with its exit code.

    Raises:
        typer.Exit: always, unless the code is 0.
    """
    try:
        code = run(work)
    except KeyboardInterrupt:
        raise fail("interrupted", Exit.INTERRUPTED, errors=errors) from None
    except Unusable as exc:
        raise fail(str(exc), Exit.USAGE, errors=errors) from None
    except (AiommError, OSError) as exc:
        message = f"{type(exc).__name__}: {exc}"
        raise fail(message, Exit.FAILED, errors=errors) from None
    if code:
        raise typer.Exit(code)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
