"""Dense weights: F32, F16 and BF16 matrices, used as they are stored.

Owns the check of what a dense tensor must be. Must not know: layers, models, files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tramontane.kernels import Array, Ops
from tramontane.weights.base import Weight

DTYPES: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class DenseWeight(Weight):
    """A matrix [N, K] of floats, one tensor "weight", packed by its ops."""

    def __init__(self, ops: Ops, format: str, shape: tuple[int, int], weight: Array) -> None:
        self.ops = ops
        self.format = format
        self.shape = shape
        self._weight = weight

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.shape[1] * DTYPES[self.format].itemsize

    def matmul(self, out: Array, x: Array, bias: Array | None = None) -> None:
        self.ops.matmul(out, x, self._weight, bias)

    def rows(self, out: Array, ids: Array) -> None:
        self.ops.rows(out, ids, self._weight)

    def dequantize(self) -> NDArray[Any]:
        return self.tensors()["weight"].astype(np.float32)

    def tensors(self) -> Mapping[str, NDArray[Any]]:
        return {"weight": self.ops.unpack(self._weight, self.format, self.shape)}

    @property
    def single(self) -> tuple[Array, str | None]:
        return self._weight, None

    @classmethod
    def from_tensors(
        cls, ops: Ops, format: str, shape: tuple[int, int], tensors: Mapping[str, NDArray[Any]]
    ) -> DenseWeight:
        if format not in DTYPES:
            raise ValueError(f"{format!r} is not a dense format ({', '.join(DTYPES)})")
        if set(tensors) != {"weight"}:
            raise ValueError(f"a dense weight is one tensor 'weight', not {sorted(tensors)}")
        weight = tensors["weight"]
        if weight.dtype != DTYPES[format] or weight.shape != tuple(shape):
            raise ValueError(
                f"{format} weight {list(shape)} must be {DTYPES[format].name}, "
                f"not {weight.dtype.name} {list(weight.shape)}"
            )
        return cls(ops, format, shape, ops.pack(ops.from_host(weight), format))
