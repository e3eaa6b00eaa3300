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
        pace.learn(1, size, base + cost * size)
    room = pace.room(1, 1)
    assert room is not None
    assert base + cost * room <= max(2.51 * base, base + 8.01 * cost)
    assert base + cost * (room + 1) >= 2.49 * base


def test_nothing_is_known_before_steps_of_two_sizes() -> None:
    pace = Pace(0.1)
    for _ in range(5):
        pace.learn(1, 0, 0.01)
        assert pace.room(1, 1) is None
    pace.learn(1, 100, 0.11)
    assert pace.room(1, 1) == pytest.approx(90, abs=1)
    assert pace.room(1, 50) == pytest.approx(90, abs=1), "a target that was set holds for any number"


@given(ones=st.integers(1, 40), many=st.integers(1, 40))
def test_what_many_sequences_take_is_not_put_down_to_prompts(ones: int, many: int) -> None:
    """A step takes a part for each sequence, too; and no step without prompts was ever seen of so many."""
    base, own, cost = 0.004, 0.0005, 0.0003
    pace = Pace(None)
    for sequences, tokens in [(1, 0), (1, 100), (ones, 300), (ones, 300), (ones + many, 300), (ones, 10)]:
        pace.learn(sequences, tokens, base + own * sequences + cost * tokens)
    room = pace.room(ones, 0)
    assert room is not None
    least, most = (1.5 * (base + own * sequences) / cost for sequences in (ones / 2, 2 * ones))
    assert 0.75 * least < room < 1.1 * most


def test_where_more_wait_for_their_first_token_than_for_their_next_they_count_for_more() -> None:
    pace = Pace(None)
    pace.learn(2, 0, 0.01)
    pace.learn(2, 100, 0.02)
    rooms = [pace.room(streams, others) for streams, others in [(4, 0), (4, 4), (4, 8), (1, 63)]]
    assert rooms == pytest.approx([150, 150, 300, 63 * 150], abs=2)


@dataclass
class Timed:
    """An executor whose steps take a time that follows from their tokens."""

    shadow: ShadowExecutor
    base: float = 0.01
    own: float = 0.0
    """Of each sequence."""
    cost: float = 0.002
    now: float = 0.0
    lasted: list[tuple[int, float]] = field(default_factory=list)
    learn: Callable[[], None] = lambda: None

    def submit(self, step: Step) -> StepResult:
        tokens = sum(len(s.tokens) for s in step.sequences)
        seconds = self.base + self.own * len(step.sequences) + self.cost * tokens
        self.now += seconds
        self.learn()
        self.lasted.append((tokens, seconds))
        return self.shadow.submit(step)

    def close(self) -> None: ...


def test_prompts_that_come_together_are_read_together() -> None:
    """A step takes a part for each sequence: put down to prompts, it would make them wait, the more the more run."""
    executor = Timed(ShadowExecutor((None,), 16), base=0.004, own=0.0005, cost=0.0003)
    pool = make_pool(CacheConfig(), 2000, (None,), 8192)
    scheduler = Scheduler(SchedulerConfig(), pool, 8192, clock=lambda: executor.now)
    engine = Engine(scheduler, executor)
    executor.learn = lambda: executor.shadow.learn(scheduler.sequences())
    for number in range(64):
        ids = np.random.default_rng(number).integers(0, 1000, 32).tolist()
        engine.add(replace(request(str(number), ids, max_tokens=64, ignore_eos=True), streamed=True))
        if number < 4:  # those that came first run by then
            engine.step()
    begun: set[str] = set()
    steps = 0
    while len(begun) < 60:
        begun |= {event.request_id for event in engine.step() if int(event.request_id) >= 4}
        steps += 1
    assert steps < 12


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
