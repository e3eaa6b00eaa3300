"""Processors against transformers' own and plain formulas; the draw's random numbers; what is reported."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tramontane.engine.sampler import Sampler, top_alternatives, uniform
from tramontane.engine.step import Draw, TokenInfo
from tramontane.errors import InvalidRequest
from tramontane.kernels.reference import ReferenceOps
from tramontane.kernels.workspace import Workspace
from tramontane.types import SAMPLING_DEFAULTS, SamplingParams

VOCAB = 97


class Recording(ReferenceOps):
    """Keeps the logits that the draw saw."""

    seen: np.ndarray[Any, Any]

    def sample(self, tokens: Any, logits: Any, *columns: Any) -> None:
        self.seen = logits.copy()
        super().sample(tokens, logits, *columns)


def sampler(ops: ReferenceOps | None = None, max_histories: int = 8) -> Sampler:
    ops = ops or ReferenceOps()
    return Sampler(ops, Workspace(ops, 64), max_histories)


def row(seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(0, 3, (1, VOCAB)).astype(np.float32)


def draw(
    prompt: tuple[int, ...] = (), output: tuple[int, ...] = (), banned: tuple[int, ...] = (), **params: Any
) -> Draw:
    return Draw(SamplingParams(**params).over(SAMPLING_DEFAULTS), 5, prompt, output, banned)


def edited(logits: np.ndarray[Any, Any], *draws: Draw) -> np.ndarray[Any, Any]:
    ops = Recording()
    sampler(ops).sample(logits.copy(), draws, list(range(len(draws))))
    return ops.seen


def test_penalties_equal_the_formulas_and_transformers() -> None:
    torch = pytest.importorskip("torch", reason="torch is the reference for logits processors")
    processors = pytest.importorskip("transformers.generation.logits_process", reason="transformers is the reference")
    logits = row()
    prompt, output = (1, 2, 3, 3, 90), (3, 4, 4, 4, 7, 7)
    seen = edited(
        logits,
        draw(
            prompt,
            output,
            banned=(9, 4),
            repetition_penalty=1.7,
            frequency_penalty=0.3,
            presence_penalty=-0.4,
            logit_bias={4: 2.0, 50: -1.5, 60: -np.inf},
        ),
    )
    reference = processors.RepetitionPenaltyLogitsProcessor(1.7)(
        torch.tensor([list(prompt + output)]), torch.from_numpy(logits.copy())
    )
    bias = processors.SequenceBiasLogitsProcessor([[[50], -1.5], [[60], float("-inf")], [[4], 2.0]])
    reference = bias(torch.tensor([list(prompt + output)]), reference)
    reference = processors.SuppressTokensLogitsProcessor([9, 4])(None, reference).numpy()
    for id_ in set(output):
        reference[0, id_] -= 0.3 * output.count(id_) - 0.4
    np.testing.assert_allclose(seen, reference, rtol=1e-6, atol=1e-6)
    assert np.isneginf(seen[0, [4, 9, 60]]).all()


def test_counts_grow_with_the_output_and_survive_eviction() -> None:
    """One sampler fed token by token equals a fresh one at every length, also when histories are thrown out."""
    rng = np.random.default_rng(1)
    prompt = tuple(rng.integers(0, VOCAB, 20).tolist())
    output: list[int] = []
    ops = Recording()
    kept = sampler(ops, max_histories=1)
    for step in range(150):
        now = draw(prompt, tuple(output), repetition_penalty=1.3, frequency_penalty=0.1, presence_penalty=0.2)
        logits = row(step)
        kept.sample(logits.copy(), [now], ["a"])
        np.testing.assert_array_equal(ops.seen, edited(logits, now))
        if step % 20 == 0:
            kept.sample(logits.copy(), [now], ["another"])
        output.append(int(rng.integers(0, VOCAB)))


def test_rows_without_edits_are_not_touched() -> None:
    logits = np.concatenate([row(1), row(2), row(3)])
    seen = edited(logits, draw((1,), (2,)), draw((1,), (2,), presence_penalty=1.0), draw((1,), (2,)))
    expected = logits.copy()
    expected[1, 2] -= 1.0
    np.testing.assert_array_equal(seen, expected)


def test_custom_processors_see_the_edited_row_and_decide() -> None:
    given: list[Any] = []

    def only_eleven(prompt: Any, output: Any, logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        given.append((tuple(prompt), tuple(output), logits.copy()))
        logits[:] = -np.inf
        logits[11] = 0.0
        return logits

    def shift(prompt: Any, output: Any, logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.roll(logits, 1)

    logits = np.concatenate([row(1), row(2)])
    plain = draw(temperature=0.0)
    chosen = draw((1,), (2,), logit_bias={3: 4.0}, logits_processors=(only_eleven, shift), logprobs=2)
    results = sampler().sample(logits.copy(), [plain, chosen], [0, 1])
    assert [info.token_id for info in results] == [int(logits[0].argmax()), 12]
    expected = logits[1].copy()
    expected[3] += 4.0
    assert given[0][:2] == ((1,), (2,))
    np.testing.assert_array_equal(given[0][2], expected)
    raw = logits[1].astype(np.float64)
    logprobs = raw - np.log(np.exp(raw).sum())  # of the row as the model gave it
    assert results[1].logprob == pytest.approx(logprobs[12], abs=1e-5)
    assert results[1].rank == 1 + (logprobs > logprobs[12]).sum()
    order = np.argsort(-logprobs)[:2]
    assert [id_ for id_, _ in results[1].top] == order.tolist()
    assert [p for _, p in results[1].top] == pytest.approx(logprobs[order], abs=1e-5)
    assert results[0] == TokenInfo(results[0].token_id)


@pytest.mark.parametrize(
    "result",
    [
        np.zeros(3),
        "words",
        None,
        *(np.full(VOCAB, value) for value in (np.nan, np.inf, -np.inf)),
        np.zeros(VOCAB, bool),
    ],
)
def test_a_processor_that_breaks_its_contract_is_named(result: Any) -> None:
    with pytest.raises(InvalidRequest, match="logits_processors"):
        sampler().sample(row(), [draw(logits_processors=(lambda prompt, output, logits: result,))], [0])


def test_uniform_depends_on_seed_and_position_alone_and_is_uniform() -> None:
    assert uniform(3, 4) == uniform(3, 4)
    assert len({uniform(seed, position) for seed in range(-20, 20) for position in range(20)}) == 800
    assert uniform(-1, 0) == uniform(2**64 - 1, 0)
    numbers = np.array([uniform(seed, position) for seed in range(100) for position in range(100)])
    assert numbers.min() >= 0.0
    assert np.float32(numbers.max()) < 1.0
    counts = np.histogram(numbers, 20, (0, 1))[0]
    assert ((counts - 500) ** 2 / 500).sum() < 43.8  # chi-square, 19 degrees of freedom, p = 0.001
    # Neighbouring seeds must not be shifted copies of one sequence.
    first, second = ([uniform(seed, position) for position in range(50)] for seed in (0, 0x9E3779B97F4A7C15))
    assert not set(first) & set(second)


def test_draws_follow_the_distribution() -> None:
    logits = np.log(np.array([[0.5, 0.25, 0.15, 0.1]], np.float32))
    counts = np.zeros(4)
    ours = sampler()
    for seed in range(80):
        draws = [Draw(SAMPLING_DEFAULTS, seed, (), (0,) * at) for at in range(50)]
        for info in ours.sample(np.repeat(logits, 50, 0), draws, list(range(50))):
            counts[info.token_id] += 1
    expected = 4000 * np.exp(logits[0])
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # chi-square, 3 degrees of freedom, p = 0.001


def test_only_allowed_tokens_are_drawn() -> None:
    allowed = (3, 31, 32, 96)
    logits = np.concatenate([row(seed) for seed in range(3)])
    draws = [draw(allowed_token_ids=allowed), draw(), draw(allowed_token_ids=(7,), logit_bias={7: -50.0})]
    seen = edited(logits, *draws)
    assert np.flatnonzero(np.isfinite(seen[0])).tolist() == list(allowed)
    np.testing.assert_array_equal(seen[0, list(allowed)], logits[0, list(allowed)])
    np.testing.assert_array_equal(seen[1], logits[1])
    assert sampler().sample(logits, draws, [0, 1, 2])[2].token_id == 7


def test_top_choices_are_excluded_as_often_as_asked() -> None:
    """Half of the draws follow the whole distribution, half what is left of it: 0.15 is the least of 0.15 or more."""
    logits = np.log(np.array([[0.5, 0.25, 0.15, 0.1]], np.float32))
    params = SamplingParams(xtc_probability=0.5, xtc_threshold=0.12).over(SAMPLING_DEFAULTS)
    counts = np.zeros(4)
    ours = sampler()
    for seed in range(80):
        draws = [Draw(params, seed, (), (0,) * at) for at in range(50)]
        infos = ours.sample(np.repeat(logits, 50, 0), draws, list(range(50)))
        assert infos == ours.sample(np.repeat(logits, 50, 0), draws, list(range(50))), "a seed repeats"
        for at in (0, 17):
            alone = ours.sample(logits.copy(), [draws[at]], [at])
            assert alone == [infos[at]], "and does so alone"
        for info in infos:
            counts[info.token_id] += 1
    expected = 4000 * (0.5 * np.array([0.5, 0.25, 0.15, 0.1]) + 0.5 * np.array([0, 0, 0.6, 0.4]))
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # chi-square, 3 degrees of freedom, p = 0.001


def test_the_cuts_of_a_row_are_its_own() -> None:
    logits = np.repeat(np.log(np.array([[0.6, 0.2, 0.1, 0.1]], np.float32)), 4, 0)
    ours = sampler()
    seen: list[set[int]] = [set() for _ in range(4)]
    params = [
        SamplingParams(),
        SamplingParams(typical_p=0.1),
        SamplingParams(xtc_probability=1.0, xtc_threshold=0.15),
        SamplingParams(typical_p=0.1, temperature=0.0),
    ]
    for seed in range(60):
        draws = [Draw(one.over(SAMPLING_DEFAULTS), seed, (), ()) for one in params]
        for info, tokens in zip(ours.sample(logits.copy(), draws, [0, 1, 2, 3]), seen, strict=True):
            tokens.add(info.token_id)
    # 1.09 nats are expected: 0.2 has 1.6, and 0.6 has 0.51
    assert seen == [{0, 1, 2, 3}, {1}, {1, 2, 3}, {0}]


def test_alternatives_rank_equal_ones_by_id() -> None:
    logprobs = np.array([-2.0, -1.0, -2.0, -1.0, -3.0], np.float32)
    assert [id_ for id_, _ in top_alternatives(logprobs, 3)] == [1, 3, 0]
    assert [id_ for id_, _ in top_alternatives(logprobs, 99)] == [1, 3, 0, 2, 4]
    assert top_alternatives(logprobs, 0) == ()
