"""From what a row has said to the changes of its logits: penalties, repetitions (DRY), biases, bans.

Owns the history of a row and the arithmetic of sparse edits. Must not know: ops, devices, how rows were scheduled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from tramontane.engine.step import Draw
from tramontane.types import SamplingParams

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int32]
Edits = tuple[IntArray, FloatArray, FloatArray]
"""Ids, penalties, biases; as `Ops.apply_edits` takes them."""

Number = TypeVar("Number", np.int32, np.float32)

LONGEST_MATCH = 256
"""Tokens of a repetition that DRY looks at: what is longer counts as this."""
_LARGEST = 1e30
"""Of DRY's penalty, which grows with a power and must stay finite."""


class History:
    """The tokens of a row, and which ids it has seen: each once, with its count in the output (0 where only the prompt
    has it)."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self.prompt_length = len(prompt)
        self.seen = 0  # output tokens counted
        self._tokens: IntArray = np.concatenate([np.asarray(prompt, np.int32), np.empty(64, np.int32)])
        ids = np.unique(self.tokens)
        self._size = len(ids)
        self._ids: IntArray = np.concatenate([ids, np.empty(64, np.int32)])
        self._counts: FloatArray = np.zeros(len(self._ids), np.float32)
        self._index = {id_: at for at, id_ in enumerate(ids.tolist())}

    @property
    def tokens(self) -> IntArray:
        """Prompt and output."""
        return self._tokens[: self.prompt_length + self.seen]

    def update(self, output: Sequence[int]) -> None:
        for id_ in output[self.seen :]:
            at = self._index.setdefault(id_, self._size)
            if at == self._size:
                self._ids, self._counts = _with_room(self._ids, at), _with_room(self._counts, at)
                self._ids[at], self._counts[at] = id_, 0
                self._size += 1
            self._counts[at] += 1
            end = self.prompt_length + self.seen
            self._tokens = _with_room(self._tokens, end)
            self._tokens[end] = id_
            self.seen += 1

    def penalties(self, repetition: float, frequency: float, presence: float) -> Edits:
        """Repetition (Keskar et al., 2019) over all ids; frequency and presence (OpenAI's API) over the output's."""
        ids, counts = self._ids[: self._size], self._counts[: self._size]
        if repetition == 1.0:  # then an id that only the prompt has is not changed
            ids, counts = ids[counts > 0], counts[counts > 0]
        penalties = np.full(len(ids), repetition, np.float32)
        biases = -(np.float32(frequency) * counts + np.float32(presence) * (counts > 0))
        return ids, penalties, biases


def _with_room(array: NDArray[Number], used: int) -> NDArray[Number]:
    return np.resize(array, 2 * used) if used == len(array) else array


def repetitions(
    tokens: IntArray, multiplier: float, base: float, allowed_length: int, breakers: Sequence[Sequence[int]]
) -> Edits:
    """Against saying a long passage again ("don't repeat yourself", Weidmann, 2024, of text-generation-webui).

    Where the last n >= allowed_length tokens of `tokens` have stood before, the token that followed them then loses
    multiplier * base ** (n - allowed_length), by the longest such n. A passage does not reach over a breaker, and a
    token that is one by itself loses nothing.
    """
    singles = {breaker[0] for breaker in breakers if len(breaker) == 1}
    longest = min(_unbroken(tokens, singles, breakers), LONGEST_MATCH)
    if longest < allowed_length:
        return _nothing()
    starts = np.flatnonzero(tokens[:-1] == tokens[-1])  # the ends of what may be the same passage
    lengths = np.ones(len(starts), np.int64)
    alive = np.arange(len(starts))
    for length in range(1, longest):
        alive = alive[starts[alive] >= length]
        alive = alive[tokens[starts[alive] - length] == tokens[len(tokens) - 1 - length]]
        if not len(alive):
            break
        lengths[alive] = length + 1
    followers = tokens[starts + 1]
    long = (lengths >= allowed_length) & ~np.isin(followers, np.fromiter(singles, np.int32, len(singles)))
    ids, where = np.unique(followers[long], return_inverse=True)
    best = np.zeros(len(ids), np.int64)
    np.maximum.at(best, where, lengths[long])
    most = math.log(_LARGEST / multiplier) / math.log(base) if base > 1 else 0.0
    losses = multiplier * base ** np.minimum(best - allowed_length, most)
    return ids, np.ones(len(ids), np.float32), -losses.astype(np.float32)


def _unbroken(tokens: IntArray, singles: set[int], breakers: Sequence[Sequence[int]]) -> int:
    """How many of the last tokens come after the last breaker."""
    longer: dict[int, list[Sequence[int]]] = {}
    for breaker in breakers:
        if len(breaker) > 1:
            longer.setdefault(breaker[-1], []).append(breaker)
    for count in range(min(len(tokens), LONGEST_MATCH)):
        end = len(tokens) - count
        token = int(tokens[end - 1])
        if token in singles or any(_ends_with(tokens[:end], breaker) for breaker in longer.get(token, ())):
            return count
    return len(tokens)


def _ends_with(tokens: IntArray, passage: Sequence[int]) -> bool:
    at = len(tokens) - len(passage)
    return at >= 0 and tokens[at:].tolist() == list(passage)


def completions(tokens: IntArray, words: Sequence[Sequence[int]]) -> set[int]:
    """The tokens that would complete one of the words, each one token or more."""
    return {word[-1] for word in words if _ends_with(tokens, word[:-1])}


def needs_history(params: SamplingParams) -> bool:
    """Whether a row's edits depend on what it has said."""
    asked = (params.frequency_penalty, params.presence_penalty, params.dry_multiplier, params.bad_words)
    return any(asked) or params.repetition_penalty not in (None, 1.0)


def edits_of(draw: Draw, history: History | None) -> Edits | None:
    """All edits of a row, each id once; None where there are none. `history`: where it is needed."""
    params, found = draw.params, list[Edits]()
    banned = set(draw.banned)
    if history is not None:
        penalties = (params.repetition_penalty or 1.0, params.frequency_penalty or 0.0, params.presence_penalty or 0.0)
        if penalties != (1.0, 0.0, 0.0):
            found.append(history.penalties(*penalties))
        if params.dry_multiplier:
            recent = history.tokens[-params.dry_range :] if params.dry_range else history.tokens
            how = (params.dry_multiplier, params.dry_base or 1.0, params.dry_allowed_length or 1)
            found.append(repetitions(recent, *how, _as_ids(params.dry_sequence_breakers)))
        banned |= completions(history.tokens, _as_ids(params.bad_words))
    if params.logit_bias:
        ids, values = np.array(list(params.logit_bias), np.int32), list(params.logit_bias.values())
        found.append((ids, np.ones(len(ids), np.float32), np.array(values, np.float32)))
    if banned:
        ids = np.array(sorted(banned), np.int32)
        found.append((ids, np.ones(len(ids), np.float32), np.full(len(ids), -np.inf, np.float32)))
    found = [edits for edits in found if len(edits[0])]
    return _merge(found) if found else None


def _as_ids(words: Sequence[str | tuple[int, ...]] | None) -> Sequence[Sequence[int]]:
    """What was resolved to tokens before it came here."""
    return [word for word in words or () if not isinstance(word, str)]


def _merge(edits: Sequence[Edits]) -> Edits:
    """One edit an id: penalties multiply (at most one differs from 1), biases add up."""
    if len(edits) == 1:
        return edits[0]
    all_ids, all_penalties, all_biases = (np.concatenate(parts) for parts in zip(*edits, strict=True))
    ids, where = np.unique(all_ids, return_inverse=True)
    penalties, biases = np.ones(len(ids), np.float32), np.zeros(len(ids), np.float32)
    np.multiply.at(penalties, where, all_penalties)
    np.add.at(biases, where, all_biases)
    return ids.astype(np.int32), penalties, biases


def _nothing() -> Edits:
    return np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, np.float32)
