"""GGML's quantized blocks, kept bit for bit: one class for every format of `kernels.BLOCKS`.

Owns the check of what a tensor of blocks must be. Must not know: layers, models, files, how blocks are computed with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tramontane.kernels import BLOCKS, Array, Ops
from tramontane.kernels.blocks import dequantize
from tramontane.weights.base import Weight


def _row_bytes(format: str, columns: int) -> int:
    if format not in BLOCKS:
        raise ValueError(f"{format!r} is not a block format ({', '.join(BLOCKS)})")
    layout = BLOCKS[format]
    if columns % layout.elements:
        raise ValueError(f"rows of {columns} do not divide into {format} blocks of {layout.elements}")
    return columns // layout.elements * layout.nbytes


class BlockWeight(Weight):
    """A matrix [N, K] of quantized blocks, one tensor "blocks": uint8 [N, bytes of a row], packed by its ops."""

    def __init__(self, ops: Ops, format: str, shape: tuple[int, int], blocks: Array) -> None:
        self.ops = ops
        self.format = format
        self.shape = shape
        self._blocks = blocks

    @property
    def nbytes(self) -> int:
        return self.shape[0] * _row_bytes(self.format, self.shape[1])

    def matmul(self, out: Array, x: Array, bias: Array | None = None) -> None:
        self.ops.matmul_blocks(out, x, self._blocks, self.format, bias)

    def rows(self, out: Array, ids: Array) -> None:
        self.ops.rows_blocks(out, ids, self._blocks, self.format)

    def dequantize(self) -> NDArray[Any]:
        return dequantize(self.format, self.tensors()["blocks"])

    def tensors(self) -> Mapping[str, NDArray[Any]]:
        return {"blocks": self.ops.unpack(self._blocks, self.format, self.shape)}

    @property
    def single(self) -> tuple[Array, str | None]:
        return self._blocks, self.format

    @classmethod
    def from_tensors(
        cls, ops: Ops, format: str, shape: tuple[int, int], tensors: Mapping[str, NDArray[Any]]
    ) -> BlockWeight:
        expected = (shape[0], _row_bytes(format, shape[1]))
        if set(tensors) != {"blocks"}:
            raise ValueError(f"a {format} weight is one tensor 'blocks', not {sorted(tensors)}")
        blocks = tensors["blocks"]
        if blocks.dtype != np.uint8 or blocks.shape != expected:
            raise ValueError(
                f"{format} weight {list(shape)} must be uint8 {list(expected)}, "
                f"not {blocks.dtype.name} {list(blocks.shape)}"
            )
        return cls(ops, format, shape, ops.pack(ops.from_host(blocks), format))
