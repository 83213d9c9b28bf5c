"""Finds msgspec and pyzmq where they are not installed: unpacked by `make gpu-wheels`."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

__all__ = ["SITE", "missing"]

SITE = Path(".wheels/site")
"""In the checkout, which is where everything here is run."""
NEEDED = {"msgspec": "msgspec", "pyzmq": "zmq"}
"""Packages, and what they are imported as."""


def missing() -> list[str]:
    """Return the packages that cannot be found, after a look at the unpacked wheels.

    Children find them there, too.
    """
    if _not_found() and SITE.is_dir():
        site = str(SITE.resolve())
        sys.path.append(site)
        paths = [os.environ.get("PYTHONPATH", ""), site]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return _not_found()


def _not_found() -> list[str]:
    return [package for package, module in NEEDED.items() if find_spec(module) is None]
