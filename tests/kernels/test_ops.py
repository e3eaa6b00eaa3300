"""The ops of every kernel module that can be built here, against oracles, and the promises of deterministic mode.

Attention has test_attention.py, mixtures of experts have test_experts.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.kernels import oracles
from tests.kernels.modules import DETERMINISTIC, FLOATS, call, ints, make, normal, unset
from tramontane import kernels
from tramontane.errors import DeviceNotAvailable, InvalidRequest, MissingExtra
from tramontane.kernels import BLOCKS, Ops
from tramontane.kernels.blocks import dequantize
from tramontane.kernels.reference import ReferenceOps
from tramontane.weights import FORMATS as WEIGHT_FORMATS

DENSE = {"F32": FLOATS["float32"], "F16": FLOATS["float16"], "BF16": FLOATS["bfloat16"]}
each_dtype = pytest.mark.parametrize("dtype", FLOATS)
each_format = pytest.mark.parametrize("format", BLOCKS)
quick = settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])


def assert_product(actual: NDArray[Any], x: NDArray[Any], weight: NDArray[Any], bias: Any) -> None:
    """Within 2e-6 of the sum of the products' magnitudes: what float32 accumulation can promise."""
    wide, w = x.astype(np.float64), weight.astype(np.float64)
    expected = wide @ w.T + (0 if bias is None else bias)
    bound = 2e-6 * (np.abs(wide) @ np.abs(w).T) + 1e-6
    assert actual.shape == expected.shape
    assert np.all(np.abs(actual - expected) <= bound), np.max(np.abs(actual - expected) / bound)


# ---- Quantized blocks


# What the gguf package lacks; a newer one may have it.
DEFINED = ("Q8_1", "Q8_K", "Q1_0", "Q2_0")


@pytest.mark.parametrize("format", [format for format in BLOCKS if format not in DEFINED])
def test_dequantize_is_ggufs_bit_for_bit(format: str, rng: np.random.Generator) -> None:
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[format]
    blocks = oracles.random_blocks(rng, format, 37, 768)
    ours = dequantize(format, blocks)
    assert ours.dtype == np.float32
    assert ours.shape == (37, 768)
    assert np.isfinite(ours).all()
    np.testing.assert_array_equal(ours.view(np.uint32), gguf.quants.dequantize(blocks, kind).view(np.uint32))
    anything = rng.integers(0, 256, (37, blocks.shape[1]), dtype=np.uint8)
    with np.errstate(all="ignore"):
        theirs = gguf.quants.dequantize(anything, kind)
    ours = dequantize(format, anything)
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))
    number = ~np.isnan(ours)
    np.testing.assert_array_equal(ours[number].view(np.uint32), theirs[number].view(np.uint32))


def test_all_that_gguf_dequantizes_is_here() -> None:
    gguf = pytest.importorskip("gguf")
    for kind in gguf.GGMLQuantizationType:
        elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
        try:
            gguf.quants.dequantize(np.zeros((1, nbytes), np.uint8), kind)
        except NotImplementedError:
            continue
        assert kind.name in WEIGHT_FORMATS, kind.name
        assert (WEIGHT_FORMATS[kind.name].elements, WEIGHT_FORMATS[kind.name].block_bytes) == (elements, nbytes)


@pytest.mark.parametrize("format", DEFINED)
def test_dequantize_is_the_definition(format: str, rng: np.random.Generator) -> None:
    blocks = oracles.random_blocks(rng, format, 7, 512)
    size = BLOCKS[format].nbytes
    expected = [oracles.dequantized(format, block.tobytes()) for block in blocks.reshape(-1, size)]
    np.testing.assert_array_equal(dequantize(format, blocks), np.array(expected, np.float32).reshape(7, 512))


@pytest.mark.parametrize(
    ("format", "bound"),
    [
        *(("Q4_0", 0.5), ("Q4_1", 0.5), ("Q5_0", 0.25), ("Q5_1", 0.25), ("Q8_0", 0.03)),
        *(("TQ1_0", 3.0), ("TQ2_0", 3.0), ("MXFP4", 1.2)),
    ],
)
def test_blocks_that_gguf_quantized_are_near_the_values(format: str, bound: float, rng: np.random.Generator) -> None:
    gguf = pytest.importorskip("gguf")
    values = normal(rng, 6, 512)
    kind = gguf.GGMLQuantizationType[format]
    blocks = gguf.quants.quantize(values, kind)
    ours = dequantize(format, blocks)
    assert np.abs(ours - values).max() < bound
    np.testing.assert_array_equal(ours, gguf.quants.dequantize(blocks, kind))


@each_format
def test_rows_of_blocks_are_exact(ops: Ops, format: str, rng: np.random.Generator) -> None:
    blocks = oracles.random_blocks(rng, format, 19, 512)
    for ids in (ints(0), ints(18, 3, 3, 0, 7), ints()):
        actual = call(ops, "rows_blocks", unset(len(ids), 512), ids, blocks, format)
        np.testing.assert_array_equal(actual, dequantize(format, blocks[ids]))


@each_format
@pytest.mark.parametrize(
    ("t", "n", "blocks_in_row"), [(0, 3, 1), (1, 1, 1), (1, 33, 3), (2, 17, 2), (5, 70, 1), (33, 31, 4)]
)
def test_matmul_blocks(ops: Ops, format: str, t: int, n: int, blocks_in_row: int, rng: np.random.Generator) -> None:
    columns = BLOCKS[format].elements * blocks_in_row
    blocks, x, bias = oracles.random_blocks(rng, format, n, columns), normal(rng, t, columns), normal(rng, n)
    weight = dequantize(format, blocks)
    for b in (None, bias):
        actual = call(ops, "matmul_blocks", unset(t, n), x, blocks, format, b)
        assert_product(actual, x, weight, b)


def test_a_large_product_spans_strips(ops: Ops, rng: np.random.Generator) -> None:
    blocks, x = oracles.random_blocks(rng, "Q8_0", 1500, 576), normal(rng, 3, 576)
    actual = call(ops, "matmul_blocks", unset(3, 1500), x, blocks, "Q8_0")
    assert_product(actual, x, dequantize("Q8_0", blocks), None)


# ---- Dense products and lookups


@each_dtype
@pytest.mark.parametrize(
    ("t", "n", "k"), [(0, 3, 8), (1, 1, 1), (1, 7, 33), (3, 5, 64), (17, 65, 96), (64, 130, 576), (2, 700, 515)]
)
def test_matmul(ops: Ops, dtype: str, t: int, n: int, k: int, rng: np.random.Generator) -> None:
    weight, x, bias = normal(rng, n, k).astype(FLOATS[dtype]), normal(rng, t, k), normal(rng, n)
    for b in (None, bias):
        assert_product(call(ops, "matmul", unset(t, n), x, weight, b), x, weight, b)


@pytest.mark.parametrize("format", ["F32", "BF16", "Q4_0", "Q6_K", "IQ4_XS"])
@pytest.mark.parametrize("t", [0, 1, 5, 16, 17, 40])
def test_several_matrices_as_each_alone(ops: Ops, format: str, t: int, rng: np.random.Generator) -> None:
    """Of sizes that do and do not fill a panel, as they are stored and packed."""
    sizes, columns = (33, 16, 1, 100), 512
    x, dense = ops.from_host(normal(rng, t, columns)), format not in BLOCKS
    stored = [
        normal(rng, n, columns).astype(DENSE[format]) if dense else oracles.random_blocks(rng, format, n, columns)
        for n in sizes
    ]
    biases = [None if n == 16 else ops.from_host(normal(rng, n)) for n in sizes]
    for weights in ([ops.from_host(each) for each in stored], [ops.pack(ops.from_host(e), format) for e in stored]):
        together, alone = ([ops.from_host(unset(t, n)) for n in sizes] for _ in range(2))
        ops.matmul_together(together, x, weights, None if dense else format, biases)
        for out, weight, bias in zip(alone, weights, biases, strict=True):
            ops.matmul(out, x, weight, bias) if dense else ops.matmul_blocks(out, x, weight, format, bias)
        for ours, theirs in zip(together, alone, strict=True):
            np.testing.assert_array_equal(ops.to_host(ours), ops.to_host(theirs))


def test_several_matrices_are_as_many_as_their_results(ops: Ops) -> None:
    x, out, weight = (ops.from_host(np.zeros(shape, np.float32)) for shape in ((1, 8), (1, 3), (3, 8)))
    half = ops.from_host(np.zeros((3, 8), np.float16))
    for outs, weights, biases in (
        ([], [], []),
        ([out], [weight, weight], [None]),
        ([out, out], [weight, weight], [None]),
        ([out, out], [weight, half], [None, None]),
    ):
        with pytest.raises(ValueError, match="matmul_together"):
            ops.matmul_together(outs, x, weights, None, biases)


@each_dtype
def test_rows(ops: Ops, dtype: str, rng: np.random.Generator) -> None:
    weight = normal(rng, 11, 37).astype(FLOATS[dtype])
    for ids in (ints(), ints(10), ints(4, 0, 4)):
        actual = call(ops, "rows", unset(len(ids), 37), ids, weight)
        np.testing.assert_array_equal(actual, weight[ids].astype(np.float32))


def test_take_rows(ops: Ops, rng: np.random.Generator) -> None:
    x = normal(rng, 9, 31)
    for rows in (ints(), ints(8, 0, 8)):
        np.testing.assert_array_equal(call(ops, "take_rows", unset(len(rows), 31), x, rows), x[rows])


# ---- Element by element


each_shape = pytest.mark.parametrize(("t", "k"), [(0, 8), (1, 1), (3, 33), (130, 64), (2, 1537)])


def weights_for(rng: np.random.Generator, t: int, k: int) -> list[tuple[Any, Any]]:
    """(weight, bias): none, one row, and rows that repeat."""
    repeated = 2 if t % 2 == 0 else t
    shapes = [(k,), (repeated, k)] if t else [(k,), (3, k)]
    return [(None, None), *((normal(rng, *shape), normal(rng, *shape)) for shape in shapes)]


@each_shape
def test_rms_norm(ops: Ops, t: int, k: int, rng: np.random.Generator) -> None:
    x = normal(rng, t, k) * 3
    for weight, _ in weights_for(rng, t, k):
        expected = oracles.rms_norm(x, weight, 1e-5)
        np.testing.assert_allclose(call(ops, "rms_norm", unset(t, k), x, weight, 1e-5), expected, rtol=3e-6, atol=1e-6)
        here = ops.from_host(x.copy())
        ops.rms_norm(here, here, weight if weight is None else ops.from_host(weight), 1e-5)
        np.testing.assert_allclose(ops.to_host(here), expected, rtol=3e-6, atol=1e-6)


@each_shape
def test_layer_norm(ops: Ops, t: int, k: int, rng: np.random.Generator) -> None:
    x = normal(rng, t, k) * 3 + 2
    weights = weights_for(rng, t, k)
    for weight, bias in (*weights, (weights[1][0], None), (None, weights[2][1])):
        expected = oracles.layer_norm(x, weight, bias, 1e-5)
        actual = call(ops, "layer_norm", unset(t, k), x, weight, bias, 1e-5)
        np.testing.assert_allclose(actual, expected, rtol=4e-6, atol=4e-6)
        here = ops.from_host(x.copy())
        ops.layer_norm(here, here, *(a if a is None else ops.from_host(a) for a in (weight, bias)), 1e-5)
        np.testing.assert_array_equal(ops.to_host(here), actual)


SHAPES = ((0, 5), (1, 1), (3, 7), (65, 33))


def test_add_multiply_and_copy(ops: Ops, rng: np.random.Generator) -> None:
    for shape in (*SHAPES, (4, 3, 5)):
        a, b = normal(rng, *shape), normal(rng, *shape)
        np.testing.assert_array_equal(call(ops, "add", a, b), a + b)
        np.testing.assert_array_equal(call(ops, "add", a, b, 0.22), a + np.float32(0.22) * b)
        np.testing.assert_array_equal(call(ops, "copy", unset(*shape), a), a)
    a, b = normal(rng, 65, 33), normal(rng, 65, 33)
    np.testing.assert_array_equal(call(ops, "multiply", a, b), a * b)


def test_add_gated(ops: Ops, rng: np.random.Generator) -> None:
    for shape in SHAPES:
        a, b, gate = normal(rng, *shape), normal(rng, *shape), normal(rng, shape[0], 1) * 20
        expected = a + oracles.sigmoid(gate) * b
        np.testing.assert_allclose(call(ops, "add_gated", a, b, gate), expected, rtol=2e-6, atol=1e-6)


def test_scale_clip_and_softcap(ops: Ops, rng: np.random.Generator) -> None:
    for shape in SHAPES:
        x = normal(rng, *shape) * 20
        if x.size > 4:
            x.flat[:5] = [0, 1e-6, -1e-3, 3e5, -3e5]
        np.testing.assert_array_equal(call(ops, "scale", x, 0.3), x * np.float32(0.3))
        np.testing.assert_array_equal(call(ops, "clip", x, 8.0), np.clip(x, np.float32(-8), np.float32(8)))
        expected = 30 * np.tanh(x.astype(np.float64) / 30)
        np.testing.assert_allclose(call(ops, "softcap", x, 30.0), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (3, 1)])
def test_place(ops: Ops, heads: tuple[int, int], rng: np.random.Generator) -> None:
    for t in (0, 1, 5):
        out, x = normal(rng, t, heads[0], 12), normal(rng, t, heads[1], 9)
        for to, start, width in ((0, 0, 9), (7, 4, 5), (12, 0, 0), (3, 8, 1)):
            expected = out.copy()
            expected[:, :, to : to + width] = x[:, :, start : start + width]
            np.testing.assert_array_equal(call(ops, "place", out, x, to, start, width), expected)


@pytest.mark.parametrize("heads", [1, 3])
def test_swap(ops: Ops, heads: int, rng: np.random.Generator) -> None:
    for t in (0, 1, 5):
        out, x = normal(rng, heads, t, 12), normal(rng, t, heads, 9)
        for to, start, width in ((0, 0, 9), (7, 4, 5), (12, 0, 0), (3, 8, 1)):
            expected = out.copy()
            expected[:, :, to : to + width] = x.swapaxes(0, 1)[:, :, start : start + width]
            np.testing.assert_array_equal(call(ops, "swap", out, x, to, start, width), expected)


ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "gelu_quick", "relu", "relu_squared", "sigmoid")


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activation(ops: Ops, kind: str, rng: np.random.Generator) -> None:
    for shape in ((0, 4), (1, 1), (5, 37), (3, 20001)):
        x = normal(rng, *shape) * 4
        if x.size > 5:
            x.flat[:5] = [0, -200, 200, -90, -1e30 if kind != "gelu_tanh" else -1e12]
        expected = oracles.activation(x, kind)
        actual = call(ops, "activation", unset(*shape), x, kind)
        np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=1e-6)
        here = ops.from_host(x.copy())
        ops.activation(here, here, kind)
        np.testing.assert_array_equal(ops.to_host(here), actual)


@pytest.mark.parametrize("kind", [*ACTIVATIONS, "swiglu_clamped"])
def test_gated_activation(ops: Ops, kind: str, rng: np.random.Generator) -> None:
    for shape in ((0, 4), (1, 1), (5, 37)):
        gate, up = normal(rng, *shape) * 5, normal(rng, *shape) * 4
        if gate.size > 4:
            gate.flat[:4] = [0, -200, 200, -90]
        expected = oracles.gated_activation(gate, up, kind, 7.0)
        actual = call(ops, "gated_activation", unset(*shape), gate, up, kind, 7.0)
        np.testing.assert_allclose(actual, expected, rtol=3e-6, atol=4e-6)
        here = ops.from_host(gate.copy())
        ops.gated_activation(here, here, ops.from_host(up), kind, 7.0)
        np.testing.assert_array_equal(ops.to_host(here), actual)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("t", "heads", "width", "half"), [(0, 2, 8, 4), (1, 1, 2, 1), (5, 3, 64, 32), (7, 2, 20, 6)])
def test_rope(ops: Ops, interleaved: bool, t: int, heads: int, width: int, half: int, rng: np.random.Generator) -> None:
    x = normal(rng, t, heads, width)
    positions = rng.integers(0, 9000, t).astype(np.int32)
    inv_freq = (10000.0 ** -(np.arange(half) / half)).astype(np.float32)
    cos, sin = call(ops, "rope_angles", unset(t, half), unset(t, half), positions, inv_freq, 1.25, written=2)
    actual = call(ops, "rope", x, cos, sin, interleaved)
    np.testing.assert_allclose(actual, oracles.rope(x, positions, inv_freq, interleaved, 1.25), atol=5e-6)
    np.testing.assert_array_equal(actual[..., 2 * half :], x[..., 2 * half :])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offset", [0, 5, 8])
def test_a_part_of_a_head_is_rotated(ops: Ops, interleaved: bool, offset: int, rng: np.random.Generator) -> None:
    x, positions, inv_freq = normal(rng, 4, 3, 20), ints(0, 3, 8000, 17), rng.random(6, np.float32)
    cos, sin = call(ops, "rope_angles", unset(4, 6), unset(4, 6), positions, inv_freq, 1.0, written=2)
    actual = call(ops, "rope", x, cos, sin, interleaved, offset)
    expected = x.copy()
    part = slice(offset, offset + 12)
    expected[:, :, part] = oracles.rope(x[:, :, part], positions, inv_freq, interleaved)
    np.testing.assert_allclose(actual, expected, atol=5e-6)


def test_rows_may_have_frequencies_of_their_own(ops: Ops, rng: np.random.Generator) -> None:
    positions, inv_freq = rng.integers(0, 9000, 7).astype(np.int32), rng.random((7, 6), np.float32)
    together = call(ops, "rope_angles", unset(7, 6), unset(7, 6), positions, inv_freq, 1.5, written=2)
    for t in range(7):
        alone = call(ops, "rope_angles", unset(1, 6), unset(1, 6), positions[t : t + 1], inv_freq[t], 1.5, written=2)
        for mine, all_rows in zip(alone, together, strict=True):
            np.testing.assert_allclose(mine[0], all_rows[t], atol=1e-6)


def test_shift(ops: Ops, rng: np.random.Generator) -> None:
    x, by = normal(rng, 5, 33), normal(rng, 33)
    np.testing.assert_array_equal(call(ops, "shift", x, by), x + by)


def test_log_softmax(ops: Ops, rng: np.random.Generator) -> None:
    for shape in ((0, 7), (1, 1), (3, 1000), (2, 50001)):
        logits = normal(rng, *shape) * 10
        if shape[1] > 5:
            logits[:, 3] = -np.inf
        expected = oracles.log_softmax(logits)
        actual = call(ops, "log_softmax", unset(*shape), logits)
        np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=1e-5)
        here = ops.from_host(logits.copy())
        ops.log_softmax(here, here)
        np.testing.assert_array_equal(ops.to_host(here), actual)


# ---- The cache


@each_dtype
@pytest.mark.parametrize("widths", [(8, 8), (24, 17)])
@pytest.mark.parametrize(("size", "t"), [(4, 0), (4, 1), (16, 11)])
def test_write_cache_rounds_and_touches_nothing_else(
    ops: Ops, dtype: str, size: int, t: int, widths: tuple[int, int], rng: np.random.Generator
) -> None:
    before = [normal(rng, 5, 3, size, width).astype(FLOATS[dtype]) for width in widths]
    before[0] = np.ascontiguousarray(before[0].swapaxes(2, 3))
    k, v = (normal(rng, t, 3, width) for width in widths)
    slots = rng.permutation(5 * size)[:t].astype(np.int32)
    expected = [a.copy() for a in before]
    for i, slot in enumerate(slots):
        for cache, values in ((expected[0].swapaxes(2, 3), k), (expected[1], v)):
            cache[slot // size, :, slot % size] = values[i].astype(FLOATS[dtype])
    for actual, right in zip(call(ops, "write_cache", *before, k, v, slots, written=2), expected, strict=True):
        np.testing.assert_array_equal(actual.astype(np.float32), right.astype(np.float32))


@each_dtype
def test_copy_blocks(ops: Ops, dtype: str, rng: np.random.Generator) -> None:
    cache = normal(rng, 6, 2, 4, 8).astype(FLOATS[dtype])
    expected = cache.copy()
    expected[[1, 5]] = cache[[0, 2]]
    for actual, right in (
        (call(ops, "copy_blocks", cache, ints(0, 2), ints(1, 5)), expected),
        (call(ops, "copy_blocks", cache, ints(), ints()), cache),
    ):
        np.testing.assert_array_equal(actual.astype(np.float32), right.astype(np.float32))


# ---- Sampling


def test_apply_edits(ops: Ops, rng: np.random.Generator) -> None:
    logits = normal(rng, 3, 50)
    logits[0, 4] = 0
    at = rng.permutation(150)[:40]
    rows, ids = (at // 50).astype(np.int32), (at % 50).astype(np.int32)
    penalties, biases = rng.uniform(0.5, 2, 40).astype(np.float32), normal(rng, 40)
    biases[:3] = -np.inf
    expected = logits.copy()
    for row, token, penalty, bias in zip(rows, ids, penalties, biases, strict=True):
        value = expected[row, token]
        expected[row, token] = (value / penalty if value > 0 else value * penalty) + bias
    actual = call(ops, "apply_edits", logits, rows, ids, penalties, biases)
    np.testing.assert_allclose(actual, expected, rtol=3e-7)
    none = np.empty(0, np.float32)
    np.testing.assert_array_equal(call(ops, "apply_edits", logits, ints(), ints(), none, none), logits)


@pytest.mark.parametrize("vocabulary", [1, 31, 32, 33, 100])
def test_mask(ops: Ops, rng: np.random.Generator, vocabulary: int) -> None:
    logits, rows = normal(rng, 5, vocabulary), ints(3, 0)
    may = rng.random((2, vocabulary)) < 0.5
    words = np.zeros((2, -(-vocabulary // 32)), np.uint32)
    for row, token in np.argwhere(may):
        words[row, token // 32] |= np.uint32(1 << (token % 32))
    expected = logits.copy()
    for row, allowed in zip(rows, may, strict=True):
        expected[row, ~allowed] = -np.inf
    np.testing.assert_array_equal(call(ops, "mask", logits, rows, words.view(np.int32)), expected)
    all_set = np.full((2, words.shape[1]), -1, np.int32)
    np.testing.assert_array_equal(call(ops, "mask", logits, rows, all_set), logits)
    np.testing.assert_array_equal(call(ops, "mask", logits, ints(), all_set[:0]), logits)


def test_a_mask_of_another_vocabulary_is_refused(ops: Ops, rng: np.random.Generator) -> None:
    for words in (1, 3):
        with pytest.raises(ValueError, match="mask"):
            call(ops, "mask", normal(rng, 2, 64), ints(0), np.zeros((1, words), np.int32))


def test_penalties_are_transformers(ops: Ops, rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits, ids = normal(rng, 1, 30), ints(3, 9, 28)
    processor = processors.RepetitionPenaltyLogitsProcessor(1.3)
    theirs = processor(torch.from_numpy(ids)[None].long(), torch.from_numpy(logits.copy())).numpy()
    edits = (np.zeros(3, np.int32), ids, np.full(3, 1.3, np.float32), np.zeros(3, np.float32))
    np.testing.assert_allclose(call(ops, "apply_edits", logits, *edits), theirs, rtol=3e-7)


Cuts = tuple[float, ...]
"""temperature, top_k, top_p, min_p, and where they are given typical_p, xtc_threshold."""


def draw_many(ops: Ops, logits: NDArray[Any], uniform: Sequence[float], cuts: Cuts) -> Any:
    """A token of the same row of logits for each number of `uniform`."""
    count = len(uniform)
    temperature, top_k, top_p, min_p, *more = (np.full(count, c, np.float32) for c in cuts)
    rows = np.tile(logits, (count, 1)).astype(np.float32)
    numbers = np.array(uniform, np.float32)
    return call(
        *(ops, "sample", unset(count, dtype=np.int32), rows, temperature, top_k.astype(np.int32), top_p, min_p),
        *(numbers, *more),
    )


@pytest.mark.parametrize(
    "cuts",
    [
        (1.0, 0, 1.0, 0.0),
        (0.5, 0, 1.0, 0.0),
        (1.7, 4, 1.0, 0.0),
        (1.0, 0, 0.8, 0.0),
        (1.0, 0, 1.0, 0.2),
        (1.3, 8, 0.9, 0.05),
        (1.0, 0, 0.001, 0.0),
        (1.0, 1, 1.0, 0.0),
        (1.0, 99, 1.0, 1.0),
        (1.0, 0, 1.0, 0.0, 0.2, 1.0),
        (1.5, 0, 1.0, 0.0, 0.7),
        (1.3, 5, 1.0, 0.0, 0.5, 1.0),
        (1.3, 9, 0.8, 0.3, 0.8, 1.0),
        (1.0, 0, 1.0, 0.0, 1e-6, 1.0),
        (1.0, 0, 1.0, 0.0, 1.0, 0.1),
        (2.0, 0, 1.0, 0.0, 1.0, 0.0),
        (2.0, 6, 0.9, 0.05, 1.0, 0.1),
        (2.0, 0, 1.0, 0.4, 1.0, 0.05),
        (1.0, 0, 1.0, 0.0, 1.0, 0.9),
        (1.9, 10, 0.9, 0.1, 0.9, 0.12),
    ],
)
def test_a_sweep_of_uniform_draws_the_distribution(ops: Ops, cuts: Cuts, rng: np.random.Generator) -> None:
    logits, count = normal(rng, 13) * 2, 3000
    logits[5] = logits[8]  # a tie: the lower id is drawn first
    uniform = (np.arange(count) + 0.5) / count
    tokens = draw_many(ops, logits, uniform.tolist(), cuts)
    expected = oracles.probabilities(logits, *cuts)
    counts = np.bincount(tokens, minlength=13)
    assert np.all(np.abs(counts - expected * count) <= 1.001)
    assert not np.any(counts[expected == 0])
    assert np.all(counts[expected * count > 1] > 0)
    # Ever larger numbers draw ever less likely tokens.
    order = np.argsort(-logits, kind="stable")
    assert np.all(np.diff(np.argsort(order)[tokens]) >= 0)


@quick
@given(
    seed=st.integers(0, 10**6),
    size=st.integers(1, 60),
    spread=st.sampled_from([0.3, 2.0, 8.0]),
    masked=st.booleans(),
    cuts=st.tuples(
        st.sampled_from([0.5, 1.0, 2.0]),
        st.sampled_from([0, 1, 7, 40]),
        st.sampled_from([0.3, 0.9, 1.0]),
        st.sampled_from([0.0, 0.1]),
        st.sampled_from([0.05, 0.4, 0.9, 1.0]),
        st.sampled_from([0.0, 0.03, 0.2, 1.0]),
    ),
)
@example(seed=0, size=2, spread=0.3, masked=True, cuts=(0.5, 0, 1.0, 0.0, 1.0, 0.0))
def test_what_is_drawn_is_what_the_cuts_leave(
    ops: Ops, seed: int, size: int, spread: float, masked: bool, cuts: Cuts
) -> None:
    rng = np.random.default_rng(seed)
    # Without a tail of less than what sums of doubles round away, which is all that an xtc_threshold of 0 leaves.
    logits = np.clip(normal(rng, size) * np.float32(spread), -5, 5)
    if masked:
        logits[1::3] = -np.inf
    count = 400
    counts = np.bincount(draw_many(ops, logits, ((np.arange(count) + 0.5) / count).tolist(), cuts), minlength=size)
    # A token may lie so near a bound that the oracle's doubles and the op's floats tell it to different sides.
    temperature, top_k, *bounds = cuts
    nearby = [[bound if bound in (0.0, 1.0) else bound * by for bound in bounds] for by in (1.0, 1 - 1e-5, 1 + 1e-5)]
    expected = [oracles.probabilities(logits, temperature, int(top_k), *near) for near in nearby]
    assert any(np.all(np.abs(counts - one * count) <= 1.001) for one in expected)


def test_cuts_of_a_large_vocabulary_need_the_whole_row(ops: Ops, rng: np.random.Generator) -> None:
    """Typical tokens of a flat tail, and a threshold below every weight that decides a common draw."""
    logits = normal(rng, 5000) * np.float32(0.7)
    logits[17] = 12.0
    uniform = ((np.arange(500) + 0.5) / 500).tolist()
    for cuts in ((1.0, 0, 1.0, 0.0, 0.95, 1.0), (1.0, 0, 1.0, 0.0, 1.0, 1e-5), (1.0, 3000, 0.999, 0.0, 0.97, 1e-4)):
        expected = oracles.probabilities(logits, *cuts)
        tokens = draw_many(ops, logits, uniform, cuts)
        assert np.all(expected[tokens] > 0)
        sums = np.cumsum(expected[np.argsort(-logits, kind="stable")])
        assert (
            np.abs(np.searchsorted(sums, uniform) - np.argsort(np.argsort(-logits, kind="stable"))[tokens]).max() <= 1
        )


@pytest.mark.parametrize("spread", [0.0, 1e-7, 1e-3, 0.05, 0.5, 3.0])
@pytest.mark.parametrize(
    "cuts",
    [
        (1.0, 0, 0.9, 0.0),
        (1.0, 700, 1.0, 0.0),
        (0.7, 1500, 0.5, 0.01),
        (1.0, 0, 0.95, 0.97),
        (1.0, 0, 1.0, 0.0, 1.0, 1e-4),
        (1.3, 900, 0.9, 0.02, 0.9, 2e-4),
    ],
)
def test_cuts_of_flat_logits(ops: Ops, rng: np.random.Generator, spread: float, cuts: Cuts) -> None:
    """Thousands of tokens that weigh alike, some of them the same: lower ids first."""
    logits = normal(rng, 3000) * np.float32(spread)
    logits[rng.integers(0, 3000, 1000)] = np.where(rng.random(1000) < 0.5, 0.0, -0.0)
    uniform = ((np.arange(200) + 0.5) / 200).tolist()
    tokens = draw_many(ops, logits, uniform, cuts)
    # A threshold may lie so near to a weight that floats and the oracle's doubles tell it to different sides.
    expected = oracles.probabilities(logits, *cuts)
    order = np.argsort(-logits, kind="stable")
    places, wanted = np.argsort(order)[tokens], np.searchsorted(np.cumsum(expected[order]), uniform)
    assert np.abs(places - wanted).max() <= 1


def test_greedy_takes_the_highest_and_the_lowest_id_of_a_tie(ops: Ops, rng: np.random.Generator) -> None:
    logits = normal(rng, 4, 3000)
    logits[1, [2999, 17, 400]] = 9
    logits[2, 0] = 9
    logits[3] = -np.inf
    logits[3, 2998] = -5
    zeros = np.zeros(4, np.float32)
    ones = np.ones(4, np.float32)
    tokens = call(ops, "sample", unset(4, dtype=np.int32), logits, zeros, ints(3, 0, 5, 0), ones, zeros, zeros + 0.99)
    assert tokens.tolist() == [int(logits[0].argmax()), 17, 0, 2998]


def test_masked_tokens_are_never_drawn_and_rows_keep_their_own_parameters(ops: Ops) -> None:
    logits = np.full((3, 6), -np.inf, np.float32)
    logits[0, [1, 4]] = [0, 1]
    logits[1, 2] = -1e30
    logits[2, :] = [5, 4, 3, 2, 1, 0]
    tokens = call(
        ops,
        "sample",
        unset(3, dtype=np.int32),
        logits,
        np.array([1, 1, 0], np.float32),
        ints(0, 0, 0),
        np.array([1, 0.5, 1], np.float32),
        np.array([0, 0, 0], np.float32),
        np.array([0.99999994, 0.99999994, 0.7], np.float32),
    )
    assert tokens.tolist() == [1, 2, 0]


def test_a_tiny_temperature_is_greedy_without_overflow(ops: Ops) -> None:
    tokens = draw_many(ops, np.array([1.0, 300.0, -300.0, 299.0]), [0.0, 0.5, 0.999], (1e-30, 0, 1.0, 0.0))
    assert tokens.tolist() == [1, 1, 1]


def test_sample_of_nothing(ops: Ops) -> None:
    assert call(ops, "sample", ints(), np.empty((0, 9), np.float32), *_parameters(0)).tolist() == []


def _parameters(rows: int, rng: np.random.Generator | None = None) -> tuple[NDArray[Any], ...]:
    rng = rng or np.random.default_rng(0)
    return (
        rng.uniform(0.2, 2, rows).astype(np.float32),
        rng.integers(0, 40, rows).astype(np.int32),
        rng.uniform(0.5, 1, rows).astype(np.float32),
        rng.uniform(0, 0.1, rows).astype(np.float32),
        rng.random(rows, np.float32),
    )


@quick
@given(
    seed=st.integers(0, 1000),
    size=st.integers(1, 60),
    cuts=st.tuples(st.floats(0.1, 5), st.integers(0, 70), st.floats(0.01, 1), st.floats(0, 1)),
    uniform=st.floats(0, 1, exclude_max=True, width=32),
)
def test_a_draw_is_where_the_running_sum_passes(
    ops: Ops, seed: int, size: int, cuts: tuple[float, int, float, float], uniform: float
) -> None:
    temperature, top_k, top_p, min_p = cuts
    cuts = (float(np.float32(temperature)), top_k, float(np.float32(top_p)), float(np.float32(min_p)))
    logits = normal(np.random.default_rng(seed), size) * 3
    (token,) = draw_many(ops, logits, [uniform], cuts)
    # Where a cut falls within rounding of a token's edge, either side is right.
    left = [
        oracles.probabilities(logits, cuts[0], top_k, max(1e-9, cuts[2] + e), min(1, max(0, cuts[3] + e)))
        for e in (-1e-5, 1e-5)
    ]
    assume(np.array_equal(left[0] > 0, left[1] > 0))
    p = oracles.probabilities(logits, *cuts)
    order = np.argsort(-logits, kind="stable")
    sums = np.cumsum(p[order])
    place = int(np.flatnonzero(order == token)[0])
    assert p[token] > 0
    assert sums[place] - p[token] - 1e-5 <= uniform <= sums[place] + 1e-5


# ---- Deterministic: a row's bits depend on its own inputs alone


def _row_operations(rng: np.random.Generator, t: int) -> dict[str, Callable[[Ops, slice], Any]]:
    """Every op whose rows are independent, as a function of the ops and the rows to compute."""
    x, weight, norm = normal(rng, t, 512), normal(rng, 77, 512), normal(rng, 512)
    narrow = normal(rng, t, 37)
    heads, angles = normal(rng, t, 3, 16), rng.uniform(-1, 1, (2, t, 8)).astype(np.float32)
    logits, parameters = normal(rng, t, 1003) * 3, _parameters(t, rng)
    positions, inv_freq = rng.integers(0, 5000, t).astype(np.int32), rng.random(8, np.float32)

    def size(rows: slice) -> int:
        return len(range(*rows.indices(t)))

    operations: dict[str, Callable[[Ops, slice], Any]] = {}
    for name, kind in FLOATS.items():
        operations[f"matmul {name}"] = lambda ops, r, dtype=kind: call(
            ops, "matmul", unset(size(r), 77), x[r], weight.astype(dtype), norm[:77]
        )
    for format in BLOCKS:
        blocks = oracles.random_blocks(rng, format, 77, 512)
        operations[f"matmul {format}"] = lambda ops, r, b=blocks, f=format: call(
            ops, "matmul_blocks", unset(size(r), 77), x[r], b, f
        )
    operations["rms_norm"] = lambda ops, r: call(ops, "rms_norm", unset(size(r), 512), x[r], norm, 1e-6)
    operations["rope_angles"] = lambda ops, r: call(
        ops, "rope_angles", unset(size(r), 8), unset(size(r), 8), positions[r], inv_freq, 1.5, written=2
    )[0]
    operations["rope"] = lambda ops, r: call(ops, "rope", heads[r], angles[0][r], angles[1][r], False)
    operations["rms_norm alone"] = lambda ops, r: call(ops, "rms_norm", unset(size(r), 512), x[r], None, 1e-6)
    operations["layer_norm"] = lambda ops, r: call(ops, "layer_norm", unset(size(r), 512), x[r], norm, norm, 1e-6)
    operations["softcap"] = lambda ops, r: call(ops, "softcap", narrow[r], 0.7)
    operations["add"] = lambda ops, r: call(ops, "add", narrow[r], narrow[r], 0.3)
    operations["add_gated"] = lambda ops, r: call(ops, "add_gated", narrow[r], narrow[r], narrow[r, :1].copy())
    for kind in ACTIVATIONS:
        operations[kind] = lambda ops, r, k=kind: call(ops, "activation", unset(size(r), 37), narrow[r], k)
    for kind in (*ACTIVATIONS, "swiglu_clamped"):
        operations[f"gated {kind}"] = lambda ops, r, k=kind: call(
            ops, "gated_activation", unset(size(r), 37), narrow[r], narrow[r], k, 0.8
        )
    operations["log_softmax"] = lambda ops, r: call(ops, "log_softmax", unset(size(r), 1003), logits[r])
    operations["sample"] = lambda ops, r: call(
        ops, "sample", unset(size(r), dtype=np.int32), logits[r], *(p[r] for p in parameters)
    )
    return operations


@pytest.mark.parametrize("module", DETERMINISTIC)
def test_rows_do_not_depend_on_other_rows_nor_on_threads(module: str, rng: np.random.Generator) -> None:
    operations = _row_operations(rng, 131)
    whole = {name: operation(make(module, threads=2), slice(0, 131)) for name, operation in operations.items()}
    ops = make(module, threads=1)
    for name, operation in operations.items():
        for rows in (slice(0, 1), slice(1, 2), slice(5, 7), slice(60, 67), slice(3, 67), slice(130, 131)):
            np.testing.assert_array_equal(operation(ops, rows), whole[name][rows], err_msg=f"{name} {rows}")


# ---- Arrays, checks and the choice of a module


@pytest.mark.parametrize("dtype", [*FLOATS, "int32", "uint8"])
def test_arrays(ops: Ops, dtype: str) -> None:
    assert ops.empty((2, 3), dtype).shape == (2, 3)
    zeros = ops.to_host(ops.zeros((4, 3), dtype))
    assert zeros.dtype == np.dtype(FLOATS.get(dtype, dtype))
    assert not zeros.any()
    host = np.arange(12).reshape(3, 4).astype(zeros.dtype)
    host.setflags(write=False)
    array = ops.from_host(host)
    np.testing.assert_array_equal(ops.to_host(array).astype(np.float32), host.astype(np.float32))
    if ops.device == "cpu":
        assert np.shares_memory(ops.to_host(array), host)
    part = ops.view(ops.from_host(host.copy()), (5, 1))
    np.testing.assert_array_equal(ops.to_host(part).astype(np.float32).ravel(), np.arange(5))


def test_a_view_is_the_same_memory(ops: Ops) -> None:
    array = ops.zeros((3, 4), "float32")
    ops.add(ops.view(array, (1, 2)), ops.from_host(np.ones((1, 2), np.float32)))
    assert ops.to_host(array).ravel().tolist() == [1, 1] + [0] * 10


def test_what_does_not_fit_is_refused(ops: Ops, rng: np.random.Generator) -> None:
    x, weight = normal(rng, 2, 32), normal(rng, 3, 32)
    blocks = oracles.random_blocks(rng, "Q8_0", 3, 32)
    wrong: list[tuple[Any, ...]] = [
        ("matmul", unset(2, 4), x, weight),
        ("matmul", unset(2, 3), x, weight[:, :31].copy()),
        ("matmul", unset(2, 3), x.astype(np.float64), weight),
        ("matmul", unset(2, 3), x, weight, unset(4)),
        ("matmul_blocks", unset(2, 3), x, blocks, "Q4_0"),
        ("matmul_blocks", unset(2, 3), x, blocks, "Q9_9"),
        ("rows", unset(1, 32), np.zeros(1, np.int64), weight),
        ("rows_blocks", unset(1, 64), ints(0), blocks, "Q8_0"),
        ("rms_norm", unset(2, 31), x, weight[0], 1e-5),
        ("rms_norm", unset(2, 32), x, weight, 1e-5),
        ("rms_norm", unset(2, 32), x, unset(0, 32), 1e-5),
        ("layer_norm", unset(2, 32), x, weight[0], weight[0, :31].copy(), 1e-5),
        ("add", unset(2, 31), x),
        ("add", unset(2, 32), x.astype(np.float64)),
        ("multiply", unset(2, 31), x),
        ("add_gated", unset(2, 32), x, unset(2, 32)),
        ("add_gated", unset(2, 32), x, unset(3, 1)),
        ("copy", unset(2, 31), x),
        ("scale", x.astype(np.float64), 2.0),
        ("clip", x.astype(np.float16), 2.0),
        ("softcap", x.astype(np.float64), 2.0),
        ("place", unset(2, 1, 8), x[:, None], 0, 0, 9),
        ("place", unset(2, 1, 8), x[:, None], 1, 0, 8),
        ("place", unset(2, 1, 8), x[:, None], -1, 0, 2),
        ("place", unset(2, 1, 8), x[:, None], 0, 30, 3),
        ("place", unset(2, 1, 8), x[:, None], 0, 0, -1),
        ("place", unset(2, 3, 8), x.reshape(2, 2, 16), 0, 0, 8),
        ("swap", unset(1, 2, 8), x[:, None], 0, 0, 9),
        ("swap", unset(1, 2, 8), x[:, None], 1, 0, 8),
        ("swap", unset(1, 2, 8), x[:, None], 0, 0, -1),
        ("swap", unset(2, 1, 8), x[:, None], 0, 0, 8),
        ("rope", unset(2, 1, 8), unset(2, 4), unset(2, 4), False, 1),
        ("rope", unset(2, 1, 8), unset(2, 2), unset(2, 2), False, -1),
        ("rope_angles", unset(2, 4), unset(2, 4), ints(0, 1), unset(3, 4), 1.0),
        ("write_cache", unset(1, 1, 8, 4), unset(1, 1, 4, 6), unset(2, 1, 8), unset(2, 1, 8), ints(0, 1)),
        ("read_cache", unset(2, 1, 8), unset(2, 1, 6), unset(2, 1, 8, 4), unset(2, 1, 4, 6), ints(0), 3),
        ("read_cache", unset(2, 1, 8), unset(2, 1, 6), unset(2, 1, 8, 4), unset(2, 1, 4, 6), ints(0), -1),
        ("read_cache", unset(2, 1, 8), unset(2, 1, 5), unset(2, 1, 8, 4), unset(2, 1, 4, 6), ints(0), 0),
        ("read_cache", unset(2, 2, 8), unset(2, 2, 6), unset(2, 1, 8, 4), unset(2, 1, 4, 6), ints(0), 0),
        ("activation", unset(2, 31), x, "relu"),
        ("activation", unset(2, 32), x, "swiglu_clamped"),
        ("gated_activation", unset(2, 32), x, x, "swish"),
        ("log_softmax", unset(1, 32), x),
    ]
    for op, *arguments in wrong:
        with pytest.raises(ValueError, match=op):
            call(ops, op, *arguments)


def test_the_choice_of_kernels() -> None:
    assert isinstance(kernels.for_device("cpu", kernels="reference", deterministic=True), ReferenceOps)
    with pytest.raises(InvalidRequest, match="kernels"):
        kernels.for_device("cpu", kernels="abacus")
    with pytest.raises(DeviceNotAvailable, match="cuda"):
        kernels.for_device("cuda", kernels="reference")


@pytest.mark.parametrize("device", ["cuda:99", "metal:0", "cuda:x", "tpu"])
def test_a_missing_torch_device_is_named(device: str) -> None:
    pytest.importorskip("torch")
    with pytest.raises(DeviceNotAvailable, match=device):
        kernels.for_device(device)


def test_without_torch_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "tramontane.kernels.torch_ops", raising=False)
    with pytest.raises(MissingExtra, match=r"tramontane\[torch\]"):
        kernels.for_device("cuda")
