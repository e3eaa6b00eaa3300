"""Engine: one turn after another, and what happens when the executor does not answer."""

from __future__ import annotations

import ast
import pickle
from pathlib import Path

import pytest

import tramontane.engine
from tests.engine.shadow import ShadowExecutor, expected
from tests.engine.test_scheduler import Setup, outputs, request
from tramontane.engine.engine import Engine
from tramontane.engine.scheduler import Scheduler
from tramontane.engine.sequence import Event
from tramontane.engine.step import Step, StepResult
from tramontane.errors import ContextLengthExceeded, EngineClosed


class Scripted:
    """The shadow executor, with steps that fail and a pickled wire between."""

    def __init__(self, scheduler: Scheduler, inner: ShadowExecutor, failing: tuple[int, ...] = ()) -> None:
        self.scheduler, self.inner, self.failing = scheduler, inner, failing

    def submit(self, step: Step) -> StepResult:
        self.inner.learn(self.scheduler.sequences())
        if step.id in self.failing:
            raise EngineClosed("the executor died")
        result: StepResult = pickle.loads(pickle.dumps(self.inner.submit(pickle.loads(pickle.dumps(step)))))
        return result

    def close(self) -> None: ...


def build(setup: Setup | None = None, failing: tuple[int, ...] = ()) -> Engine:
    scheduler, executor = (setup or Setup()).build()
    return Engine(scheduler, Scripted(scheduler, executor, failing))


def drain(engine: Engine) -> list[Event]:
    events = []
    while engine.has_work:
        events += engine.step()
        engine.scheduler.check()
    return events


def test_many_requests_end_with_the_answers_they_get_alone() -> None:
    engine = build(Setup((None, 8), num_blocks=30))
    requests = [request(str(i), [1, 2, i % 3] * (i + 1), seed=i, n=1 + i % 3, max_tokens=9) for i in range(9)]
    for r in requests:
        engine.add(r)
    events = drain(engine)
    got = outputs(events)
    for r in requests:
        for index in range(r.num_choices):
            assert got[r.id, index] == expected(r, index, 40)[0]
    assert len([e for e in events if e.finish_reason]) == sum(r.num_choices for r in requests)
    assert engine.step() == []


def test_a_step_that_raises_ends_its_sequences_and_no_others() -> None:
    engine = build(Setup(max_num_seqs=2), failing=(2,))
    for id in "abc":
        engine.add(request(id, [1, 2, 3], max_tokens=4, ignore_eos=True))
    events = drain(engine)
    final = {e.request_id: e for e in events if e.finish_reason}
    assert {id: e.finish_reason for id, e in final.items()} == {"a": "error", "b": "error", "c": "length"}
    assert isinstance(final["a"].error, EngineClosed)
    assert final["c"].error is None
    stats = engine.stats()
    assert (stats.requests_failed, stats.requests_finished, stats.blocks_used) == (2, 1, 0)


def test_an_answer_to_another_question_is_a_failure() -> None:
    class Deaf:
        def submit(self, step: Step) -> StepResult:
            return StepResult(step.id, ())

        def close(self) -> None: ...

    scheduler, _ = Setup().build()
    engine = Engine(scheduler, Deaf())
    engine.add(request("a", [1, 2], n=2, max_tokens=4))
    events = engine.step()
    assert [(e.index, e.finish_reason) for e in events] == [(0, "error"), (1, "error")]
    assert "does not answer" in str(events[0].error)
    assert not engine.has_work


def test_a_stop_string_found_above_ends_one_choice() -> None:
    engine = build()
    engine.add(request("a", [1, 2], n=2, max_tokens=6, ignore_eos=True))
    engine.step()
    (event,) = engine.finish("a", 1, "\n\n")
    assert (event.index, event.tokens, event.finish_reason, event.stop_reason) == (1, (), "stop", "\n\n")
    assert engine.finish("a", 1, "\n\n") == []
    assert {(e.index, e.finish_reason) for e in drain(engine) if e.finish_reason} == {(0, "length")}
    assert engine.stats().requests_finished == 1


def test_a_refused_request_leaves_no_trace() -> None:
    engine = build()
    with pytest.raises(ContextLengthExceeded):
        engine.add(request("a", [1] * 99))
    assert not engine.has_work
    assert engine.abort("a") == []


def test_stats_count() -> None:
    engine = build()
    engine.add(request("a", [1] * 9, max_tokens=3, ignore_eos=True))
    engine.add(request("b", [2] * 9, max_tokens=30, ignore_eos=True))
    engine.step()
    running = engine.stats()
    assert (running.running, running.waiting, running.steps, running.blocks_total) == (2, 0, 1, 24)
    assert running.blocks_used == 5, "a has 9 tokens computed, b the 7 that were left of the budget"
    engine.step()
    engine.step()
    engine.abort("b")
    engine.add(request("c", [1] * 9, max_tokens=1))
    drain(engine)
    stats = engine.stats()
    assert (stats.requests_finished, stats.requests_cancelled, stats.requests_failed) == (2, 1, 0)
    assert (stats.prompt_tokens, stats.cached_tokens) == (27, 8)
    assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)
    assert stats.generated_tokens == 3 + 2 + 1
    assert stats.blocks_cached > 0


@pytest.mark.parametrize("name", ["beams", "blocks", "sequence", "scheduler", "waiting", "engine", "step"])
def test_bookkeeping_knows_no_arrays(name: str) -> None:
    tree = ast.parse((Path(tramontane.engine.__file__).parent / f"{name}.py").read_text("utf-8"))
    modules = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    modules |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not {m.split(".")[0] for m in modules} & {"numpy", "torch", "ml_dtypes", "array"}
    assert not {m for m in modules if m.startswith(("tramontane.kernels", "tramontane.layers", "tramontane.weights"))}
