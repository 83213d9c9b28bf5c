"""`aiomm demo`: runs the two processes and tells what came of it."""

from __future__ import annotations

from importlib.util import find_spec

import msgspec
from rich.console import Console

from ..demo.messages import Options
from ..demo.processes import run_demo
from .demo_view import DemoProgress, show_report
from .device import ensure_usable
from .running import Exit, Unusable

__all__ = ["demonstrate"]


async def demonstrate(
    options: Options, *, as_json: bool, console: Console, errors: Console
) -> Exit:
    """Run the demo; print one JSON object, or what a person wants to see.

    Raises:
        Unusable: an extra is missing, or the device or the plane cannot be used here.
    """
    if options.image is not None and not (find_spec("transformers") and find_spec("PIL")):
        raise Unusable("--image needs python -m pip install 'aiomm[vision]'")
    if options.control == "aiozmq" and not find_spec("aiozmq"):
        raise Unusable("--control aiozmq needs python -m pip install 'aiomm[aiozmq]'")
    await ensure_usable(options.device, options.plane)
    with DemoProgress(options, errors) as progress:
        report = await run_demo(options, progress.heard)
    if as_json:
        print(msgspec.json.encode(report.as_json()).decode(), flush=True)
    else:
        show_report(report, console)
    return Exit.OK if report.verified else Exit.FAILED
