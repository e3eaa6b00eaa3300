"""Weights: matrices in the formats that checkpoints store, each with its own matmul.

Owns `FORMATS`, the table of storage formats: a new format is one class in one file and one row here.
Must not know: layers, models, files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tramontane.kernels import BLOCKS, Ops
from tramontane.records import dataclass
from tramontane.weights.base import Weight
from tramontane.weights.coded import BITS, CodedWeight, select_coded_rows
from tramontane.weights.dense import DenseWeight
from tramontane.weights.experts import Experts
from tramontane.weights.ggml import BlockWeight

__all__ = [
    "FORMATS",
    "BlockWeight",
    "CodedWeight",
    "DenseWeight",
    "Experts",
    "Format",
    "Weight",
    "make_weight",
    "select_rows",
]


@dataclass(frozen=True)
class Format:
    """How a matrix is stored: `elements` weights of a row in `block_bytes` bytes, read by `weight`.

    Of coded formats these are the codes; their scales come on top, as many as each matrix has.
    """

    name: str
    weight: type[Weight]
    elements: int
    block_bytes: int

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of this shape. Raises ValueError where rows do not divide into blocks."""
        *rows, columns = shape
        if columns % self.elements:
            raise ValueError(f"rows of {columns} do not divide into {self.name} blocks of {self.elements}")
        total = columns // self.elements * self.block_bytes
        for n in rows:
            total *= n
        return total


FORMATS: Mapping[str, Format] = {
    f.name: f
    for f in (
        Format("F32", DenseWeight, 1, 4),
        Format("F16", DenseWeight, 1, 2),
        Format("BF16", DenseWeight, 1, 2),
        *(Format(name, BlockWeight, layout.elements, layout.nbytes) for name, layout in BLOCKS.items()),
        *(Format(name, CodedWeight, 8, bits) for name, bits in BITS.items()),
    )
}


def make_weight(ops: Ops, format: str, shape: tuple[int, int], tensors: Mapping[str, NDArray[Any]]) -> Weight:
    """The weight of a known format over host tensors; see `Weight.from_tensors`."""
    return FORMATS[format].weight.from_tensors(ops, format, shape, tensors)


def select_rows(
    tensors: Mapping[str, NDArray[Any]], rows: slice | NDArray[np.int64], total: int
) -> Mapping[str, NDArray[Any]]:
    """What some rows of a matrix of `total` rows are made from; see `Weight.from_tensors`. Views where `rows` is a
    slice."""
    if "codes" in tensors:
        return select_coded_rows(tensors, rows, total)
    return {name: array[rows] for name, array in tensors.items()}
