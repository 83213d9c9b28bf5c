"""Be one of the demo's processes: `python -m aiomm.demo language` or `... encoder`.

`aiomm demo` starts them and speaks :mod:`.messages` with them. They end when it does.
"""

from __future__ import annotations

import signal
import sys

from .loops import run


def main() -> None:
    """Run the process that the command line names."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command, which ends us
    if sys.argv[1:] == ["language"]:
        from .language import receive_all

        run(receive_all())
    elif sys.argv[1:] == ["encoder"]:
        from .encoder import encode_all

        run(encode_all())
    else:
        sys.exit("usage: python -m aiomm.demo language|encoder")


if __name__ == "__main__":
    main()
