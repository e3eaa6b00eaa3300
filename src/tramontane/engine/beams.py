"""Beam search: which continuations go on, which have ended, and when nothing better can come.

Owns the rules, which are transformers' (`generate(num_beams=...)` without sampling). Must not know: arrays, blocks, how
a beam is computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from tramontane.engine.sequence import Ending, EngineRequest, Sequence
from tramontane.engine.step import TokenInfo
from tramontane.records import dataclass


@dataclass(frozen=True)
class Continuation:
    """A beam with one more token. `total`: the sum of its tokens' scores."""

    parent: Sequence
    info: TokenInfo
    total: float
    ending: Ending | None


@dataclass(frozen=True)
class Hypothesis:
    """A beam that has ended."""

    score: float
    """Its total over its length to the power of the length penalty."""
    tokens: tuple[TokenInfo, ...]
    ending: Ending


class BeamSearch:
    """The search of one request. `finished`: the best that have ended, best first, at most as many as there are
    beams."""

    def __init__(self, request: EngineRequest, longest: int) -> None:
        """`longest`: tokens that a beam can have."""
        self.finished: list[Hypothesis] = []
        self._request, self._longest = request, longest
        self._width = request.beam_width
        self._penalty = request.params.length_penalty or 0.0
        self._early = request.params.early_stopping
        self._length = 0

    def continuations(self, sequence: Sequence, context_length: int) -> Iterable[Continuation]:
        """Of a beam whose candidates are in; what may not be drawn is none."""
        for info in sequence.candidates:
            if info.score is not None and info.score > -math.inf:
                length = len(sequence.output_ids) + 1
                ending = self._request.ending(info, length, len(sequence.token_ids) + 1, context_length)
                yield Continuation(sequence, info, sequence.total + info.score, ending)

    def advance(self, found: Iterable[Continuation]) -> list[Continuation]:
        """Take the continuations of all beams. Returns those to go on with, best first; none when it is over."""
        self._length += 1
        best = sorted(found, key=lambda one: -one.total)[: self._request.candidates]
        going = [one for one in best if one.ending is None][: self._width]
        # of what has ended, only what stands among the best counts; the rest is there so that enough can go on
        ended = [self._hypothesis(one, one.ending) for one in best[: self._width] if one.ending is not None]
        self.finished = sorted([*self.finished, *ended], key=lambda one: -one.score)[: self._width]
        return going if going and self._may_improve(going[0].total) else []

    def _hypothesis(self, one: Continuation, ending: Ending) -> Hypothesis:
        return Hypothesis(one.total / math.pow(self._length, self._penalty), (*one.parent.infos, one.info), ending)

    def _may_improve(self, total: float) -> bool:
        """Whether the best that goes on, of this total, may still become better than the worst that has ended."""
        if len(self.finished) < self._width:
            return True
        if self._early is True:
            return False
        length = self._longest if self._early == "never" and self._penalty > 0 else self._length
        return total / math.pow(length, self._penalty) > self.finished[-1].score
