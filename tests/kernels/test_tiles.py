"""Matrices in tiles, or made tiles for each product: packing loses nothing, rows are exact, products are exact or as
good as eight bits allow."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.kernels.oracles import TILED, random_blocks
from tramontane import platform
from tramontane.kernels import BLOCKS, cpu
from tramontane.kernels.blocks import dequantize

if not cpu.available():
    pytest.skip("the compiled module is not built", allow_module_level=True)

DENSE = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
each_isa = pytest.mark.parametrize("isa", cpu.isas(emulated=True))
each_wide = pytest.mark.parametrize("isa", [isa for isa in cpu.isas(emulated=True) if isa.startswith("amx")])
IN_ROWS = tuple(name for name in BLOCKS if name not in TILED)
each_format = pytest.mark.parametrize("format", [*DENSE, *BLOCKS])
each_quantized = pytest.mark.parametrize("format", BLOCKS)
each_shape = pytest.mark.parametrize(
    ("tokens", "rows", "columns"), [(16, 1, 256), (33, 50, 768), (40, 129, 1280), (1100, 33, 256)]
)
SHAPES = ((1, 256), (16, 512), (35, 1024))


def matrix(rng: np.random.Generator, format: str, rows: int, columns: int) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """A matrix as it is stored, and its values."""
    if format in DENSE:
        dense = rng.standard_normal((rows, columns)).astype(DENSE[format])
        return dense, dense.astype(np.float32)
    blocks = random_blocks(rng, format, rows, columns)
    return blocks, dequantize(format, blocks)


def product(ops: cpu.CpuOps, format: str, x: NDArray[np.float32], tiles: Any, rows: int, bias: Any = None) -> Any:
    out = np.full((len(x), rows), np.nan, np.float32)
    if format in DENSE:
        ops.matmul(out, x, tiles, bias)
    else:
        ops.matmul_blocks(out, x, tiles, format, bias)
    return out


@pytest.mark.parametrize("format", TILED)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_packing_loses_nothing_of_any_bytes(format: str, data: st.DataObject) -> None:
    rows, blocks = data.draw(st.integers(1, 33)), data.draw(st.integers(1, 5))
    shape = (rows, blocks * BLOCKS[format].nbytes)
    stored = np.random.default_rng(data.draw(st.integers(0, 999))).integers(0, 256, shape, np.uint8)
    ops = cpu.CpuOps()
    tiles = ops.pack(stored, format)
    assert tiles.ndim == 3
    np.testing.assert_array_equal(ops.unpack(tiles, format, (rows, blocks * BLOCKS[format].elements)), stored)


@pytest.mark.parametrize("threads", [1, 3])
def test_packing_together_is_packing_each(rng: np.random.Generator, threads: int) -> None:
    together, alone = cpu.CpuOps(threads=threads), cpu.CpuOps()
    shapes = {"F32": (19, 33), "Q4_1": (50, 256), "BF16": (16, 64), "Q6_K": (333, 512)}
    stored = {format: matrix(rng, format, *shape)[0] for format, shape in shapes.items()}
    with together.packing():
        made = {format: together.pack(one, format) for format, one in stored.items() if format != "Q6_K"}
        np.testing.assert_array_equal(together.unpack(made["F32"], "F32", shapes["F32"]), stored["F32"])
        made["Q6_K"] = together.pack(stored["Q6_K"], "Q6_K")
    for format, one in stored.items():
        assert made[format].tobytes() == alone.pack(one, format).tobytes()
    with together.packing():
        pass
    assert together.pack(stored["F32"], "F32").tobytes() == made["F32"].tobytes()
    with pytest.raises(ValueError, match="pack_all: rows do not divide"):
        together._native.pack_all([(made["Q4_1"], np.zeros((50, 7), np.uint8), "Q4_1")])


@each_isa
@each_format
def test_rows_are_exact_and_products_as_good_as_they_say(isa: str, format: str, rng: np.random.Generator) -> None:
    for rows, columns in SHAPES:
        stored, values = matrix(rng, format, rows, columns)
        bias = rng.standard_normal(rows).astype(np.float32)
        x = rng.standard_normal((45, columns)).astype(np.float32)
        x[3] = 0
        want = x.astype(np.float64) @ values.astype(np.float64).T + bias
        scale = np.abs(x) @ np.abs(values).T + 1e-9  # of what is summed
        for exact in (True, False):
            ops = cpu.CpuOps(2, isa=isa, exact=exact)
            tiles = ops.pack(stored, format)
            error = np.abs(product(ops, format, x, tiles, rows, bias) - want)
            in_float = exact or format == "F32" or (format == "F16" and not isa.startswith("amx"))
            assert (error / scale).max() < (2e-6 if in_float else 7e-3)
            # What rounding to 8 bits makes of a column is some 0.5 % of the usual one, and of either sign; AMX rounds
            # both factors, with a scale for 256 columns.
            lengths = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(values, axis=1)
            coarse = 0.06 if isa.startswith("amx") else 0.035
            assert (error <= coarse * lengths / np.sqrt(columns) + 1e-5 * (lengths + np.abs(bias))).all()
        ids = rng.integers(0, rows, 9).astype(np.int32)
        out = np.full((9, columns), np.nan, np.float32)
        if format in DENSE:
            ops.rows(out, ids, tiles)
        else:
            ops.rows_blocks(out, ids, tiles, format)
        np.testing.assert_array_equal(out, values[ids])


@each_isa
@each_format
@pytest.mark.parametrize("exact", [False, True])
def test_a_token_is_the_same_alone_and_among_others(
    isa: str, format: str, exact: bool, rng: np.random.Generator
) -> None:
    stored, _ = matrix(rng, format, 40, 512)
    x = rng.standard_normal((61, 512)).astype(np.float32)
    one, three = (cpu.CpuOps(threads, True, isa, exact) for threads in (1, 3))
    tiles = one.pack(stored, format)
    alone = np.concatenate([product(one, format, x[t : t + 1], tiles, 40) for t in range(len(x))])
    for count in (2, 4, 5, 11, 12, 13, 61):
        np.testing.assert_array_equal(product(three, format, x[:count], tiles, 40), alone[:count])


@each_isa
@pytest.mark.parametrize("format", DENSE)
@pytest.mark.parametrize("columns", [1, 5, 31, 33])
def test_columns_of_dense_matrices_need_not_fill_a_unit(
    isa: str, format: str, columns: int, rng: np.random.Generator
) -> None:
    stored, values = matrix(rng, format, 19, columns)
    x = rng.standard_normal((6, columns)).astype(np.float32)
    ops = cpu.CpuOps(isa=isa, exact=True)
    tiles = ops.pack(stored, format)
    np.testing.assert_allclose(product(ops, format, x, tiles, 19), x @ values.T, rtol=1e-5, atol=1e-5)
    fast = product(cpu.CpuOps(isa=isa), format, x, tiles, 19)
    np.testing.assert_allclose(fast, x @ values.T, rtol=0, atol=1e-2 * np.sqrt(columns))
    np.testing.assert_array_equal(ops.unpack(tiles, format, (19, columns)), stored)


@each_isa
@each_quantized
def test_what_is_not_finite_shows_in_its_own_token_alone(isa: str, format: str, rng: np.random.Generator) -> None:
    stored, _ = matrix(rng, format, 16, 256)
    x = rng.standard_normal((21, 256)).astype(np.float32)
    ops = cpu.CpuOps(isa=isa)
    tiles = ops.pack(stored, format)
    sound = product(ops, format, x, tiles, 16)
    for bad in (np.nan, np.inf, -np.inf):
        broken = x.copy()
        broken[5, 40] = bad
        out = product(ops, format, broken, tiles, 16)
        assert not np.isfinite(out[5]).any()
        np.testing.assert_array_equal(np.delete(out, 5, 0), np.delete(sound, 5, 0))


@each_isa
@each_quantized
@pytest.mark.parametrize("every", [1, 4])
def test_a_few_large_activations_cost_no_precision(isa: str, format: str, every: int, rng: np.random.Generator) -> None:
    """Real models have columns a hundred times as large as others: what eight bits lose there is kept, in all tokens
    (where AMX leaves bytes) or some (where it adds second terms)."""
    stored, values = matrix(rng, format, 16, 1024)
    x = rng.standard_normal((21, 1024)).astype(np.float32)
    x[::every, 100], x[::every, 700] = 300, -200
    x[3:5, 100] = 0  # tokens with and without them side by side
    ops = cpu.CpuOps(isa=isa)
    out = product(ops, format, x, ops.pack(stored, format), 16)
    # Bfloat16 has a part in 512 for each.
    finest = 2e-3 if isa.startswith("amx") else 1e-4
    usual = np.where(np.abs(x) < 10, np.abs(x), 0)
    bound = 2e-2 * usual @ np.abs(values).T + finest * np.abs(x) @ np.abs(values).T
    assert (np.abs(out - x.astype(np.float64) @ values.T) < bound).all()


@each_wide
@pytest.mark.parametrize("format", ["F16", "BF16", "Q4_1", "Q4_K", "Q6_K"])
@each_shape
def test_many_tokens_of_dense_matrices_or_large_columns_are_multiplied_in_bfloat16(
    isa: str, format: str, tokens: int, rows: int, columns: int, rng: np.random.Generator
) -> None:
    stored, values = matrix(rng, format, rows, columns)
    x = rng.standard_normal((tokens, columns)).astype(np.float32)
    if format in TILED:
        x[:, ::256] = 40
    bias = rng.standard_normal(rows).astype(np.float32)
    one, three = (cpu.CpuOps(threads, isa=isa) for threads in (1, 3))
    tiles = one.pack(stored, format)
    out = product(one, format, x, tiles, rows, bias)
    # What bfloat16 makes of both factors, and float32 of the sum.
    short = x.astype(ml_dtypes.bfloat16).astype(np.float64), values.astype(ml_dtypes.bfloat16).astype(np.float64)
    close = short[0] @ short[1].T + bias
    np.testing.assert_allclose(out, close, rtol=0, atol=3e-6 * (np.abs(x) @ np.abs(values).T + 1).max())
    np.testing.assert_array_equal(product(three, format, x, tiles, rows, bias), out)
    few = product(cpu.CpuOps(isa=isa, deterministic=True), format, x, tiles, rows, bias)
    assert format == "BF16" or not np.array_equal(few, out)


@each_wide
@pytest.mark.parametrize("format", TILED)
@each_shape
def test_many_tokens_of_quantized_matrices_are_multiplied_in_bytes(
    isa: str, format: str, tokens: int, rows: int, columns: int, rng: np.random.Generator
) -> None:
    columns += 64 if BLOCKS[format].elements == 32 else 0  # a last part that is short
    stored, values = matrix(rng, format, rows, columns)
    x = rng.standard_normal((tokens, columns)).astype(np.float32)
    bias = rng.standard_normal(rows).astype(np.float32)
    one, three = (cpu.CpuOps(threads, isa=isa) for threads in (1, 3))
    tiles = one.pack(stored, format)
    out = product(one, format, x, tiles, rows, bias)
    want = x.astype(np.float64) @ values.astype(np.float64).T + bias
    lengths = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(values, axis=1) / np.sqrt(columns)
    error = np.sqrt(np.mean((out - want) ** 2)) / np.sqrt(np.mean(lengths**2))
    # Bytes with a scale for 256 columns make a part in a hundred of both factors; bfloat16 makes 0.0024.
    assert 0.003 < error < 0.015
    np.testing.assert_array_equal(product(three, format, x, tiles, rows, bias), out)


@each_wide
def test_weights_beside_much_larger_ones_keep_their_precision(isa: str, rng: np.random.Generator) -> None:
    codes = rng.integers(-127, 128, (35, 512), np.int8)
    codes[:20, 96:128] = 1
    codes[:20, 100] = 127
    scales = np.full((35, 16), 0.01, np.float16)
    scales[:20, 3] = 1
    blocks = np.concatenate([scales[..., None].view(np.uint8), codes.reshape(35, 16, 32).view(np.uint8)], axis=2)
    stored = blocks.reshape(35, -1)
    values = dequantize("Q8_0", stored)
    x = rng.standard_normal((33, 512)).astype(np.float32)
    x[:, 100] = 0  # what meets the large ones, which then say nothing
    ops = cpu.CpuOps(isa=isa)
    out = product(ops, "Q8_0", x, ops.pack(stored, "Q8_0"), 35)
    values[:, 100] = 0
    lengths = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(values, axis=1)
    assert (np.abs(out - x @ values.T) < 0.06 * lengths / np.sqrt(512)).all()


@each_wide
def test_experts_of_few_and_of_many_tokens_are_each_multiplied_their_way(isa: str, rng: np.random.Generator) -> None:
    counts = (3, 20, 0, 300, 1, 2, 16)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    matrices = [matrix(rng, "Q4_K", 40, 512)[0] for _ in counts]
    x, bias = rng.standard_normal((offsets[-1], 512), np.float32), rng.standard_normal((len(counts), 40), np.float32)
    ops = cpu.CpuOps(2, isa=isa)
    tiles = [ops.pack(stored, "Q4_K") for stored in matrices]
    out = np.full((len(x), 40), np.nan, np.float32)
    ops.matmul_experts(out, x, offsets, tiles, "Q4_K", bias)
    for e in range(len(counts)):
        rows = slice(offsets[e], offsets[e + 1])
        np.testing.assert_array_equal(out[rows], product(ops, "Q4_K", x[rows], tiles[e], 40, bias[e]))


@each_isa
@each_quantized
def test_blocks_that_are_not_packed_give_the_same(isa: str, format: str, rng: np.random.Generator) -> None:
    stored, _ = matrix(rng, format, 35, 512)
    x = rng.standard_normal((14, 512)).astype(np.float32)
    for exact in (True, False):
        ops = cpu.CpuOps(2, isa=isa, exact=exact)
        tiles = ops.pack(stored, format)
        assert (tiles is stored) == (format in IN_ROWS)
        np.testing.assert_array_equal(product(ops, format, x, stored, 35), product(ops, format, x, tiles, 35))


@pytest.mark.parametrize("format", ["IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"])
def test_what_tiles_make_larger_is_left_while_memory_is_short(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ops, stored = cpu.CpuOps(), np.zeros((16, BLOCKS[format].nbytes), np.uint8)
    assert ops.pack(stored, format).nbytes > stored.nbytes
    monkeypatch.setattr(platform, "available_memory", lambda: platform.total_memory() // 5)
    assert ops.pack(stored, format) is stored
    assert ops.pack(np.zeros((16, 18), np.uint8), "Q4_0").ndim == 3


def test_tiles_are_checked() -> None:
    ops = cpu.CpuOps()
    tiles = ops.pack(np.zeros((16, 32), np.float32), "F32")
    x, out = np.zeros((1, 32), np.float32), np.zeros((1, 16), np.float32)
    for wrong in (tiles[:, :, :-1].copy(), np.concatenate([tiles, tiles])):
        with pytest.raises(ValueError, match="weight"):
            ops.matmul(out, x, wrong)
    with pytest.raises(ValueError, match="no tiles"):
        ops.matmul_blocks(out, np.zeros((1, 256), np.float32), np.zeros((1, 1, 54), np.uint8), "TQ1_0")
    with pytest.raises(ValueError, match="outside"):
        ops.rows(x, np.array([16], np.int32), tiles)


@each_isa
@each_format
def test_several_matrices_as_each_alone(isa: str, format: str) -> None:
    """Bit for bit, where activations are rounded too, for few tokens and many, on one thread and on several."""
    rng, sizes = np.random.default_rng(8), (48, 17, 5)
    for threads, tokens in ((1, 1), (2, 7), (3, 16), (2, 30), (1, 260)):
        ops = cpu.CpuOps(threads, isa=isa)
        x = rng.standard_normal((tokens, 512), dtype=np.float32)
        tiles = [ops.pack(matrix(rng, format, rows, 512)[0], format) for rows in sizes]
        outs = [np.full((tokens, rows), np.nan, np.float32) for rows in sizes]
        biases = [rng.standard_normal(48, dtype=np.float32), None, None]
        ops.matmul_together(outs, x, tiles, None if format in DENSE else format, biases)
        for out, tile, rows, bias in zip(outs, tiles, sizes, biases, strict=True):
            np.testing.assert_array_equal(out, product(ops, format, x, tile, rows, bias))
