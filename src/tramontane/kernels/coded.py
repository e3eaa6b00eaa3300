"""Coded matrices: short codes, a table of values, and scales a group; one storage for every group and codebook format.

Owns `Coded`, the value tables, and what a coded row stands for, for numpy and torch alike. Must not know: which method
or file the codes come from, ops, devices.

A weight is table[code], then (where the matrix has them) minus its zero point, times its scale, plus its offset, times
the factor, in this order, in float32, each operation rounded. That is the arithmetic of the libraries that define the
formats, so values equal theirs bit for bit.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tramontane.kernels.base import Array
from tramontane.kernels.checks import FLOAT32, FLOATS, INT32, UINT8, Spec, check
from tramontane.records import dataclass

__all__ = ["GRIDS", "TABLES", "Coded", "check_coded", "decode", "decode_host", "turn", "turn_back", "unpack"]

GRIDS = ("scales", "zeros", "offsets")


@dataclass(frozen=True)
class Coded:
    """A matrix [N, K] of codes, on one device.

    Scales, zero points and offsets are grids [R, G] of one shape: row n takes row (n // row_block) % R of them, stored
    column k takes column k // group. So a grid serves groups within rows (R = N), blocks of rows (row_block > 1),
    groups across rows (R rows that repeat), channels (G = 1) and whole tensors (R = G = 1). What `Ops.pack_codes` made
    may have them turned, where R = N: see `turn`.
    """

    codes: Array
    """uint8 [N, at least ceil(K * bits / 8)]: each row's codes from the lowest bit of its first byte on. Or what
    `Ops.pack_codes` made of them."""
    bits: int
    """1 to 8."""
    columns: int
    """K."""
    table: Array
    """float32 [2 ** bits]: the value of each code."""
    scales: Array
    """[R, G] float32, float16, bfloat16; or uint8 places in `scale_table`."""
    group: int
    row_block: int = 1
    scale_table: Array | None = None
    """float32 [256], with uint8 scales only."""
    zeros: Array | None = None
    """[R, G] uint8, float32, float16 or bfloat16."""
    offsets: Array | None = None
    """[R, G] float32, float16 or bfloat16."""
    order: Array | None = None
    """int32 [K], a permutation: stored column k is the matrix's column order[k]."""
    factor: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        return (int(self.codes.shape[0]), self.columns)


def _integers(bits: int) -> NDArray[np.float32]:
    return np.arange(2**bits, dtype=np.float32)


def _signed(bits: int) -> NDArray[np.float32]:
    values = _integers(bits)
    return np.where(values < 2 ** (bits - 1), values, values - np.float32(2**bits)).astype(np.float32)


def _floats(dtype: Any) -> NDArray[np.float32]:
    values: NDArray[np.float32] = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    return values


TABLES: dict[str, NDArray[np.float32]] = {
    **{f"U{bits}": _integers(bits) for bits in range(1, 9)},
    **{f"S{bits}": _signed(bits) for bits in range(1, 9)},
    # Two's complement with the sign bit flipped, as compressed-tensors packs: code 0 is the lowest value.
    **{f"B{bits}": _integers(bits) - np.float32(2 ** (bits - 1)) for bits in range(1, 9)},
    "E2M1": np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32),
    "E4M3": _floats(ml_dtypes.float8_e4m3fn),
    "E5M2": _floats(ml_dtypes.float8_e5m2),
    "E8M0": _floats(ml_dtypes.float8_e8m0fnu),
}
"""Values of codes: unsigned (U), two's complement (S) and biased (B) integers of each width, and the small floats of
the Open Compute Project (FP8 1.0; Microscaling Formats 1.0)."""
for _table in TABLES.values():
    _table.setflags(write=False)


class Library(Protocol):
    """What numpy and torch spell differently. Everything else that `decode` uses, both have."""

    def zeros(self, like: Array, shape: tuple[int, ...]) -> Array:
        """uint8, where `like` is."""
        ...

    def look(self, table: Array, codes: Array) -> Array:
        """table[codes], codes uint8."""
        ...

    def floats(self, array: Array) -> Array:
        """float32."""
        ...


class NumpyLibrary:
    """`Library` on numpy arrays."""

    def zeros(self, like: Array, shape: tuple[int, ...]) -> Array:
        return np.zeros(shape, np.uint8)

    def look(self, table: Array, codes: Array) -> Array:
        return table.take(codes)

    def floats(self, array: Array) -> Array:
        return array.astype(np.float32)


_NUMPY = NumpyLibrary()


def unpack(out: Array, packed: Array, bits: int) -> None:
    """out uint8 [..., K] = the first K codes of packed uint8 [..., bytes], lowest bits first; numpy or torch."""
    columns, mask = int(out.shape[-1]), (1 << bits) - 1
    step = math.gcd(8, bits)
    period, stride = 8 // step, bits // step  # `period` codes fill `stride` bytes
    for i in range(min(period, columns)):
        count = -(-(columns - i) // period)
        byte, shift = divmod(i * bits, 8)
        part = packed[..., byte::stride][..., :count] >> shift
        if shift + bits > 8:
            part = part | (packed[..., byte + 1 :: stride][..., :count] << (8 - shift))
        out[..., i::period] = part & mask


def decode(lib: Library, coded: Coded, rows: Array) -> Array:
    """float32 [len(rows), K]: the values of these rows (integers on the device), stored columns in stored order."""
    group, packed = coded.group, coded.codes[rows]
    line = (rows // coded.row_block) % coded.scales.shape[0]
    groups = coded.scales.shape[1]
    codes = lib.zeros(packed, (packed.shape[0], groups * group))
    unpack(codes[:, : coded.columns], packed, coded.bits)
    values = lib.look(coded.table, codes).reshape(packed.shape[0], groups, group)
    if coded.zeros is not None:
        values -= lib.floats(coded.zeros[line])[:, :, None]
    scales = coded.scales[line]
    scales = lib.floats(scales) if coded.scale_table is None else lib.look(coded.scale_table, scales)
    values *= scales[:, :, None]
    if coded.offsets is not None:
        values += lib.floats(coded.offsets[line])[:, :, None]
    if coded.factor != 1.0:
        values *= coded.factor
    return values.reshape(packed.shape[0], groups * group)[:, : coded.columns]


def decode_host(coded: Coded, rows: NDArray[Any] | range) -> NDArray[np.float32]:
    """`decode` of numpy arrays."""
    with np.errstate(over="ignore", invalid="ignore"):  # a scale may be inf or not a number: so are its values
        values: NDArray[np.float32] = decode(_NUMPY, coded, np.asarray(rows, np.int64))
    return values


def turn(grid: NDArray[Any]) -> NDArray[Any]:
    """[ceil(R / 16), G, 16] of a grid [R, G]: what 16 rows have for a group lies together; zeros for rows beyond."""
    rows, groups = grid.shape
    turned = np.zeros((-(-rows // 16), 16, groups), grid.dtype)
    turned.reshape(-1, groups)[:rows] = grid
    return np.ascontiguousarray(turned.transpose(0, 2, 1))


def turn_back(grid: NDArray[Any], rows: int) -> NDArray[Any]:
    """The grid of so many rows that `turn` was given; one that is not turned as it is."""
    if grid.ndim == 2:
        return grid
    return np.ascontiguousarray(grid.transpose(0, 2, 1).reshape(-1, grid.shape[1])[:rows])


def check_coded(op: str, coded: Coded, *specs: Spec) -> None:
    """Hold a coded matrix's arrays, and an op's others (see `checks.check`; N, K are the matrix's), to one another.

    Raises ValueError.
    """
    if not 1 <= coded.bits <= 8 or coded.columns < 1 or coded.group < 1 or coded.row_block < 1:
        raise ValueError(f"{op}: codes of {coded.bits} bits in groups of {coded.group} x {coded.row_block}")
    sizes = check(
        op,
        ("codes", coded.codes, "N bytes", UINT8),
        ("table", coded.table, "values", FLOAT32),
        ("scales", coded.scales, "lines groups", FLOATS if coded.scale_table is None else UINT8),
        ("zeros", coded.zeros, "lines groups", (*UINT8, *FLOATS)),
        ("offsets", coded.offsets, "lines groups", FLOATS),
        ("scale_table", coded.scale_table, "scale_values", FLOAT32),
        ("order", coded.order, "K", INT32),
        *specs,
    )
    wrong = (
        sizes["values"] != 2**coded.bits
        or sizes["bytes"] < -(-coded.columns * coded.bits // 8)
        or sizes["lines"] < 1
        or sizes["groups"] != -(-coded.columns // coded.group)
        or sizes.get("scale_values", 256) != 256
        or sizes.get("K", coded.columns) != coded.columns
    )
    if wrong:
        raise ValueError(
            f"{op}: {sizes['N']} x {coded.columns} codes of {coded.bits} bits in groups of {coded.group} do not fit "
            f"{sizes['bytes']} bytes a row, {sizes['values']} values, a grid of {sizes['lines']} x {sizes['groups']}, "
            f"or rows of {sizes.get('K', coded.columns)}"
        )
