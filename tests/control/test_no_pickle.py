"""Nothing that comes over the wire is ever unpickled."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import aiomm.control

from .contract import ROOT
from .kinds import KINDS

FORBIDDEN = re.compile(
    r"pickle|marshal|shelve|recv_pyobj|send_pyobj|recv_serialized|\beval\(|\bexec\("
)

SCRIPT = """
import asyncio, os, pickle, secrets, sys

from tests.control.kinds import KINDS
from tests.control.recorder import Recorder, echo

unpickled = []
sys.addaudithook(lambda event, _: unpickled.append(event) if "pickle" in event else None)

class Bomb:
    def __reduce__(self):
        return (os.system, ("exit 1",))

async def main(kind, bind):
    told, near = Recorder(echo), Recorder()
    listener, channel = KINDS[kind](bind, "listener"), KINDS[kind](None, "near")
    await listener.start(told)
    await channel.start(near)
    peer = channel.connect(listener.address)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        channel.send(peer, pickle.dumps(Bomb(), protocol))
    await near.until_packets(pickle.HIGHEST_PROTOCOL + 1)
    await channel.aclose()
    await listener.aclose()

asyncio.run(main(*sys.argv[1:]))
assert unpickled == [], unpickled
pickle.loads(pickle.dumps(Recorder))
assert unpickled == ["pickle.find_class"]  # the hook does see it
"""


def test_the_source_names_no_serialiser_that_runs_code() -> None:
    package = Path(str(aiomm.control.__file__)).parent
    for path in sorted(package.glob("*.py")):
        assert not FORBIDDEN.search(path.read_text()), path


@pytest.mark.parametrize(
    ("kind", "bind"),
    [("zmq", "tcp://127.0.0.1:0"), ("aiozmq", "tcp://127.0.0.1:0"), ("unix", "unix://")],
)
def test_pickles_on_the_wire_are_octets(kind: str, bind: str) -> None:
    assert kind in KINDS
    command = [sys.executable, "-c", SCRIPT, kind, bind]
    assert subprocess.run(command, cwd=ROOT, timeout=20, check=False).returncode == 0


def test_the_seam_is_cheap_to_import() -> None:
    script = (
        "import sys, aiomm.control.base; sys.exit('zmq' in sys.modules or 'asyncio' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=20, check=False).returncode == 0
