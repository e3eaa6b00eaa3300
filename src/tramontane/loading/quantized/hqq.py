"""HQQ checkpoints (Badri and Shaji, 2023), as the hqq library stores them in safetensors.

Owns their layout: the matrix reshaped to groups (rows of them, axis 1, or columns, axis 0), its codes packed so that
one word holds codes of distant rows, the first row's in the uppermost bits; scales and zero points in floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable

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
    flat_grid,
    flat_values,
)
from tramontane.loading.quantized.packing import pack_rows, row_bytes
from tramontane.models.fields import Fields
from tramontane.records import dataclass

_INTS = ("I32", "I64", "U8")
_PACKINGS = {8: ("U8", 1), 4: ("U8", 2), 3: ("I32", 10), 2: ("U8", 4), 1: ("U8", 8)}
"""Bits -> the words that codes are packed into, and how many a word."""
_SETTINGS = (
    *("nbits", "group_size", "shape", "axis", "packing", "view_as_float", "unpack_view_dtype", "compute_dtype"),
    *("quant_zero", "quant_scale", "channel_wise", "optimize", "round_zero", "offload_meta", "encoded_state_dict"),
    "stores_quant_config",
)


def method(config: Fields) -> Method:
    config.mapping("quant_config")
    return Method(
        label="hqq",
        tensors=("W_q", "scale", "zero", *_SETTINGS),
        quantized=lambda module: "W_q" in module,
        plan=_plan,
    )


def _plan(module: Module) -> Matrix:
    bits, axis = module.number("nbits", _INTS), module.number("axis", _INTS)
    shape = module.sizes("shape", _INTS)
    for setting in ("quant_zero", "quant_scale"):
        if setting in module and module.number(setting, _INTS):
            raise module.unsupported("has quantized scales or zero points")
    group = shape[1] if axis else shape[0]
    if "group_size" in module:
        group = module.number("group_size", _INTS)
    return plan_groups(module, Groups(shape, bits, group, axis), "W_q", "scale", "zero")


@dataclass(frozen=True)
class Groups:
    """How a matrix is cut: `size` weights a group along `axis` of the matrix reshaped to groups."""

    shape: tuple[int, int]
    bits: int
    size: int
    axis: int


def plan_groups(module: Module, groups: Groups, words: str, scale: str, zero: str) -> Matrix:
    """The matrix of packed words and of scales and zero points, one a group, by their tensors' names."""
    bits, shape = groups.bits, groups.shape
    count = shape[0] * shape[1]
    if bits not in _PACKINGS or groups.axis not in (0, 1) or groups.size < 1 or count % groups.size:
        raise module.corrupt(f"{shape[0]} x {shape[1]} codes of {bits} bits in groups of {groups.size}")
    number = count // groups.size
    for tensor in (scale, zero):
        module.need(tensor, FLOATS, (number, 1), (1, number), (number,))
    # Rows and columns of the matrix that is packed, and of its words.
    high, wide = (number, groups.size) if groups.axis else (groups.size, number)
    element, each = _PACKINGS[bits]
    segment = -(-high // each) * wide
    stored = module.entry(words)
    if stored.nbytes != segment * (4 if element == "I32" else 1):
        raise module.corrupt(f"{words} takes {stored.nbytes} bytes for {count} codes of {bits} bits")
    grid, expand = _grid(groups)
    grids = [math.prod((grid.lines, grid.groups)) * (4 if module.format(t) == "F32" else 2) for t in (scale, zero)]
    size = coded_bytes(shape[0] * row_bytes(shape[1], bits), bits, *grids)

    def load() -> dict[str, Array]:
        flat = np.ascontiguousarray(module.read(words)).reshape(-1).view(np.uint8 if element == "U8" else np.int32)
        if bits == 8:
            codes = flat.reshape(shape)
        else:
            columns = shape[1]
            codes = pack_rows(
                shape, bits, lambda a, b: _codes(flat, bits, each, a * columns, b * columns).reshape(-1, columns)
            )
        return {
            "codes": codes,
            "table": TABLES[f"U{bits}"],
            "scales": expand(module.read(scale)),
            "zeros": expand(module.read(zero)),
            "layout": grid.layout,
        }

    return Matrix(shape, f"INT{bits}", size, load)


def _grid(groups: Groups) -> tuple[Grid, Callable[[Array], Array]]:
    """Where the groups' scales lie, and how their tensor becomes that grid.

    Along axis 0 a group takes every (N K / size)-th weight: its scales repeat over the matrix, after whole rows where
    the size divides N. Where it does not they are repeated here until they do.
    """
    (rows, columns), size = groups.shape, groups.size
    if groups.axis:
        flat = flat_grid(groups.shape, size)
        return flat, lambda values: flat_values(values, flat, size)
    lines = rows // math.gcd(rows, size)
    grid = Grid(lines, columns, 1)
    times = size // math.gcd(rows, size)
    return grid, lambda values: grid.array(np.tile(values.reshape(-1), times))


def _codes(words: Array, bits: int, each: int, start: int, stop: int) -> Array:
    """Codes start to stop of the whole matrix, uint8: word i has codes i, i + W, i + 2 W, ..., the first uppermost."""
    out = np.empty(stop - start, np.uint8)
    at = start
    while at < stop:
        segment, first = divmod(at, len(words))
        count = min(stop - at, len(words) - first)
        shift = (each - 1 - segment) * bits
        out[at - start : at - start + count] = (words[first : first + count] >> shift) & (2**bits - 1)
        at += count
    return out
