"""The `aiomm` command; what it needs comes with the extra `aiomm[cli]`."""

from __future__ import annotations

import sys
from importlib.util import find_spec

__all__ = ["main"]

NEEDED = ("typer", "rich", "safetensors", "numpy", "torch")


def main() -> None:
    """Run the command line; without the extra say which one is missing, and exit with 2."""
    missing = [name for name in NEEDED if not _is_installed(name)]
    if missing:
        sys.exit(_complain(missing))
    from .app import app

    app()


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ValueError:  # blocked: sys.modules holds None for it
        return False


def _complain(missing: list[str]) -> int:
    names = ", ".join(missing)
    print(f"the aiomm command needs {names}: python -m pip install 'aiomm[cli]'", file=sys.stderr)
    return 2
