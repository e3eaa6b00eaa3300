"""The plain numpy truth of every op; `kernels.blocks` has that of quantized blocks.

Owns the meaning that the other kernel modules are held to: clear before fast, but fast enough to run a small model
where the compiled module is missing. Must not know: weights, layers, models, other kernel modules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tramontane.kernels import cells
from tramontane.kernels.base import Array
from tramontane.kernels.blocks import dequantize
from tramontane.kernels.checks import (
    CACHES,
    FLOAT32,
    FLOATS,
    INT32,
    UINT8,
    check,
    check_attention,
    check_blocks,
    check_experts,
    check_gate,
    check_groups,
    check_mask,
    check_norm,
    check_place,
    check_read,
    check_route,
    check_same,
    check_sample,
    check_swap,
    check_write,
)
from tramontane.kernels.coded import Coded, check_coded, decode_host
from tramontane.kernels.recurrence import RecurrentOps
from tramontane.kernels.stored import StoredOps
from tramontane.records import dataclass

__all__ = ["ReferenceOps", "dequantize"]

Floats = NDArray[np.float32]

_STRIP = 1 << 17
"""Weights made float32 at a time: half a megabyte stays in a core's cache."""
_QUERY_ROWS = 128
"""Query rows whose scores are held at a time."""


def _float32(array: NDArray[Any]) -> Floats:
    """float32 values of a float32, float16 or bfloat16 array (the same array where it is float32)."""
    if array.dtype == cells.BFLOAT16:
        # A bfloat16 is the upper half of a float32.
        return (np.ascontiguousarray(array).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32, copy=False)


def _erf(x: Floats) -> Floats:
    return np.fromiter(map(math.erf, x.ravel().tolist()), np.float32, x.size).reshape(x.shape)


def _silu(x: Floats) -> Floats:
    with np.errstate(over="ignore"):  # exp(-x) is inf far below zero, and the result -0
        y: Floats = x / (1 + np.exp(-x))
    return y


def _gelu(x: Floats) -> Floats:
    y: Floats = np.float32(0.5) * x * (1 + _erf(x * np.float32(math.sqrt(0.5))))
    return y


def _gelu_tanh(x: Floats) -> Floats:
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
    y: Floats = np.float32(0.5) * x * (1 + np.tanh(inner))
    return y


def _relu(x: Floats) -> Floats:
    y: Floats = np.maximum(x, np.float32(0))
    return y


def _relu_squared(x: Floats) -> Floats:
    y: Floats = np.square(_relu(x))
    return y


def _gelu_quick(x: Floats) -> Floats:
    y: Floats = x * _sigmoid(np.float32(1.702) * x)
    return y


def _sigmoid(x: Floats) -> Floats:
    with np.errstate(over="ignore"):
        y: Floats = np.float32(1) / (np.float32(1) + np.exp(-x))
    return y


ACTIVATIONS: Mapping[str, Callable[[Floats], Floats]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "gelu_quick": _gelu_quick,
    "sigmoid": _sigmoid,
    "relu": _relu,
    "relu_squared": _relu_squared,
}


@dataclass(frozen=True)
class _Scoring:
    """What `Ops.attention` makes of a sequence's scores besides their scale. Heads are [Hkv, G]."""

    context: int
    window: int
    causal: bool
    softcap: float
    sinks: Floats | None
    slopes: Floats | None

    def __call__(self, scores: Floats, positions: NDArray[np.int64], keys: NDArray[np.int64]) -> Floats:
        """scores [n, Hkv, G, m] of query positions [n] and key positions [m]; -inf where a key is not seen."""
        ahead = (positions[:, None] - keys[None, :])[:, None, None, :]
        if self.softcap > 0:
            scores = np.float32(self.softcap) * np.tanh(scores / np.float32(self.softcap))
        if self.slopes is not None:
            scores = scores - self.slopes[:, :, None] * ahead.astype(np.float32)
        seen = ahead >= 0 if self.causal else np.broadcast_to(keys < self.context, ahead.shape)
        if self.window > 0:
            seen = seen & (np.abs(ahead) < self.window)
        result: Floats = np.where(seen, scores, np.float32(-np.inf))
        return result


def _attend(
    q: Floats, k: Floats, v: Floats, positions: NDArray[np.int64], start: int, scoring: _Scoring
) -> tuple[Floats, Floats]:
    """Attention of scaled queries [n, Hkv, G, D] over pages [B, Hkv, block, D] that start at position `start`, and the
    logarithms of sums [n, Hkv, G]."""
    heads = k.shape[1]
    k = k.swapaxes(0, 1).reshape(heads, -1, k.shape[3])
    v = v.swapaxes(0, 1).reshape(heads, -1, v.shape[3])
    keys = np.arange(start, start + k.shape[1])
    out, totals = np.empty((*q.shape[:3], v.shape[2]), np.float32), np.empty(q.shape[:3], np.float32)
    for a in range(0, len(q), _QUERY_ROWS):
        part = q[a : a + _QUERY_ROWS].transpose(1, 0, 2, 3)
        scores = (part.reshape(heads, -1, part.shape[3]) @ k.swapaxes(1, 2)).reshape(*part.shape[:3], -1)
        scores = scoring(scores.transpose(1, 0, 2, 3), positions[a : a + _QUERY_ROWS], keys)
        best = scores.max(axis=-1, keepdims=True)
        if scoring.sinks is not None:
            best = np.maximum(best, scoring.sinks[:, :, None])
        scores = np.exp(scores - best)
        total = scores.sum(axis=-1, keepdims=True)
        if scoring.sinks is not None:
            total += np.exp(scoring.sinks[:, :, None] - best)
        totals[a : a + _QUERY_ROWS] = (best + np.log(total))[..., 0]
        weights = (scores / total).transpose(1, 0, 2, 3).reshape(heads, -1, len(keys))
        out[a : a + _QUERY_ROWS] = (weights @ v).reshape(*part.shape[:3], -1).transpose(1, 0, 2, 3)
    return out, totals


def _attend_tiled(
    q: Floats, k: Floats, v: Floats, positions: NDArray[np.int64], start: int, scoring: _Scoring
) -> tuple[Floats, Floats]:
    """The same with an online softmax over the pages in order (Milakov and Gimelshein, 2018).

    A row's products are of one shape [G, D] x [D, block] whatever else is computed, and a page that it does not see
    multiplies by one and adds zero: so its bits depend on its own context only.
    """
    size = k.shape[2]
    best = np.full(q.shape[:3], -np.inf, np.float32)
    total = np.zeros(q.shape[:3], np.float32)
    mixed = np.zeros((*q.shape[:3], v.shape[3]), np.float32)
    if scoring.sinks is not None:
        best[...], total[...] = scoring.sinks, 1
    for page in range(len(k)):
        first = start + page * size
        scores = scoring(q @ k[page].swapaxes(1, 2), positions, np.arange(first, first + size))
        new = np.maximum(best, scores.max(axis=-1))
        finite = np.where(np.isneginf(new), np.float32(0), new)
        keep = np.exp(best - finite)
        weights = np.exp(scores - finite[..., None])
        total = total * keep + weights.sum(axis=-1)
        mixed = mixed * keep[..., None] + weights @ v[page]
        best = new
    mixed /= total[..., None]
    return mixed, best + np.log(total)


def _best(values: Floats, count: int) -> NDArray[np.int64]:
    """Places of the `count` highest of each row, the highest first, the lower place on ties."""
    order: NDArray[np.int64] = np.argsort(-values, axis=-1, kind="stable")
    return order[:, :count]


def _group_mask(choice: Floats, groups: int, top_groups: int, group_score: str) -> NDArray[np.bool_]:
    """[T,E]: whether an expert's group is among the best."""
    each = choice.reshape(len(choice), groups, -1)
    worth = np.sort(each, axis=-1)[:, :, -1 if group_score == "max" else slice(-2, None)]
    worth = worth if worth.ndim == 2 else worth.sum(axis=-1, dtype=np.float32)
    kept = np.zeros(worth.shape, bool)
    np.put_along_axis(kept, _best(worth, top_groups), True, axis=1)
    return np.repeat(kept, each.shape[2], axis=1)


def _sparsemixer(logits: Floats, jitter: float) -> tuple[Floats, NDArray[np.int64]]:
    """Weights and places [T,2]; see `Ops.route`."""
    weights, places, left = [], [], logits
    for _ in range(2):
        top = left.max(axis=-1, keepdims=True)
        with np.errstate(invalid="ignore"):  # what has been chosen is infinitely far; zeros are not far from zero
            far = (top - left) / np.maximum(np.abs(left), top) > 2 * jitter
        scores = np.where(far, np.float32(-np.inf), left)
        place = _best(left, 1)
        exps = np.exp(scores - top)
        weights.append(np.take_along_axis(exps / exps.sum(axis=-1, keepdims=True), place, axis=1))
        places.append(place)
        left = left.copy()
        np.put_along_axis(left, place, -np.inf, axis=1)
    return np.concatenate(weights, axis=1), np.concatenate(places, axis=1)


def _draw(
    logits: Floats,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    uniform: float,
    typical_p: float,
    xtc_threshold: float,
) -> int:
    """One row of `Ops.sample`; sums are in float64."""
    if temperature == 0:
        return int(np.argmax(logits))
    order = np.argsort(-logits, kind="stable")
    sorted_logits = logits[order].astype(np.float64)
    weights = np.exp((sorted_logits - sorted_logits[0]) / temperature)
    # In descending order each cut keeps a range; what is masked weighs nothing, and is in none.
    first, kept = 0, max(1, int(np.count_nonzero(weights)))
    if 0 < top_k < kept:
        kept = int(np.count_nonzero(sorted_logits >= sorted_logits[top_k - 1]))
    if typical_p < 1:
        first, kept = _typical(weights[:kept], typical_p)
    if top_p < 1:
        sums = np.cumsum(weights[first:kept])
        kept = min(kept, first + int(np.searchsorted(sums, top_p * sums[-1], side="left")) + 1)
    kept = max(first + 1, min(kept, int(np.count_nonzero(weights >= min_p * weights[first]))))
    top = int(np.count_nonzero(weights[first:kept] >= xtc_threshold * weights[first:kept].sum()))
    first += max(0, top - 1)
    sums = np.cumsum(weights[first:kept])
    return int(order[min(first + int(np.searchsorted(sums, uniform * sums[-1], side="right")), kept - 1)])


def _typical(weights: NDArray[np.float64], mass: float) -> tuple[int, int]:
    """The range of the typical ones among weights in descending order."""
    p = weights / weights.sum()
    with np.errstate(divide="ignore"):
        information = -np.log(p)
    distance = np.abs(information - (p[p > 0] * information[p > 0]).sum())
    nearest = np.argsort(distance, kind="stable")
    sums = np.cumsum(p[nearest])
    last = min(int(np.searchsorted(sums, mass * sums[-1], side="left")), len(p) - 1)
    (kept,) = np.nonzero(distance <= distance[nearest[last]])
    return int(kept[0]), int(kept[-1]) + 1


class ReferenceOps(StoredOps, RecurrentOps):
    """Every op of `Ops` in numpy. `threads` is only what the caller asked for: numpy's BLAS has its own setting.

    Not deterministic, products go through BLAS, whose rounding differs with the number of rows; deterministic, each
    output is one product and one pairwise sum in numpy's fixed order.
    """

    name = "reference"
    device = "cpu"

    def __init__(self, threads: int = 1, deterministic: bool = False) -> None:
        self.threads = threads
        self.processors: Sequence[int] = ()
        self.deterministic = deterministic

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        return np.empty(shape, cells.numpy_dtype(dtype))

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Array:
        return np.zeros(shape, cells.numpy_dtype(dtype))

    def from_host(self, array: NDArray[Any]) -> Array:
        return np.ascontiguousarray(array)

    def to_host(self, array: Array) -> NDArray[Any]:
        host: NDArray[Any] = array
        return host

    def view(self, array: Array, shape: tuple[int, ...]) -> Array:
        return array.reshape(-1)[: math.prod(shape)].reshape(shape)

    def synchronize(self) -> None:
        """Nothing to wait for: numpy computes at once."""

    def free_memory(self) -> int | None:
        return None

    def matmul(self, out: Array, x: Array, weight: Array, bias: Array | None = None) -> None:
        check(
            "matmul",
            ("out", out, "T N", FLOAT32),
            ("x", x, "T K", FLOAT32),
            ("weight", weight, "N K", FLOATS),
            ("bias", bias, "N", FLOAT32),
        )
        rows = len(weight) if weight.dtype == np.float32 and not self.deterministic else _STRIP // max(1, x.shape[1])
        self._product(out, x, _float32, weight, rows, bias)

    def matmul_blocks(self, out: Array, x: Array, blocks: Array, format: str, bias: Array | None = None) -> None:
        check(
            "matmul_blocks",
            ("out", out, "T N", FLOAT32),
            ("x", x, "T K", FLOAT32),
            ("blocks", blocks, "N bytes", UINT8),
            ("bias", bias, "N", FLOAT32),
        )
        check_blocks("matmul_blocks", blocks, format, x.shape[1])
        self._product(out, x, lambda part: dequantize(format, part), blocks, _STRIP // max(1, x.shape[1]), bias)

    def _product(
        self,
        out: Array,
        x: Array,
        decode: Callable[[NDArray[Any]], Floats],
        weight: Array,
        strip_rows: int,
        bias: Array | None,
    ) -> None:
        """out = x @ decode(weight).T + bias, `strip_rows` rows of the weight at a time."""
        if not len(x):
            return
        for start, strip in _strips(weight, strip_rows):
            values = decode(strip)
            part = out[:, start : start + len(values)]
            if self.deterministic:
                for t in range(len(x)):
                    np.add.reduce(values * x[t], axis=-1, out=part[t])
            else:
                np.matmul(x, values.T, out=part)
        if bias is not None:
            out += bias

    def rows(self, out: Array, ids: Array, weight: Array) -> None:
        check("rows", ("out", out, "R K", FLOAT32), ("ids", ids, "R", INT32), ("weight", weight, "V K", FLOATS))
        out[...] = _float32(weight[ids])

    def rows_blocks(self, out: Array, ids: Array, blocks: Array, format: str) -> None:
        check(
            "rows_blocks",
            ("out", out, "R K", FLOAT32),
            ("ids", ids, "R", INT32),
            ("blocks", blocks, "V bytes", UINT8),
        )
        check_blocks("rows_blocks", blocks, format, out.shape[1])
        out[...] = dequantize(format, blocks[ids])

    def matmul_coded(self, out: Array, x: Array, coded: Coded, bias: Array | None = None) -> None:
        check_coded(
            "matmul_coded",
            coded,
            ("out", out, "T N", FLOAT32),
            ("x", x, "T K", FLOAT32),
            ("bias", bias, "N", FLOAT32),
        )
        if coded.order is not None:
            x = x[:, coded.order]
        strip = _STRIP // coded.columns
        self._product(out, x, lambda rows: decode_host(coded, rows), range(coded.shape[0]), strip, bias)

    def rows_coded(self, out: Array, ids: Array, coded: Coded) -> None:
        check_coded("rows_coded", coded, ("out", out, "R K", FLOAT32), ("ids", ids, "R", INT32))
        out[:, slice(None) if coded.order is None else coded.order] = decode_host(coded, ids)

    def matmul_experts(
        self,
        out: Array,
        x: Array,
        offsets: Array | None,
        weights: Sequence[Array],
        format: str | None,
        bias: Array | None = None,
    ) -> None:
        bounds = [] if offsets is None else offsets.tolist()
        for e, rows in check_experts(out, x, offsets, bounds, weights, bias):
            own = None if bias is None else bias[e]
            if format is None:
                self.matmul(out[rows], x[rows], weights[e], own)
            else:
                self.matmul_blocks(out[rows], x[rows], weights[e], format, own)

    def rms_norm(self, out: Array, x: Array, weight: Array | None, eps: float) -> None:
        check_norm("rms_norm", out, x, weight)
        mean = np.square(x).mean(axis=-1, keepdims=True)
        np.divide(x, np.sqrt(mean + np.float32(eps)), out=out)
        if weight is not None:
            _by_row(out, weight)[...] *= weight

    def layer_norm(self, out: Array, x: Array, weight: Array | None, bias: Array | None, eps: float) -> None:
        check_norm("layer_norm", out, x, weight, bias)
        np.subtract(x, x.mean(axis=-1, keepdims=True), out=out)
        variance = np.square(out).mean(axis=-1, keepdims=True)
        np.divide(out, np.sqrt(variance + np.float32(eps)), out=out)
        if weight is not None:
            _by_row(out, weight)[...] *= weight
        if bias is not None:
            _by_row(out, bias)[...] += bias

    def add(self, out: Array, x: Array, factor: float = 1.0) -> None:
        check_same("add", out=out, x=x)
        out += x if factor == 1.0 else np.float32(factor) * x

    def add_gated(self, out: Array, x: Array, gate: Array) -> None:
        check_gate(out, x, gate)
        out += _sigmoid(gate) * x

    def multiply(self, out: Array, x: Array) -> None:
        check("multiply", ("out", out, "T K", FLOAT32), ("x", x, "T K", FLOAT32))
        out *= x

    def scale(self, x: Array, factor: float) -> None:
        check_same("scale", x=x)
        x *= np.float32(factor)

    def clip(self, x: Array, limit: float) -> None:
        check_same("clip", x=x)
        np.clip(x, -np.float32(limit), np.float32(limit), out=x)

    def softcap(self, x: Array, cap: float) -> None:
        check_same("softcap", x=x)
        x /= np.float32(cap)
        np.tanh(x, out=x)
        x *= np.float32(cap)

    def shift(self, x: Array, by: Array) -> None:
        check("shift", ("x", x, "T K", FLOAT32), ("by", by, "K", FLOAT32))
        x += by

    def place(self, out: Array, x: Array, to: int, start: int, width: int) -> None:
        check_place(out, x, to, start, width)
        out[:, :, to : to + width] = x[:, :, start : start + width]

    def swap(self, out: Array, x: Array, to: int, start: int, width: int) -> None:
        check_swap(out, x, to, start, width)
        out[:, :, to : to + width] = x[:, :, start : start + width].swapaxes(0, 1)

    def copy(self, out: Array, x: Array) -> None:
        check_same("copy", out=out, x=x)
        out[...] = x

    def part(self, array: Array, start: int, stop: int) -> Array:
        return array[start:stop]

    def rope_angles(self, cos: Array, sin: Array, positions: Array, inv_freq: Array, scale: float) -> None:
        check(
            "rope_angles",
            ("cos", cos, "T half", FLOAT32),
            ("sin", sin, "T half", FLOAT32),
            ("positions", positions, "T", INT32),
            ("inv_freq", inv_freq, "half" if inv_freq.ndim == 1 else "T half", FLOAT32),
        )
        angles = positions.astype(np.float32)[:, None] * inv_freq
        cos[...] = np.cos(angles.astype(np.float64)) * scale
        sin[...] = np.sin(angles.astype(np.float64)) * scale

    def rope(self, x: Array, cos: Array, sin: Array, interleaved: bool, offset: int = 0) -> None:
        check("rope", ("x", x, "T H D", FLOAT32), ("cos", cos, "T half", FLOAT32), ("sin", sin, "T half", FLOAT32))
        half = cos.shape[1]
        if not 0 <= offset <= x.shape[2] - 2 * half:
            raise ValueError(f"rope: {2 * half} elements from {offset} on do not lie in heads of {x.shape[2]}")
        x = x[:, :, offset:]
        if interleaved:
            a, b = x[:, :, 0 : 2 * half : 2], x[:, :, 1 : 2 * half : 2]
        else:
            a, b = x[:, :, :half], x[:, :, half : 2 * half]
        c, s = cos[:, None, :], sin[:, None, :]
        a[...], b[...] = a * c - b * s, b * c + a * s

    def write_cache(self, k_cache: Array, v_cache: Array, k: Array, v: Array, slots: Array) -> None:
        check_write(k_cache, v_cache, k, v, slots)
        cells.write_keys(k_cache, k, slots)
        cells.write_values(v_cache, v, slots)

    def read_cache(self, k: Array, v: Array, k_cache: Array, v_cache: Array, table: Array, first: int) -> None:
        check_read(k, v, k_cache, v_cache, table, first)
        if not len(k):
            return
        size, tokens = k_cache.shape[3], slice(first % k_cache.shape[3], None)
        blocks = table[first // size : -(-(first + len(k)) // size)]
        keys, values = cells.read_keys(k_cache[blocks], k.shape[2]), cells.read_values(v_cache[blocks], v.shape[2])
        if cells.cells_of(k_cache).top:
            keys = cells.rotate(keys)
        for out, x in ((k, keys), (v, values)):
            out[...] = x.swapaxes(1, 2).reshape(-1, *out.shape[1:])[tokens][: len(out)]

    def copy_blocks(self, cache: Array, source: Array, target: Array) -> None:
        check(
            "copy_blocks",
            ("cache", cache, "blocks H size D", CACHES),
            ("source", source, "n", INT32),
            ("target", target, "n", INT32),
        )
        cache[target] = cache[source]

    def attention(
        self,
        out: Array,
        q: Array,
        k_cache: Array,
        v_cache: Array,
        block_tables: Array,
        query_start: Array,
        context_lens: Array,
        scale: float,
        window: int = 0,
        causal: bool = True,
        softcap: float = 0.0,
        sinks: Array | None = None,
        slopes: Array | None = None,
        latent: bool = False,
        totals: Array | None = None,
        joins: bool = False,
    ) -> None:
        lists = (block_tables, query_start, context_lens)
        check_attention(out, q, k_cache, v_cache, *lists, causal, sinks, slopes, latent, totals, joins)
        heads, size, width = k_cache.shape[1], k_cache.shape[3], q.shape[2]
        if cells.cells_of(k_cache).top and not latent:
            q = cells.rotate(q)
        by_head = [None if each is None else each.reshape(heads, -1) for each in (sinks, slopes)]
        attend = _attend_tiled if self.deterministic else _attend
        for s, context in enumerate(context_lens.tolist()):
            a, b = int(query_start[s]), int(query_start[s + 1])
            if a == b:
                continue
            first = max(0, context - (b - a) - window + 1) // size if window > 0 else 0
            table = block_tables[s, first : -(-context // size)]
            pages, value_width = (k_cache[table], v_cache[table]), out.shape[2]
            if latent:
                keys, values = cells.read_latent(*pages, value_width, width - value_width)
            else:
                keys, values = cells.read_keys(pages[0], width), cells.read_values(pages[1], value_width)
            if context % size:  # what no token has written yet may be anything, NaN included
                keys[-1, :, context % size :] = 0
                values[-1, :, context % size :] = 0
            queries = (q[a:b] * np.float32(scale)).reshape(b - a, heads, -1, width)
            positions = np.arange(context - (b - a), context)
            scoring = _Scoring(context, window, causal, softcap, *by_head)
            mixed, total = attend(queries, keys, values, positions, first * size, scoring)
            mixed, total = mixed.reshape(b - a, -1, out.shape[2]), total.reshape(b - a, -1)
            if joins and totals is not None:
                before, total = totals[a:b], np.logaddexp(totals[a:b], total)
                here = np.float32(1) - np.exp(before - total)
                mixed = out[a:b] + (mixed - out[a:b]) * here[..., None]
            out[a:b] = mixed
            if totals is not None:
                totals[a:b] = total

    def activation(self, out: Array, x: Array, kind: str) -> None:
        check("activation", ("out", out, "T N", FLOAT32), ("x", x, "T N", FLOAT32))
        out[...] = _activation("activation", kind)(x)

    def gated_activation(self, out: Array, gate: Array, up: Array, kind: str, limit: float = 0.0) -> None:
        check(
            "gated_activation",
            ("out", out, "T N", FLOAT32),
            ("gate", gate, "T N", FLOAT32),
            ("up", up, "T N", FLOAT32),
        )
        if kind == "swiglu_clamped":
            bound = np.float32(limit)
            np.multiply(_gelu_quick(np.minimum(gate, bound)), np.clip(up, -bound, bound) + np.float32(1), out=out)
        else:
            np.multiply(_activation("gated_activation", kind)(gate), up, out=out)

    def route(
        self,
        weights: Array,
        experts: Array,
        logits: Array,
        correction: Array | None,
        score: str,
        normalize: bool,
        scale: float,
        groups: int = 1,
        top_groups: int = 1,
        group_score: str = "max",
        jitter: float = 0.0,
    ) -> None:
        check_route(weights, experts, logits, correction, score, groups, top_groups, group_score)
        if not len(logits):
            return
        if score == "sparsemixer":
            chosen, places = _sparsemixer(logits, jitter)
        else:
            scores = _softmax(logits) if score == "softmax" else _sigmoid(logits)
            choice = scores if correction is None else scores + correction
            if groups > 1:
                allowed = _group_mask(choice, groups, top_groups, group_score)
                choice = np.where(allowed, choice, np.float32(-np.inf))
            places = _best(choice, experts.shape[1])
            chosen = np.take_along_axis(scores, places, axis=1)
        if normalize:
            chosen = chosen / (chosen.sum(axis=-1, keepdims=True) + np.float32(1e-20))
        weights[...] = chosen * np.float32(scale)
        experts[...] = places

    def group_rows(self, rows: Array, slots: Array, offsets: Array, experts: Array) -> None:
        check_groups(rows, slots, offsets, experts)
        order = np.argsort(experts.reshape(-1), kind="stable")
        rows[...] = order // max(1, experts.shape[1])
        slots.reshape(-1)[order] = np.arange(len(order), dtype=np.int32)
        offsets[0] = 0
        np.cumsum(np.bincount(experts.reshape(-1), minlength=len(offsets) - 1), out=offsets[1:])

    def combine(self, out: Array, x: Array, slots: Array, weights: Array) -> None:
        check(
            "combine",
            ("out", out, "T K", FLOAT32),
            ("x", x, "places K", FLOAT32),
            ("slots", slots, "T k", INT32),
            ("weights", weights, "T k", FLOAT32),
        )
        out[...] = 0
        for j in range(slots.shape[1]):
            out += weights[:, j : j + 1] * x[slots[:, j]]

    def take_rows(self, out: Array, x: Array, rows: Array) -> None:
        check("take_rows", ("out", out, "R K", FLOAT32), ("x", x, "T K", FLOAT32), ("rows", rows, "R", INT32))
        out[...] = x[rows]

    def apply_edits(self, logits: Array, rows: Array, ids: Array, penalties: Array, biases: Array) -> None:
        check(
            "apply_edits",
            ("logits", logits, "R V", FLOAT32),
            ("rows", rows, "E", INT32),
            ("ids", ids, "E", INT32),
            ("penalties", penalties, "E", FLOAT32),
            ("biases", biases, "E", FLOAT32),
        )
        values = logits[rows, ids]
        logits[rows, ids] = np.where(values > 0, values / penalties, values * penalties) + biases

    def mask(self, logits: Array, rows: Array, masks: Array) -> None:
        check_mask(logits, rows, masks)
        bits = np.unpackbits(masks.astype("<i4").view(np.uint8), axis=1, bitorder="little")
        logits[rows] = np.where(bits[:, : logits.shape[1]], logits[rows], np.float32(-np.inf))

    def log_softmax(self, out: Array, logits: Array) -> None:
        check("log_softmax", ("out", out, "R V", FLOAT32), ("logits", logits, "R V", FLOAT32))
        if not len(logits):
            return
        np.subtract(logits, logits.max(axis=-1, keepdims=True), out=out)
        out -= np.log(np.exp(out).sum(axis=-1, keepdims=True))

    def sample(
        self,
        tokens: Array,
        logits: Array,
        temperature: Array,
        top_k: Array,
        top_p: Array,
        min_p: Array,
        uniform: Array,
        typical_p: Array | None = None,
        xtc_threshold: Array | None = None,
    ) -> None:
        check_sample(tokens, logits, temperature, top_k, top_p, min_p, uniform, typical_p, xtc_threshold)
        typical_p, xtc_threshold = (np.ones(len(logits)) if c is None else c for c in (typical_p, xtc_threshold))
        columns = (temperature, top_k, top_p, min_p, uniform, typical_p, xtc_threshold)
        for r, parameters in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
            tokens[r] = _draw(logits[r], *parameters)


def _activation(op: str, kind: str) -> Callable[[Floats], Floats]:
    if kind not in ACTIVATIONS:
        raise ValueError(f"{op}: kind {kind!r} is none of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[kind]


def _by_row(x: Floats, weight: Floats) -> Floats:
    """x [T,K] so that a weight [K], or [W,K] for rows t % W, lies over it."""
    return x if weight.ndim == 1 else x.reshape(len(x) // len(weight), *weight.shape)


def _softmax(logits: Floats) -> Floats:
    exps = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: Floats = exps / exps.sum(axis=-1, keepdims=True)
    return result


def _strips(weight: NDArray[Any], rows: int) -> Iterator[tuple[int, NDArray[Any]]]:
    """(first row, rows of the weight), about `rows` at a time."""
    step = max(1, rows)
    for start in range(0, len(weight), step):
        yield start, weight[start : start + step]
