"""Checkpoints of the compressed-tensors library (llm-compressor, Neural Magic).

Owns its layouts: integers packed into int32 words or stored as int8, 8-bit floats, and the 4-bit floats of NVFP4 and
MXFP4 with 8-bit scales. Which of them a module has is told by its tensors; the settings tell the sizes of groups.
Quantized activations are not reproduced: weights are exact, activations stay floats.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

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
    scale_grid,
)
from tramontane.loading.quantized.eight_bits import plan_eight_bits
from tramontane.loading.quantized.gptq import group_order
from tramontane.loading.quantized.packing import pack_rows, row_bytes, unpacked
from tramontane.models.fields import Fields

_FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "mixed-precision",
    "dense",
)


def method(config: Fields) -> Method:
    schemes = [Fields(_mapping(config, value), config.source) for value in config.mapping("config_groups").values()]
    for fields in (config, *schemes):
        if fields.get("format") is not None and fields.text("format") not in _FORMATS:
            raise fields.unsupported("format", f"This build reads {', '.join(_FORMATS)}.")
    _refuse_other(config)
    weights = [Fields(scheme.mapping("weights"), config.source) for scheme in schemes]
    widths = {each.integer("num_bits", 8, high=8) for each in weights}
    groups = {configured_group(each.get("group_size")) for each in weights}
    blocks = {_block(each.get("block_structure")) for each in weights}
    kind = config.text("format", "")
    return Method(
        label=f"compressed-tensors, {kind}" if kind else "compressed-tensors",
        tensors=(
            "weight",
            "weight_packed",
            "weight_scale",
            "weight_zero_point",
            "weight_shape",
            "weight_g_idx",
            "weight_global_scale",
        ),
        quantized=lambda module: "weight_packed" in module or "weight_scale" in module,
        plan=partial(_plan, groups=groups, widths=widths, block=blocks.pop() if len(blocks) == 1 else None),
        ignored=(
            "input_scale",
            "input_zero_point",
            "input_global_scale",
            "output_scale",
            "output_zero_point",
            "k_scale",
            "v_scale",
            "q_scale",
        ),
    )


def _mapping(config: Fields, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise config.corrupt("config_groups", "has a group that is not an object")
    return value


def _refuse_other(config: Fields) -> None:
    sparsity = Fields(config.mapping("sparsity_config"), config.source)
    if sparsity.get("format") not in (None, "dense"):
        raise sparsity.unsupported("format", "Use the checkpoint without sparse storage.")
    if config.get("transform_config"):
        raise config.unsupported("transform_config", "Use a checkpoint without transforms of its activations.")


def _block(value: Any) -> tuple[int, int] | None:
    """`[128, 128]`, or "128x128"."""
    if isinstance(value, str) and len(value) < 32:
        value = [int(part) if part.isascii() and part.isdigit() else 0 for part in value.split("x")]
    if isinstance(value, list) and len(value) == 2 and all(type(size) is int and 0 < size < 1 << 20 for size in value):
        return (value[0], value[1])
    return None


def _plan(module: Module, *, groups: set[int | None], widths: set[int], block: tuple[int, int] | None) -> Matrix:
    if module.format("weight_packed") == "I32":
        return _plan_packed(module, groups, widths)
    if module.format("weight_packed") == "U8":
        return _plan_small_floats(module)
    if "weight_packed" in module:
        raise module.unsupported(f"has weight_packed of {module.format('weight_packed')}")
    return plan_eight_bits(module, "weight_scale", block=block, group=_one(groups), zeros="weight_zero_point")


def _one(groups: set[int | None]) -> int | None:
    return next(iter(groups)) if len(groups) == 1 else None


# ---- integers packed into words ---------------------------------------------------------------------------------


def _plan_packed(module: Module, groups: set[int | None], widths: set[int]) -> Matrix:
    shape = module.sizes("weight_shape", ("I64", "I32"))
    rows, columns = shape
    _, words = module.need("weight_packed", ("I32",), (rows, None))
    bits, dense = _packing(module, columns, words, widths)
    module.need("weight_scale", FLOATS, (rows, None), (1,), ())
    stored = module.tensors["weight_scale"].shape
    fits = {group for group in groups if group and len(stored) == 2 and -(-columns // group) == stored[1]}
    grid = scale_grid(module, "weight_scale", shape, group=_one({*fits}))
    zeros = _zero_words(module, grid, bits, dense)
    order = _order(module, grid, columns)
    whole = dense and order is None
    codes = rows * (words * 4 if whole else row_bytes(columns, bits))
    grids = (module.tensors["weight_scale"].nbytes, grid.lines * grid.groups if zeros else 0)
    size = coded_bytes(codes, bits, *grids, order=0 if order is None else columns)

    def load() -> dict[str, Array]:
        packed = module.read("weight_packed")
        tensors = {
            "codes": packed.view(np.uint8) if whole else _repacked(packed, shape, bits, dense, order),
            "table": TABLES[f"U{bits}" if zeros else f"B{bits}"],
            "scales": grid.array(module.read("weight_scale")),
            "layout": grid.layout,
        }
        if zeros:
            # Packed down the outputs, with the sign bit flipped as in the codes: both shifts cancel.
            columnwise = np.ascontiguousarray(module.read("weight_zero_point").T)
            tensors["zeros"] = np.ascontiguousarray(_codes(columnwise, bits, grid.lines, dense).T)
        return tensors if order is None else {**tensors, "order": order}

    return Matrix(shape, f"INT{bits}", size, load)


def _packing(module: Module, columns: int, words: int, widths: set[int]) -> tuple[int, bool]:
    """Bits of a code, and whether codes may cross words (they did not in older versions)."""
    for bits in sorted(widths):
        if -(-columns * bits // 32) == words:
            return bits, True
    for bits in sorted(widths):
        if -(-columns // (32 // bits)) == words:
            return bits, False
    raise module.corrupt(f"weight_packed has {words} words for {columns} inputs of {sorted(widths)} bits")


def _codes(packed: Array, bits: int, columns: int, dense: bool) -> Array:
    """uint8 [R, columns] of words int32 [R, W]."""
    if dense:
        return unpacked(packed, bits, columns)
    shifts = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
    codes: Array = (packed.view(np.uint32)[:, :, None] >> shifts) & np.uint32(2**bits - 1)
    return codes.astype(np.uint8).reshape(len(packed), -1)[:, :columns]


def _repacked(packed: Array, shape: tuple[int, int], bits: int, dense: bool, order: Array | None) -> Array:
    columns = slice(None) if order is None else order
    return pack_rows(shape, bits, lambda a, b: _codes(packed[a:b], bits, shape[1], dense)[:, columns])


def _zero_words(module: Module, grid: Grid, bits: int, dense: bool) -> bool:
    if "weight_zero_point" not in module:
        return False
    words = -(-grid.lines * bits // 32) if dense else -(-grid.lines // (32 // bits))
    module.need("weight_zero_point", ("I32",), (words, grid.groups))
    return True


def _order(module: Module, grid: Grid, columns: int) -> Array | None:
    if "weight_g_idx" not in module:
        return None
    module.need("weight_g_idx", ("I32", "I64"), (columns,))
    groups = module.small("weight_g_idx").astype(np.int64)
    if (groups == -1).all():  # never set: inputs stand in their order
        return None
    return group_order(module, "weight_g_idx", groups, grid)


# ---- 4-bit floats -----------------------------------------------------------------------------------------------


def _plan_small_floats(module: Module) -> Matrix:
    """NVFP4: e4m3 scales over a global divisor. MXFP4: e8m0 scales."""
    rows, half = module.need("weight_packed", ("U8",), (None, None))
    shape = (rows, half * 2)
    nv = module.format("weight_scale") == "F8_E4M3"
    module.need("weight_scale", ("F8_E4M3", "U8", "F8_E8M0"), (rows, None))
    grid = scale_grid(module, "weight_scale", shape, group=16 if nv else 32)
    if nv:
        module.need("weight_global_scale", FLOATS, (1,), ())
    elif "weight_global_scale" in module:
        raise module.corrupt("weight_global_scale stands beside scales that are powers of two")
    size = coded_bytes(rows * half, 4, rows * grid.groups, scale_table=True)

    def load() -> dict[str, Array]:
        table = TABLES["E8M0"]
        if nv:
            divisor = module.read("weight_global_scale").reshape(-1)[:1].astype(np.float32)
            with np.errstate(all="ignore"):
                table = TABLES["E4M3"] / divisor
        return {
            "codes": module.read("weight_packed"),
            "table": TABLES["E2M1"],
            "scales": grid.array(module.read("weight_scale").view(np.uint8)),
            "scale_table": table,
            "layout": grid.layout,
        }

    return Matrix(shape, "FP4", size, load)
