"""Sampling in two halves: processors turn a row's history into sparse edits on the host; one op cuts and draws.

Owns custom processors, the random numbers and the reported probabilities; the edits are made in `edits`, what grammars
allow in `masks`.
Must not know: the decoder, the cache, how rows were scheduled.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tramontane.engine.edits import FloatArray, History, IntArray, edits_of, needs_history
from tramontane.engine.masks import Mask, Masks
from tramontane.engine.step import Draw, TokenInfo
from tramontane.errors import InvalidRequest
from tramontane.kernels import Array, Ops
from tramontane.kernels.workspace import Workspace
from tramontane.text.grammar import Grammars
from tramontane.types import LogitsProcessor

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


_COIN = 0x2545F4914F6CDD1D
"""Of a seed, it makes another, for what is decided beside the draw."""


@lru_cache(maxsize=64)
def mask_of(allowed: tuple[int, ...], vocab_size: int) -> IntArray:
    """int32 [ceil(V/32)] as `Ops.mask` takes it. Not to be written to."""
    bits = np.zeros(-(-vocab_size // 32) * 32, bool)
    bits[list(allowed)] = True
    return np.packbits(bits, bitorder="little").view("<i4").astype(np.int32)


class Sampler:
    """Draws tokens for rows of logits. Not thread-safe: one runner owns it."""

    def __init__(self, ops: Ops, workspace: Workspace, max_histories: int, grammars: Grammars | None = None) -> None:
        """`workspace` must hold as many rows as are ever sampled at once; histories kept, and places in grammars, are
        the latest used. `grammars`: of the model's tokens; without them a draw with a grammar fails."""
        self._ops = ops
        self._workspace = workspace
        self._max_histories = max_histories
        self._histories: dict[Hashable, History] = {}
        self._masks = Masks(grammars, max_histories)

    def begin(self, draws: Sequence[Draw], keys: Sequence[Hashable]) -> None:
        """Before the model runs: all that will be sampled of it. What takes no logits is done meanwhile."""
        self._masks.start(draws, keys)

    def sample(self, logits: Array, draws: Sequence[Draw], keys: Sequence[Hashable]) -> list[TokenInfo]:
        """One token a row of logits [R,V], which are overwritten. `keys` name the rows' sequences across steps.

        Raises InvalidRequest("logits_processors") where a custom processor returns something else than its row.
        """
        logprobs = self._logprobs(logits, draws)
        held = self._masks.of(keys)
        draws = [
            replace(draw, banned=()) if row in held and held[row].closing else draw for row, draw in enumerate(draws)
        ]
        masks = _all_masks(held, draws, logits.shape[1])
        self._edit(logits, draws, keys, held, masks)
        self._mask(logits, masks)
        tokens = self._draw(logits, draws)
        custom = [row for row, draw in enumerate(draws) if draw.params.logits_processors]
        if custom:
            host = self._ops.to_host(logits)
            processed = np.stack([self._process(draws[row], host[row]) for row in custom])
            for row, values in zip(custom, processed, strict=True):
                _check_left(held, masks, row, np.flatnonzero(np.isneginf(values)), "logits_processors")
            redone = self._ops.from_host(processed)
            self._mask(redone, {at: masks[row] for at, row in enumerate(custom) if row in held and row in masks})
            redrawn = self._draw(redone, [draws[row] for row in custom])
            for row, token in zip(custom, redrawn, strict=True):
                tokens[row] = token
        infos = [_info(token, logprobs.get(row), draws[row]) for row, token in enumerate(tokens)]
        for row, mask in held.items():
            infos[row] = self._held(infos[row], mask, draws[row], keys[row])
        return infos

    def _held(self, info: TokenInfo, mask: Mask, draw: Draw, key: Hashable) -> TokenInfo:
        """What is reported of a row that a grammar holds."""
        if mask.error is not None:
            return replace(info, error=mask.error)
        ends = info.token_id in draw.ends
        return replace(info, complete=mask.closing if ends else self._masks.advance(key, info.token_id))

    def expand(self, logits: Array, draws: Sequence[Draw], keys: Sequence[Hashable]) -> list[list[TokenInfo]]:
        """The likeliest tokens of beams, as many a row of logits [R,V] as its draw wants, best first; the logits are
        overwritten. Processors change log probabilities here, and may leave them unnormalised, as in transformers."""
        logprobs = self._logprobs(logits, draws)
        self._ops.log_softmax(logits, logits)
        masks = _all_masks({}, draws, logits.shape[1])
        self._edit(logits, draws, keys, {}, masks)
        self._mask(logits, masks)
        found = []
        for row, (draw, scores) in enumerate(zip(draws, self._ops.to_host(logits), strict=True)):
            best = top_alternatives(scores, draw.candidates)
            told = [_info(id_, logprobs.get(row), draw) for id_, _ in best]
            found.append([replace(info, score=score) for info, (_, score) in zip(told, best, strict=True)])
        return found

    def _logprobs(self, logits: Array, draws: Sequence[Draw]) -> dict[int, FloatArray]:
        """Row -> log probabilities [V] of the logits as they are, for the rows that report them."""
        wanted = [row for row, draw in enumerate(draws) if draw.params.logprobs is not None]
        if not wanted:
            return {}
        out = self._workspace.take("logprobs", len(wanted), logits.shape[1])
        self._ops.take_rows(out, logits, self._ops.from_host(np.array(wanted, np.int32)))
        self._ops.log_softmax(out, out)
        return dict(zip(wanted, self._ops.to_host(out), strict=True))

    def _edit(
        self,
        logits: Array,
        draws: Sequence[Draw],
        keys: Sequence[Hashable],
        held: dict[int, Mask],
        masks: dict[int, IntArray],
    ) -> None:
        """Also finds the rows in which edits forbid all that a grammar allows."""
        histories = [
            self._history(draw, key) if needs_history(draw.params) else None
            for draw, key in zip(draws, keys, strict=True)
        ]
        per_row = enumerate(edits_of(draw, history) for draw, history in zip(draws, histories, strict=True))
        found = [(row, edits) for row, edits in per_row if edits is not None]
        if not found:
            return
        for row, (ids, _, biases) in found:
            _check_left(held, masks, row, ids[np.isneginf(biases)], "grammar")
        rows = np.repeat(np.array([row for row, _ in found], np.int32), [len(edits[0]) for _, edits in found])
        columns = (np.concatenate(parts) for parts in zip(*(edits for _, edits in found), strict=True))
        device = self._ops.from_host
        self._ops.apply_edits(logits, device(rows), *(device(column) for column in columns))

    def _mask(self, logits: Array, masks: Mapping[int, IntArray]) -> None:
        if masks:
            rows, bits = np.array(list(masks), np.int32), np.stack(list(masks.values()))
            self._ops.mask(logits, self._ops.from_host(rows), self._ops.from_host(bits))

    def _history(self, draw: Draw, key: Hashable) -> History:
        history = self._histories.pop(key, None)
        if history is None or history.prompt_length != len(draw.prompt) or history.seen > len(draw.output):
            history = History(draw.prompt)
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
            np.array([uniform(d.seed, len(d.output)) if d.params.temperature else 0 for d in draws], np.float32),
        )
        cuts = (np.array([p.typical_p for p in params], np.float32), np.array(list(map(_xtc, draws)), np.float32))
        tokens = self._workspace.take("tokens", len(draws), dtype="int32")
        self._ops.sample(
            tokens,
            logits,
            *(self._ops.from_host(column) for column in columns),
            *(self._ops.from_host(cut) if cut.min(initial=1) < 1 else None for cut in cuts),
        )
        drawn: list[int] = self._ops.to_host(tokens).tolist()
        return drawn


def _all_masks(held: dict[int, Mask], draws: Sequence[Draw], vocab_size: int) -> dict[int, IntArray]:
    """Row -> what it may draw, by its grammar and its allowed tokens; a grammar that these leave nothing gets an
    error. Where only an end may follow, it may."""
    masks = {row: mask.words for row, mask in held.items() if mask.error is None}
    for row, draw in enumerate(draws):
        ids = draw.params.allowed_token_ids
        if ids is None or (row in held and held[row].closing):
            continue
        allowed = mask_of(ids, vocab_size)
        masks[row] = masks[row] & allowed if row in masks else allowed
        _check_left(held, masks, row, np.empty(0, np.int64), "allowed_token_ids")
    return masks


def _check_left(
    held: dict[int, Mask], masks: dict[int, IntArray], row: int, forbidden: NDArray[Any], field: str
) -> None:
    """Ends a row that a grammar holds with an error where its mask leaves no token besides the forbidden ids."""
    if row not in held or row not in masks:
        return
    allowed = np.unpackbits(masks[row].astype("<i4").view(np.uint8), bitorder="little")
    allowed[forbidden] = 0
    if not allowed.any():
        del masks[row]
        what = "all tokens that the grammar allows are forbidden by other sampling parameters"
        held[row] = replace(held[row], error=InvalidRequest(field, what))


def _info(token: int, logprobs: FloatArray | None, draw: Draw) -> TokenInfo:
    """What is reported of a token, given its row's log probabilities where they are asked for."""
    return TokenInfo(token) if logprobs is None else token_info(token, logprobs, draw.params.logprobs or 0)


def _xtc(draw: Draw) -> float:
    """The threshold where the top choices are excluded this time, else 1, which excludes none."""
    params = draw.params
    if not params.xtc_probability or params.xtc_threshold is None:
        return 1.0
    coin = uniform(draw.seed ^ _COIN, len(draw.output))
    return params.xtc_threshold if coin < params.xtc_probability else 1.0


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
