"""Linear: a weight and its bias; Linears: several of one input.

Owns nothing but them. Must not know: how a weight is stored, which layer it is in.
"""

from __future__ import annotations

from collections.abc import Sequence

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


class Linears:
    """Linears that have their input in common, so that it is made ready once for all whose weights are stored alike."""

    def __init__(self, *linears: Linear) -> None:
        alike: dict[str, list[int]] = {}
        for index, linear in enumerate(linears):
            if linear.weight.single is not None:
                alike.setdefault(linear.weight.format, []).append(index)
        self._together = [indices for indices in alike.values() if len(indices) > 1]
        self._alone = [i for i in range(len(linears)) if not any(i in indices for indices in self._together)]
        self.linears = linears

    def __call__(self, outs: Sequence[Array], x: Array) -> None:
        """outs[i][T,N] = x[T,K] @ W_i.T (+ b_i)."""
        for index in self._alone:
            self.linears[index](outs[index], x)
        for indices in self._together:
            linears = [self.linears[index] for index in indices]
            singles = [linear.weight.single for linear in linears if linear.weight.single is not None]
            arrays, formats = zip(*singles, strict=True)
            biases = [linear.bias for linear in linears]
            linears[0].weight.ops.matmul_together([outs[i] for i in indices], x, arrays, formats[0], biases)
