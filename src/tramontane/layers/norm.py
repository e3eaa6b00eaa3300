"""Norms: RMSNorm (Zhang and Sennrich, 2019) and LayerNorm (Ba et al., 2016).

Must not know: where in a layer they stand.
"""

from __future__ import annotations

from typing import Literal

from tramontane.kernels import Array, Ops


class Norm:
    """Rows scaled to unit size (rms), or to mean 0 and variance 1 (layer), times a weight, plus a bias."""

    def __init__(
        self, ops: Ops, kind: Literal["rms", "layer"], eps: float, weight: Array | None, bias: Array | None = None
    ) -> None:
        """`weight`, `bias`: float32 [K], [W,K] of which row t takes row t % W, or None; an rms norm has no bias."""
        self.ops = ops
        self.kind = kind
        self.eps = eps
        self.weight = weight
        self.bias = bias

    def __call__(self, out: Array, x: Array) -> None:
        """out[T,K] = norm(x[T,K]); out may be x."""
        if self.kind == "rms":
            self.ops.rms_norm(out, x, self.weight, self.eps)
        else:
            self.ops.layer_norm(out, x, self.weight, self.bias, self.eps)
