"""Heads: from the states of a text's tokens to one vector, or to a score.

Owns pooling, the small layers after it and normalization. Texts are few rows beside their tokens, so all of it is numpy
on the host, one text at a time: whoever else is in a batch changes nothing. Must not know: files, requests, the engine.
Source: sentence-transformers' modules Pooling, Dense, LayerNorm and Normalize; transformers' classification heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tramontane.kernels.reference import ACTIVATIONS as GATES
from tramontane.records import dataclass
from tramontane.types import Pooling

Floats = NDArray[np.float32]


def _sigmoid(x: Floats) -> Floats:
    with np.errstate(over="ignore"):  # exp(-x) is inf far below zero, and the result 0
        y: Floats = np.divide(1, 1 + np.exp(-x), dtype=np.float32)
    return y


ACTIVATIONS: Mapping[str, Callable[[Floats], Floats]] = {
    **GATES,
    "identity": lambda x: x,
    "tanh": np.tanh,
    "sigmoid": _sigmoid,
}


class Pool:
    """One text's tokens, pooled as their states come, in pieces of any size."""

    def __init__(self, modes: Sequence[Pooling], length: int, skip: int = 0) -> None:
        """`modes`: their vectors are joined. `length`: tokens in all. `skip`: the first tokens are left out (a prompt
        that is not to count); the last token always counts."""
        self._modes = tuple(modes)
        self._length, self._skip = length, min(skip, length - 1)
        self._seen = 0
        self._found: dict[Pooling, NDArray[Any]] = {}

    def add(self, states: Floats) -> None:
        """The states float32 [n,H] of the next n tokens."""
        first = max(self._skip - self._seen, 0)
        at = self._seen + first
        self._seen += len(states)
        states = states[first:]
        if not len(states):
            return
        for mode in self._modes:
            before = self._found.get(mode)
            if mode == "lasttoken" or (mode == "cls" and before is None):
                self._found[mode] = states[-1 if mode == "lasttoken" else 0].copy()
            elif mode == "max":
                highest = states.max(axis=0)
                self._found[mode] = highest if before is None else np.maximum(before, highest)
            elif mode != "cls":
                places = np.arange(at + 1, self._seen + 1, dtype=np.float64)
                weights = places if mode == "weightedmean" else np.ones(len(states))
                total = weights @ states.astype(np.float64)
                self._found[mode] = total if before is None else before + total

    def vector(self) -> Floats:
        """float32 [modes * H], once all tokens are in."""
        return np.concatenate([self._result(mode) for mode in self._modes]).astype(np.float32)

    def _result(self, mode: Pooling) -> NDArray[Any]:
        found, count = self._found[mode], self._length - self._skip
        if mode == "mean":
            return found / count
        if mode == "mean_sqrt_len_tokens":
            return found / math.sqrt(count)
        if mode == "weightedmean":
            return found / (count * (self._skip + 1 + self._length) / 2)
        return found


@dataclass(frozen=True, eq=False)
class Dense:
    """y = activation(W x + b)."""

    weight: Floats
    """[N,K]."""
    bias: Floats | None
    activation: str
    """One of ACTIVATIONS."""

    @property
    def width(self) -> int:
        return len(self.weight)

    def __call__(self, x: Floats) -> Floats:
        y = self.weight @ x
        return ACTIVATIONS[self.activation](y if self.bias is None else y + self.bias)


@dataclass(frozen=True, eq=False)
class Norm:
    """Layer normalization."""

    weight: Floats
    bias: Floats | None
    eps: float

    @property
    def width(self) -> int:
        return len(self.weight)

    def __call__(self, x: Floats) -> Floats:
        centred = x - x.mean()
        y: Floats = centred / np.sqrt(np.mean(centred * centred) + np.float32(self.eps)) * self.weight
        return y if self.bias is None else y + self.bias


Layer = Dense | Norm


@dataclass(frozen=True, eq=False)
class EmbeddingHead:
    """How a text's vector comes about, where a request does not say otherwise."""

    pooling: tuple[Pooling, ...]
    layers: tuple[Layer, ...] = ()
    normalize: bool = False

    def width(self, hidden_size: int, pooling: Sequence[Pooling] | None = None) -> int:
        """Elements of a vector, with this pooling or the head's own."""
        return self.layers[-1].width if self.layers else hidden_size * len(pooling or self.pooling)

    def vector(self, pooled: Floats, normalize: bool | None = None, dimensions: int | None = None) -> Floats:
        """float32 [dimensions or width] from what `Pool` made. None: as the head has it."""
        for layer in self.layers:
            pooled = layer(pooled)
        kept = pooled[:dimensions]
        if not (self.normalize if normalize is None else normalize):
            return kept
        return kept / max(float(np.linalg.norm(kept)), 1e-12)


@dataclass(frozen=True, eq=False)
class ScoringHead:
    """A classifier over one pooled state; with one label it scores pairs of texts."""

    pooling: Pooling
    layers: tuple[Layer, ...]
    activation: str
    """What makes of a logit the score that is reported."""

    @property
    def labels(self) -> int:
        return self.layers[-1].width

    def logits(self, pooled: Floats) -> Floats:
        """float32 [labels]."""
        for layer in self.layers:
            pooled = layer(pooled)
        return pooled

    def score(self, pooled: Floats) -> float:
        """Of a head with one label."""
        return float(ACTIVATIONS[self.activation](self.logits(pooled))[0])
