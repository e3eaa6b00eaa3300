"""GGML's tensor types as files number them: names, sizes, and which bytes of a block are one number.

Owns that table, shared by the readers of GGUF and of GGML's older files. Must not know: containers; how a block is
computed with (`weights.FORMATS`). Source: ggml/include/ggml.h and ggml/src/ggml-common.h of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tramontane.kernels import BLOCKS
from tramontane.records import dataclass


@dataclass(frozen=True)
class GGMLType:
    """One of ggml's tensor types: `block` elements of a row take `nbytes` bytes.

    `dtype` is that of plain numbers, None for blocks.
    """

    name: str
    block: int
    nbytes: int
    dtype: np.dtype[Any] | None = None


_BLOCK_IDS: Mapping[str, int] = {
    "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q8_1": 9,
    "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14, "Q8_K": 15,
    "IQ2_XXS": 16, "IQ2_XS": 17, "IQ3_XXS": 18, "IQ1_S": 19, "IQ4_NL": 20, "IQ3_S": 21, "IQ2_S": 22, "IQ4_XS": 23,
    "IQ1_M": 29, "TQ1_0": 34, "TQ2_0": 35, "MXFP4": 39, "NVFP4": 40, "Q1_0": 41, "Q2_0": 42,
}  # fmt: skip
_PLAIN: Mapping[int, tuple[str, np.dtype[Any]]] = {
    0: ("F32", np.dtype("<f4")),
    1: ("F16", np.dtype("<f2")),
    24: ("I8", np.dtype("i1")),
    25: ("I16", np.dtype("<i2")),
    26: ("I32", np.dtype("<i4")),
    27: ("I64", np.dtype("<i8")),
    28: ("F64", np.dtype("<f8")),
    30: ("BF16", np.dtype(ml_dtypes.bfloat16)),
}

GGML_TYPES: Mapping[int, GGMLType] = {
    **{
        number: GGMLType(name, 1, np.dtype(dtype).itemsize, np.dtype(dtype)) for number, (name, dtype) in _PLAIN.items()
    },
    **{number: GGMLType(name, BLOCKS[name].elements, BLOCKS[name].nbytes) for name, number in _BLOCK_IDS.items()},
}
BY_NAME: Mapping[str, GGMLType] = {kind.name: kind for kind in GGML_TYPES.values()}

FILE_TYPES: Mapping[int, str] = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S",
    12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS",
    20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M",
    28: "IQ2_S", 29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4",
    39: "NVFP4", 40: "Q1_0",
}  # fmt: skip
"""`general.file_type` -> the mixture of types that a file is said to be."""

# Offset and size of each number of more than a byte in a block. Formats of grids are missing: what the big-endian
# machines that llama.cpp runs on would write there is not settled.
_NUMBERS: Mapping[str, tuple[tuple[int, int], ...]] = {
    **dict.fromkeys(("Q4_0", "Q8_0", "Q1_0", "Q2_0", "IQ4_NL"), ((0, 2),)),
    **dict.fromkeys(("Q4_1", "Q8_1", "Q4_K", "Q5_K", "IQ4_XS"), ((0, 2), (2, 2))),
    "Q5_0": ((0, 2), (2, 4)),
    "Q5_1": ((0, 2), (2, 2), (4, 4)),
    "Q2_K": ((80, 2), (82, 2)),
    "Q3_K": ((108, 2),),
    "Q6_K": ((208, 2),),
    "TQ1_0": ((52, 2),),
    "TQ2_0": ((64, 2),),
    "MXFP4": (),
    "NVFP4": (),
}


def swappable(kind: GGMLType) -> bool:
    """Whether `swapped` can turn a tensor of this type around."""
    return kind.dtype is not None or kind.name in _NUMBERS


def swapped(kind: GGMLType, data: NDArray[Any]) -> NDArray[Any]:
    """A copy of numbers or of blocks (uint8, any shape) with the bytes of each number in the other order."""
    if kind.dtype is not None:
        # Through integers: bfloat16 does not know how.
        turned, integers = np.empty(data.shape, kind.dtype), np.dtype(f"u{kind.nbytes}")
        turned.view(integers)[...] = data.view(integers).byteswap()
        return turned
    blocks: NDArray[np.uint8] = data.reshape(-1, kind.nbytes).copy()
    for offset, size in _NUMBERS[kind.name]:
        blocks[:, offset : offset + size] = blocks[:, offset : offset + size][:, ::-1].copy()
    return blocks.reshape(data.shape)
