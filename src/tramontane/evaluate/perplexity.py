"""Perplexity: how well a model predicts a text, over windows that do not overlap.

Owns the cutting into windows and the sum. Must not know: how scores are computed; anything of a model but its
tokenizer and the length of its context.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from tramontane.errors import InvalidRequest
from tramontane.records import dataclass
from tramontane.types import Score

WINDOW = 1024
_BATCH = 8


class _Limits(Protocol):
    @property
    def context_length(self) -> int: ...


class Scorer(Protocol):
    """What perplexity needs of a model. An LLM is one."""

    def capabilities(self) -> _Limits: ...

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def score(self, texts: Sequence[Sequence[int]], /) -> list[Score]:
        """Log probabilities of sequences of token ids; the first of each has none."""
        ...


@dataclass(frozen=True)
class PerplexityResult:
    """`perplexity` is exp(`nll` / `tokens`); `nll` the summed negative natural-log probability of scored tokens."""

    perplexity: float
    tokens: int
    """Tokens scored."""
    windows: int
    nll: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def perplexity(
    scorer: Scorer, text: str, *, context: int | None = None, windows: int | None = None, bos: int | None = None
) -> PerplexityResult:
    """Perplexity of a text, in windows of min(1024, context) tokens that do not overlap.

    Each window starts with `bos` (None: with what the tokenizer puts in front of a text, if anything), which counts
    in its length; its first token is not scored. The last window may be shorter. `context`: None is the model's.
    `windows`: at most so many, from the start. Raises InvalidRequest for values out of range or nothing to score.
    """
    longest = scorer.capabilities().context_length
    if context is not None and not 2 <= context <= longest:
        raise InvalidRequest("context", f"{context} is out of range", f"It must be from 2 to {longest}.")
    if windows is not None and windows < 1:
        raise InvalidRequest("windows", f"{windows} is out of range", "It must be at least 1.")
    ids = scorer.tokenize(text, add_special_tokens=False)
    front = _front(scorer) if bos is None else [bos]
    cut = list(cut_windows(ids, min(WINDOW, context or longest), front))[:windows]
    nll, tokens = 0.0, 0
    for start in range(0, len(cut), _BATCH):
        for score in scorer.score(cut[start : start + _BATCH]):
            nll -= score.total
            tokens += sum(p is not None for p in score.logprobs)
    if not tokens:
        raise InvalidRequest("text", "it is too short to score", "Two tokens are the least.")
    return PerplexityResult(math.exp(nll / tokens), tokens, len(cut), nll)


def cut_windows(ids: Sequence[int], size: int, front: Sequence[int]) -> Iterator[list[int]]:
    """Windows of `size` tokens, `front` included; what would leave nothing to score is left out."""
    step = size - len(front)
    if step < 1:
        raise InvalidRequest("context", f"{size} leaves no room after the {len(front)} tokens in front of a text")
    for start in range(0, len(ids), step):
        window = [*front, *ids[start : start + step]]
        if len(window) > 1:
            yield window


def _front(scorer: Scorer) -> list[int]:
    """The special tokens that the tokenizer puts before a text (and not those after it)."""
    bare = scorer.tokenize("a", add_special_tokens=False)
    full = scorer.tokenize("a")
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    raise InvalidRequest("bos", "what the tokenizer puts in front of a text cannot be told", "Pass bos=.")
