"""Experts: equal matrices of which each row of a batch meets one.

Owns the product of rows that are grouped by expert. Must not know: how rows were assigned, how a matrix is stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tramontane.kernels import Array, Ops
from tramontane.weights.base import Weight
from tramontane.weights.dense import DenseWeight


class Experts:
    """Matrices [N, K], one an expert, each a Weight of any format. One that gets no rows is not touched."""

    def __init__(self, ops: Ops, weights: Sequence[Weight]) -> None:
        self.ops = ops
        self.weights = tuple(weights)
        self.shape = (len(self.weights), *self.weights[0].shape)
        singles = [weight.single for weight in self.weights]
        alike = len({weight.format for weight in self.weights}) == 1
        self._arrays = tuple(single[0] for single in singles if single) if alike and all(singles) else None
        self._format = singles[0][1] if singles[0] else None

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights)

    def turned(self) -> Weight:
        """One matrix [E * K, N], the matrices' transposes one above the other, dense: float32 where they are not."""
        dense = all(isinstance(weight, DenseWeight) for weight in self.weights)
        matrices = [weight.tensors()["weight"] if dense else weight.dequantize() for weight in self.weights]
        stacked = np.concatenate([np.ascontiguousarray(matrix.T) for matrix in matrices])
        format = self.weights[0].format if dense else "F32"
        return DenseWeight.from_tensors(self.ops, format, stacked.shape, {"weight": stacked})

    def matmul(self, out: Array, x: Array, offsets: Array | None, bias: Array | None = None) -> None:
        """out[P,N] = x[P,K] @ W_e.T (+ bias[e]) for the rows from offsets[e] to offsets[e + 1].

        offsets int32 [E + 1], read on the host; None: each expert has P / E rows. bias float32 [E, N].
        """
        ops = self.ops
        if self._arrays is not None:
            ops.matmul_experts(out, x, offsets, self._arrays, self._format, bias)
            return
        count, total = len(self.weights), int(x.shape[0])
        bounds = [total * e // count for e in range(count + 1)] if offsets is None else ops.to_host(offsets).tolist()
        for e, weight in enumerate(self.weights):
            start, stop = bounds[e], bounds[e + 1]
            if start < stop:
                own = None if bias is None else ops.view(ops.part(bias, e, e + 1), (weight.shape[0],))
                weight.matmul(ops.part(out, start, stop), ops.part(x, start, stop), own)
