"""Coded weights on every kernel module: values, products, lookups, independence of rows, round trips, refusals."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.kernels.modules import DETERMINISTIC, MODULES, make, unset
from tramontane.kernels import Ops, cpu
from tramontane.kernels.coded import TABLES, Coded, unpack
from tramontane.kernels.reference import ReferenceOps
from tramontane.loading.quantized.packing import pack, row_bytes
from tramontane.weights import CodedWeight, make_weight

Arrays = dict[str, NDArray[Any]]
ARRAYS = ("scales", "zeros", "offsets")


@pytest.fixture(params=MODULES, scope="module")
def ops(request: pytest.FixtureRequest) -> Ops:
    return make(request.param)


@pytest.fixture(params=DETERMINISTIC, scope="module")
def fixed(request: pytest.FixtureRequest) -> Ops:
    return make(request.param)


def random_coded(
    bits: int,
    shape: tuple[int, int] = (37, 96),
    *,
    table: str = "",
    group: int = 32,
    lines: int = 0,
    row_block: int = 1,
    dtype: Any = np.float16,
    zeros: Any = None,
    offsets: Any = None,
    scale_table: str = "",
    order: bool = False,
    factor: float = 1.0,
    spare: int = 0,
) -> tuple[Arrays, NDArray[np.float32]]:
    """Tensors of a coded weight, and its values by the definition, element by element."""
    rng = np.random.default_rng(bits + group)
    rows, columns = shape
    values = TABLES[table or f"U{bits}"]
    codes = rng.choice(np.flatnonzero(np.isfinite(values)), shape).astype(np.uint8)
    packed = np.empty((rows, row_bytes(columns, bits) + spare), np.uint8)
    packed[:, row_bytes(columns, bits) :] = 255
    pack(packed[:, : row_bytes(columns, bits)], codes, bits)
    grid = (lines or -(-rows // row_block), -(-columns // group))
    tensors: Arrays = {"codes": packed, "table": values, "layout": np.array([group, row_block], np.int32)}
    if scale_table:
        tensors["scales"], tensors["scale_table"] = rng.integers(60, 120, grid, dtype=np.uint8), TABLES[scale_table]
        scale = tensors["scale_table"][tensors["scales"]]
    else:
        tensors["scales"] = rng.uniform(0.01, 0.1, grid).astype(dtype)
        scale = tensors["scales"].astype(np.float32)
    if zeros is not None:
        tensors["zeros"] = rng.uniform(0, 2**bits, grid).astype(zeros)
    if offsets is not None:
        tensors["offsets"] = rng.standard_normal(grid).astype(offsets)
    if factor != 1.0:
        tensors["factor"] = np.array([factor], np.float32)
    line = (np.arange(rows) // row_block % grid[0])[:, None]
    at = np.arange(columns) // group
    stored = values[codes]
    if zeros is not None:
        stored = stored - tensors["zeros"].astype(np.float32)[line, at]
    stored = stored * scale[line, at]
    if offsets is not None:
        stored = stored + tensors["offsets"].astype(np.float32)[line, at]
    if factor != 1.0:
        stored = stored * np.float32(factor)
    if order:
        tensors["order"] = rng.permutation(columns).astype(np.int32)
        dense = np.empty_like(stored)
        dense[:, tensors["order"]] = stored
        stored = dense
    for array in tensors.values():
        array.setflags(write=False)
    return tensors, stored.astype(np.float32)


BF16 = ml_dtypes.bfloat16
CASES: dict[str, dict[str, Any]] = {
    **{f"{bits} bits": {"bits": bits} for bits in range(1, 9)},
    **{f"{bits} bits, odd columns": {"bits": bits, "shape": (5, 43), "group": 43} for bits in range(1, 9)},
    "zero points of bytes": {"bits": 4, "zeros": np.uint8},
    "zero points of halves": {"bits": 4, "zeros": np.float16, "dtype": BF16},
    "zero points of floats": {"bits": 2, "zeros": np.float32, "dtype": np.float32},
    "offsets": {"bits": 6, "offsets": np.float16},
    "offsets of bfloat16": {"bits": 3, "offsets": BF16, "dtype": BF16},
    "everything": {"bits": 5, "zeros": BF16, "offsets": np.float32, "factor": 0.37, "order": True},
    "a factor": {"bits": 8, "table": "S8", "group": 96, "factor": 7.874015718698502e-3},
    "powers of two": {"bits": 4, "table": "E2M1", "scale_table": "E8M0"},
    "small floats": {"bits": 4, "table": "E2M1", "scale_table": "E4M3", "group": 16},
    "eight-bit floats": {"bits": 8, "table": "E5M2", "group": 96, "lines": 1, "dtype": np.float32},
    "blocks of rows": {"bits": 8, "table": "S8", "group": 48, "row_block": 8},
    "ragged blocks": {"bits": 8, "table": "S8", "group": 40, "row_block": 10},
    "groups across rows": {"bits": 4, "group": 1, "lines": 7, "zeros": np.float32, "dtype": np.float32},
    "groups across rows in halves": {"bits": 8, "group": 1, "lines": 3, "zeros": BF16, "offsets": np.float16},
    "tiny groups": {"bits": 4, "group": 4, "zeros": np.uint8},
    "an odd group": {"bits": 4, "group": 7},
    "another order": {"bits": 3, "order": True, "zeros": np.uint8},
    "bytes to spare": {"bits": 4, "shape": (6, 52), "group": 13, "spare": 6},
    "long rows": {"bits": 4, "shape": (35, 4608), "group": 128, "zeros": np.uint8},
}


@pytest.mark.parametrize("name", CASES)
def test_a_weight_is_its_values(ops: Ops, name: str) -> None:
    case = dict(CASES[name])
    bits = case.pop("bits")
    tensors, values = random_coded(bits, **case)
    rows, columns = values.shape
    weight = make_weight(ops, f"INT{bits}", values.shape, tensors)
    assert (weight.format, weight.shape, type(weight)) == (f"INT{bits}", values.shape, CodedWeight)
    assert weight.nbytes == sum(array.nbytes for array in tensors.values())
    exact = weight.dequantize()
    assert exact.dtype == np.float32
    np.testing.assert_array_equal(exact, values)

    ids = np.array([rows - 1, 0, 0, 3], np.int32)
    out = ops.from_host(unset(4, columns))
    weight.rows(out, ops.from_host(ids))
    np.testing.assert_array_equal(ops.to_host(out), values[ids])
    weight.rows(ops.from_host(unset(0, columns)), ops.from_host(ids[:0]))

    rng = np.random.default_rng(1)
    bias = rng.standard_normal(rows, dtype=np.float32)
    for count in (1, 2, 9):
        x = rng.standard_normal((count, columns), dtype=np.float32)
        out, plain = ops.from_host(unset(count, rows)), ops.from_host(unset(count, rows))
        weight.matmul(out, ops.from_host(x), ops.from_host(bias))
        weight.matmul(plain, ops.from_host(x))
        np.testing.assert_allclose(ops.to_host(out), ops.to_host(plain) + bias, atol=1e-5)
        bound = 2e-6 * (np.abs(x).astype(np.float64) @ np.abs(values).T) + 1e-6
        assert np.all(np.abs(ops.to_host(plain) - x.astype(np.float64) @ values.T.astype(np.float64)) <= bound)
    weight.matmul(ops.from_host(unset(0, rows)), ops.from_host(unset(0, columns)))


@pytest.mark.parametrize("name", ["another order", "ragged blocks", "groups across rows", "5 bits", "powers of two"])
def test_deterministic_rows_depend_on_themselves_alone(fixed: Ops, name: str) -> None:
    case = dict(CASES[name])
    bits = case.pop("bits")
    tensors, values = random_coded(bits, **case)
    weight = make_weight(fixed, f"INT{bits}", values.shape, tensors)
    x = np.random.default_rng(2).standard_normal((70, values.shape[1]), dtype=np.float32)
    together = fixed.from_host(unset(70, len(values)))
    weight.matmul(together, fixed.from_host(x))
    for a, b in ((0, 1), (3, 7), (69, 70)):
        alone = fixed.from_host(unset(b - a, len(values)))
        weight.matmul(alone, fixed.from_host(x[a:b]))
        np.testing.assert_array_equal(fixed.to_host(alone), fixed.to_host(together)[a:b])


NF4 = np.array(
    [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0,
     0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0], np.float32
)  # fmt: skip
FAST: dict[str, dict[str, Any]] = {
    **CASES,
    "wide groups": {"bits": 4, "shape": (35, 512), "group": 128, "zeros": np.uint8},
    "groups of 16": {"bits": 8, "shape": (17, 160), "group": 16, "zeros": np.uint8, "offsets": np.float16},
    "channels": {"bits": 8, "table": "S8", "shape": (33, 1100), "group": 1100, "dtype": np.float32},
    "channels in another order": {"bits": 4, "shape": (16, 1100), "group": 1100, "order": True, "zeros": np.float16},
    "floats of e4m3": {"bits": 8, "table": "E4M3", "shape": (35, 640), "group": 128, "row_block": 16},
    "floats of e5m2 and zero points": {"bits": 8, "table": "E5M2", "shape": (18, 600), "zeros": np.float32},
    "floats of e4m3 in groups of 16": {"bits": 8, "table": "E4M3", "shape": (18, 80), "group": 16},
}  # fmt: skip


@pytest.mark.skipif(not cpu.available(), reason="the compiled module is not built")
@pytest.mark.parametrize("isa", cpu.isas() if cpu.available() else [])
@pytest.mark.parametrize("name", FAST)
def test_fast_products_are_as_good_as_they_say(isa: str, name: str) -> None:
    """And a row's is the same alone and among others. Weights of a few levels may be rounded to eight bits."""
    case = dict(FAST[name])
    bits = case.pop("bits")
    tensors, values = random_coded(bits, **case)
    rows, columns = values.shape
    ops = cpu.CpuOps(2, isa=isa)
    weight = make_weight(ops, f"INT{bits}", values.shape, tensors)
    rng = np.random.default_rng(3)
    x, bias = rng.standard_normal((29, columns), dtype=np.float32), rng.standard_normal(rows, dtype=np.float32)
    out = unset(29, rows)
    weight.matmul(out, x, bias)
    error = np.abs(out - (x.astype(np.float64) @ values.T.astype(np.float64) + bias))
    # Rounding to 8 bits is some 0.5 % of a usual column, and of either sign.
    lengths = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(values, axis=1)
    assert np.sqrt((error**2).mean() / (lengths**2).mean()) < 0.025 / np.sqrt(columns)
    for count in (1, 3, 5, 13):
        alone = unset(count, rows)
        weight.matmul(alone, x[:count], bias)
        np.testing.assert_array_equal(alone, out[:count])


@pytest.mark.skipif(not cpu.available(), reason="the compiled module is not built")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (16, 64), (35, 96)])
def test_codes_are_packed_and_lose_nothing(bits: int, rows: int, columns: int) -> None:
    tensors, _ = random_coded(bits, (rows, columns), zeros=np.uint8)
    coded = Coded(tensors["codes"], bits, columns, tensors["table"], tensors["scales"], 32, zeros=tensors["zeros"])
    ops = cpu.CpuOps(2)
    packed = ops.pack_codes(coded, rows)
    assert packed.codes.ndim == 3
    assert packed.codes.nbytes == -(-rows // 16) * 16 * columns * bits // 8
    np.testing.assert_array_equal(ops.unpack_codes(packed, rows), tensors["codes"])
    with pytest.raises(ValueError, match="codes"):
        ops.matmul_coded(unset(1, rows + 16), np.zeros((1, columns), np.float32), packed)
    with pytest.raises(ValueError, match="tiles"):
        ops.unpack_codes(packed, rows + 16)


@pytest.mark.skipif(not cpu.available(), reason="the compiled module is not built")
@pytest.mark.parametrize("isa", cpu.isas() if cpu.available() else [])
def test_levels_that_are_no_whole_numbers_lose_little(isa: str) -> None:
    tensors, values = random_coded(4, (32, 1024), group=64)
    tensors = {**tensors, "table": NF4}
    exact = cpu.CpuOps(exact=True, isa=isa)
    values = make_weight(exact, "NF4", values.shape, tensors).dequantize()
    x = np.random.default_rng(4).standard_normal((5, 1024), dtype=np.float32)
    out = unset(5, 32)
    make_weight(cpu.CpuOps(isa=isa), "NF4", values.shape, tensors).matmul(out, x)
    want = x.astype(np.float64) @ values.T
    assert np.linalg.norm(out - want) < 0.015 * np.linalg.norm(want)


@pytest.mark.parametrize(
    "name", ["everything", "powers of two", "groups across rows", "a factor", "zero points of bytes", "bytes to spare"]
)
def test_tensors_round_trip(ops: Ops, name: str) -> None:
    case = dict(CASES[name])
    bits = case.pop("bits")
    tensors, values = random_coded(bits, **case)
    again = make_weight(
        ops, f"INT{bits}", values.shape, make_weight(ops, f"INT{bits}", values.shape, tensors).tensors()
    )
    stored = again.tensors()
    assert stored.keys() == tensors.keys()
    for key, array in stored.items():
        assert array.dtype == tensors[key].dtype, key
        np.testing.assert_array_equal(array, tensors[key])
    np.testing.assert_array_equal(again.dequantize(), values)


def test_numbers_that_are_none_stay_so(ops: Ops) -> None:
    """Scales of infinity and codes that are not numbers give what float32 arithmetic gives."""
    tensors, _ = random_coded(8, (2, 32), table="E4M3", group=16, dtype=np.float32)
    tensors = {**tensors, "scales": np.array([[np.inf, 1e38], [np.nan, 0]], np.float32)}
    weight = make_weight(ops, "FP8", (2, 32), tensors)
    codes = TABLES["E4M3"][tensors["codes"]].copy()
    with np.errstate(all="ignore"):
        values = codes * np.repeat(tensors["scales"], 16, 1)
    np.testing.assert_array_equal(weight.dequantize(), values)


def _changed(**changes: Any) -> Arrays:
    tensors, _ = random_coded(4, zeros=np.uint8)
    kept = {name: array for name, array in tensors.items() if changes.get(name, array) is not None}
    return {**kept, **{name: change for name, change in changes.items() if change is not None}}


WRONG: dict[str, tuple[Arrays, tuple[int, int]]] = {
    "no scales": (_changed(scales=None), (37, 96)),
    "another tensor": (_changed(more=np.zeros(1)), (37, 96)),
    "other rows": (_changed(), (38, 96)),
    "more columns": (_changed(), (37, 128)),
    "codes of words": (_changed(codes=np.zeros((37, 12), np.uint32)), (37, 96)),
    "short rows": (_changed(codes=np.zeros((37, 47), np.uint8)), (37, 96)),
    "a short table": (_changed(table=np.zeros(8, np.float32)), (37, 96)),
    "integer scales": (_changed(scales=np.ones((37, 3), np.int32)), (37, 96)),
    "bytes of scales without their table": (_changed(scales=np.ones((37, 3), np.uint8)), (37, 96)),
    "groups too many": (_changed(scales=np.ones((37, 4), np.float16)), (37, 96)),
    "zeros of another grid": (_changed(zeros=np.ones((37, 1), np.uint8)), (37, 96)),
    "no grid": (_changed(scales=np.ones((0, 3), np.float16), zeros=np.ones((0, 3), np.uint8)), (37, 96)),
    "groups of nothing": (_changed(layout=np.array([0, 1], np.int32)), (37, 96)),
    "blocks of nothing": (_changed(layout=np.array([32, 0], np.int32)), (37, 96)),
    "a layout of three": (_changed(layout=np.array([32, 1, 1], np.int32)), (37, 96)),
    "an order of others": (_changed(order=np.arange(95, dtype=np.int32)), (37, 96)),
}


@pytest.mark.parametrize("what", WRONG)
def test_tensors_that_do_not_fit_are_refused(what: str) -> None:
    tensors, shape = WRONG[what]
    with pytest.raises(ValueError, match=r"INT4|coded weight"):
        make_weight(ReferenceOps(), "INT4", shape, tensors)
    with pytest.raises(ValueError, match="format"):
        CodedWeight.from_tensors(ReferenceOps(), "INT9", (37, 96), _changed())


def test_ops_hold_rows_to_the_columns(ops: Ops) -> None:
    """Codes may have bytes to spare, so only the matrix itself tells how many columns it has."""
    tensors, values = random_coded(4, (6, 52), group=13, spare=6)
    weight = make_weight(ops, "INT4", values.shape, tensors)
    for columns in (51, 56, 64):
        with pytest.raises(ValueError, match="matmul_coded"):
            weight.matmul(ops.from_host(unset(1, 6)), ops.from_host(unset(1, columns)))
        with pytest.raises(ValueError, match="rows_coded"):
            weight.rows(ops.from_host(unset(1, columns)), ops.from_host(np.zeros(1, np.int32)))


@settings(max_examples=60)
@given(st.integers(1, 8), st.integers(1, 70), st.integers(1, 5), st.integers(0, 9), st.randoms())
def test_packing_and_unpacking_are_inverse(bits: int, columns: int, rows: int, spare: int, random: Any) -> None:
    codes = np.array([[random.randrange(2**bits) for _ in range(columns)] for _ in range(rows)], np.uint8)
    packed = np.full((rows, row_bytes(columns, bits) + spare), 255, np.uint8)
    pack(packed[:, : row_bytes(columns, bits)], codes, bits)
    for row, bytes_ in zip(codes.tolist(), packed, strict=True):
        word = int.from_bytes(bytes(bytes_[: row_bytes(columns, bits)]), "little")
        assert word == sum(code << (i * bits) for i, code in enumerate(row))
    out = np.empty_like(codes)
    unpack(out, packed, bits)
    np.testing.assert_array_equal(out, codes)
