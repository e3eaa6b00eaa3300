"""Sequences of different lengths side by side in one batch of transformers, a token each at a time.

Owns the layout of that batch: all rows end at the same column, shorter ones are filled up on the left, where a mask
hides them. Needs the extra transformers. Must not know: models, how a token is drawn, which sequences there are.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

Past = dict[str, Any]
"""What transformers keeps of a sequence, by the names under which a model takes it; or its tokens."""

_CACHE = "past_key_values"


class SideBySide:
    """What is kept of several sequences, as one batch. Computing the next tokens changes it in place."""

    def __init__(self, pasts: Sequence[Past]) -> None:
        """Copies what each sequence keeps, all of which `fits`."""
        caches = [past[_CACHE] for past in pasts]
        self.lengths = [cache.get_seq_length() for cache in caches]
        self.cache: Any = _like(caches[0])
        for layer, *rows in zip(self.cache.layers, *(cache.layers for cache in caches), strict=True):
            width = max(row.keys.shape[-2] for row in rows)
            layer.keys = torch.cat([_filled(row.keys, width) for row in rows])
            layer.values = torch.cat([_filled(row.values, width) for row in rows])
            if layer.is_sliding:
                layer.cumulative_length = max(self.lengths)

    def inputs(self, tokens: Sequence[int], device: torch.device) -> dict[str, Any]:
        """What a model takes to continue each sequence by one token, which they are from now on longer by."""
        lengths = torch.tensor(self.lengths, device=device)[:, None]
        columns = torch.arange(max(self.lengths) + 1, device=device)
        self.lengths = [length + 1 for length in self.lengths]
        return {
            "input_ids": torch.tensor(tokens, device=device)[:, None],
            "attention_mask": (columns >= lengths.max() - lengths).long(),
            "position_ids": lengths,
            _CACHE: self.cache,
        }

    def row(self, index: int) -> Past:
        """What is kept of one sequence, as a copy for it alone."""
        length, alone = self.lengths[index], _like(self.cache)
        for layer, batch in zip(alone.layers, self.cache.layers, strict=True):
            first = max(batch.keys.shape[-2] - length, 0)
            layer.keys = batch.keys[index : index + 1, :, first:].clone()
            layer.values = batch.values[index : index + 1, :, first:].clone()
            if layer.is_sliding:
                layer.cumulative_length = length
        return {_CACHE: alone}


def fits(past: Past) -> bool:
    """Whether that is all keys and values, a column a token: states of other kinds are not known to go side by side."""
    cache: Any = past.get(_CACHE)
    return past.keys() == {_CACHE} and type(cache) is DynamicCache and all(_known(layer) for layer in cache.layers)


def _known(layer: Any) -> bool:
    return type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) and bool(layer.is_initialized)


def _like(cache: Any) -> Any:
    """A cache of the same kinds of layers, whose tensors are to be replaced."""
    new: Any = copy.copy(cache)
    new.layers = [copy.copy(layer) for layer in cache.layers]
    return new


def _filled(rows: torch.Tensor, width: int) -> torch.Tensor:
    """[1, H, L, D] as [1, H, width, D]; what is new comes first."""
    return torch.nn.functional.pad(rows, (0, 0, width - rows.shape[-2], 0))


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

    def arrange(self, held: set[int], side_by_side: list[int]) -> SideBySide | None:
        """Forget all but `held`; of these put some side by side, which are returned, if any."""
        if side_by_side != self._blocks:
            self._part(held)
            if side_by_side:
                self._batch = SideBySide([self._alone.pop(block) for block in side_by_side])
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
