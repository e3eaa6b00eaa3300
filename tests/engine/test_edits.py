"""Edits against the published description of DRY, written out, and transformers' bans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tramontane.engine.edits import LONGEST_MATCH, History, completions, edits_of, repetitions
from tramontane.engine.step import Draw
from tramontane.types import SAMPLING_DEFAULTS, SamplingParams

Words = Sequence[tuple[int, ...]]


def described(
    tokens: list[int], multiplier: float, base: float, allowed_length: int, breakers: Words
) -> dict[int, float]:
    """Token -> loss, as the author describes it: for each token, the longest sequence at the end of the text that has
    already occurred, with the token right after it; and no sequence goes over a breaker."""
    losses: dict[int, float] = {}
    for place in range(1, len(tokens)):
        token = tokens[place]
        if (token,) in breakers:
            continue
        n = 0
        for length in range(1, place + 1):
            passage = tokens[place - length : place]
            if passage != tokens[len(tokens) - length :]:
                break
            inside = [tokens[len(tokens) - length :][i : i + len(b)] for b in breakers for i in range(length)]
            if any(tuple(part) in breakers for part in inside) or any(
                # the passage begins inside a breaker: what is before its end is not looked at either
                tuple(tokens[end - len(b) : end]) == b
                for b in breakers
                for end in range(len(tokens) - length + 1, len(tokens) + 1)
            ):
                break
            n = length
        if n >= allowed_length:
            losses[token] = max(losses.get(token, 0.0), multiplier * base ** (n - allowed_length))
    return losses


SHORT = st.lists(st.integers(0, 3), min_size=1, max_size=40)


@given(
    tokens=SHORT,
    multiplier=st.sampled_from([0.5, 2.0]),
    base=st.sampled_from([1.0, 1.3, 1.75]),
    allowed_length=st.integers(1, 4),
    breakers=st.sampled_from([(), ((3,),), ((3,), (0,)), ((1, 2),), ((3,), (2, 2, 1))]),
)
def test_dry_is_what_its_author_describes(
    tokens: list[int], multiplier: float, base: float, allowed_length: int, breakers: Words
) -> None:
    ids, penalties, biases = repetitions(np.array(tokens, np.int32), multiplier, base, allowed_length, breakers)
    assert np.all(penalties == 1)
    found = dict(zip(ids.tolist(), (-biases).tolist(), strict=True))
    assert found == pytest.approx(described(tokens, multiplier, base, allowed_length, breakers))


def test_dry_by_hand() -> None:
    """ "a b c d ... a b c": d has followed a passage of 3."""
    tokens = np.array([1, 2, 3, 4, 9, 1, 2, 3], np.int32)
    ids, _, biases = repetitions(tokens, 0.8, 1.75, 2, ())
    assert ids.tolist() == [4]
    assert biases.tolist() == pytest.approx([-0.8 * 1.75])
    assert len(repetitions(tokens, 0.8, 1.75, 4, ())[0]) == 0
    assert len(repetitions(tokens, 0.8, 1.75, 2, ((2,),))[0]) == 0, "only c is left of the passage"
    assert len(repetitions(tokens, 0.8, 1.75, 2, ((4,),))[0]) == 0, "a breaker itself loses nothing"


@pytest.mark.parametrize(
    ("base", "loss"), [(1.0, 100.0), (1.0001, 100 * 1.0001 ** (LONGEST_MATCH - 2)), (1.75, 1e30), (100.0, 1e30)]
)
def test_dry_of_a_long_loop_stays_finite(base: float, loss: float) -> None:
    ids, _, biases = repetitions(np.zeros(5000, np.int32), 100.0, base, 2, ())
    assert ids.tolist() == [0]
    assert -biases[0] == pytest.approx(loss, rel=1e-3)


@given(SHORT, st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=6))
def test_bad_words_are_transformers(tokens: list[int], words: list[list[int]]) -> None:
    torch = pytest.importorskip("torch", reason="torch is the reference for logits processors")
    processors = pytest.importorskip("transformers.generation.logits_process", reason="transformers is the reference")
    theirs = processors.NoBadWordsLogitsProcessor(words)(torch.tensor([tokens]), torch.zeros(1, 4))
    banned = completions(np.array(tokens, np.int32), [tuple(word) for word in words])
    assert banned == set(np.flatnonzero(np.isneginf(theirs[0].numpy())).tolist())


def test_a_history_grows_with_the_output() -> None:
    rng = np.random.default_rng(0)
    prompt, output = tuple(rng.integers(0, 50, 30).tolist()), rng.integers(0, 50, 500).tolist()
    history = History(prompt)
    for length in (0, 3, 64, 65, 200, 500):
        history.update(output[:length])
        assert history.tokens.tolist() == [*prompt, *output[:length]]
        ids, _, biases = history.penalties(1.0, 1.0, 0.0)
        assert {int(i): -b for i, b in zip(ids, biases, strict=True)} == {
            i: output[:length].count(i) for i in set(output[:length])
        }


def draw(output: Sequence[int] = (), prompt: tuple[int, ...] = (), **params: Any) -> Draw:
    return Draw(SamplingParams(**params).over(SAMPLING_DEFAULTS), 5, prompt, output)


def test_edits_of_all_kinds_meet_on_one_token() -> None:
    history = History((1, 2, 3, 4, 9))
    history.update([1, 2, 3])
    both = draw(
        (1, 2, 3),
        (1, 2, 3, 4, 9),
        dry_multiplier=1.0,
        dry_base=2.0,
        dry_sequence_breakers=(),
        repetition_penalty=1.5,
        frequency_penalty=0.25,
        logit_bias={4: 10.0, 3: 1.0},
        bad_words=((2, 3, 9), (7, 1)),
    )
    edits = edits_of(both, history)
    assert edits is not None
    found = {int(i): (float(p), float(b)) for i, p, b in zip(*edits, strict=True)}
    assert found == {
        1: (1.5, -0.25),
        2: (1.5, -0.25),
        3: (1.5, 0.75),
        4: (1.5, 10.0 - 2.0),
        9: (1.5, -np.inf),
    }


def test_dry_looks_as_far_back_as_it_is_told() -> None:
    history = History((1, 2, 3, 9, 9, 1, 2))
    how: dict[str, Any] = {"dry_multiplier": 1.0, "dry_sequence_breakers": ()}
    assert edits_of(draw(prompt=(1, 2, 3, 9, 9, 1, 2), dry_range=7, **how), history) is not None
    assert edits_of(draw(prompt=(1, 2, 3, 9, 9, 1, 2), dry_range=6, **how), history) is None
