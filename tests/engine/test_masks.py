"""Answers held to grammars by a real engine: in any batch, forked, preempted, with all else that ends an answer."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine.checkpoints import EOS, VOCAB, Rig, load, prompt, request, rig
from tests.schemas import SCHEMAS
from tramontane.config import CacheConfig, EngineConfig, SchedulerConfig
from tramontane.engine.masks import Mask, Masks
from tramontane.engine.sampler import Sampler
from tramontane.engine.step import Draw
from tramontane.errors import InvalidRequest
from tramontane.kernels.reference import ReferenceOps
from tramontane.kernels.workspace import Workspace
from tramontane.loading.build import LoadedModel
from tramontane.text.grammar import Grammars
from tramontane.text.tokenizer import Tokenizer
from tramontane.types import SAMPLING_DEFAULTS, Grammar, SamplingParams

pytest.importorskip("llguidance", reason="the extra 'grammar' is not installed")

WORDS = Grammar("regex", "[a-c]{2,9}( [a-c]{2,9}){0,3}")
THREE = Grammar("choice", ("abc", "abd", "xyz"))
ORDER = Grammar("json_schema", SCHEMAS["an order"])
CUSTOMER = Grammar("json_schema", SCHEMAS["a customer"])
TREE = Grammar("json_schema", SCHEMAS["a tree"])


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> LoadedModel:
    return load(checkpoint, ReferenceOps(deterministic=True))


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_file(checkpoint / "tokenizer.json")


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, VOCAB)


def engine(loaded: LoadedModel, grammars: Grammars | None, blocks: int = 300, seqs: int = 16, tokens: int = 160) -> Rig:
    config = EngineConfig(CacheConfig(block_size=4), SchedulerConfig(seqs, tokens))
    return rig(loaded, config, blocks, grammars=grammars)


def text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids)


def mixed() -> list[Any]:
    """Requests of every sort, grammars and none, greedy and not, choices and not."""
    sorts: list[dict[str, Any]] = [
        {"grammar": WORDS},
        {},
        {"grammar": ORDER, "n": 3},
        {"grammar": TREE, "temperature": 0.0},
        {"n": 2},
        {"grammar": THREE, "n": 4, "logprobs": 2},
        {"grammar": WORDS, "repetition_penalty": 1.3, "min_tokens": 6},
        {"grammar": ORDER, "top_k": 3, "logit_bias": {ord("b") - 33: -2.0}},
    ]
    return [request(str(i), prompt(5 + 7 * i), i, max_tokens=40, **sort) for i, sort in enumerate(sorts)]


def answers(ran: Rig) -> dict[tuple[str, int], tuple[list[int], str | None]]:
    return {key: (ran.ids(*key), end.finish_reason) for key, end in ran.ends.items()}


@pytest.fixture(scope="module")
def alone(loaded: LoadedModel, grammars: Grammars) -> dict[tuple[str, int], tuple[list[int], str | None]]:
    found = {}
    for one in mixed():
        found |= answers(engine(loaded, grammars).run([one]))
    return found


@pytest.mark.parametrize(("blocks", "tokens"), [(300, 160), (45, 160), (300, 17)])
def test_a_batch_equals_each_alone(
    loaded: LoadedModel, grammars: Grammars, alone: dict[Any, Any], blocks: int, tokens: int
) -> None:
    """With room for all, with so little that sequences are preempted, and with prompts in pieces."""
    together = engine(loaded, grammars, blocks, tokens=tokens).run(mixed())
    assert answers(together) == alone
    assert (together.engine.scheduler.counters.preemptions > 0) == (blocks == 45)
    ended = {key[0] for key, (_, reason) in alone.items() if reason == "stop"}
    assert {"0", "5"} <= ended


def test_every_answer_that_ends_matches(loaded: LoadedModel, grammars: Grammars, tokenizer: Tokenizer) -> None:
    validate = pytest.importorskip("jsonschema", reason="jsonschema judges").validate
    dense = {tokenizer.encode(space)[0]: -30.0 for space in " \t\r\n"}
    requests = [
        request(f"{i}", prompt(9, i), i, grammar=CUSTOMER, n=2, max_tokens=100, logit_bias=dense) for i in range(5)
    ]
    ran = engine(loaded, grammars).run(requests)
    ended = [key for key, end in ran.ends.items() if end.finish_reason == "stop"]
    assert len(ended) > 3
    for key in ended:
        ids = ran.ids(*key)
        validate(json.loads(text(tokenizer, ids)), SCHEMAS["a customer"])
        assert ids[-1] != EOS, "the closing brace is the end: no token is spent on saying so"
    assert {end.finish_reason for end in ran.ends.values()} <= {"stop", "length"}


def test_choices_fork_and_each_goes_its_own_way(loaded: LoadedModel, grammars: Grammars, tokenizer: Tokenizer) -> None:
    ran = engine(loaded, grammars).run([request("x", prompt(6), grammar=THREE, n=12)])
    found = {text(tokenizer, ran.ids("x", index)) for index in range(12)}
    assert found <= {*THREE.value}
    assert len(found) > 1
    assert {end.finish_reason for end in ran.ends.values()} == {"stop"}


def test_the_first_choice_may_end_before_the_others(
    loaded: LoadedModel, grammars: Grammars, tokenizer: Tokenizer
) -> None:
    """Then another takes its sequence over, and must not take its place in the grammar."""
    grammar = Grammar("lark", 'start: "a" | "b" /[0-9]/ "x"')
    ended_first = False
    for seed in range(20):
        one = request("x", prompt(6), seed, grammar=grammar, n=6, temperature=99.0)
        ran = engine(loaded, grammars).run([one])
        found = [text(tokenizer, ran.ids("x", index)) for index in range(6)]
        assert all(re.fullmatch("a|b[0-9]x", answer) for answer in found)
        ended_first = ended_first or (found[0] == "a" and {*found} != {"a"})
    assert ended_first


def test_ends_are_drawn_just_where_the_grammar_may_end(
    loaded: LoadedModel, grammars: Grammars, tokenizer: Tokenizer
) -> None:
    wants = {EOS: 50.0}
    for params, expected in (
        ({}, "ab"),  # the first moment that allows it
        ({"ignore_eos": True}, r"ab[a-c]{8}"),
        ({"min_tokens": 5}, r"ab[a-c]{3}"),
        ({"max_tokens": 1}, "a"),
    ):
        grammar = Grammar("regex", "ab[a-c]{0,8}")
        ran = engine(loaded, grammars).run([request("x", prompt(6), grammar=grammar, logit_bias=wants, **params)])
        (end,) = ran.ends.values()
        ids = ran.ids("x")
        assert re.fullmatch(expected, text(tokenizer, [id_ for id_ in ids if id_ != EOS]))
        assert end.finish_reason == ("length" if "max_tokens" in params else "stop")
        assert (ids[-1] == EOS) == (params in ({}, {"min_tokens": 5}))


def test_min_tokens_yield_where_nothing_can_follow(
    loaded: LoadedModel, grammars: Grammars, tokenizer: Tokenizer
) -> None:
    ran = engine(loaded, grammars).run([request("x", prompt(6), grammar=THREE, min_tokens=50, max_tokens=60)])
    assert text(tokenizer, ran.ids("x")) in THREE.value
    assert ran.ends[("x", 0)].finish_reason == "stop"


def test_an_answer_of_nothing_ends_at_once(loaded: LoadedModel, grammars: Grammars) -> None:
    empty = Grammar("choice", ("",))
    ran = engine(loaded, grammars).run([request("x", prompt(6), grammar=empty, min_tokens=4)])
    assert (ran.ids("x"), ran.ends[("x", 0)].finish_reason) == ([EOS], "stop")


def test_a_stop_token_is_allowed_where_the_grammar_may_end(
    loaded: LoadedModel, grammars: Grammars, tokenizer: Tokenizer
) -> None:
    (a,) = tokenizer.encode("a")
    (b,) = tokenizer.encode("b")
    grammar = Grammar("regex", "[ab]{3,5}")
    one = request("x", prompt(6), grammar=grammar, stop_token_ids=(b,), ignore_eos=True, logit_bias={b: 50.0})
    ran = engine(loaded, grammars).run([one])
    assert ran.ids("x") == [a, a, a, b]
    assert (ran.ends[("x", 0)].finish_reason, ran.ends[("x", 0)].stop_reason) == ("stop", b)


def test_what_cannot_go_on_ends_with_an_error_and_others_go_on(loaded: LoadedModel, grammars: Grammars) -> None:
    """Every token that the grammar allows is forbidden by another parameter."""
    everything = {id_: -np.inf for id_ in range(VOCAB) if id_ != EOS}
    requests = [
        request("bad", prompt(6), grammar=THREE, logit_bias=everything),
        request("good", prompt(6), grammar=THREE),
        request("free", prompt(6), max_tokens=7, ignore_eos=True),
    ]
    ran = engine(loaded, grammars).run_to_errors(requests)
    bad = ran.ends[("bad", 0)]
    assert bad.finish_reason == "error"
    assert isinstance(bad.error, InvalidRequest)
    assert bad.error.field == "grammar"
    assert ran.ends[("good", 0)].finish_reason == "stop"
    assert ran.ends[("free", 0)].finish_reason == "length"


def test_a_processor_sees_what_is_allowed_and_cannot_allow_more(
    loaded: LoadedModel, grammars: Grammars, tokenizer: Tokenizer
) -> None:
    seen = []

    def processor(prompt_ids: Sequence[int], output_ids: Sequence[int], logits: Any) -> Any:
        seen.append(int(np.isfinite(logits).sum()))
        return np.where(np.isneginf(logits), 99.0, logits)

    ran = engine(loaded, grammars).run([request("x", prompt(6), grammar=THREE, logits_processors=(processor,))])
    assert text(tokenizer, ran.ids("x")) in THREE.value
    assert seen[0] == 2

    def nothing(prompt_ids: Sequence[int], output_ids: Sequence[int], logits: Any) -> Any:
        return np.where(np.isneginf(logits), 0.0, -np.inf)

    failed = engine(loaded, grammars).run_to_errors(
        [request("x", prompt(6), grammar=THREE, logits_processors=(nothing,))]
    )
    error = failed.ends[("x", 0)].error
    assert isinstance(error, InvalidRequest)
    assert error.field == "logits_processors"


def test_without_grammars_a_draw_that_has_one_fails(loaded: LoadedModel) -> None:
    ran = engine(loaded, None).run_to_errors([request("x", prompt(6), grammar=THREE)])
    assert "without grammars" in str(ran.ends[("x", 0)].error)


# ---- the parts alone


def draw(output: Sequence[int] = (), grammar: Grammar = THREE, ends: tuple[int, ...] = (EOS,)) -> Draw:
    return Draw(SamplingParams(grammar=grammar).over(SAMPLING_DEFAULTS), 1, (1,), output, ends=ends)


def bits(mask: Mask) -> list[int]:
    return np.flatnonzero(np.unpackbits(mask.words.view(np.uint8), bitorder="little")).tolist()


def test_states_that_are_not_at_hand_are_made_anew(grammars: Grammars, tokenizer: Tokenizer) -> None:
    a, b, c, d, x, y = (tokenizer.encode(letter)[0] for letter in "abcdxy")
    masks = Masks(grammars, max_states=2)
    masks.start([draw()], ["one"])
    assert bits(masks.of(["one"])[0]) == sorted([a, x])
    assert not masks.advance("one", a)
    masks.start([draw([a])], ["one"])
    assert bits(masks.of(["one"])[0]) == [b]
    for key, output, allowed in (
        ("one", [x], [y]),  # the key is another sequence's by now
        ("two", [a, b], [c, d]),
        ("three", [], [a, x]),
        ("one", [x], [y]),  # evicted
        ("one", [], [a, x]),  # goes back
    ):
        masks.start([draw(output)], [key])
        assert bits(masks.of([key])[0]) == sorted(allowed)
    assert len(masks._states) == 2


def test_a_rejected_token_shows_in_the_next_mask(grammars: Grammars, tokenizer: Tokenizer) -> None:
    a, z = (tokenizer.encode(letter)[0] for letter in "az")
    masks = Masks(grammars, 4)
    masks.start([draw(), draw()], ["bad", "good"])
    assert len(masks.of(["bad", "good"])) == 2
    assert not masks.advance("bad", z)
    assert not masks.advance("good", a)
    masks.start([draw([z]), draw([a])], ["bad", "good"])
    found = masks.of(["good", "bad"])
    assert found[0].error is None
    assert isinstance(found[1].error, InvalidRequest)


def test_ends_are_set_and_cleared(grammars: Grammars, tokenizer: Tokenizer) -> None:
    a, b = (tokenizer.encode(letter)[0] for letter in "ab")
    masks, grammar, ends = Masks(grammars, 4), Grammar("regex", "aab?"), (a, EOS, 10**9)
    masks.start([draw([a, a], grammar, ends)], [0])
    assert bits(masks.of([0])[0]) == sorted([a, b, EOS])
    masks.start([draw([a, a], Grammar("choice", ("aa",)), ends)], [1])
    (mask,) = masks.of([1]).values()
    assert (bits(mask), mask.closing) == (sorted([a, EOS]), True)
    masks.start([draw([a], grammar, ends)], [0])
    assert "no token" in str(masks.of([0])[0].error), "the only token that may come would end the answer"


def test_a_failed_step_leaves_nothing_behind(grammars: Grammars, tokenizer: Tokenizer) -> None:
    masks = Masks(grammars, 4)
    masks.start([draw()], [1])  # and its model fails
    masks.start([draw(grammar=WORDS)], [2])
    assert [*masks.of([1, 2])] == [1]
    masks.start([], [])
    assert masks.of([1, 2]) == {}


def test_rows_without_a_grammar_are_as_they_were(grammars: Grammars) -> None:
    ops = ReferenceOps()
    logits = np.random.default_rng(0).normal(0, 3, (3, VOCAB)).astype(np.float32)
    plain = Draw(SamplingParams(logprobs=2).over(SAMPLING_DEFAULTS), 5, (1,), ())
    held = draw()

    def sampled(draws: Sequence[Draw]) -> list[Any]:
        sampler = Sampler(ops, Workspace(ops, 64), 8, grammars)
        sampler.begin(draws, range(len(draws)))
        return sampler.sample(logits[: len(draws)].copy(), draws, range(len(draws)))

    assert sampled([plain, held, plain])[::2] == sampled([plain, plain, plain])[::2]


def test_reported_probabilities_are_those_before_the_mask(loaded: LoadedModel, grammars: Grammars) -> None:
    held = engine(loaded, grammars).run([request("x", prompt(6), grammar=THREE, logprobs=VOCAB)])
    free = engine(loaded, grammars).run([request("x", prompt(6), logprobs=VOCAB, max_tokens=1)])
    assert held.tokens[("x", 0)][0].top == free.tokens[("x", 0)][0].top
