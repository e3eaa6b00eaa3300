"""Sequences of different lengths side by side in one batch of transformers, a token each at a time.

Owns the layout of that batch: all rows end at the same column, shorter ones are filled up on the left, where a mask
hides that. Needs the extra transformers. Must not know: models, how a token is drawn, which sequences there are.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

Past = dict[str, Any]
"""What transformers keeps of a sequence, by the names under which a model takes it; or its tokens."""

_COLUMNS = ("keys", "values")
"""Of a layer: [B, heads, columns, D], a column a token, or as many as its window sees."""
_STATES = ("conv_states", "recurrent_states")
"""Of a layer: by numbers, [B, ...], of the same shape however long a sequence is."""
_LAYERS = frozenset(
    {"DynamicLayer", "DynamicSlidingWindowLayer", "LinearAttentionLayer", "LinearAttentionAndFullAttentionLayer"}
    | {"LinearAttentionAndSlidingWindowAttentionLayer", "DummyLayer"}
)
"""The kinds that keep nothing else."""


class SideBySide:
    """What is kept of several sequences, as one batch. Computing the next tokens changes it in place."""

    def __init__(self, pasts: Sequence[Past], lengths: Sequence[int]) -> None:
        """Copies what each sequence keeps, all of which `fits`. `lengths`: its tokens."""
        (self._name,) = pasts[0]
        caches = [past[self._name] for past in pasts]
        self.lengths = list(lengths)
        self._cache: Any = _like(caches[0])
        for layer, *rows in zip(self._cache.layers, *(cache.layers for cache in caches), strict=True):
            for name in _COLUMNS:
                if getattr(layer, name, None) is not None:
                    setattr(layer, name, _joined([getattr(row, name) for row in rows]))
            for name in _STATES:
                for at, state in getattr(layer, name, {}).items():
                    if state is not None:
                        getattr(layer, name)[at] = torch.cat([getattr(row, name)[at] for row in rows])
            _tell_length(layer, max(lengths))

    def inputs(self, tokens: Sequence[int], device: torch.device) -> dict[str, Any]:
        """What a model takes to continue each sequence by one token, which they are from now on longer by."""
        lengths = torch.tensor(self.lengths, device=device)[:, None]
        columns = torch.arange(max(self.lengths) + 1, device=device)
        self.lengths = [length + 1 for length in self.lengths]
        return {
            "input_ids": torch.tensor(tokens, device=device)[:, None],
            "attention_mask": (columns >= lengths.max() - lengths).long(),
            "position_ids": lengths,
            self._name: self._cache,
        }

    def row(self, index: int) -> Past:
        """What is kept of one sequence, as a copy for it alone."""
        length, alone = self.lengths[index], _like(self._cache)
        for layer in alone.layers:
            for name in _COLUMNS:
                if (batch := getattr(layer, name, None)) is not None:
                    first = max(batch.shape[-2] - length, 0)
                    setattr(layer, name, batch[index : index + 1, :, first:].clone())
            for name in _STATES:
                for at, state in getattr(layer, name, {}).items():
                    if state is not None:
                        getattr(layer, name)[at] = state[index : index + 1].clone()
            _tell_length(layer, length)
        return {self._name: alone}


def fits(past: Past) -> bool:
    """Whether that is known to go side by side: a column a token, and states."""
    caches = list(past.values())
    if len(caches) != 1 or type(caches[0]) is not DynamicCache:
        return False
    return all(type(layer).__name__ in _LAYERS and _numbered(layer) for layer in caches[0].layers)


def _numbered(layer: Any) -> bool:
    return all(isinstance(getattr(layer, name, {}), dict) for name in _STATES)


def _like(cache: Any) -> Any:
    """A cache of the same layers, whose tensors may be replaced."""
    new = copy.copy(cache)
    new.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in new.layers:
        for name in _STATES:
            if hasattr(layer, name):
                setattr(layer, name, dict(getattr(layer, name)))
    return new


def _tell_length(layer: Any, length: int) -> None:
    if hasattr(layer, "cumulative_length"):  # of a layer with a window, which keeps fewer columns
        layer.cumulative_length = length


def _joined(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Each [1, heads, columns, D], as one batch of as many columns as the longest has; what is new comes first."""
    width = max(row.shape[-2] for row in rows)
    return torch.cat([torch.nn.functional.pad(row, (0, 0, width - row.shape[-2], 0)) for row in rows])


class Pasts:
    """What is kept of each sequence that runs, by its block: some lie side by side, the others by themselves."""

    def __init__(self) -> None:
        self._alone: dict[int, Past] = {}
        self._batch: SideBySide | None = None
        self._blocks: list[int] = []
        """Of the batch's rows."""

    def copy(self, source: int, target: int) -> None:
        """The target's sequence has come out of the source's."""
        self._part({*self._blocks})
        self._alone[target] = copy.deepcopy(self._alone[source])

    def arrange(self, held: set[int], side_by_side: list[int], lengths: Sequence[int]) -> SideBySide | None:
        """Forget all but `held`; of these put some side by side, which are returned, if any. `lengths`: their tokens
        so far."""
        if side_by_side != self._blocks:
            self._part(held)
            if side_by_side:
                self._batch = SideBySide([self._alone.pop(block) for block in side_by_side], lengths)
                self._blocks = side_by_side
        self._alone = {block: past for block, past in self._alone.items() if block in held}
        return self._batch

    def begin(self, block: int) -> None:
        """A sequence has nothing yet."""
        self._alone[block] = {}

    def of(self, block: int) -> Past:
        """What is kept of a sequence by itself."""
        return self._alone[block]

    def _part(self, held: set[int]) -> None:
        """Each row of the batch goes by itself again, as far as it is held."""
        for index, block in enumerate(self._blocks):
            if block in held and self._batch is not None:
                self._alone[block] = self._batch.row(index)
        self._batch, self._blocks = None, []
