"""MLX checkpoints: affine groups, "AFQ" to mistral.rs, and MLX's small floats.

Owns their layout: codes packed densely into uint32 words along the inputs, scales and biases [N, G]; w = s * q + b.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from tramontane.kernels.coded import TABLES
from tramontane.loading.quantized.base import FLOATS, Array, Grid, Matrix, Method, Module, coded_bytes
from tramontane.models.fields import Fields

_BITS = (2, 3, 4, 5, 6, 8)
_MODES = {"mxfp4": ("FP4", 4, "E2M1", 32, "E8M0"), "nvfp4": ("FP4", 4, "E2M1", 16, "E4M3"),
          "mxfp8": ("FP8", 8, "E4M3", 32, "E8M0")}  # fmt: skip
"""Mode -> storage format, bits, values, group size, values of the scales."""


def method(config: Fields) -> Method:
    """`config`: the `quantization` of an MLX config.json: settings, and under modules' names their own."""
    overrides = {name: value for name, value in config.values.items() if isinstance(value, Mapping)}
    for each in (config, *(Fields(value, config.source) for value in overrides.values())):
        mode = each.text("mode", "affine")
        if mode != "affine" and mode not in _MODES:
            raise each.unsupported("mode", f"This build reads affine, {', '.join(_MODES)}.")
    shown = config.text("mode", "affine")
    return Method(
        label=f"mlx, {shown}" if shown != "affine" else f"mlx, {config.integer('bits', 4)} bits",
        tensors=("weight", "scales", "biases"),
        quantized=lambda module: module.format("weight") == "U32",
        plan=partial(_plan, config=config, overrides=overrides),
    )


def _plan(module: Module, *, config: Fields, overrides: Mapping[str, Mapping[str, Any]]) -> Matrix:
    own = Fields({**config.values, **overrides.get(module.name, {})}, config.source)
    mode = own.text("mode", "affine")
    if mode != "affine":
        return _plan_floats(module, mode)
    return plan_affine(module, own.integer("bits"), own.integer("group_size"), "weight", "scales", "biases")


def plan_affine(module: Module, bits: int, group: int, weight: str, scales: str, biases: str) -> Matrix:
    """The matrix of words [N, K * bits / 32] with a scale and a bias a group, by their tensors' names."""
    if bits not in _BITS:
        raise module.unsupported(f"has codes of {bits} bits")
    rows, words = module.need(weight, ("U32",), (None, None))
    module.need(scales, FLOATS, (rows, None))
    groups = module.tensors[scales].shape[1]
    columns = groups * group
    if columns * bits != words * 32:
        raise module.corrupt(f"{weight} has {words} words a row for {groups} groups of {group} codes of {bits} bits")
    module.need(biases, FLOATS, (rows, groups))
    grid = Grid(rows, groups, group)
    grids = [module.tensors[tensor].nbytes for tensor in (scales, biases)]

    def load() -> dict[str, Array]:
        return {
            "codes": module.read(weight).view(np.uint8),
            "table": TABLES[f"U{bits}"],
            "scales": module.read(scales),
            "offsets": module.read(biases),
            "layout": grid.layout,
        }

    return Matrix((rows, columns), f"INT{bits}", coded_bytes(rows * words * 4, bits, *grids), load)


def _plan_floats(module: Module, mode: str) -> Matrix:
    format, bits, values, group, scale_values = _MODES[mode]
    rows, words = module.need("weight", ("U32",), (None, None))
    columns = words * 32 // bits
    if columns % group:
        raise module.corrupt(f"rows of {columns} do not divide into groups of {group}")
    module.need("scales", ("U8",), (rows, columns // group))
    grid = Grid(rows, columns // group, group)

    def load() -> dict[str, Array]:
        return {
            "codes": module.read("weight").view(np.uint8),
            "table": TABLES[values],
            "scales": module.read("scales"),
            "scale_table": TABLES[scale_values],
            "layout": grid.layout,
        }

    size = coded_bytes(rows * words * 4, bits, rows * grid.groups, scale_table=True)
    return Matrix((rows, columns), format, size, load)
