"""Masks of the rows whose answers must match a grammar, computed on a thread of their own while the model runs.

Owns where each sequence stands in its grammar, and which tokens end an answer there. Must not know: logits, how rows
were scheduled, what a grammar is made of.

A sequence's state is a function of its output tokens: one that is not at hand, or has not seen them all, is made anew.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from tramontane.engine.step import Draw
from tramontane.errors import InvalidRequest, TramontaneError
from tramontane.records import dataclass
from tramontane.text.grammar import Grammars, Matcher
from tramontane.types import Grammar

Words = NDArray[np.int32]


@dataclass(frozen=True)
class Mask:
    """What a row may draw."""

    words: Words
    """As `Ops.mask` takes them: int32 [ceil(V/32)]."""
    closing: bool = False
    """Only an end may follow: whatever holds ends off does not hold here."""
    error: TramontaneError | None = None
    """Why the answer cannot go on; `words` then mean nothing."""


@dataclass
class _State:
    matcher: Matcher
    taken: list[int]
    """Output tokens."""


class Masks:
    """Not thread-safe: one sampler owns it. One step at a time: `start`, `of` its rows, `advance` those that drew."""

    def __init__(self, grammars: Grammars | None, max_states: int) -> None:
        """States kept are the latest used. Without `grammars` a draw that has one raises."""
        self._grammars, self._max_states = grammars, max_states
        self._states: dict[Hashable, _State] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._pending: Future[dict[Hashable, Mask]] | None = None

    def start(self, draws: Sequence[Draw], keys: Sequence[Hashable]) -> None:
        """Begin with the masks of a step's draws; `keys` name the rows' sequences across steps."""
        if self._pending is not None:  # of a step that failed
            self._pending.exception()
        wanted = [(key, draw) for key, draw in zip(keys, draws, strict=True) if draw.params.grammar is not None]
        self._pending = None
        if wanted:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(1, "tramontane-masks")
            self._pending = self._pool.submit(self._compute, wanted)

    def of(self, keys: Sequence[Hashable]) -> dict[int, Mask]:
        """Row -> mask, of the rows that have one; waits until they are there."""
        if self._pending is None:
            return {}
        found = self._pending.result()
        return {row: found[key] for row, key in enumerate(keys) if key in found}

    def advance(self, key: Hashable, token: int) -> bool:
        """Take the token that a row drew; whether the answer is complete and nothing can follow."""
        state = self._states[key]
        try:
            state.matcher.advance(token)
        except InvalidRequest:
            del self._states[key]  # made anew for the next mask; if that fails too, the mask says so
            return False
        state.taken.append(token)
        return state.matcher.complete

    def _compute(self, wanted: Sequence[tuple[Hashable, Draw]]) -> dict[Hashable, Mask]:
        return {key: self._mask(key, draw) for key, draw in wanted}

    def _mask(self, key: Hashable, draw: Draw) -> Mask:
        try:
            words, may_end = self._allowed(key, draw)
        except TramontaneError as error:
            self._states.pop(key, None)
            return Mask(np.empty(0, np.int32), error=error)
        _set(words, draw.ends, False)
        closing = may_end and not words.any()
        if may_end:
            _set(words, draw.ends, True)
        if words.any():
            return Mask(words, closing)
        what = "its end is the only thing left, and the model's ends are ignored" if may_end else "no token is left"
        return Mask(words, error=InvalidRequest("grammar", what))

    def _allowed(self, key: Hashable, draw: Draw) -> tuple[Words, bool]:
        """A copy of what the matcher says."""
        grammar, grammars = draw.params.grammar, self._grammars
        if grammar is None or grammars is None:
            raise InvalidRequest("grammar", "this engine was built without grammars")
        try:
            words, may_end = self._matcher(key, draw.output, grammars, grammar).mask()
        except InvalidRequest:
            if not grammars.renew(grammar):
                raise
            self._states.pop(key, None)
            words, may_end = self._matcher(key, draw.output, grammars, grammar).mask()
        return words.copy(), may_end

    def _matcher(self, key: Hashable, output: Sequence[int], grammars: Grammars, grammar: Grammar) -> Matcher:
        state = self._states.pop(key, None)
        if state is None or state.taken != list(output):
            state = _State(grammars.compiled(grammar).matcher(), list(output))
            state.matcher.advance(*output)
        self._states[key] = state  # the latest used stands last
        if len(self._states) > self._max_states:
            del self._states[next(iter(self._states))]
        return state.matcher


def _set(words: Words, ids: Iterable[int], value: bool) -> None:
    """Change the bits of tokens; ids beyond the words have none."""
    bits = words.view(np.uint32)
    for id_ in ids:
        if id_ // 32 < len(bits):
            bit = np.uint32(1 << id_ % 32)
            bits[id_ // 32] = bits[id_ // 32] | bit if value else bits[id_ // 32] & ~bit
