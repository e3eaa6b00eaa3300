"""How a cache keeps keys and values: its dtypes, the shapes of its blocks, and what quantized numbers stand for.

Owns the layout, and the definition of quantized caches in numpy. Must not know: attention, layers, models.

Quantized, each token has codes and one scale a head, for keys and for values: scale = bfloat16(max|x| / top), a code is
x / scale, rounded to the dtype (ties to even) within -top and top, and stands for code * scale in float32. Keys are
rotated first (`rotate`), and so are the queries that meet them: some models have keys with a few elements that are
larger than the others by orders of magnitude, and one scale would leave nothing of the others. What is not finite makes
its token's scale not a number. In memory a head of a block is its codes and then its scales, as many as it has tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tramontane.kernels.base import Array
from tramontane.records import dataclass

__all__ = [
    "CELLS",
    "Cells",
    "cells_of",
    "numpy_dtype",
    "quantize",
    "read_keys",
    "read_latent",
    "read_values",
    "rotate",
    "write_keys",
    "write_values",
]

BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class Cells:
    """The `dtype` of a cache's arrays (a numpy or ml_dtypes name), its bytes, and the largest code; 0: no codes."""

    dtype: str
    itemsize: int
    top: int = 0

    def width(self, size: int) -> int:
        """Elements that a token takes for `size` of a head, its scale among them."""
        return size + (2 // self.itemsize if self.top else 0)

    def shapes(
        self, num_blocks: int, heads: int, block_size: int, key_size: int, value_size: int
    ) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
        """Of the arrays of keys and of values."""
        keys = (num_blocks, heads, self.width(key_size), block_size)
        return keys, (num_blocks, heads, block_size, self.width(value_size))


CELLS: Mapping[str, Cells] = {
    "float32": Cells("float32", 4),
    "float16": Cells("float16", 2),
    "bfloat16": Cells("bfloat16", 2),
    "int8": Cells("int8", 1, 127),
    "fp8": Cells("float8_e4m3fn", 1, 448),
}
"""By the name that `cache_dtype` has for them."""

_BY_DTYPE = {cells.dtype: cells for cells in CELLS.values()}


def cells_of(array: Array) -> Cells:
    """Of a cache, which is an array or a tensor."""
    return _BY_DTYPE[str(array.dtype).removeprefix("torch.")]


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The dtype of that name, which numpy or ml_dtypes knows."""
    return np.dtype(getattr(ml_dtypes, name, name))


def rotate(x: NDArray[Any]) -> NDArray[Any]:
    """Hadamard's rotation of float32 [..., D]: of n elements, n the largest power of two that divides D, of the next n,
    and so on. Its own inverse; products of two rotated vectors are those of the two."""
    size = x.shape[-1]
    n, half = size & -size, 1
    while half < n:
        pairs = x.reshape(*x.shape[:-1], size // (2 * half), 2, half)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = np.stack((a + b, a - b), axis=-2).reshape(x.shape)
        half *= 2
    rotated: NDArray[Any] = x * np.float32(1 / math.sqrt(n))
    return rotated


def quantize(x: NDArray[Any], cells: Cells) -> tuple[NDArray[Any], NDArray[Any]]:
    """Codes [..., D] of float32 x and their scales bfloat16 [...]."""
    highest = np.abs(x).max(axis=-1, initial=0)
    highest[~np.isfinite(highest)] = np.nan
    top = np.float32(cells.top)
    scales = (highest / top).astype(BFLOAT16)
    divisors = scales.astype(np.float32)[..., None]
    with np.errstate(over="ignore", invalid="ignore"):
        codes = np.clip(x / np.where(divisors > 0, divisors, np.float32(np.inf)), -top, top)
    codes[~(divisors[..., 0] > 0)] = 0
    return (np.rint(codes) if cells.dtype == "int8" else codes).astype(numpy_dtype(cells.dtype)), scales


def write_keys(cache: NDArray[Any], x: NDArray[Any], slots: NDArray[Any]) -> None:
    """Store x [T,H,D] float32 at slots [T] of [num_blocks,H,D or more,block_size]."""
    size, cells = cache.shape[3], cells_of(cache)
    blocks, places = np.divmod(slots, np.int32(size))
    if not cells.top:
        with np.errstate(over="ignore"):  # beyond float16 is inf
            cache[blocks, :, :, places] = x.astype(cache.dtype)
        return
    codes, scales = quantize(rotate(x), cells)
    cache[blocks, :, : x.shape[2], places] = codes
    _scales(cache, x.shape[2])[blocks, :, places] = scales.view(np.uint16)


def write_values(cache: NDArray[Any], x: NDArray[Any], slots: NDArray[Any]) -> None:
    """Store x [T,H,Dv] float32 at slots [T] of [num_blocks,H,block_size,Dv or more]."""
    size, cells = cache.shape[2], cells_of(cache)
    blocks, places = np.divmod(slots, np.int32(size))
    if not cells.top:
        with np.errstate(over="ignore"):
            cache[blocks, :, places] = x.astype(cache.dtype)
        return
    codes, scales = quantize(x, cells)
    flat = cache.reshape(*cache.shape[:2], -1)[:, :, : size * x.shape[2]]
    flat.reshape(*cache.shape[:2], size, -1)[blocks, :, places] = codes
    _scales(cache, x.shape[2])[blocks, :, places] = scales.view(np.uint16)


def _scales(blocks: NDArray[Any], width: int) -> NDArray[Any]:
    """The bits of the scales of whole blocks, uint16 [num_blocks,H,block_size], same memory."""
    flat = blocks.view(np.uint8).reshape(*blocks.shape[:2], -1)
    size = flat.shape[2] // (width + 2)
    return flat[:, :, size * width :].view(np.uint16)


def read_keys(blocks: NDArray[Any], width: int) -> NDArray[Any]:
    """float32 [B,H,block_size,D] of blocks of a cache of keys; rotated where they are quantized."""
    keys = blocks[:, :, :width].swapaxes(2, 3).astype(np.float32)
    return _scaled(keys, blocks, width)


def read_values(blocks: NDArray[Any], width: int) -> NDArray[Any]:
    """float32 [B,H,block_size,Dv] of blocks of a cache of values."""
    size = blocks.shape[2]
    flat = blocks.reshape(*blocks.shape[:2], -1)[:, :, : size * width]
    return _scaled(flat.reshape(*blocks.shape[:3], width).astype(np.float32), blocks, width)


def read_latent(
    latents: NDArray[Any], rotated: NDArray[Any], width: int, more: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Keys [B,H,block_size,width + more] and values [B,H,block_size,width], float32, of blocks of two caches: what the
    first holds are both the values and the beginning of the keys."""
    values = read_keys(latents, width)
    if cells_of(latents).top:
        with np.errstate(over="ignore", invalid="ignore"):
            values = rotate(values)
    return np.concatenate((values, read_values(rotated, more)), axis=-1), values


def _scaled(numbers: NDArray[Any], blocks: NDArray[Any], width: int) -> NDArray[Any]:
    if cells_of(blocks).top:
        with np.errstate(over="ignore", invalid="ignore"):  # of what no token has written yet
            numbers *= _scales(blocks, width).view(BFLOAT16).astype(np.float32)[..., None]
    return numbers
