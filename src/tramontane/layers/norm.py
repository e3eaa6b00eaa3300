"""RMSNorm (Zhang and Sennrich, 2019).

Must not know: where in a layer it stands.
"""

from __future__ import annotations

from tramontane.kernels import Array, Ops


class RMSNorm:
    """Rows scaled to unit root mean square, times a learned weight."""

    def __init__(self, ops: Ops, weight: Array, eps: float) -> None:
        """`weight`: float32 [K]."""
        self.ops = ops
        self.weight = weight
        self.eps = eps

    def __call__(self, out: Array, x: Array) -> None:
        """out[T,K] = norm(x[T,K]); out may be x."""
        self.ops.rms_norm(out, x, self.weight, self.eps)
