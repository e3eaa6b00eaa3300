"""What ops must compute, in float64 or by the letter of a definition; test_oracles.py holds these to other projects."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tramontane.kernels import BLOCKS

Floats = NDArray[Any]

TILED = (
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ2_S",
    "IQ3_XXS",
    "IQ3_S",
    "IQ4_NL",
    "IQ4_XS",
    "TQ2_0",
    "MXFP4",
)
"""The block formats that the compiled module keeps in tiles."""

# Where the float16 fields of a block begin; the formats that are missing have no such field.
_HALVES = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "Q1_0", "Q2_0", "IQ4_NL", "IQ4_XS", "IQ1_S"), (0,)),
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q8_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}


def random_blocks(rng: np.random.Generator, format: str, rows: int, columns: int) -> NDArray[np.uint8]:
    """Any bytes but for the scales, which are finite and of both signs, some zero, some subnormal."""
    layout = BLOCKS[format]
    count = columns // layout.elements
    blocks = rng.integers(0, 256, (rows * count, layout.nbytes), dtype=np.uint8)

    def halves() -> NDArray[np.uint8]:
        scales = (rng.standard_normal(len(blocks)) * 0.01).astype(np.float16)
        scales[rng.random(len(blocks)) < 0.05] = 0
        scales[rng.random(len(blocks)) < 0.05] = np.float16(6e-8)
        return scales.view(np.uint8).reshape(-1, 2)

    for start in _HALVES.get(format, ()):
        blocks[:, start : start + 2] = halves()
    if format == "MXFP4":  # an exponent
        blocks[:, 0] = rng.integers(123, 128, len(blocks))
    if format == "Q8_K":
        blocks[:, :4] = rng.standard_normal(len(blocks)).astype(np.float32).view(np.uint8).reshape(-1, 4)
    if format == "IQ1_M":  # a nibble of the half on top of each of the last four words
        for i in range(4):
            nibble = halves()[:, i // 2] >> 4 * (i % 2) & 15
            blocks[:, 49 + 2 * i] = (blocks[:, 49 + 2 * i] & 15) | nibble << 4
        blocks[:, 55] &= 0xBF  # a small exponent
    return blocks.reshape(rows, count * layout.nbytes)


def dequantized(format: str, block: bytes) -> list[float]:
    """The formats that the gguf package does not dequantize, by their definition in ggml-quants.c, in Python floats."""
    if format == "Q8_K":
        return [struct.unpack("<f", block[:4])[0] * q for q in struct.unpack("256b", block[4:260])]
    d = struct.unpack("<e", block[:2])[0]
    if format == "Q8_1":
        return [d * q for q in struct.unpack("32b", block[4:])]
    if format == "Q1_0":
        return [d if block[2 + j // 8] & 1 << j % 8 else -d for j in range(128)]
    assert format == "Q2_0"
    return [((block[2 + j // 4] >> j % 4 * 2 & 3) - 1) * d for j in range(64)]


def rms_norm(x: Floats, weight: Floats | None, eps: float) -> Floats:
    """weight [K], or [W,K] for rows t % W."""
    wide = x.astype(np.float64)
    return _weighted(wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + eps), weight, None)


def layer_norm(x: Floats, weight: Floats | None, bias: Floats | None, eps: float) -> Floats:
    wide = x.astype(np.float64)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    return _weighted(centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps), weight, bias)


def _weighted(x: Floats, weight: Floats | None, bias: Floats | None) -> Floats:
    def by_row(rows: Floats) -> Floats:
        return np.atleast_2d(rows)[np.arange(len(x)) % len(np.atleast_2d(rows))]

    return x * (1 if weight is None else by_row(weight)) + (0 if bias is None else by_row(bias))


def rope(x: Floats, positions: NDArray[Any], inv_freq: Floats, interleaved: bool, scale: float = 1.0) -> Floats:
    """Pairs as complex numbers, turned by e^(i * position * frequency)."""
    half = len(inv_freq)
    angles = (positions.astype(np.float32)[:, None] * inv_freq).astype(np.float64)
    turn = scale * np.exp(1j * angles)[:, None, :]
    wide = x.astype(np.float64)
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
    )
    turned = (wide[..., first] + 1j * wide[..., second]) * turn
    wide[..., first], wide[..., second] = turned.real, turned.imag
    return wide


def attention(
    q: Floats,
    k: Floats,
    v: Floats,
    scale: float,
    window: int = 0,
    causal: bool = True,
    softcap: float = 0.0,
    sinks: Floats | None = None,
    slopes: Floats | None = None,
) -> Floats:
    """One sequence: the last len(q) of len(k) positions ask; q [n,Hq,D], k [L,Hkv,D], v [L,Hkv,Dv]."""
    n, length = len(q), len(k)
    shared = q.shape[1] // k.shape[1]
    k, v = (np.repeat(a.astype(np.float64), shared, axis=1) for a in (k, v))
    scores = np.einsum("nhd,lhd->hnl", q.astype(np.float64), k) * scale
    ahead = np.arange(length - n, length)[:, None] - np.arange(length)[None, :]
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    if slopes is not None:
        scores = scores - slopes[:, None, None] * ahead
    seen = ((ahead >= 0) | (not causal)) & ((np.abs(ahead) < window) if window else True)
    scores = np.where(seen, scores, -np.inf)
    if sinks is not None:
        scores = np.concatenate((scores, np.tile(sinks[:, None, None], (1, n, 1))), axis=-1)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = (weights / weights.sum(axis=-1, keepdims=True))[..., :length]
    return np.einsum("hnl,lhd->nhd", weights, v)


def sigmoid(x: Floats) -> Floats:
    return np.exp(-np.logaddexp(0, -x.astype(np.float64)))


def activation(x: Floats, kind: str) -> Floats:
    wide = x.astype(np.float64)
    if kind == "silu":
        return wide * sigmoid(wide)
    if kind == "gelu":
        return wide * np.vectorize(lambda z: 0.5 * math.erfc(-z / math.sqrt(2)), otypes=[np.float64])(wide)
    if kind == "gelu_tanh":
        return wide * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))
    if kind == "gelu_quick":
        return wide * sigmoid(1.702 * wide)
    if kind == "sigmoid":
        return sigmoid(wide)
    assert kind in ("relu", "relu_squared")
    return np.where(wide > 0, wide, 0) ** (2 if kind == "relu_squared" else 1)


def gated_activation(gate: Floats, up: Floats, kind: str, limit: float) -> Floats:
    if kind != "swiglu_clamped":
        return activation(gate, kind) * up
    bounded = np.minimum(gate.astype(np.float64), limit)
    return bounded * sigmoid(1.702 * bounded) * (np.clip(up.astype(np.float64), -limit, limit) + 1)


def log_softmax(logits: Floats) -> Floats:
    wide = logits.astype(np.float64)
    return wide - np.logaddexp.reduce(wide, axis=-1, keepdims=True)


def probabilities(
    logits: Floats,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    typical_p: float = 1.0,
    xtc_threshold: float = 1.0,
) -> Floats:
    """float64 [V]: what is left of a row's distribution after the six cuts, by their definitions."""
    p = np.exp(log_softmax(logits / temperature))
    if 0 < top_k < len(p):
        p = np.where(p >= np.sort(p)[-top_k], p, 0)
        p /= p.sum()
    if typical_p < 1:
        p = typical(p, typical_p)
    if top_p < 1:
        taken = 0.0
        for token in sorted(range(len(p)), key=lambda i: (-p[i], i)):
            if taken >= top_p:
                p[token] = 0
            taken += p[token]
        p /= p.sum()
    p = np.where(p >= min_p * p.max(), p, 0)
    p /= p.sum()
    chosen = [i for i in sorted(range(len(p)), key=lambda i: (-p[i], i)) if p[i] >= xtc_threshold and p[i] > 0]
    p[chosen[:-1]] = 0
    return p / p.sum()


def typical(p: Floats, mass: float) -> Floats:
    """What is left of a distribution [V] of its typical tokens: those that surprise about as much as is expected."""
    information = {i: -math.log(p[i]) for i in np.flatnonzero(p).tolist()}
    expected = sum(p[i] * each for i, each in information.items())
    taken, kept = 0.0, list[int]()
    for i in sorted(information, key=lambda i: abs(information[i] - expected)):
        if taken >= mass and abs(information[i] - expected) > abs(information[kept[-1]] - expected) + 1e-12:
            break
        kept.append(i)
        taken += p[i]
    left = np.zeros_like(p)
    left[kept] = p[kept]
    return left / left.sum()
