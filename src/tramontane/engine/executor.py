"""Executor: where steps are computed; here in this process, later one a rank.

Owns the seam. Must not know: scheduling, requests. What crosses it pickles, so that it may end in another process.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from tramontane.engine.runner import Runner
from tramontane.engine.step import Step, StepResult


class Executor(Protocol):
    """Computes steps in the order in which they are submitted."""

    def submit(self, step: Step) -> StepResult: ...

    def close(self) -> None:
        """Let go of weights and cache. May be called twice."""
        ...


class LocalExecutor:
    """Runs each step at once, on the calling thread. Executors that share a model share `turn`: they take turns."""

    def __init__(self, runner: Runner, turn: AbstractContextManager[object] | None = None) -> None:
        self._runner: Runner | None = runner
        self._turn = turn or nullcontext()

    @property
    def workspace_bytes(self) -> int:
        """Bytes of the buffers that steps have asked for so far."""
        return 0 if self._runner is None else self._runner.workspace_bytes

    def submit(self, step: Step) -> StepResult:
        if self._runner is None:
            raise RuntimeError("the executor is closed")
        with self._turn:
            return self._runner.run(step)

    def close(self) -> None:
        self._runner = None
