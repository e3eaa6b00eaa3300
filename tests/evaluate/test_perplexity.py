"""Perplexity: windows as documented, sums as by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tramontane import LLM
from tramontane.backends.mock import PROMPT_LOGPROB, MockBackend
from tramontane.errors import InvalidRequest
from tramontane.evaluate.perplexity import cut_windows, perplexity
from tramontane.types import Score


class Bigram:
    """A scorer whose log probabilities anyone can compute: -(token + previous) / 100."""

    def __init__(self, before: Sequence[int] = (1,), after: Sequence[int] = (), context: int = 8) -> None:
        self.before, self.after, self.context = list(before), list(after), context
        self.calls: list[list[list[int]]] = []

    def capabilities(self) -> Any:
        return SimpleNamespace(context_length=self.context)

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids = [ord(char) for char in text]
        return [*self.before, *ids, *self.after] if add_special_tokens else ids

    def score(self, texts: Sequence[Sequence[int]], /) -> list[Score]:
        self.calls.append([list(ids) for ids in texts])
        return [Score(tuple(ids), (None, *(-(a + b) / 100 for a, b in itertools.pairwise(ids)))) for ids in texts]


def test_windows_start_with_bos_and_do_not_overlap() -> None:
    scorer = Bigram(context=4)
    result = perplexity(scorer, "abcdefg")
    a = ord("a")
    assert scorer.calls == [[[1, a, a + 1, a + 2], [1, a + 3, a + 4, a + 5], [1, a + 6]]]
    nll = sum((x + y) / 100 for window in scorer.calls[0] for x, y in itertools.pairwise(window))
    assert result.nll == pytest.approx(nll)
    assert (result.tokens, result.windows) == (7, 3)
    assert result.perplexity == pytest.approx(math.exp(nll / 7))
    assert result.as_dict() == {
        "perplexity": result.perplexity,
        "tokens": 7,
        "windows": 3,
        "nll": result.nll,
    }


def test_without_bos_the_first_token_of_each_window_is_unscored() -> None:
    scorer = Bigram(before=(), after=(9,), context=4)
    result = perplexity(scorer, "abcdefghi")
    assert [len(window) for window in scorer.calls[0]] == [4, 4]  # a last window of one token scores nothing
    assert result.tokens == 6


def test_bos_can_be_given_and_windows_limited() -> None:
    scorer = Bigram(before=(), context=4)
    result = perplexity(scorer, "abcdefg", bos=5, windows=2, context=3)
    assert [window[0] for window in scorer.calls[0]] == [5, 5]
    assert [len(window) for window in scorer.calls[0]] == [3, 3]
    assert result.windows == 2


def test_windows_hold_at_most_1024_tokens_and_go_in_small_batches() -> None:
    scorer = Bigram(context=1 << 20)
    result = perplexity(scorer, "x" * 1023 * 19)
    assert [len(call) for call in scorer.calls] == [8, 8, 3]
    assert {len(window) for call in scorer.calls for window in call} == {1024}
    assert result.windows == 19


@pytest.mark.parametrize(
    ("field", "options"),
    [("context", {"context": 1}), ("context", {"context": 9}), ("windows", {"windows": 0}), ("text", {"text": ""})],
)
def test_what_is_out_of_range_is_named(field: str, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        perplexity(Bigram(), **{"text": "abc", **options})
    assert caught.value.field == field


@given(st.lists(st.integers(0, 9)), st.integers(2, 6), st.lists(st.just(7), max_size=1))
def test_windows_cover_the_text_in_order(ids: list[int], size: int, front: list[int]) -> None:
    windows = list(cut_windows(ids, size, front))
    assert all(2 <= len(window) <= size and window[: len(front)] == front for window in windows)
    covered = [token for window in windows for token in window[len(front) :]]
    assert covered == ids[: len(covered)]
    assert len(ids) - len(covered) <= (0 if front else 1)


def test_an_llm_is_a_scorer() -> None:
    with LLM.from_backend(MockBackend(context_length=64)) as llm:
        result = perplexity(llm, "of the wind " * 20, context=32)
    assert result.perplexity == pytest.approx(math.exp(-PROMPT_LOGPROB))
    assert result.tokens == 240
