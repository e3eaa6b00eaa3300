"""Linear: a weight and its bias.

Owns nothing but the pair. Must not know: how the weight is stored, which layer it is in.
"""

from __future__ import annotations

from tramontane.kernels import Array
from tramontane.weights import Weight


class Linear:
    """y = x W.T + b over float32 rows."""

    def __init__(self, weight: Weight, bias: Array | None = None) -> None:
        """`bias`: float32 [N] on the weight's device."""
        self.weight = weight
        self.bias = bias

    def __call__(self, out: Array, x: Array) -> None:
        """out[T,N] = x[T,K] @ W.T (+ b)."""
        self.weight.matmul(out, x, self.bias)
