"""Quantized caches: what every kernel module writes, and how near it is to what was given."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.kernels.modules import call, ints, normal, unset
from tramontane.kernels import Ops
from tramontane.kernels.cells import CELLS, numpy_dtype, quantize, read_keys, read_values, rotate

each_kind = pytest.mark.parametrize("kind", ["int8", "fp8"])
WIDTHS = [(8, 8), (24, 17), (64, 64), (80, 96), (33, 1)]


def test_rotating_nothing_gives_nothing() -> None:
    assert rotate(np.zeros((0, 2, 64), np.float32)).shape == (0, 2, 64)


def empty(kind: str, blocks: int, heads: int, size: int, widths: tuple[int, int]) -> list[NDArray[Any]]:
    cells = CELLS[kind]
    shapes = cells.shapes(blocks, heads, size, *widths)
    return [np.zeros(shape, np.uint8).view(numpy_dtype(cells.dtype)) for shape in shapes]


def written(ops: Ops, caches: list[NDArray[Any]], k: NDArray[Any], v: NDArray[Any], slots: Any) -> list[NDArray[Any]]:
    results: list[NDArray[Any]] = call(ops, "write_cache", *caches, k, v, slots, written=2)
    return results


def hadamard(size: int) -> NDArray[np.float64]:
    """Sylvester's matrix of the largest power of two that divides `size`, along the diagonal."""
    n = size & -size
    matrix = np.ones((1, 1))
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.kron(np.eye(size // n), matrix / np.sqrt(n))


@pytest.mark.parametrize("size", [1, 2, 24, 64, 80, 128, 576])
def test_rotation(size: int, rng: np.random.Generator) -> None:
    x = normal(rng, 3, 5, size)
    np.testing.assert_allclose(rotate(x), x @ hadamard(size), atol=2e-6)
    np.testing.assert_allclose(rotate(rotate(x)), x, atol=2e-6)


@each_kind
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("size", [1, 5, 16])
def test_every_module_writes_the_same(
    ops: Ops, kind: str, widths: tuple[int, int], size: int, rng: np.random.Generator
) -> None:
    """Codes and scales as the definition has them, at their own places, and nothing else."""
    k, v = (normal(rng, 7, 3, width) * 10.0 ** rng.integers(-6, 4, (7, 3, 1)) for width in widths)
    k, v = k.astype(np.float32), v.astype(np.float32)
    k[2, 1], v[3, 0] = 0, 0
    slots = rng.permutation(9 * size)[:7].astype(np.int32)
    before = empty(kind, 9, 3, size, widths)
    for cache in before:
        cache.view(np.uint8)[...] = 0x55
    caches = written(ops, before, k, v, slots)
    for cache, x, width, keys in zip(caches, (rotate(k), v), widths, (True, False), strict=True):
        codes, scales = quantize(x, CELLS[kind])
        flat = np.full((9, 3, size * (width + 2)), 0x55, np.uint8)
        for t, slot in enumerate(slots):
            block, place = divmod(int(slot), size)
            for head in range(3):
                row = flat[block, head, : size * width]
                row = row.reshape(width, size)[:, place] if keys else row.reshape(size, width)[place]
                row[...] = codes[t, head].view(np.uint8)
                at = size * width + 2 * place
                flat[block, head, at : at + 2] = scales[t, head].reshape(1).view(np.uint8)
        np.testing.assert_array_equal(cache.view(np.uint8).reshape(flat.shape), flat)


@each_kind
def test_quantized_numbers_are_near(ops: Ops, kind: str, rng: np.random.Generator) -> None:
    """Of keys with a few elements that are far larger than the others, too."""
    k, v = normal(rng, 64, 2, 128), normal(rng, 64, 2, 128)
    k[..., 5], k[..., 69] = 200, -150
    k_cache, v_cache = written(ops, empty(kind, 4, 2, 16, (128, 128)), k, v, np.arange(64, dtype=np.int32))
    for actual, x in ((read_keys(k_cache, 128), rotate(k)), (read_values(v_cache, 128), v)):
        right = x.reshape(4, 16, 2, 128).swapaxes(1, 2)
        largest = np.abs(right).max(axis=-1, keepdims=True)
        # Half a step of 127; four bits of a number, or half the smallest step of 2 ** -9 in 448.
        bound = largest / 253 if kind == "int8" else np.maximum(np.abs(right) / 16, largest / 448 / 1000)
        assert (np.abs(actual - right) <= bound * 1.01).all()


@each_kind
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so(ops: Ops, kind: str, bad: float, rng: np.random.Generator) -> None:
    k, v = normal(rng, 2, 1, 8), normal(rng, 2, 1, 8)
    k[0, 0, 3] = v[0, 0, 7] = bad
    caches = written(ops, empty(kind, 1, 1, 4, (8, 8)), k, v, ints(0, 1))
    for read, cache in zip((read_keys, read_values), caches, strict=True):
        numbers = read(cache, 8)
        assert np.isnan(numbers[0, 0, 0]).all()
        assert np.isfinite(numbers[0, 0, 1]).all()


def test_rounding_to_eight_bits_with_an_exponent(ops: Ops) -> None:
    """Every number, and all around every half: with 448 among them, the scale is one."""
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    finite = np.sort(codes[np.isfinite(codes)])
    between = (finite[1:] + finite[:-1]) / 2
    near = [np.nextafter(between, np.float32(sign * np.inf)) for sign in (-1, 1)]
    x = np.concatenate([finite, between, *near]).astype(np.float32)[None, None]
    _, cache = written(ops, empty("fp8", 1, 1, 1, (1, x.shape[2])), x[:, :, :1], x, ints(0))
    np.testing.assert_array_equal(
        cache.reshape(-1)[: x.size].astype(np.float32), x[0, 0].astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    )


@each_kind
def test_blocks_are_copied_with_their_scales(ops: Ops, kind: str, rng: np.random.Generator) -> None:
    for cache in empty(kind, 6, 2, 4, (8, 7)):
        cache.view(np.uint8)[...] = rng.integers(0, 256, cache.shape, np.uint8)
        copied = call(ops, "copy_blocks", cache, ints(0, 2), ints(1, 5))
        expected = cache.view(np.uint8).copy()
        expected[[1, 5]] = expected[[0, 2]]
        np.testing.assert_array_equal(copied.view(np.uint8), expected)


@each_kind
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("size", [1, 5, 16])
def test_every_module_reads_what_was_written(
    ops: Ops, kind: str, widths: tuple[int, int], size: int, rng: np.random.Generator
) -> None:
    """Tokens of a context from any on, keys turned back; of floats without a cache it is what was written, rounded."""
    table, tokens = ints(*rng.permutation(9)), 37 if size > 4 else 7
    k, v = (normal(rng, tokens, 3, width) for width in widths)
    slots = (table[:, None] * size + np.arange(size, dtype=np.int32)).reshape(-1)[:tokens]
    caches = written(ops, empty(kind, 9, 3, size, widths), k, v, slots)
    near = {"float32": 0, "float16": 1e-3, "bfloat16": 8e-3, "int8": 2e-2, "fp8": 8e-2}[kind]
    for first, stop in ((0, tokens), (3, tokens - 1), (tokens - 1, tokens), (2, 2)):
        shapes = [(stop - first, 3, width) for width in widths]
        outs = call(ops, "read_cache", *(unset(*shape) for shape in shapes), *caches, table, first, written=2)
        for out, x in zip(outs, (k, v), strict=True):
            np.testing.assert_allclose(out, x[first:stop], atol=near * 3, rtol=0)
    keys, values = (x.swapaxes(1, 2).reshape(-1, 3, x.shape[3])[:tokens] for x in _held(caches, table, widths))
    outs = call(ops, "read_cache", unset(*k.shape), unset(*v.shape), *caches, table, 0, written=2)
    np.testing.assert_allclose(outs[0], rotate(keys) if CELLS[kind].top else keys, atol=2e-6)
    np.testing.assert_array_equal(outs[1], values)


def _held(caches: list[NDArray[Any]], table: NDArray[Any], widths: tuple[int, int]) -> tuple[NDArray[Any], ...]:
    return read_keys(caches[0][table], widths[0]), read_values(caches[1][table], widths[1])
