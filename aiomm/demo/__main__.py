"""Be one of the demo's processes: `python -m aiomm.demo language` or `... encoder`.

`aiomm demo` starts them and speaks :mod:`.messages` with them. They end when it does.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Coroutine
from typing import Any

from .loops import run

__all__ = ["main"]


def main() -> None:
    """Run the process that the command line names."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command, which ends us
    work = _work(sys.argv[1:])
    orphaned = False
    try:
        run(work)
    except* (BrokenPipeError, EOFError):
        orphaned = True  # the command is gone, and there is nobody to tell
    sys.exit(1 if orphaned else 0)


def _work(arguments: list[str]) -> Coroutine[Any, Any, None]:
    match arguments:
        case ["language"]:
            from .language import receive_all

            return receive_all()
        case ["encoder"]:
            from .encoder import encode_all

            return encode_all()
        case _:
            sys.exit("usage: python -m aiomm.demo language|encoder")


if __name__ == "__main__":
    main()
