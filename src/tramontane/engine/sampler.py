"""Sampling in two halves: processors turn a row's history into sparse edits on the host; one op cuts and draws.

Owns penalties, biases, bans, custom processors, the random numbers and the reported probabilities.
Must not know: the decoder, the cache, how rows were scheduled.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tramontane.engine.step import Draw, TokenInfo
from tramontane.errors import InvalidRequest
from tramontane.kernels import Array, Ops
from tramontane.kernels.workspace import Workspace
from tramontane.types import LogitsProcessor

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int32]
Edits = tuple[IntArray, FloatArray, FloatArray]  # ids, penalties, biases: each id once

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that draws token `position` of a choice: splitmix64 (Steele, Lea and Flood, 2014).

    A function of its arguments alone. 24 bits, so that float32 holds it exactly. The seed is mixed first: neighbouring
    seeds would otherwise walk the same sequence.
    """
    state = (_mix((seed + _GOLDEN) & _MASK) + (position + 1) * _GOLDEN) & _MASK
    return (_mix(state) >> 40) * 2.0**-24


class _History:
    """Which ids a row has seen: each once, with its count in the output (0 where only the prompt has it)."""

    def __init__(self, prompt: Sequence[int]) -> None:
        ids = np.unique(np.asarray(prompt, np.int32))
        self.prompt_length = len(prompt)
        self.seen = 0  # output tokens counted
        self._size = len(ids)
        self._ids = np.concatenate([ids, np.empty(64, np.int32)])
        self._counts = np.zeros(len(self._ids), np.float32)
        self._index = {id_: at for at, id_ in enumerate(ids.tolist())}

    def update(self, output: Sequence[int]) -> None:
        for id_ in output[self.seen :]:
            at = self._index.setdefault(id_, self._size)
            if at == self._size:
                self._grow()
                self._ids[at], self._counts[at] = id_, 0
                self._size += 1
            self._counts[at] += 1
        self.seen = len(output)

    def _grow(self) -> None:
        if self._size == len(self._ids):
            self._ids = np.resize(self._ids, 2 * self._size)
            self._counts = np.resize(self._counts, 2 * self._size)

    def edits(self, repetition: float, frequency: float, presence: float) -> Edits:
        """Repetition (Keskar et al., 2019) over all ids; frequency and presence (OpenAI's API) over the output's."""
        ids, counts = self._ids[: self._size], self._counts[: self._size]
        if repetition == 1.0:  # then an id that only the prompt has is not changed
            ids, counts = ids[counts > 0], counts[counts > 0]
        penalties = np.full(len(ids), repetition, np.float32)
        biases = -(np.float32(frequency) * counts + np.float32(presence) * (counts > 0))
        return ids, penalties, biases


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


class Sampler:
    """Draws tokens for rows of logits. Not thread-safe: one runner owns it."""

    def __init__(self, ops: Ops, workspace: Workspace, max_histories: int) -> None:
        """`workspace` must hold as many rows as are ever sampled at once; histories kept are the latest used."""
        self._ops = ops
        self._workspace = workspace
        self._max_histories = max_histories
        self._histories: dict[Hashable, _History] = {}

    def sample(self, logits: Array, draws: Sequence[Draw], keys: Sequence[Hashable]) -> list[TokenInfo]:
        """One token a row of logits [R,V], which are overwritten. `keys` name the rows' sequences across steps.

        Raises InvalidRequest("logits_processors") where a custom processor returns something else than its row.
        """
        logprobs = self._logprobs(logits, draws)
        self._edit(logits, draws, keys)
        tokens = self._draw(logits, draws)
        custom = [row for row, draw in enumerate(draws) if draw.params.logits_processors]
        if custom:
            host = self._ops.to_host(logits)
            processed = np.stack([self._process(draws[row], host[row]) for row in custom])
            redrawn = self._draw(self._ops.from_host(processed), [draws[row] for row in custom])
            for row, token in zip(custom, redrawn, strict=True):
                tokens[row] = token
        return [
            token_info(token, logprobs[row], draws[row].params.logprobs or 0) if row in logprobs else TokenInfo(token)
            for row, token in enumerate(tokens)
        ]

    def _logprobs(self, logits: Array, draws: Sequence[Draw]) -> dict[int, FloatArray]:
        """Row -> log probabilities [V] of the logits as they are, for the rows that report them."""
        wanted = [row for row, draw in enumerate(draws) if draw.params.logprobs is not None]
        if not wanted:
            return {}
        out = self._workspace.take("logprobs", len(wanted), logits.shape[1])
        self._ops.take_rows(out, logits, self._ops.from_host(np.array(wanted, np.int32)))
        self._ops.log_softmax(out, out)
        return dict(zip(wanted, self._ops.to_host(out), strict=True))

    def _edit(self, logits: Array, draws: Sequence[Draw], keys: Sequence[Hashable]) -> None:
        per_row = [(row, self._edits(draw, key)) for row, (draw, key) in enumerate(zip(draws, keys, strict=True))]
        found = [(row, edits) for row, edits in per_row if edits is not None and len(edits[0])]
        if not found:
            return
        rows = np.repeat(np.array([row for row, _ in found], np.int32), [len(edits[0]) for _, edits in found])
        columns = (np.concatenate(parts) for parts in zip(*(edits for _, edits in found), strict=True))
        device = self._ops.from_host
        self._ops.apply_edits(logits, device(rows), *(device(column) for column in columns))

    def _edits(self, draw: Draw, key: Hashable) -> Edits | None:
        params, found = draw.params, []
        repetition, frequency, presence = (
            params.repetition_penalty or 1.0,
            params.frequency_penalty or 0.0,
            params.presence_penalty or 0.0,
        )
        if repetition != 1.0 or frequency or presence:
            found.append(self._history(draw, key).edits(repetition, frequency, presence))
        if params.logit_bias:
            ids, values = np.array(list(params.logit_bias), np.int32), list(params.logit_bias.values())
            found.append((ids, np.ones(len(ids), np.float32), np.array(values, np.float32)))
        if draw.banned:
            ids = np.unique(np.array(draw.banned, np.int32))
            found.append((ids, np.ones(len(ids), np.float32), np.full(len(ids), -np.inf, np.float32)))
        return _merge(found) if found else None

    def _history(self, draw: Draw, key: Hashable) -> _History:
        history = self._histories.pop(key, None)
        if history is None or history.prompt_length != len(draw.prompt) or history.seen > len(draw.output):
            history = _History(draw.prompt)
        history.update(draw.output)
        self._histories[key] = history  # the latest used stands last
        if len(self._histories) > self._max_histories:
            del self._histories[next(iter(self._histories))]
        return history

    def _process(self, draw: Draw, row: FloatArray) -> FloatArray:
        for processor in draw.params.logits_processors or ():
            row = apply_processor(processor, draw.prompt, draw.output, row)
        return row

    def _draw(self, logits: Array, draws: Sequence[Draw]) -> list[int]:
        params = [draw.params for draw in draws]
        columns: tuple[NDArray[Any], ...] = (
            np.array([p.temperature for p in params], np.float32),
            np.array([min(p.top_k or 0, 2**31 - 1) for p in params], np.int32),
            np.array([p.top_p for p in params], np.float32),
            np.array([p.min_p for p in params], np.float32),
            np.array([uniform(draw.seed, len(draw.output)) for draw in draws], np.float32),
        )
        tokens = self._workspace.take("tokens", len(draws), dtype="int32")
        self._ops.sample(tokens, logits, *(self._ops.from_host(column) for column in columns))
        drawn: list[int] = self._ops.to_host(tokens).tolist()
        return drawn


def apply_processor(
    processor: LogitsProcessor, prompt: Sequence[int], output: Sequence[int], row: FloatArray
) -> FloatArray:
    """The row [V] after a custom processor, which gets copies and may keep or change them.

    Raises what the processor raises, and InvalidRequest("logits_processors") for what is not a row of logits.
    """
    result: Any = np.asarray(processor(tuple(prompt), tuple(output), row.copy()))
    if result.shape != row.shape or result.dtype.kind not in "fiu":
        raise InvalidRequest(
            "logits_processors",
            f"{processor!r} returned an array of shape {result.shape} and dtype {result.dtype}",
            f"Return float32 logits of shape {row.shape}.",
        )
    processed: FloatArray = result.astype(np.float32)
    if not np.isfinite(processed.max()):  # -inf where nothing is left, NaN where one is there
        raise InvalidRequest("logits_processors", f"{processor!r} returned NaN or inf, or left no token to choose")
    return processed


def token_info(token: int, logprobs: FloatArray, alternatives: int) -> TokenInfo:
    """What is reported of a token from its row's log probabilities [V]; equal ones rank by id."""
    own = logprobs[token]
    rank = 1 + int(np.count_nonzero(logprobs > own)) + int(np.count_nonzero(logprobs[:token] == own))
    return TokenInfo(token, float(own), rank, top_alternatives(logprobs, alternatives))


def top_alternatives(logprobs: FloatArray, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` most likely (id, log probability) of a row [V], best first, equal ones by id."""
    count = min(count, len(logprobs))
    if count == 0:
        return ()
    edge = np.partition(logprobs, len(logprobs) - count)[len(logprobs) - count]
    ids = np.flatnonzero(logprobs >= edge)
    ids = ids[np.argsort(-logprobs[ids], kind="stable")][:count]
    return tuple(zip(ids.tolist(), logprobs[ids].tolist(), strict=True))
