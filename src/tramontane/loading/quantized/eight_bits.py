"""Weights of one byte: int8 and the 8-bit floats, with scales a tensor, row, block or group.

Owns how such a pair of tensors becomes a coded weight, whatever a method calls them, and the method "fp8" (DeepSeek's
blocks, and scales a tensor or row) with its relatives, Mistral's own spelling of it included.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from tramontane.kernels.coded import TABLES
from tramontane.loading.quantized.base import FLOATS, REMEDY, Array, Matrix, Method, Module, coded_bytes, scale_grid
from tramontane.models.fields import Fields

_CODES = {"I8": ("INT8", "S8"), "F8_E4M3": ("FP8", "E4M3"), "F8_E5M2": ("FP8", "E5M2")}
"""Element type -> storage format and value table."""


def fp8(config: Fields) -> Method:
    config.only(fmt="e4m3", weight_dtype="float8_e4m3fn")
    block = config.get("weight_block_size")
    return Method(
        label="fp8" if block is None else f"fp8, blocks of {block}",
        tensors=("weight", "weight_scale_inv", "weight_scale"),
        quantized=lambda module: module.format("weight") in ("F8_E4M3", "F8_E5M2"),
        plan=partial(_plan_fp8, block=_block(config, block)),
        ignored=("input_scale", "activation_scale", "input_scale_ub", "output_scale", "k_scale", "v_scale"),
    )


def mistral_fp8(config: Fields) -> Method:
    """The `quantization` of Mistral's own params.json: one scale a matrix. Scales of activations have no use here."""
    config.known({"qformat_weight", "qscheme_act"})
    if config.text("qformat_weight") != "fp8_e4m3":
        raise config.unsupported("qformat_weight", REMEDY)
    return Method(
        label="fp8",
        tensors=("weight", "qscale_weight"),
        quantized=lambda module: module.format("weight") == "F8_E4M3",
        plan=partial(plan_eight_bits, scale="qscale_weight"),
        ignored=("qscale_act",),
    )


def _block(config: Fields, value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or not all(type(s) is int and 0 < s < 1 << 20 for s in value):
        raise config.corrupt("weight_block_size", f"is {str(value)[:60]}, not two sizes")
    return (value[0], value[1])


def _plan_fp8(module: Module, *, block: tuple[int, int] | None) -> Matrix:
    scale = "weight_scale_inv" if "weight_scale_inv" in module else "weight_scale"
    group = block[1] if block is not None and block[0] == 1 else None
    return plan_eight_bits(module, scale, block=block, group=group)


def plan_eight_bits(
    module: Module,
    scale: str,
    *,
    block: tuple[int, int] | None = None,
    group: int | None = None,
    zeros: str = "",
    factor: float = 1.0,
) -> Matrix:
    """The matrix of `weight` [N, K] with the scales in the tensor `scale`: floats, or bytes that are powers of two.

    `zeros` names the tensor of zero points, if any; `factor` multiplies the products.
    """
    rows, columns = module.need("weight", tuple(_CODES), (None, None))
    shape = (rows, columns)
    module.need(scale, (*FLOATS, "U8", "F8_E8M0"))
    powers = module.format(scale) in ("U8", "F8_E8M0")
    grid = scale_grid(module, scale, shape, block, group or (32 if powers else None))
    zeroed = bool(zeros) and zeros in module
    if zeroed:
        module.need(zeros, ("I8",), module.tensors[scale].shape)
    format, values = _CODES[module.format("weight")]
    grids = (module.tensors[scale].nbytes, 2 * module.tensors[zeros].nbytes if zeroed else 0)
    size = coded_bytes(rows * columns, 8, *grids, scale_table=powers) + (4 if factor != 1.0 else 0)

    def load() -> dict[str, Array]:
        scales = module.read(scale)
        tensors: dict[str, Array] = {
            "codes": module.read("weight").view(np.uint8),
            "table": TABLES[values],
            "scales": grid.array(scales.view(np.uint8) if powers else scales),
            "layout": grid.layout,
        }
        if powers:
            tensors["scale_table"] = TABLES["E8M0"]
        if zeroed:
            tensors["zeros"] = grid.array(module.read(zeros).astype(np.float16))  # exact: they are bytes
        if factor != 1.0:
            tensors["factor"] = np.array([factor], np.float32)
        return tensors

    return Matrix(shape, format, size, load)
