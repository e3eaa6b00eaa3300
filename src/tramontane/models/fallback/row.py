"""The whole batch as one row: transformers' layers call our paged attention.

Owns which attention functions ours can stand for. Must not know: weights, what else a model is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tramontane.kernels import Array, Ops
from tramontane.layers.context import BatchContext
from tramontane.layers.kvcache import KVCache
from tramontane.models.fallback.module import Module, rotary_by_length
from tramontane.models.fallback.passes import Refused, running
from tramontane.models.fallback.tensors import to_array, to_tensor
from tramontane.records import dataclass


@dataclass(frozen=True)
class Layer:
    """What a layer keeps of a token, and how it attends to it."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    scale: float = 1.0
    window: int | None = None
    softcap: float = 0.0
    sinks: Array | None = None


_HONOURED = {"scaling", "sliding_window", "softcap", "s_aux", "is_causal", "dropout"}
"""Options of attention functions: the window is read off the mask, models in use drop nothing out."""
_WITHOUT_EFFECT = {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "cache_position"}


class Row:
    """Runs all sequences of a batch through a module at once."""

    name = "one row"
    state_size = 0

    def __init__(self, module: Module, ops: Ops, tokens: Any, context_length: int) -> None:
        """Finds the layers by a pass on these tokens. Raises Refused for attention that ours cannot stand for."""
        self._module = module
        kind = rotary_by_length(module.parts)
        if kind is not None:
            raise Refused(f"its {kind} rotary embedding depends on all that is in a batch")
        recording = _Recording(ops, context_length)
        with running(recording):
            module.hidden(tokens, torch.arange(len(tokens), device=tokens.device))
        if not recording.calls:
            raise Refused("it never calls the attention function that transformers offers to replace")
        self.layers = tuple(layer for number, (layer, kept) in enumerate(recording.calls) if kept == number)
        places = {number: place for place, number in enumerate(dict.fromkeys(kept for _, kept in recording.calls))}
        self._calls = [(layer, places[kept]) for layer, kept in recording.calls]

    def hidden(self, batch: BatchContext, cache: KVCache, groups: Sequence[int]) -> Any:
        """float32 [T,H]; `groups`: the cache group of each layer."""
        step = _Step(self._calls, groups, batch, cache)
        tokens, positions = (to_tensor(array).long() for array in (batch.tokens, batch.positions))
        with running(step):
            hidden = self._module.hidden(tokens, positions)
        if step.made != len(self._calls):
            raise RuntimeError(f"{step.made} calls of attention instead of {len(self._calls)}")
        return hidden


class _Recording:
    """A pass that notes how each layer attends."""

    def __init__(self, ops: Ops, context_length: int) -> None:
        self.calls: list[tuple[Layer, int]] = []
        """Each with the number of the call that keeps its keys and values: its own, unless a layer is handed those of
        an earlier one."""
        self._ops, self._context_length = ops, context_length
        self._seen: list[tuple[Any, Any]] = []

    def mask(self, allowed: Callable[..., Any]) -> Callable[..., Any]:
        return allowed

    def attend(self, q: Any, k: Any, v: Any, mask: Any, options: Mapping[str, Any]) -> Any:
        if not callable(mask):
            raise Refused("it makes its attention masks itself" if mask is not None else "its attention has no mask")
        for name, value in options.items():
            if name not in _HONOURED | _WITHOUT_EFFECT and value is not None:
                raise Refused(f"its attention takes {name}")
        if k.shape[2] != q.shape[2] or k.shape[0] != 1:
            raise Refused("its attention sees other tokens than those of the batch")
        scale, sinks = options.get("scaling"), options.get("s_aux")
        layer = Layer(
            num_heads=q.shape[1],
            num_kv_heads=k.shape[1],
            head_dim=q.shape[3],
            value_dim=v.shape[3],
            scale=q.shape[3] ** -0.5 if scale is None else float(scale),
            window=window_of(mask, self._context_length),
            softcap=float(options.get("softcap") or 0.0),
            sinks=None if sinks is None else to_array(self._ops, sinks.reshape(-1).to(torch.float32)),
        )
        self.calls.append((layer, self._keeper(k, v, layer.window)))
        return q.new_zeros(1, q.shape[2], q.shape[1], v.shape[3])

    def _keeper(self, k: Any, v: Any, window: int | None) -> int:
        """The call that had the same keys and values already; this one if none. (Those seen stay alive meanwhile, so
        that no others get their memory.)"""
        self._seen.append((k, v))
        for number, earlier in enumerate(self._seen):
            same = all(_same(x, y) for x, y in zip(earlier, (k, v), strict=True))
            if same and (number == len(self.calls) or self.calls[number][0].window == window):
                return number
        raise AssertionError("a tensor is itself")


def _same(x: Any, y: Any) -> bool:
    return bool(x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride())


class _Step:
    """A pass over a batch of the engine's."""

    def __init__(
        self, calls: Sequence[tuple[Layer, int]], groups: Sequence[int], batch: BatchContext, cache: KVCache
    ) -> None:
        """`calls`: layers, and where among those of the cache each keeps its keys and values."""
        self.made = 0
        self._calls, self._groups, self._batch, self._cache = calls, groups, batch, cache
        self._written: set[int] = set()

    def mask(self, allowed: Callable[..., Any]) -> Callable[..., Any]:
        return allowed

    def attend(self, q: Any, k: Any, v: Any, mask: Any, options: Mapping[str, Any]) -> Any:
        layer, place = self._calls[self.made]
        group, cache = self._batch.groups[self._groups[place]], self._cache.layer(place)
        ops, batch = self._cache.ops, self._batch
        self.made += 1
        if place not in self._written:
            self._written.add(place)
            ops.write_cache(*cache, _rows(ops, k), _rows(ops, v), group.slots)
        out = q.new_empty(q.shape[2], layer.num_heads, layer.value_dim, dtype=torch.float32)
        ops.attention(
            to_array(ops, out),
            _rows(ops, q),
            *cache,
            group.block_tables,
            batch.query_start,
            batch.context_lens,
            layer.scale,
            window=layer.window or 0,
            softcap=layer.softcap,
            sinks=layer.sinks,
        )
        return out[None]


def _rows(ops: Ops, x: Any) -> Array:
    """[1,H,T,D] as float32 [T,H,D]."""
    return to_array(ops, x[0].transpose(0, 1).to(torch.float32))


def window_of(allowed: Callable[..., Any], context_length: int) -> int | None:
    """The window of a mask function of transformers, None for all tokens before. Refuses masks of another kind.

    The function is asked for whole rows: at the start, at the end of the context, and between.
    """
    windows, widest = set(), 0
    zero = torch.zeros(1, dtype=torch.long)
    for position in sorted({0, 1, 5, 100, context_length // 2, context_length}):
        keys = torch.arange(position + 2)
        seen = torch.as_tensor(allowed(zero, zero, torch.tensor([position]), keys)).expand(len(keys)).nonzero()[:, 0]
        first, last = (int(seen[0]), int(seen[-1])) if len(seen) else (0, -1)
        if last != position or len(seen) != last - first + 1:
            raise Refused("its attention is not causal, or leaves tokens out")
        if first > 0:
            windows.add(last - first + 1)
        else:
            widest = max(widest, last + 1)
    if len(windows) > 1 or any(widest > window for window in windows):
        raise Refused("its attention is over chunks")
    return windows.pop() if windows else None
