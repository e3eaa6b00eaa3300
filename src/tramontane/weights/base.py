"""Weight: a matrix that knows its own matmul, whatever it is stored as.

Owns the interface that layers hold. Must not know: layers, models, files, where its bytes came from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from tramontane.kernels import Array, Ops


class Weight(ABC):
    """A matrix [N, K] (outputs, inputs), immutable, in one storage format, living on one device's ops."""

    format: str
    """Its row in `weights.FORMATS`, such as "F16" or "Q4_K"."""
    shape: tuple[int, int]
    ops: Ops

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that it keeps."""

    @abstractmethod
    def matmul(self, out: Array, x: Array, bias: Array | None = None) -> None:
        """out[T,N] = x[T,K] @ W.T (+ bias[N]), float32."""

    @abstractmethod
    def rows(self, out: Array, ids: Array) -> None:
        """out[R,K] float32 = W[ids], ids int32 [R]: an embedding lookup."""

    @abstractmethod
    def dequantize(self) -> NDArray[Any]:
        """The exact values, float32 [N,K], on the host."""

    @abstractmethod
    def tensors(self) -> Mapping[str, NDArray[Any]]:
        """What it stores, on the host, by role ("weight" or "blocks"); `from_tensors` takes the same."""

    @property
    def single(self) -> tuple[Array, str | None] | None:
        """Its array and the format of its blocks (None: dense), as `Ops.matmul_experts` takes them; None where it is
        stored as several arrays."""
        return None

    @classmethod
    @abstractmethod
    def from_tensors(cls, ops: Ops, format: str, shape: tuple[int, int], tensors: Mapping[str, NDArray[Any]]) -> Weight:
        """The weight over these tensors, not copied where the device can use them in place.

        Raises ValueError where sizes or dtypes do not fit `shape`; loaders check files before with `Format.nbytes`.
        """
