"""Engine: add, abort, step. Nothing else.

Owns the loop's one turn: schedule, submit, take in. Must not know: arrays, text, threads; whoever owns the engine calls
it from one thread at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tramontane.engine.scheduler import Scheduler
from tramontane.engine.sequence import EngineRequest, Event
from tramontane.types import FinishReason, Stats

if TYPE_CHECKING:  # executors bring arrays along; the engine needs only their shape
    from tramontane.engine.executor import Executor


class Engine:
    """Runs many requests through one executor. Each choice of each request gets exactly one final event: from `step`,
    or from the `abort` or `finish` that ended it."""

    def __init__(self, scheduler: Scheduler, executor: Executor) -> None:
        self._scheduler = scheduler
        self._executor = executor

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    @property
    def scheduler(self) -> Scheduler:
        return self._scheduler

    def add(self, request: EngineRequest) -> None:
        """Queue a request; raises InvalidRequest, ContextLengthExceeded or OutOfMemory where it can never be served,
        Overloaded where too many wait."""
        self._scheduler.add(request)

    def abort(self, request_id: str, index: int | None = None, reason: FinishReason = "cancelled") -> list[Event]:
        """End a request, or one choice of it, now; returns the final events, none where it has ended already."""
        return self._scheduler.abort(request_id, index, reason)

    def finish(self, request_id: str, index: int, stop_reason: str | int | None) -> list[Event]:
        """End a choice with "stop" (a stop string was found in its text); returns the final event, if it was open."""
        return self._scheduler.finish(request_id, index, stop_reason)

    def step(self) -> list[Event]:
        """One turn. An executor that raises, or answers something else, ends the step's sequences with "error"."""
        late = self._scheduler.expire()
        step = self._scheduler.schedule()
        if step is None:
            return late
        try:
            return late + self._scheduler.update(step, self._executor.submit(step))
        except Exception as error:
            return late + self._scheduler.fail(step, error)

    def stats(self) -> Stats:
        """This moment's numbers; the bytes are for the backend to fill in."""
        counters, pool = self._scheduler.counters, self._scheduler.pool
        return Stats(
            running=self._scheduler.running,
            waiting=self._scheduler.waiting,
            steps=counters.steps,
            prompt_tokens=counters.prompt_tokens,
            cached_tokens=counters.cached_tokens,
            generated_tokens=counters.generated_tokens,
            preemptions=counters.preemptions,
            requests_finished=counters.finished,
            requests_failed=counters.failed,
            requests_cancelled=counters.cancelled,
            blocks_total=pool.num_blocks,
            blocks_used=pool.used,
            blocks_cached=pool.cached,
        )
