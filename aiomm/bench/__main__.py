"""Be one of the benchmark's processes: `python -m aiomm.bench language|encoder FD PLAN`.

`aiomm bench` starts them, and they end when it does: their stdin says so.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

import msgspec

from ..demo.loops import run
from ..errors import AiommError
from .messages import Broke, tell
from .plan import Plan

__all__ = ["main"]


def main() -> None:
    """Run the process that the command line names."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command, which ends us
    if len(sys.argv) != 4 or sys.argv[1] not in ("language", "encoder"):
        sys.exit("usage: python -m aiomm.bench language|encoder FD PLAN")
    name, descriptor, encoded = sys.argv[1:]
    plan = msgspec.json.decode(encoded, type=Plan)
    sys.setswitchinterval(plan.switch_interval)
    with socket.socket(fileno=int(descriptor)) as link:
        sys.exit(_run(_work(name, plan, link)))


def _run(work: Coroutine[Any, Any, None]) -> int:
    try:
        run(_until_orphaned(work))
    except (BrokenPipeError, EOFError):
        return 1  # the command or the other side is gone: there is nobody to tell, or it knows
    except (AiommError, OSError) as exc:
        with suppress(BrokenPipeError):
            tell([Broke(f"{type(exc).__name__}: {exc}")])
        return 1
    return 0


async def _until_orphaned(work: Coroutine[Any, Any, None]) -> None:
    """Do the work until it is done, or stdin is closed."""
    loop = asyncio.get_running_loop()
    task = loop.create_task(work)

    def end() -> None:
        loop.remove_reader(0)
        task.cancel()

    loop.add_reader(0, end)
    try:
        await task
    except asyncio.CancelledError:
        pass
    except ExceptionGroup as group:  # of the first among many workers
        raise group.exceptions[0] from None
    finally:
        loop.remove_reader(0)


async def _work(name: str, plan: Plan, link: socket.socket) -> None:
    if name == "language":
        from .language import receive_all

        await receive_all(plan, link)
        return
    from .encoder import send_all

    await send_all(plan, link)


if __name__ == "__main__":
    main()
