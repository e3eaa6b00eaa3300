"""Pace: what a step may read of prompts, so that streams come steadily."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.shadow import ShadowExecutor
from tests.engine.test_scheduler import request
from tramontane.config import CacheConfig, SchedulerConfig
from tramontane.engine.blocks import make_pool
from tramontane.engine.engine import Engine
from tramontane.engine.pace import Pace
from tramontane.engine.scheduler import Scheduler
from tramontane.engine.step import Step, StepResult


@given(base=st.floats(1e-4, 1.0), cost=st.floats(1e-5, 0.1), sizes=st.lists(st.integers(0, 512), min_size=2))
def test_it_finds_what_steps_cost(base: float, cost: float, sizes: list[int]) -> None:
    pace = Pace(None)
    for size in [0, 512, *sizes]:
        pace.learn(size, base + cost * size)
    room = pace.room()
    assert room is not None
    assert base + cost * room <= max(2.51 * base, base + 8.01 * cost)
    assert base + cost * (room + 1) >= 2.49 * base


def test_nothing_is_known_before_steps_of_two_sizes() -> None:
    pace = Pace(0.1)
    for _ in range(5):
        pace.learn(0, 0.01)
        assert pace.room() is None
    pace.learn(100, 0.11)
    assert pace.room() == pytest.approx(90, abs=1)


@dataclass
class Timed:
    """An executor whose steps take a time that follows from their tokens."""

    shadow: ShadowExecutor
    base: float = 0.01
    cost: float = 0.002
    now: float = 0.0
    lasted: list[tuple[int, float]] = field(default_factory=list)
    learn: Callable[[], None] = lambda: None

    def submit(self, step: Step) -> StepResult:
        tokens = sum(len(s.tokens) for s in step.sequences)
        seconds = self.base + self.cost * tokens
        self.now += seconds
        self.learn()
        self.lasted.append((tokens, seconds))
        return self.shadow.submit(step)

    def close(self) -> None: ...


def intervals(streamed: bool, **config: Any) -> tuple[list[float], Timed]:
    """Seconds between a stream's tokens while prompts of 4,000 tokens come, one behind the other, after a while."""
    executor = Timed(ShadowExecutor((None,), 16))
    pool = make_pool(CacheConfig(), 2000, (None,), 8192)
    scheduler = Scheduler(SchedulerConfig(**config), pool, 8192, clock=lambda: executor.now)
    engine = Engine(scheduler, executor)
    executor.learn = lambda: executor.shadow.learn(scheduler.sequences())

    def add(name: str, prompt: int, tokens: int) -> None:
        ids = np.random.default_rng(prompts).integers(0, 1000, prompt).tolist()
        engine.add(replace(request(name, ids, max_tokens=tokens, ignore_eos=True), streamed=streamed))

    times: list[float] = []
    prompts = 0
    add("stream", 100, 600)
    while engine.has_work:
        events = engine.step()
        times += [executor.now for event in events if event.request_id == "stream"]
        if len(times) >= 50 and prompts < 4 and not any(s.remaining > 1 for s in scheduler.sequences()):
            add(f"prompt {prompts}", 4000, 4)
            prompts += 1
    return [b - a for a, b in itertools.pairwise(times)], executor


def test_streams_keep_their_pace_while_prompts_come() -> None:
    between, executor = intervals(True)
    ordered = sorted(between)
    assert ordered[int(0.99 * len(ordered))] <= 3 * statistics.median(between)
    assert ordered[int(0.99 * len(ordered))] <= 3 * (executor.base + executor.cost)
    unsteady, _ = intervals(False)
    assert max(unsteady) > 1


def test_a_target_is_kept_and_used() -> None:
    between, executor = intervals(True, step_target=0.2)
    late = [seconds for tokens, seconds in executor.lasted[60:] if tokens > 1]
    assert max(late) <= 0.21
    assert statistics.median(late) > 0.15
    assert len(between) == 599
