"""Repacking codes into the rows of a coded weight, a strip at a time.

Owns the bit work. Must not know: methods, modules.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tramontane.kernels.coded import unpack

Array = NDArray[Any]

_STRIP = 1 << 20
"""Codes unpacked at a time."""


def row_bytes(columns: int, bits: int) -> int:
    return -(-columns * bits // 8)


def row_words(columns: int, bits: int) -> int:
    """The same in words of 32 bits."""
    return -(-columns * bits // 32)


def pack(out: Array, codes: Array, bits: int) -> None:
    """out uint8 [R, row_bytes] = codes uint8 [R, K], each row from the lowest bit of its first byte on."""
    columns, step = codes.shape[1], math.gcd(8, bits)
    period, stride = 8 // step, bits // step
    out[...] = 0
    for i in range(min(period, columns)):
        part = codes[:, i::period]
        byte, shift = divmod(i * bits, 8)
        out[:, byte::stride][:, : part.shape[1]] |= part << shift
        if shift + bits > 8:
            out[:, byte + 1 :: stride][:, : part.shape[1]] |= part >> (8 - shift)


def pack_rows(shape: tuple[int, int], bits: int, codes: Callable[[int, int], Array]) -> Array:
    """Packed codes of a matrix; `codes(start, stop)` gives the rows between, uint8 [stop - start, K]."""
    rows, columns = shape
    out = np.empty((rows, row_bytes(columns, bits)), np.uint8)
    step = max(1, _STRIP // columns)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        pack(out[start:stop], codes(start, stop), bits)
    return out


def pack_columns(shape: tuple[int, int], bits: int, codes: Callable[[int, int], Array]) -> Array:
    """The same from columns: `codes(start, stop)` gives the columns between, uint8 [stop - start, N]."""
    rows, columns = shape
    out = np.empty((rows, row_bytes(columns, bits)), np.uint8)
    step = max(8, _STRIP // rows // 8 * 8)  # eight codes of any width are whole bytes
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        strip = np.ascontiguousarray(codes(start, stop).T)
        pack(out[:, start * bits // 8 : row_bytes(stop, bits)], strip, bits)
    return out


def dense_codes(words: Array, bits: int, index: Array) -> Array:
    """Codes `index` of each column of words int32 [W, M], packed densely down the column: uint8 [len(index), M]."""
    at = index.astype(np.int64) * bits
    mask = np.uint8(2**bits - 1)
    if 8 % bits == 0:  # no code crosses bytes
        flat = words.view(np.uint8).reshape(*words.shape, 4)
        codes: Array = flat[at >> 5, :, (at & 31) >> 3] >> (at & 7).astype(np.uint8)[:, None]
        codes &= mask
        return codes
    word, shift = at >> 5, (at & 31).astype(np.uint32)[:, None]
    unsigned = words.view(np.uint32)
    wide: Array = unsigned[word] >> shift
    crossing = np.flatnonzero(shift[:, 0] + bits > 32)
    if len(crossing):
        wide[crossing] |= unsigned[word[crossing] + 1] << (np.uint32(32) - shift[crossing])
    codes = wide.astype(np.uint8)
    codes &= mask
    return codes


def unpacked(packed: Array, bits: int, columns: int) -> Array:
    """uint8 [R, K] of rows packed densely into any words."""
    flat = np.ascontiguousarray(packed).view(np.uint8)
    out = np.empty((len(flat), columns), np.uint8)
    unpack(out, flat, bits)
    return out
