"""The plain numpy truth of every op; `kernels.blocks` has that of quantized blocks.

Owns the meaning that the other kernel modules are held to: clear before fast, but fast enough to run a small model
where the compiled module is missing. Must not know: weights, layers, models, other kernel modules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tramontane.kernels.base import Array
from tramontane.kernels.blocks import dequantize
from tramontane.kernels.checks import FLOAT32, FLOATS, INT32, UINT8, check, check_attention, check_blocks, check_sample
from tramontane.kernels.coded import Coded, check_coded, decode_host

__all__ = ["ReferenceOps", "dequantize"]

Floats = NDArray[np.float32]

_BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
_STRIP = 1 << 17
"""Weights made float32 at a time: half a megabyte stays in a core's cache."""
_QUERY_ROWS = 128
"""Query rows whose scores are held at a time."""


def _float32(array: NDArray[Any]) -> Floats:
    """float32 values of a float32, float16 or bfloat16 array (the same array where it is float32)."""
    if array.dtype == _BFLOAT16:
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


ACTIVATIONS: Mapping[str, Callable[[Floats], Floats]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": _relu,
}


def _softmax(scores: Floats) -> Floats:
    """In place over the last axis; at least one score of each row is finite."""
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return scores


def _visible(positions: NDArray[np.int64], keys: NDArray[np.int64], window: int) -> NDArray[np.bool_]:
    """[n, m]: which key positions each query position sees."""
    ahead = positions[:, None] - keys[None, :]
    return (ahead >= 0) & (ahead < window) if window > 0 else ahead >= 0


def _attend(q: Floats, k: Floats, v: Floats, positions: NDArray[np.int64], start: int, window: int) -> Floats:
    """Attention of scaled queries [n, Hkv, G, D] over pages [B, Hkv, block, D] that start at position `start`."""
    heads, width = k.shape[1], k.shape[3]
    k = k.swapaxes(0, 1).reshape(heads, -1, width)
    v = v.swapaxes(0, 1).reshape(heads, -1, width)
    keys = np.arange(start, start + k.shape[1])
    out = np.empty_like(q)
    for a in range(0, len(q), _QUERY_ROWS):
        part = q[a : a + _QUERY_ROWS].transpose(1, 0, 2, 3)
        scores = part.reshape(heads, -1, width) @ k.swapaxes(1, 2)
        seen = _visible(positions[a : a + _QUERY_ROWS], keys, window)
        scores = np.where(seen[None, :, None, :], scores.reshape(*part.shape[:3], -1), np.float32(-np.inf))
        mixed = _softmax(scores).reshape(heads, -1, len(keys)) @ v
        out[a : a + _QUERY_ROWS] = mixed.reshape(part.shape).transpose(1, 0, 2, 3)
    return out


def _attend_tiled(q: Floats, k: Floats, v: Floats, positions: NDArray[np.int64], start: int, window: int) -> Floats:
    """The same with an online softmax over the pages in order (Milakov and Gimelshein, 2018).

    A row's products are of one shape [G, D] x [D, block] whatever else is computed, and a page that it does not see
    multiplies by one and adds zero: so its bits depend on its own context only.
    """
    size = k.shape[2]
    best = np.full(q.shape[:3], -np.inf, np.float32)
    total = np.zeros(q.shape[:3], np.float32)
    mixed = np.zeros(q.shape, np.float32)
    for page in range(len(k)):
        first = start + page * size
        seen = _visible(positions, np.arange(first, first + size), window)[:, None, None, :]
        scores = np.where(seen, q @ k[page].swapaxes(1, 2), np.float32(-np.inf))
        new = np.maximum(best, scores.max(axis=-1))
        finite = np.where(np.isneginf(new), np.float32(0), new)
        keep = np.exp(best - finite)
        weights = np.exp(scores - finite[..., None])
        total = total * keep + weights.sum(axis=-1)
        mixed = mixed * keep[..., None] + weights @ v[page]
        best = new
    mixed /= total[..., None]
    return mixed


def _draw(logits: Floats, temperature: float, top_k: int, top_p: float, min_p: float, uniform: float) -> int:
    """One row of `Ops.sample`; sums are in float64."""
    if temperature == 0:
        return int(np.argmax(logits))
    order = np.argsort(-logits, kind="stable")
    sorted_logits = logits[order].astype(np.float64)
    weights = np.exp((sorted_logits - sorted_logits[0]) / temperature)
    # In descending order each cut keeps a prefix.
    kept = len(order)
    if 0 < top_k < kept:
        kept = int(np.count_nonzero(sorted_logits >= sorted_logits[top_k - 1]))
    if top_p < 1:
        sums = np.cumsum(weights[:kept])
        kept = min(kept, int(np.searchsorted(sums, top_p * sums[-1], side="left")) + 1)
    kept = max(1, min(kept, int(np.count_nonzero(weights >= min_p))))
    sums = np.cumsum(weights[:kept])
    return int(order[min(int(np.searchsorted(sums, uniform * sums[-1], side="right")), kept - 1)])


class ReferenceOps:
    """Every op of `Ops` in numpy. `threads` is only what the caller asked for: numpy's BLAS has its own setting.

    Not deterministic, products go through BLAS, whose rounding differs with the number of rows; deterministic, each
    output is one product and one pairwise sum in numpy's fixed order.
    """

    name = "reference"
    device = "cpu"

    def __init__(self, threads: int = 1, deterministic: bool = False) -> None:
        self.threads = threads
        self.deterministic = deterministic

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        return np.empty(shape, _BFLOAT16 if dtype == "bfloat16" else dtype)

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Array:
        return np.zeros(shape, _BFLOAT16 if dtype == "bfloat16" else dtype)

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

    def rms_norm(self, out: Array, x: Array, weight: Array, eps: float) -> None:
        check("rms_norm", ("out", out, "T K", FLOAT32), ("x", x, "T K", FLOAT32), ("weight", weight, "K", FLOAT32))
        mean = np.square(x).mean(axis=-1, keepdims=True)
        np.divide(x, np.sqrt(mean + np.float32(eps)), out=out)
        out *= weight

    def add(self, out: Array, x: Array) -> None:
        if out.shape != x.shape:
            raise ValueError(f"add: out has shape {list(out.shape)}, x {list(x.shape)}")
        out += x

    def rope_angles(self, cos: Array, sin: Array, positions: Array, inv_freq: Array, scale: float) -> None:
        check(
            "rope_angles",
            ("cos", cos, "T half", FLOAT32),
            ("sin", sin, "T half", FLOAT32),
            ("positions", positions, "T", INT32),
            ("inv_freq", inv_freq, "half", FLOAT32),
        )
        angles = positions.astype(np.float32)[:, None] * inv_freq
        cos[...] = np.cos(angles.astype(np.float64)) * scale
        sin[...] = np.sin(angles.astype(np.float64)) * scale

    def rope(self, x: Array, cos: Array, sin: Array, interleaved: bool) -> None:
        check("rope", ("x", x, "T H D", FLOAT32), ("cos", cos, "T half", FLOAT32), ("sin", sin, "T half", FLOAT32))
        half = cos.shape[1]
        if 2 * half > x.shape[2]:
            raise ValueError(f"rope: {half} angles rotate {2 * half} elements, heads have {x.shape[2]}")
        if interleaved:
            a, b = x[:, :, 0 : 2 * half : 2], x[:, :, 1 : 2 * half : 2]
        else:
            a, b = x[:, :, :half], x[:, :, half : 2 * half]
        c, s = cos[:, None, :], sin[:, None, :]
        a[...], b[...] = a * c - b * s, b * c + a * s

    def write_cache(self, k_cache: Array, v_cache: Array, k: Array, v: Array, slots: Array) -> None:
        check(
            "write_cache",
            ("k_cache", k_cache, "blocks H size D", FLOATS),
            ("v_cache", v_cache, "blocks H size D", FLOATS),
            ("k", k, "T H D", FLOAT32),
            ("v", v, "T H D", FLOAT32),
            ("slots", slots, "T", INT32),
        )
        blocks, offsets = np.divmod(slots, np.int32(k_cache.shape[2]))
        with np.errstate(over="ignore"):  # beyond float16 is inf
            k_cache[blocks, :, offsets] = k.astype(k_cache.dtype)
            v_cache[blocks, :, offsets] = v.astype(v_cache.dtype)

    def copy_blocks(self, cache: Array, source: Array, target: Array) -> None:
        check(
            "copy_blocks",
            ("cache", cache, "blocks H size D", FLOATS),
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
    ) -> None:
        check_attention(out, q, k_cache, v_cache, block_tables, query_start, context_lens)
        _, heads, size, width = k_cache.shape
        attend = _attend_tiled if self.deterministic else _attend
        for s, context in enumerate(context_lens.tolist()):
            a, b = int(query_start[s]), int(query_start[s + 1])
            if a == b:
                continue
            first = max(0, context - (b - a) - window + 1) // size if window > 0 else 0
            table = block_tables[s, first : -(-context // size)]
            keys, values = _float32(k_cache[table]), _float32(v_cache[table])
            if context % size:  # what no token has written yet may be anything, NaN included
                keys[-1, :, context % size :] = 0
                values[-1, :, context % size :] = 0
            queries = (q[a:b] * np.float32(scale)).reshape(b - a, heads, -1, width)
            positions = np.arange(context - (b - a), context)
            out[a:b] = attend(queries, keys, values, positions, first * size, window).reshape(b - a, -1, width)

    def gated_activation(self, out: Array, gate: Array, up: Array, kind: str) -> None:
        check(
            "gated_activation",
            ("out", out, "T N", FLOAT32),
            ("gate", gate, "T N", FLOAT32),
            ("up", up, "T N", FLOAT32),
        )
        if kind not in ACTIVATIONS:
            raise ValueError(f"gated_activation: kind {kind!r} is none of {', '.join(ACTIVATIONS)}")
        np.multiply(ACTIVATIONS[kind](gate), up, out=out)

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

    def log_softmax(self, out: Array, logits: Array) -> None:
        check("log_softmax", ("out", out, "R V", FLOAT32), ("logits", logits, "R V", FLOAT32))
        if not len(logits):
            return
        np.subtract(logits, logits.max(axis=-1, keepdims=True), out=out)
        out -= np.log(np.exp(out).sum(axis=-1, keepdims=True))

    def sample(
        self, tokens: Array, logits: Array, temperature: Array, top_k: Array, top_p: Array, min_p: Array, uniform: Array
    ) -> None:
        check_sample(tokens, logits, temperature, top_k, top_p, min_p, uniform)
        columns = (column.tolist() for column in (temperature, top_k, top_p, min_p, uniform))
        for r, parameters in enumerate(zip(*columns, strict=True)):
            tokens[r] = _draw(logits[r], *parameters)


def _strips(weight: NDArray[Any], rows: int) -> Iterator[tuple[int, NDArray[Any]]]:
    """(first row, rows of the weight), about `rows` at a time."""
    step = max(1, rows)
    for start in range(0, len(weight), step):
        yield start, weight[start : start + step]
