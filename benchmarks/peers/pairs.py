"""Both processes of one path: started once, kept warm, given deadlines, ended at the end."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from typing import IO, Any, NamedTuple

from .base import Setting

START_SECONDS = 60.0
ANSWER_SECONDS = 30.0
CLOSING_SECONDS = 8.0

Answers = queue.Queue[tuple[str, dict[str, Any]]]


class PeerFailed(Exception):
    """A path cannot take part any more."""


class Moved(NamedTuple):
    """What one transfer took, in seconds."""

    seconds: float
    """From the call in the sender until the receiver has the usable tensor."""
    cpu_seconds: float
    """User and system time of both processes."""
    first_read_seconds: float
    """Reading one byte of every page for the first time, after the clock has ended."""


class Child:
    """One process; what it says comes into a queue, its end as a failure."""

    def __init__(self, role: str, setting: Setting, where: str, answers: Answers) -> None:
        self.role = role
        self._answers = answers
        self._errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [sys.executable, "-m", "benchmarks.peers.play", role, json.dumps(setting), where]
        self._process = subprocess.Popen(
            command,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        threading.Thread(target=self._listen, daemon=True).start()

    def order(self, what: dict[str, Any]) -> None:
        """Tell it what to do.

        Raises:
            PeerFailed: it has ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()
        except OSError as exc:
            raise PeerFailed(f"{self.role} side: {self._last_words()}") from exc

    def ask_to_end(self) -> None:
        """Let it close."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
        except OSError:
            return  # it has ended

    def end(self, seconds: float) -> None:
        """Wait so long for it, then kill it."""
        try:
            self._process.wait(max(seconds, 0))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put((self.role, json.loads(line)))
        self._process.wait()
        self._answers.put((self.role, {"failed": f"{self.role} side: {self._last_words()}"}))

    def _last_words(self) -> str:
        if self._errors.closed:
            return "ended"
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        said = f": {lines[-1]}" if lines else ""
        return f"ended with {self._process.poll()}{said}"


class Pair:
    """Both processes of a path. Call the `begin` functions in their order, then `move`."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._answers: Answers = queue.Queue()
        self._number = 0
        self._children = [Child("far", setting, "", self._answers)]

    def begin_near(self) -> None:
        """Start the near side, once the far side says where it is."""
        where = self._hear({"far"}, START_SECONDS)["far"]["where"]
        self._children.append(Child("near", self._setting, where, self._answers))

    def begin_moving(self) -> None:
        """Wait until both are connected."""
        self._hear({"far", "near"}, START_SECONDS)

    def move(self, nbytes: int, *, count: int, pause: float = 0.0) -> list[Moved]:
        """Move a tensor so many times, each after so many seconds.

        Raises:
            PeerFailed: it does not come, or not as it was sent.
        """
        order = {"nbytes": nbytes, "count": count, "pause": pause, "number": self._number}
        self._number += count
        for child in self._children:
            child.order(order)
        answers = self._hear({"far", "near"}, ANSWER_SECONDS)
        return [
            moved(sent, received)
            for sent, received in zip(
                answers["near"]["sent"], answers["far"]["received"], strict=True
            )
        ]

    def ask_to_end(self) -> None:
        """Let both close."""
        for child in reversed(self._children):
            child.ask_to_end()

    def end(self, seconds: float = CLOSING_SECONDS) -> None:
        """Wait so long for both, then kill them."""
        deadline = time.monotonic() + seconds
        for child in self._children:
            child.end(deadline - time.monotonic())

    def _hear(self, roles: set[str], seconds: float) -> dict[str, dict[str, Any]]:
        """Return one answer of each.

        Raises:
            PeerFailed: one of them says so, ends, or says nothing.
        """
        deadline = time.monotonic() + seconds
        heard: dict[str, dict[str, Any]] = {}
        while heard.keys() != roles:
            try:
                role, answer = self._answers.get(timeout=max(deadline - time.monotonic(), 0))
            except queue.Empty as exc:
                silent = " and ".join(sorted(roles - heard.keys()))
                raise PeerFailed(f"no answer of the {silent} side in {seconds:g} s") from exc
            if "failed" in answer:
                raise PeerFailed(answer["failed"])
            heard[role] = answer
        return heard


def moved(sent: dict[str, int | None], received: dict[str, int]) -> Moved:
    """Put both sides' figures together, in seconds."""
    began, near_ended, near_cpu = sent["began"], sent["ended"], sent["cpu"]
    assert began is not None
    assert near_cpu is not None
    first_read = received["first_read"] / 1e9
    if near_ended is not None:  # a bare memcpy, which is nothing but CPU time
        seconds = (near_ended - began) / 1e9
        return Moved(seconds, seconds, first_read)
    cpu = (near_cpu + received["cpu"]) / 1e9
    return Moved((received["ended"] - began) / 1e9, cpu, first_read)
