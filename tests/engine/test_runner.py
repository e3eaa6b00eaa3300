"""The runner under a real engine: what is reported, what crosses the executor, what memory it takes, how it fails."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine.checkpoints import EOS, VOCAB, Rig, load, prompt, request, rig
from tests.kernels.modules import make
from tramontane.config import CacheConfig, EngineConfig, SchedulerConfig
from tramontane.engine import runner
from tramontane.engine.executor import LocalExecutor
from tramontane.engine.sampler import uniform
from tramontane.engine.sequence import choice_seed
from tramontane.engine.step import Step, StepResult
from tramontane.kernels.reference import ReferenceOps
from tramontane.loading.build import LoadedModel
from tramontane.loading.memory import workspace_bytes


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> LoadedModel:
    return load(checkpoint, ReferenceOps(deterministic=True))


def config(tokens: int = 160, seqs: int = 16, **cache: Any) -> EngineConfig:
    return EngineConfig(CacheConfig(block_size=4, **cache), SchedulerConfig(seqs, tokens))


def logprobs(loaded: LoadedModel, ids: tuple[int, ...]) -> Any:
    """float64 [len(ids), V]: of the whole text at once, every row's alternatives asked for."""
    whole = rig(loaded, config(), 300).run([request("x", ids, max_tokens=1, prompt_logprobs=VOCAB, logprobs=VOCAB)])
    rows = [info for info in (*whole.prompt_logprobs["x"], *whole.tokens[("x", 0)]) if info is not None]
    found = np.zeros((len(rows), VOCAB))
    for row, info in enumerate(rows):
        found[row, [id_ for id_, _ in info.top]] = [p for _, p in info.top]
    return found


@pytest.mark.parametrize("tokens", [160, 70, 9])
def test_prompt_logprobs_whatever_the_chunks(loaded: LoadedModel, tokens: int) -> None:
    """More rows than are computed at once, in chunks of any size, also where the prefix is in the cache."""
    ids = prompt(150)
    ours = rig(loaded, config(tokens, seqs=9), 300)
    ours.run([request("a", ids, max_tokens=1), request("b", ids, max_tokens=3, prompt_logprobs=2, temperature=0.0)])
    found = ours.prompt_logprobs["b"]
    expected = logprobs(loaded, ids)
    assert np.exp(expected).sum(1) == pytest.approx(np.ones(150), abs=1e-4)
    assert found[0] is None
    assert len(found) == len(ids)
    for row, (info, target) in enumerate(zip(found[1:], ids[1:], strict=True)):
        assert info is not None
        assert info.token_id == target
        assert info.logprob == pytest.approx(expected[row, target], abs=1e-5)
        assert info.rank == 1 + (expected[row] > expected[row, target]).sum()
        assert [id_ for id_, _ in info.top] == np.argsort(-expected[row], kind="stable")[:2].tolist()
    assert ours.tokens[("b", 0)][0].logprob is None


def test_the_distribution_that_is_drawn_from(loaded: LoadedModel) -> None:
    """Temperature, top-k, top-p and min-p over the model's own logits, by the plain formula."""
    ids = prompt(20)
    p = np.exp(logprobs(loaded, ids)[-1].astype(np.float64) / 0.7)
    p /= p.sum()
    order = np.argsort(-p, kind="stable")[:30]
    q = p[order] / p[order].sum()
    q = q[: 1 + np.searchsorted(np.cumsum(q), 0.8)]
    q = q[q >= 0.05 * q[0]]
    running = np.cumsum(q / q.sum())
    seeds = range(60)
    drawn = rig(loaded, config(seqs=60), 400).run(
        request(f"{seed}", ids, seed, max_tokens=1, temperature=0.7, top_k=30, top_p=0.8, min_p=0.05) for seed in seeds
    )
    for seed in seeds:
        assert drawn.ids(f"{seed}") == [order[np.searchsorted(running, uniform(seed, 0), side="right")]]


def test_choices_are_the_requests_of_their_seeds(loaded: LoadedModel) -> None:
    params: dict[str, Any] = {"max_tokens": 12, "temperature": 1.0, "repetition_penalty": 1.3, "logprobs": 1}
    ids = prompt(21)
    forked = rig(loaded, config(), 300).run([request("n", ids, 77, n=4, **params)])
    alone = rig(loaded, config(), 300)
    for index in range(4):
        alone.run([request(f"{index}", ids, choice_seed(77, index), **params)])  # one by one: no history is another's
    for index in range(4):
        assert forked.tokens[("n", index)] == alone.tokens[(f"{index}", 0)]
    assert len({tuple(forked.ids("n", index)) for index in range(4)}) == 4


def test_ends_and_bans(loaded: LoadedModel) -> None:
    """min_tokens holds off the ends, ignore_eos lets them pass, a stop token ends with its own id."""
    ids = prompt(11)
    plain = rig(loaded, config(), 300).run([request("a", ids, 3, max_tokens=40, ignore_eos=True)]).ids("a")
    third = plain[2]
    first = plain.index(third)
    ours = rig(loaded, config(), 300).run(
        [
            request("stop", ids, 3, max_tokens=40, stop_token_ids=[third]),
            request("late", ids, 3, max_tokens=40, stop_token_ids=[third], min_tokens=30),
            request("bias", ids, 3, max_tokens=5, logit_bias={EOS: 1e4}),
            request("ignored", ids, 3, max_tokens=5, logit_bias={EOS: 1e4}, ignore_eos=True),
        ]
    )
    assert ours.ids("stop") == plain[: first + 1]
    assert (ours.ends[("stop", 0)].finish_reason, ours.ends[("stop", 0)].stop_reason) == ("stop", third)
    assert third not in ours.ids("late")[:30]
    assert ours.ids("bias") == [EOS]
    assert (ours.ends[("bias", 0)].finish_reason, ours.ends[("bias", 0)].stop_reason) == ("stop", None)
    assert ours.ids("ignored") == [EOS] * 5


class Pickling(LocalExecutor):
    """All that crosses is pickled, as to another process."""

    def submit(self, step: Step) -> StepResult:
        result: StepResult = pickle.loads(pickle.dumps(super().submit(pickle.loads(pickle.dumps(step)))))
        return result


def test_steps_cross_a_process_border(loaded: LoadedModel) -> None:
    everyone = [
        request(f"{number}", prompt(5 + number), number, max_tokens=9, n=2, frequency_penalty=0.5, prompt_logprobs=1)
        for number in range(6)
    ]
    here = rig(loaded, config(), 200).run(everyone)
    there = rig(loaded, config(), 200, Pickling).run(everyone)
    assert there.tokens == here.tokens
    assert there.prompt_logprobs == here.prompt_logprobs


def test_memory_stays_within_what_is_configured(loaded: LoadedModel) -> None:
    """Whatever is asked: the cache is what it was, buffers are what was estimated, and what the sampler adds."""
    tokens = 64
    ours = rig(loaded, config(tokens, seqs=16), 120)
    everything: dict[str, Any] = {"logprobs": 5, "prompt_logprobs": 5, "repetition_penalty": 1.1}
    requests = [
        request(f"{number}", prompt(40 + number), number, max_tokens=20, n=1 + number % 3, **everything)
        for number in range(20)
    ]
    ours.run(requests[:10])
    first = ours.runner.workspace_bytes
    ours.run(requests[10:])
    assert ours.runner.workspace_bytes == first
    per_row = 64 * 4
    assert first <= workspace_bytes(loaded.spec, tokens) + per_row * (VOCAB + 1)
    assert ours.cache_bytes == 120 * 4 * 2 * 2 * 8 * 4  # blocks, tokens, keys and values, heads, head size, float32


@pytest.mark.parametrize("paged", [True, False])
def test_cancelling_at_any_moment_frees_everything(loaded: LoadedModel, paged: bool) -> None:
    chooser = random.Random(5)
    blocks = 150 if paged else 4 * 40 * 4
    ours = rig(loaded, config(48, seqs=8, paged_attention=paged), blocks)
    left = [
        request(f"{number}", prompt(1 + number % 30), number, max_tokens=12, n=1 + number % 3) for number in range(40)
    ]
    names = [one.id for one in left]
    while left or ours.engine.has_work:
        for _ in range(chooser.randrange(3)):
            if left:
                ours.engine.add(left.pop())
        if chooser.random() < 0.3:
            index = chooser.choice([None, 0, 1, 2])
            ours.take(ours.engine.abort(chooser.choice(names), index))
        if ours.engine.has_work:
            ours.take(ours.engine.step())
        ours.engine.scheduler.check()
    assert ours.engine.scheduler.pool.used == 0
    reasons = {event.finish_reason for event in ours.ends.values()}
    assert {"cancelled", "length"} <= reasons <= {"cancelled", "length", "stop"}


def test_custom_processors_through_the_engine(loaded: LoadedModel) -> None:
    """A processor sees its own request's history, step after step."""
    seen: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def count_up(prompt_ids: Any, output_ids: Any, logits: Any) -> Any:
        seen.append((tuple(prompt_ids), tuple(output_ids)))
        forced = np.full_like(logits, -np.inf)
        forced[len(output_ids)] = 1.0
        return forced

    ids = prompt(7)
    ours = rig(loaded, config(), 100).run(
        [request("a", ids, logits_processors=(count_up,), max_tokens=4), request("b", prompt(9), max_tokens=4)]
    )
    assert ours.ids("a") == [0, 1, 2, 3]
    assert seen == [(ids, tuple(range(length))) for length in range(4)]


class Failing(LocalExecutor):
    failures = 0

    def submit(self, step: Step) -> StepResult:
        if step.id == 3:
            raise MemoryError("the third step")
        return super().submit(step)


def test_a_failing_step_ends_its_sequences_and_no_others(loaded: LoadedModel) -> None:
    ours: Rig = rig(loaded, config(32, seqs=2), 100, Failing)
    for name in "abc":
        ours.engine.add(request(name, prompt(5), max_tokens=6, ignore_eos=True))
    events = [event for _ in range(3) for event in ours.engine.step()]
    assert {e.request_id for e in events if isinstance(e.error, MemoryError)} == {"a", "b"}
    while ours.engine.has_work:
        events += ours.engine.step()
        ours.engine.scheduler.check()
    assert [e.request_id for e in events if e.finish_reason == "length"] == ["c"]
    assert ours.engine.scheduler.pool.used == 0


def test_replayed_steps_say_the_same(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences that come and go, so that shapes come again with other sequences in them."""
    everyone = [request(f"{n}", prompt(3 + n % 5, n), seed=n, max_tokens=4 + n % 9, logprobs=1) for n in range(12)]
    found = []
    for rows in (0, runner.REPLAYED_ROWS):
        monkeypatch.setattr(runner, "REPLAYED_ROWS", rows)
        found.append(rig(load(checkpoint, make("cpu", 2)), config(seqs=5), 300).run(everyone).tokens)
    assert found[0] == found[1]
