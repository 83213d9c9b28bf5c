"""What a process does beside its transfers: spin or beat, if the plan asks for it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from .busy import Spinner
from .heartbeat import Heart
from .messages import Beats
from .plan import Plan, Process, Step

__all__ = ["Beside"]


class Beside:
    """The spinner and the heart of one process. Costs nothing where neither is asked for."""

    def __init__(self, plan: Plan, process: Process) -> None:
        self._plan = plan
        self._process = process
        self._heart = Heart(process)
        self.spinner = Spinner()

    def spinning(self, step: Step) -> AbstractContextManager[None]:
        """Spin meanwhile, if the step is one of those."""
        spins = self._plan.spins(self._process, step)
        return self.spinner.spinning() if spins else nullcontext()

    def beating(self, step: Step) -> AbstractContextManager[None]:
        """Beat meanwhile, if that is wanted and the step counts."""
        beats = self._plan.heartbeat and not self._plan.is_warm_up(step)
        return self._heart.beating(step.path) if beats else nullcontext()

    def beats(self) -> list[Beats]:
        """Return what the heart has noted up to now; nothing if it never beat."""
        return self._heart.beats()
