"""Sequence after sequence: a model attends as it does, over a cache of transformers' own kind that lies in our blocks.

For models whose attention ours cannot stand for. Keys and values lie in the paged cache as always. What a model keeps
besides, the states of convolutions and recurrences, lies one behind the other in the sequence's place for states.

Must not know: weights, our attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer, LinearAttentionCacheLayerMixin

from tramontane.kernels.cells import cells_of
from tramontane.kernels.torch_cells import pages_of, read_keys, read_values, rotate
from tramontane.layers.context import BatchContext
from tramontane.layers.kvcache import KVCache
from tramontane.models.fallback.module import Module
from tramontane.models.fallback.passes import Refused
from tramontane.models.fallback.row import Layer
from tramontane.models.fallback.tensors import to_array, to_tensor
from tramontane.records import dataclass

_STATES = ("conv_states", "recurrent_states")


@dataclass(frozen=True)
class _Rows:
    """What a layer keeps of every token, in one pair of the cache's arrays."""

    number: int
    indexer: bool
    """The keys of a sparse attention's indexer, not its keys and values."""
    positions: tuple[int, ...] | None = None
    """Of an indexer that keeps the positions of its keys, the shape of those of one token."""


@dataclass(frozen=True)
class _State:
    """A tensor that a layer keeps of all tokens before."""

    number: int
    kind: str
    index: int
    shape: tuple[int, ...]
    start: int
    """Where it begins in what is kept of a sequence."""

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class Sequences:
    """Runs the sequences of a batch through a module, one at a time."""

    def __init__(self, module: Module, tokens: Any, *, singly: bool = False) -> None:
        """Finds what the model keeps by a pass on these tokens. Raises Refused for what has no place in our cache.

        `singly`: tokens go through the model one by one, for models that continue from a state in no other way.
        """
        self._module, self._singly = module, singly
        self.name = "token by token" if singly else "sequence by sequence"
        past = self._fresh()
        with torch.inference_mode():
            module.hidden(tokens, torch.arange(len(tokens), device=tokens.device), past)
        self._rows: list[_Rows] = []
        self._states: list[_State] = []
        layers: list[Layer] = []
        for number, layer in enumerate(past.layers):
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                self._note_states(number, layer)
            if isinstance(layer, CacheLayerMixin) and layer.is_initialized:
                layers += self._note_rows(number, layer, len(tokens))
        if not layers and not self._states:
            raise Refused("it keeps nothing of the tokens before that transformers' cache holds")
        self._count = len(past.layers)
        self.state_size = sum(state.size for state in self._states)
        self.layers = tuple(layers)

    def _fresh(self) -> Any:
        return DynamicCache(config=self._module.model.config)

    def _note_rows(self, number: int, layer: Any, count: int) -> Iterator[Layer]:
        k, v = layer.keys, layer.values
        every = k.dim() == 4 and (layer.is_sliding or k.shape[2] == count)
        if not isinstance(layer, DynamicLayer) or not every or k.shape[0] != 1:
            raise Refused("it keeps more or less than a key and a value a token")
        self._rows.append(_Rows(number, False))
        yield Layer(k.shape[1], k.shape[1], k.shape[3], v.shape[3])
        if getattr(layer, "is_indexer_initialized", False):
            width = layer.indexer_keys.shape[-1]
            positions = layer.indexer_position_ids
            self._rows.append(_Rows(number, True, None if positions is None else tuple(positions.shape[:-1])))
            yield Layer(1, 1, width, width)

    def _note_states(self, number: int, layer: Any) -> None:
        for kind in _STATES:
            for index, state in getattr(layer, kind).items():
                if state is not None:
                    start = sum(other.size for other in self._states)
                    self._states.append(_State(number, kind, index, tuple(state.shape), start))

    def hidden(self, batch: BatchContext, cache: KVCache, groups: Sequence[int]) -> Any:
        """float32 [T,H]; `groups`: the cache group of each layer."""
        tokens, positions = (to_tensor(array).long() for array in (batch.tokens, batch.positions))
        starts, lens = (to_tensor(array).tolist() for array in (batch.query_start, batch.context_lens))
        parts = []
        with torch.inference_mode():
            for index, (start, end) in enumerate(pairwise(starts)):
                at = _At(batch, cache, groups, index, lens[index] - end)
                for rows in self._pieces(start, end):
                    past = self._past(at, rows)
                    parts.append(self._module.hidden(tokens[slice(*rows)], positions[slice(*rows)], past))
                    self._keep(past, at)
        return torch.cat(parts)

    def _pieces(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The rows from start to end: all at once, or one by one."""
        if not self._singly:
            yield start, end
            return
        for row in range(start, end):
            yield row, row + 1

    def _past(self, at: _At, rows: tuple[int, int]) -> Any:
        """The cache as the model wants it, before these rows."""
        past = self._fresh()
        while len(past.layers) < self._count:
            past.layers.append(DynamicLayer())
        for pair, noted in enumerate(self._rows):
            layer, store = past.layers[noted.number], at.store(pair, self.layers[pair], rows)
            if noted.indexer:
                layer.update_indexer = store.update_indexer
                layer.is_indexer_initialized = True
                if noted.positions is not None and rows[0] + at.shift:
                    before = torch.arange(rows[0] + at.shift, device=store.slots.device) + self._module.offset
                    layer.indexer_position_ids = before.expand(*noted.positions, -1)
            else:
                _put_keys_and_values(layer, store, rows[0] + at.shift)
        if self._states and rows[0] + at.shift:
            self._put_states(past, at.state(len(self.layers)))
        return past

    def _put_states(self, past: Any, held: Any) -> None:
        for state in self._states:
            layer = past.layers[state.number]
            value = held[state.start : state.start + state.size].view(state.shape).clone()
            getattr(layer, state.kind)[state.index] = value
            getattr(layer, f"is_{state.kind}_initialized")[state.index] = True
            layer.has_previous_state[state.index] = True
            layer.dtype, layer.device = value.dtype, value.device
            if state.kind == "conv_states":
                layer.conv_kernel_size[state.index] = state.shape[-1]

    def _keep(self, past: Any, at: _At) -> None:
        """Put the states into the sequence's place."""
        if self._states:
            held = at.state(len(self.layers))
            for state in self._states:
                value = getattr(past.layers[state.number], state.kind)[state.index]
                held[state.start : state.start + state.size] = value.reshape(-1)


@dataclass(frozen=True)
class _At:
    """One sequence of a batch, and its blocks."""

    batch: BatchContext
    cache: KVCache
    groups: Sequence[int]
    index: int
    shift: int
    """How much later than its row in the batch a token stands."""

    def store(self, pair: int, layer: Layer, rows: tuple[int, int]) -> _Store:
        context = self.batch.groups[self.groups[pair]]
        slots, table = to_tensor(context.slots)[slice(*rows)], to_tensor(context.block_tables)[self.index]
        return _Store(self.cache, pair, layer, slots, table, rows[1] + self.shift)

    def state(self, layer: int) -> Any:
        """What the cache keeps of the sequence, float32 [size]: the state of `layer`, behind those with keys."""
        places = self.batch.states
        place = 0 if places is None else int(to_tensor(places)[self.index])
        return to_tensor(self.cache.state(layer)[0])[place].reshape(-1)


@dataclass(frozen=True)
class _Store:
    """One sequence's part of a pair of the cache's arrays."""

    cache: KVCache
    pair: int
    layer: Layer
    slots: Any
    """int32: where the new tokens go."""
    table: Any
    length: int
    """Tokens of the sequence, the new ones included."""

    def update(self, k: Any, v: Any) -> tuple[Any, Any]:
        """Write the new tokens' k and v [1,H,T,D], and read those of the whole sequence."""
        ops, arrays = self.cache.ops, self.cache.layer(self.pair)
        new_k, new_v = (to_array(ops, x[0].transpose(0, 1).to(torch.float32)) for x in (k, v))
        ops.write_cache(*arrays, new_k, new_v, to_array(ops, self.slots))
        blocks = self.table[: -(-self.length // self.cache.block_size)].long()
        held = [pages_of(to_tensor(array), blocks) for array in arrays]
        keys, values = read_keys(held[0], k.shape[3]), read_values(held[1], v.shape[3])  # [B,H,block_size,D]
        if cells_of(held[0]).top:
            keys = rotate(keys)
        pages = (x.transpose(0, 1).flatten(1, 2)[None, :, : self.length] for x in (keys, values))
        k, v = (x.to(k.dtype) for x in pages)
        return k, v

    def update_indexer(self, keys: Any) -> Any:
        """The same with an indexer's keys [1,T,D]."""
        return self.update(keys[:, None], keys[:, None])[0][:, 0]


def _put_keys_and_values(layer: Any, store: _Store, past: int) -> None:
    """Let a layer of transformers' cache keep its keys and values in ours."""
    seen = past

    def update(k: Any, v: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
        nonlocal seen
        seen = store.length
        return store.update(k, v)

    layer.update = update
    layer.get_seq_length = lambda: seen
    layer.get_mask_sizes = lambda query_length: (seen + query_length, 0)
    layer.is_initialized = True
