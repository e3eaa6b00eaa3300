"""AWQ checkpoints (Lin et al., 2023) in AutoAWQ's "gemm" layout.

Owns that layout: 4-bit codes of W transposed, [K, N / 8] words of eight outputs in the order 0 2 4 6 1 3 5 7; zero
points alike, [G, N / 8]; scales [G, N].
"""

from __future__ import annotations

from functools import partial

import numpy as np

from tramontane.kernels.coded import TABLES
from tramontane.loading.quantized.base import (
    FLOATS,
    Array,
    Grid,
    Matrix,
    Method,
    Module,
    coded_bytes,
    configured_group,
    group_size,
)
from tramontane.loading.quantized.packing import pack_columns, row_bytes
from tramontane.models.fields import Fields

_BYTES, _SHIFTS = np.array([0, 2, 0, 2, 1, 3, 1, 3]), np.array([0, 0, 4, 4, 0, 0, 4, 4], np.uint8)
"""The byte of a word that each of its eight outputs is in, and the lowest of its bits there."""


def method(config: Fields) -> Method:
    config.only(bits=4, w_bit=4, zero_point=True)
    for key in ("version", "format"):
        if config.get(key) is not None and config.text(key).lower() != "gemm":
            raise config.unsupported(key, "This build reads the gemm layout: convert the checkpoint to it.")
    return Method(
        label="awq, 4 bits",
        tensors=("qweight", "qzeros", "scales"),
        quantized=lambda module: "qweight" in module,
        plan=partial(_plan, group=configured_group(config.get("group_size"), config.get("q_group_size"))),
    )


def _plan(module: Module, *, group: int | None) -> Matrix:
    columns, words = module.need("qweight", ("I32",), (None, None))
    rows = words * 8
    groups, _ = module.need("qzeros", ("I32",), (None, words))
    module.need("scales", FLOATS, (groups, rows))
    shape = (rows, columns)
    grid = Grid(rows, groups, group_size(module, "qzeros", columns, groups, group))
    size = coded_bytes(rows * row_bytes(columns, 4), 4, module.tensors["scales"].nbytes, rows * groups)

    def load() -> dict[str, Array]:
        packed = module.read("qweight")
        return {
            "codes": pack_columns(shape, 4, lambda a, b: _outputs(packed[a:b])),
            "table": TABLES["U4"],
            "scales": np.ascontiguousarray(module.read("scales").T),
            "zeros": np.ascontiguousarray(_outputs(module.read("qzeros")).T),
            "layout": grid.layout,
        }

    return Matrix(shape, "INT4", size, load)


def _outputs(words: Array) -> Array:
    """uint8 [R, 8 * W] of words int32 [R, W]."""
    codes: Array = (words.view(np.uint8).reshape(*words.shape, 4)[:, :, _BYTES] >> _SHIFTS) & np.uint8(15)
    return codes.reshape(len(words), -1)
