"""Embedding: token ids to rows of a weight.

Must not know: how the weight is stored, whether the output head shares it.
"""

from __future__ import annotations

from tramontane.kernels import Array
from tramontane.weights import Weight


class Embedding:
    """The first layer's input, float32."""

    def __init__(self, weight: Weight) -> None:
        self.weight = weight

    def __call__(self, out: Array, ids: Array) -> None:
        """out[T,H] = W[ids], ids int32 [T]."""
        self.weight.rows(out, ids)
