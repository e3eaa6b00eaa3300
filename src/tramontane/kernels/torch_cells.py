"""What `kernels.cells` defines, on torch tensors.

Owns how quantized keys and values are stored and read there. Must not know: attention, layers, models.
"""

from __future__ import annotations

import math

from tramontane.errors import MissingExtra
from tramontane.kernels.base import Array
from tramontane.kernels.cells import Cells, cells_of

try:
    import torch
except ImportError as error:
    raise MissingExtra("torch", "Running on torch") from error

__all__ = ["pages_of", "read_keys", "read_values", "rotate", "write_keys", "write_values"]


def rotate(x: Array) -> Array:
    """Hadamard's rotation of float32 [..., D], see `kernels.cells.rotate`."""
    shape, size = x.shape, x.shape[-1]
    n, half = size & -size, 1
    while half < n:
        a, b = x.reshape(*shape[:-1], size // (2 * half), 2, half).unbind(dim=-2)
        x = torch.stack((a + b, a - b), dim=-2).reshape(shape)
        half *= 2
    return x * (1 / math.sqrt(n))


def _quantize(x: Array, cells: Cells) -> tuple[Array, Array]:
    """Codes [..., D] as bytes, and the two bytes of their scales [..., 2]."""
    highest = x.abs().amax(dim=-1)
    scales = (highest.masked_fill(~highest.isfinite(), math.nan) / cells.top).to(torch.bfloat16)
    divisors = scales.float()[..., None]
    codes = (x / divisors).clamp(-cells.top, cells.top).masked_fill(~(divisors > 0), 0)
    codes = (codes.round() if cells.dtype == "int8" else codes).to(getattr(torch, cells.dtype))
    return codes.view(torch.uint8), scales[..., None].view(torch.uint8)


def write_keys(cache: Array, x: Array, slots: Array) -> None:
    """Store x [T,H,D] float32 at slots [T] of [num_blocks,H,D or more,block_size]."""
    size, cells = cache.shape[3], cells_of(cache)
    blocks, places = (slots // size).long(), (slots % size).long()
    if not cells.top:
        cache[blocks, :, :, places] = x.to(cache.dtype)
        return
    codes, scales = _quantize(rotate(x), cells)
    cache.view(torch.uint8)[blocks, :, : x.shape[2], places] = codes
    _scale_bytes(cache, x.shape[2])[blocks, :, places] = scales


def write_values(cache: Array, x: Array, slots: Array) -> None:
    """Store x [T,H,Dv] float32 at slots [T] of [num_blocks,H,block_size,Dv or more]."""
    size, cells = cache.shape[2], cells_of(cache)
    blocks, places = (slots // size).long(), (slots % size).long()
    if not cells.top:
        cache[blocks, :, places] = x.to(cache.dtype)
        return
    codes, scales = _quantize(x, cells)
    _code_bytes(cache, x.shape[2])[blocks, :, places] = codes
    _scale_bytes(cache, x.shape[2])[blocks, :, places] = scales


def _code_bytes(blocks: Array, width: int) -> Array:
    """The codes of values [..., block_size, Dv], same memory."""
    size = blocks.shape[-2]
    return blocks.view(torch.uint8).flatten(-2)[..., : size * width].unflatten(-1, (size, width))


def _scale_bytes(blocks: Array, width: int) -> Array:
    """The bytes of the scales [..., block_size, 2], same memory."""
    flat = blocks.view(torch.uint8).flatten(-2)
    size = flat.shape[-1] // (width + 2)
    return flat[..., size * width :].unflatten(-1, (size, 2))


def pages_of(cache: Array, blocks: Array) -> Array:
    """The blocks of a cache."""
    if cache.dtype == torch.float8_e4m3fn:  # which torch cannot index
        pages: Array = cache.view(torch.uint8)[blocks].view(cache.dtype)
        return pages
    return cache[blocks]


def read_keys(blocks: Array, width: int) -> Array:
    """float32 [..., H, block_size, D] of blocks of a cache of keys; rotated where they are quantized."""
    keys = blocks[..., :width, :].transpose(-1, -2).float()
    return keys * _scales(blocks, width) if cells_of(blocks).top else keys


def read_values(blocks: Array, width: int) -> Array:
    """float32 [..., H, block_size, Dv] of blocks of a cache of values."""
    if not cells_of(blocks).top:
        return blocks.float()
    return _code_bytes(blocks, width).view(blocks.dtype).float() * _scales(blocks, width)


def _scales(blocks: Array, width: int) -> Array:
    bits = _scale_bytes(blocks, width).clone(memory_format=torch.contiguous_format)  # at an offset of its own
    return bits.view(torch.bfloat16).float()
