"""GPTQ checkpoints (Frantar et al., 2022), as AutoGPTQ and GPTQModel write them.

Owns their layout: codes and zero points packed into int32 words down the columns of W transposed, scales [G, N], and
with act-order the group of every input in `g_idx`. Zero points of the first version are stored minus one.
"""

from __future__ import annotations

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
    group_size,
)
from tramontane.loading.quantized.packing import dense_codes, pack_columns, row_bytes, row_words
from tramontane.models.fields import Fields

_BITS = (2, 3, 4, 8)
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
"""A one in every field of a word."""


def method(config: Fields) -> Method:
    bits = config.integer("bits")
    if bits not in _BITS:
        raise config.unsupported("bits", f"This build reads GPTQ of {', '.join(map(str, _BITS))} bits.")
    stored = config.text("checkpoint_format", config.text("format", "gptq"))
    if stored not in ("gptq", "gptq_v2"):
        key = "checkpoint_format" if config.get("checkpoint_format") else "format"
        raise config.unsupported(key, "This build reads gptq and gptq_v2.")
    config.only(is_marlin_format=False)
    return Method(
        label=f"gptq, {bits} bits",
        tensors=("qweight", "qzeros", "scales", "g_idx"),
        quantized=lambda module: "qweight" in module,
        plan=partial(
            _plan,
            bits=None if config.get("dynamic") else bits,
            group=configured_group(config.get("group_size")),
            minus_one=stored == "gptq",
        ),
        zero_biases=True,
    )


def _plan(module: Module, *, bits: int | None, group: int | None, minus_one: bool) -> Matrix:
    groups, rows = module.need("scales", FLOATS, (None, None))
    _, words = module.need("qzeros", ("I32",), (groups, None))
    widths = [width for width in _BITS if bits in (None, width) and row_words(rows, width) == words]
    if len(widths) != 1:
        raise module.corrupt(f"qzeros has {words} words for {rows} outputs, no packing of {bits or 'its'} bits")
    found = widths[0]
    packed, _ = module.need("qweight", ("I32",), (None, rows))
    shape = (rows, _columns(module, packed, found))
    grid = Grid(rows, groups, group_size(module, "qzeros", shape[1], groups, group))
    order = _order(module, grid, shape[1])
    scales = module.tensors["scales"].nbytes
    codes = rows * (packed * 4 if order is None else row_bytes(shape[1], found))
    size = coded_bytes(codes, found, scales, rows * groups, order=0 if order is None else shape[1])

    def load() -> dict[str, Array]:
        words = module.read("qweight")
        if order is None:  # a column of words is a row of codes
            codes = np.ascontiguousarray(words.T).view(np.uint8)
        else:
            codes = pack_columns(shape, found, lambda a, b: dense_codes(words, found, order[a:b]))
        tensors: dict[str, Array] = {
            "codes": codes,
            "table": TABLES[f"U{found}"],
            "scales": np.ascontiguousarray(module.read("scales").T),
            "zeros": _zeros(module.read("qzeros"), found, rows, minus_one),
            "layout": grid.layout,
        }
        return tensors if order is None else {**tensors, "order": order}

    return Matrix(shape, f"INT{found}", size, load)


def _columns(module: Module, words: int, bits: int) -> int:
    """K: the last word of a column may be filled up, which `g_idx` tells."""
    entry = module.tensors.get("g_idx")
    if entry is not None and len(entry.shape) == 1 and row_words(entry.shape[0], bits) == words:
        return entry.shape[0]
    if words * 32 % bits:
        raise module.corrupt(f"qweight has {words} words a column, no whole number of {bits}-bit codes")
    return words * 32 // bits


def _order(module: Module, grid: Grid, columns: int) -> Array | None:
    """The inputs in the order of their groups; None where they stand in it already."""
    if "g_idx" not in module:
        return None
    module.need("g_idx", ("I32", "I64"), (columns,))
    groups = module.small("g_idx").astype(np.int64)
    return group_order(module, "g_idx", groups, grid)


def group_order(module: Module, tensor: str, groups: Array, grid: Grid) -> Array | None:
    """A permutation that sorts inputs by their group; None where they are sorted. Groups must be full but the last."""
    if groups.min() < 0 or groups.max() >= grid.groups:
        raise module.corrupt(f"{tensor} names groups {groups.min()} to {groups.max()}; there are {grid.groups}")
    order = np.argsort(groups, kind="stable")
    if not np.array_equal(groups[order], np.arange(len(groups)) // grid.group):
        raise module.unsupported(f"has groups of unequal sizes in {tensor}")
    if np.array_equal(order, np.arange(len(groups))):
        return None
    return order.astype(np.int32)


def _zeros(words: Array, bits: int, rows: int, minus_one: bool) -> Array:
    """uint8 [N, G]. What the first version subtracted from whole words is added to whole words, carries and all."""
    unsigned: Any = words.view(np.uint32)
    if minus_one and bits in _ONES:
        unsigned = unsigned + np.uint32(_ONES[bits])
    codes = dense_codes(np.ascontiguousarray(unsigned.T), bits, np.arange(rows))
    if minus_one and bits not in _ONES:
        codes = (codes + 1) & (2**bits - 1)
    return codes
