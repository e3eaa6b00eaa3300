"""bitsandbytes checkpoints (Dettmers et al., 2022 and 2023): int8 with a scale a row, NF4 and FP4 in blocks.

Owns their layout: two 4-bit codes a byte, the first in the upper half, in blocks that are counted over the whole
matrix; block scales as floats or, doubly quantized, as codes of an 8-bit table with scales of their own.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from tramontane.loading.quantized.base import (
    Array,
    Matrix,
    Method,
    Module,
    coded_bytes,
    flat_grid,
    flat_values,
)
from tramontane.loading.quantized.eight_bits import plan_eight_bits
from tramontane.loading.quantized.packing import pack_rows
from tramontane.models.fields import Fields

_STATE = "weight.quant_state.bitsandbytes__"
_KINDS = {"nf4": "NF4", "fp4": "FP4"}
_INT8 = 7.874015718698502e-3
"""1 / 127, as the library has it: an int8 row's scale is its largest value."""


def method(config: Fields) -> Method:
    four = config.boolean("load_in_4bit", config.boolean("_load_in_4bit", False))
    if four:
        kind = config.text("bnb_4bit_quant_type", "fp4")
        if kind not in _KINDS:
            raise config.unsupported("bnb_4bit_quant_type", f"This build reads {' and '.join(_KINDS)}.")
        return Method(
            label=f"bitsandbytes, {kind}",
            tensors=(
                "weight",
                "weight.absmax",
                "weight.quant_map",
                "weight.nested_absmax",
                "weight.nested_quant_map",
                *(f"{_STATE}{kind}" for kind in _KINDS),
            ),
            quantized=lambda module: "weight.absmax" in module,
            plan=_plan_4bit,
        )
    return Method(
        label="bitsandbytes, int8",
        tensors=("weight", "SCB", "weight_format"),
        quantized=lambda module: module.format("weight") == "I8",
        plan=_plan_int8,
    )


def _plan_int8(module: Module) -> Matrix:
    rows, _ = module.need("weight", ("I8",), (None, None))
    module.need("SCB", ("F32",), (rows,))
    if "weight_format" in module and module.number("weight_format", ("U8",)) != 0:
        raise module.unsupported(
            "is int8 in a tiled layout", "Save the checkpoint anew with bitsandbytes 0.45 or later."
        )
    return plan_eight_bits(module, "SCB", factor=_INT8)


def _plan_4bit(module: Module) -> Matrix:
    state = _state(module)
    shape, block = state.shape, state.block
    count = shape[0] * shape[1]
    packed = module.entry("weight")
    if packed.format not in ("U8", "I8", "F32", "F16", "BF16") or packed.nbytes != -(-count // 2):
        raise module.corrupt(f"weight takes {packed.nbytes} bytes for {shape[0]} x {shape[1]} codes of 4 bits")
    runs = -(-count // block)
    module.need("weight.absmax", ("U8",) if state.nested else ("F32",), (runs,))
    module.need("weight.quant_map", ("F32",), (16,))
    if state.nested:
        module.need("weight.nested_absmax", ("F32",), (-(-runs // state.nested),))
        module.need("weight.nested_quant_map", ("F32",), (256,))
    grid = flat_grid(shape, block)
    size = coded_bytes(shape[0] * -(-shape[1] // 2), 4, 4 * grid.lines * grid.groups)

    def load() -> dict[str, Array]:
        flat = module.read("weight").reshape(-1).view(np.uint8)
        absmax = _absmax(module, state)
        return {
            "codes": _swapped(flat, shape),
            "table": np.array(module.read("weight.quant_map"), np.float32),
            "scales": flat_values(absmax, grid, block),
            "layout": grid.layout,
        }

    return Matrix(shape, state.format, size, load)


class _State:
    """The settings that the library stores as JSON in a tensor."""

    def __init__(self, fields: Fields, kind: str) -> None:
        self.format = _KINDS[kind]
        if fields.text("quant_type", kind) != kind:
            raise fields.corrupt("quant_type", f"is not {kind}, as the tensor's name says")
        self.block = fields.integer("blocksize")
        sizes = fields.get("shape")
        if not isinstance(sizes, list) or len(sizes) != 2 or not all(type(n) is int and 0 < n < 1 << 31 for n in sizes):
            raise fields.corrupt("shape", "is not that of a matrix")
        self.shape = (int(sizes[0]), int(sizes[1]))
        self.nested = fields.integer("nested_blocksize", 0, low=0)
        self.offset = 0.0
        if self.nested:
            offset = fields.get("nested_offset")
            if not isinstance(offset, (int, float)) or isinstance(offset, bool):
                raise fields.corrupt("nested_offset", "is not a number")
            self.offset = float(offset)


def _state(module: Module) -> _State:
    kind = next((kind for kind in _KINDS if f"{_STATE}{kind}" in module), None)
    if kind is None:
        raise module.corrupt("it has no quant_state")
    name = f"{_STATE}{kind}"
    module.need(name, ("U8",), (None,))
    try:
        value: Any = json.loads(module.small(name).tobytes())
    except (ValueError, RecursionError) as error:
        raise module.corrupt(f"{name} is not JSON") from error
    if not isinstance(value, dict):
        raise module.corrupt(f"{name} is not a JSON object")
    return _State(Fields(value, f"{name} of {module.name} in {module.source}"), kind)


def _absmax(module: Module, state: _State) -> Array:
    """float32, one a block."""
    absmax = module.read("weight.absmax")
    if not state.nested:
        return absmax
    table, scales = module.read("weight.nested_quant_map"), module.read("weight.nested_absmax")
    with np.errstate(all="ignore"):  # what a file has that is not a number stays so
        values: Array = table[absmax] * np.repeat(scales, state.nested)[: len(absmax)]
        values += np.float32(state.offset)
    return values


def _swapped(flat: Array, shape: tuple[int, int]) -> Array:
    """Rows packed lowest bits first, of bytes that have their first code in the upper half."""
    rows, columns = shape
    if columns % 2 == 0:
        packed = flat.reshape(rows, columns // 2)
        return (packed >> 4) | (packed << 4)

    def codes(start: int, stop: int) -> Array:
        part = flat[start * columns // 2 : -(-stop * columns // 2)]
        both = np.stack((part >> 4, part & 15), axis=-1).reshape(-1)
        first = start * columns % 2
        return both[first : first + (stop - start) * columns].reshape(-1, columns)

    return pack_rows(shape, 4, codes)
