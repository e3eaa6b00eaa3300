"""MXFP4 as gpt-oss stores it (Open Compute Project, Microscaling Formats 1.0).

Owns the layout of its linear modules: 32 codes of e2m1 in 16 bytes, the first in the lower half, and an e8m0 scale.
"""

from __future__ import annotations

import math

from tramontane.kernels.coded import TABLES
from tramontane.loading.quantized.base import Array, Grid, Matrix, Method, Module, coded_bytes
from tramontane.models.fields import Fields

_BYTES = ("U8",)
_SCALES = ("U8", "F8_E8M0")


def method(config: Fields) -> Method:
    return Method(
        label="mxfp4",
        tensors=("blocks", "scales"),
        quantized=lambda module: "blocks" in module,
        plan=lambda module: plan_microscaled(module, "blocks", "scales"),
        joints=(".", "_"),
    )


def plan_microscaled(module: Module, blocks: str, scales: str) -> Matrix:
    """The matrix of codes [N, K / 32, 16] or [N, K / 2] and scales [N, K / 32], or of so many experts [E, N, K / 32,
    16] and [E, N, K / 32], by their tensors' names."""
    shape = module.need(blocks, _BYTES, (None, None, None, 16), (None, None, 16), (None, None))
    outer, half = (shape[:-2], shape[-2] * 16) if len(shape) > 2 else (shape[:-1], shape[-1])
    if half % 16:
        raise module.corrupt(f"{blocks} has rows of {half} bytes, no groups of 16")
    rows = math.prod(outer)
    grid = Grid(rows, half // 16, 32)
    module.need(scales, _SCALES, (*outer, grid.groups))

    def load() -> dict[str, Array]:
        return {
            "codes": module.read(blocks).reshape(rows, half),
            "table": TABLES["E2M1"],
            "scales": module.read(scales).view("u1").reshape(rows, grid.groups),
            "scale_table": TABLES["E8M0"],
            "layout": grid.layout,
        }

    nbytes = coded_bytes(rows * half, 4, rows * grid.groups, scale_table=True)
    return Matrix((*outer, half * 2), "FP4", nbytes, load)
