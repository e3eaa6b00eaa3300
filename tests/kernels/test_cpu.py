"""What is particular to the compiled module: its instruction sets, its checks, its threads, awkward shapes.

That its ops compute what they should is tests/kernels/test_ops.py's to show.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.kernels import oracles
from tramontane import platform
from tramontane.errors import InvalidRequest
from tramontane.kernels import cpu

if not cpu.available():
    pytest.skip("the compiled module is not built", allow_module_level=True)

COMPILED = ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K")
DENSE = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
each_isa = pytest.mark.parametrize("isa", cpu.isas())


def normal(*shape: int, seed: int = 3) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def ints(*values: int) -> NDArray[np.int32]:
    return np.array(values, np.int32)


def weight_of(format: str, rows: int, columns: int) -> NDArray[Any]:
    if format in DENSE:
        return normal(rows, columns).astype(DENSE[format])
    return oracles.random_blocks(np.random.default_rng(4), format, rows, columns)


def multiply(
    ops: cpu.CpuOps, x: NDArray[Any], weight: NDArray[Any], format: str, bias: NDArray[Any] | None = None
) -> NDArray[np.float32]:
    out = np.full((len(x), len(weight)), np.nan, np.float32)
    if format in DENSE:
        ops.matmul(out, x, weight, bias)
    else:
        ops.matmul_blocks(out, x, weight, format, bias)
    return out


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=60
    )


# ---- Instruction sets


def test_plain_always_runs_and_the_best_is_taken() -> None:
    assert cpu.isas()[-1] == "plain"
    assert cpu.CpuOps().name in [f"cpu-{isa}" for isa in cpu.isas()]
    assert not any("emulated" in isa for isa in cpu.isas())


@pytest.mark.parametrize("isa", cpu.isas(emulated=True))
def test_an_instruction_set_can_be_forced(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu.CpuOps(isa=isa).name == f"cpu-{isa}"
    monkeypatch.setenv("TRAMONTANE_ISA", isa)
    assert cpu.CpuOps().name == f"cpu-{isa}"
    assert cpu.CpuOps(isa="plain").name == "cpu-plain"


def test_an_absent_instruction_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest, match="mmx"):
        cpu.CpuOps(isa="mmx")
    monkeypatch.setenv("TRAMONTANE_ISA", "sve9")
    with pytest.raises(InvalidRequest, match=r"TRAMONTANE_ISA.*sve9"):
        cpu.CpuOps()


def test_a_pool_has_at_least_one_thread() -> None:
    with pytest.raises(InvalidRequest, match="threads"):
        cpu.CpuOps(threads=0)


@each_isa
@pytest.mark.parametrize("format", COMPILED)
def test_rows_of_blocks_are_exactly_ggufs(isa: str, format: str) -> None:
    gguf = pytest.importorskip("gguf")
    blocks = weight_of(format, 9, 512)
    ids = ints(8, 0, 3, 3)
    out = np.full((4, 512), np.nan, np.float32)
    cpu.CpuOps(isa=isa).rows_blocks(out, ids, blocks, format)
    theirs = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[format])[ids]
    np.testing.assert_array_equal(out.view(np.uint32), theirs.view(np.uint32))


@each_isa
def test_every_half_is_read_and_every_float_rounded_to_one(isa: str) -> None:
    ops = cpu.CpuOps(isa=isa)
    halves = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16).reshape(1, -1)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        values = halves.view(dtype)
        out = np.empty(values.shape, np.float32)
        ops.rows(out, ints(0), values)
        np.testing.assert_array_equal(out, values.astype(np.float32))
        # Around every half, ties and both sides of them: through the cache, which is where floats are rounded.
        finite = out[np.isfinite(out)]
        between = (finite + np.nextafter(finite.astype(dtype), np.array(np.inf, dtype)).astype(np.float32)) / 2
        between = between[np.isfinite(between)]
        with np.errstate(over="ignore", under="ignore"):
            x = np.concatenate(
                [finite, between, np.nextafter(between, np.float32(-np.inf)), np.nextafter(between, np.float32(np.inf))]
            )
            x = x[np.isfinite(x)][None, None]
            keys = np.zeros((1, 1, x.shape[2], 1), dtype)
            values = np.zeros((1, 1, 1, x.shape[2]), dtype)
            ops.write_cache(keys, values, x, x, ints(0))
            expected = x.astype(dtype)[None].view(np.uint16)
        np.testing.assert_array_equal(keys.swapaxes(2, 3).copy().view(np.uint16), expected)
        np.testing.assert_array_equal(values.view(np.uint16), expected)


# ---- One arithmetic: rows, threads, shapes


@each_isa
@pytest.mark.parametrize("format", [*COMPILED, *DENSE])
def test_a_row_is_the_same_alone_and_among_others(isa: str, format: str) -> None:
    """One row, few and many, one thread and three, and more columns than a panel holds: the same bits."""
    for rows, columns in ((37, 2048), (130, 256), (3, 3328)):
        x, weight, bias = normal(40, columns), weight_of(format, rows, columns), normal(rows)
        one, three = cpu.CpuOps(1, isa=isa), cpu.CpuOps(3, isa=isa)
        whole = multiply(one, x, weight, format, bias)
        np.testing.assert_array_equal(multiply(three, x, weight, format, bias), whole)
        for tokens in (1, 2, 3, 4, 5, 7, 13, 24):
            for ops in (one, three):
                np.testing.assert_array_equal(multiply(ops, x[:tokens], weight, format, bias), whole[:tokens])
        np.testing.assert_array_equal(multiply(one, x, weight[-2:], format, bias[-2:]), whole[:, -2:])


@each_isa
@pytest.mark.parametrize("dtype", DENSE)
@pytest.mark.parametrize("columns", [1, 7, 31, 33, 100, 1537])
def test_columns_need_not_fill_a_vector(isa: str, dtype: str, columns: int) -> None:
    x, weight = normal(9, columns), weight_of(dtype, 5, columns)
    exact = x.astype(np.float64) @ weight.astype(np.float64).T
    for tokens in (1, 9):
        out = multiply(cpu.CpuOps(isa=isa), x[:tokens], weight, dtype)
        np.testing.assert_allclose(out, exact[:tokens], rtol=0, atol=2e-5 * np.sqrt(columns))


@each_isa
def test_weights_need_not_be_aligned(isa: str) -> None:
    ops = cpu.CpuOps(isa=isa)
    for format in ("Q4_K", "float32"):
        weight, x = weight_of(format, 6, 512), normal(3, 512)
        shifted = np.zeros(weight.nbytes + 4, np.uint8)
        shifted[4:] = weight.view(np.uint8).ravel()
        moved = shifted[4:].view(weight.dtype).reshape(weight.shape)
        np.testing.assert_array_equal(multiply(ops, x, moved, format), multiply(ops, x, weight, format))


@each_isa
@pytest.mark.parametrize(("heads", "size", "block"), [((9, 3), 64, 16), ((4, 4), 20, 5), ((6, 1), 100, 3)])
def test_attention_does_not_depend_on_the_threads(isa: str, heads: tuple[int, int], size: int, block: int) -> None:
    query_heads, key_heads = heads
    lengths, contexts = (70, 1, 8), (150, 97, 8)
    tables = np.full((3, 150 // block + 1), -1, np.int32)
    taken = iter(np.random.default_rng(5).permutation(tables.size))
    for table, context in zip(tables, contexts, strict=True):
        for i in range(-(-context // block)):
            table[i] = next(taken)
    keys, values = (
        normal(tables.size, key_heads, size, block, seed=6),
        normal(tables.size, key_heads, block, size, seed=7),
    )
    q = normal(sum(lengths), query_heads, size)
    starts = np.cumsum([0, *lengths]).astype(np.int32)
    results = []
    for threads in (1, 3):
        out = np.full_like(q, np.nan)
        cpu.CpuOps(threads, isa=isa).attention(out, q, keys, values, tables, starts, ints(*contexts), 0.1)
        results.append(out)
    np.testing.assert_array_equal(results[0], results[1])
    assert np.isfinite(results[0]).all()


@each_isa
def test_nothing_to_do_is_fine(isa: str) -> None:
    ops = cpu.CpuOps(2, isa=isa)
    none = np.empty((0, 32), np.float32)
    ops.matmul(np.empty((0, 4), np.float32), none, normal(4, 32))
    ops.matmul_experts(np.empty((0, 4), np.float32), none, ints(0, 0), (normal(4, 32),), None)
    ops.rms_norm(none, none, normal(32), 1e-5)
    ops.combine(none, none, np.empty((0, 2), np.int32), np.empty((0, 2), np.float32))
    ops.group_rows(ints(), np.empty((0, 2), np.int32), ints(7, 7), np.empty((0, 2), np.int32))
    ops.rope(np.empty((0, 2, 8), np.float32), np.empty((0, 4), np.float32), np.empty((0, 4), np.float32), False)
    ops.log_softmax(none, none)
    ops.take_rows(none, normal(3, 32), ints())
    empty = np.empty((0, 2, 8), np.float32)
    caches = np.zeros((1, 2, 8, 4), np.float32), np.zeros((1, 2, 4, 8), np.float32)
    ops.write_cache(*caches, empty, empty, ints())
    ops.attention(empty, empty, *caches, np.empty((0, 1), np.int32), ints(0), ints(), 1.0)


def test_exponentials_reach_from_zero_to_infinity() -> None:
    """SiLU and softmax of extreme values, on every instruction set: no NaN, and the limits."""
    for isa in cpu.isas():
        ops = cpu.CpuOps(isa=isa)
        gate = np.array([[-np.inf, -1e30, -120, -88, 0, 88, 120, 1e30]], np.float32)
        gate[0, 0] = -3e38
        out = np.empty_like(gate)
        ops.gated_activation(out, gate, np.ones_like(gate), "silu")
        np.testing.assert_allclose(out[0, 4:], gate[0, 4:], rtol=1e-6)
        assert (np.abs(out[0, :4]) < 1e-30).all()
        capped = np.array([[-np.inf, -1e30, 1e30, np.inf, 1e-30, np.nan]], np.float32)
        ops.softcap(capped, 30.0)
        np.testing.assert_array_equal(capped, np.array([[-30, -30, 30, 30, 1e-30, np.nan]], np.float32))
        logits = np.array([[0, -50, -103, -200, -np.inf]], np.float32)
        result = np.empty_like(logits)
        ops.log_softmax(result, logits)
        np.testing.assert_array_equal(result, logits)


@each_isa
def test_a_draw_falls_on_what_can_be_drawn(isa: str) -> None:
    """Masked and hopeless tokens are never drawn, not even at the far end; rows without any finite logit give one."""
    ops = cpu.CpuOps(isa=isa)
    last = np.nextafter(np.float32(1), np.float32(0))
    logits = np.full((4, 1000), -np.inf, np.float32)
    logits[0, [3, 900]] = 1, -80
    logits[1, 77] = -5
    logits[2] = 2
    tokens = np.full(4, -1, np.int32)
    column = np.ones(4, np.float32)
    ops.sample(tokens, logits, column, np.zeros(4, np.int32), column, column * 0, column * last)
    assert tokens[0] == 3
    assert tokens[1] == 77
    assert tokens[2] == 999
    assert 0 <= tokens[3] < 1000


# ---- Threads


def test_ops_may_be_called_from_several_threads() -> None:
    ops = cpu.CpuOps(3)
    weight, x = weight_of("Q8_0", 500, 256), normal(16, 256)
    expected = multiply(ops, x, weight, "Q8_0")
    wrong: list[int] = []

    def work() -> None:
        for i in range(60):
            if not np.array_equal(multiply(ops, x, weight, "Q8_0"), expected):
                wrong.append(i)

    callers = [threading.Thread(target=work) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


USE = """
import numpy as np
from tramontane.kernels.cpu import CpuOps
ops = CpuOps(2)
x, w, out = np.ones((8, 512), np.float32), np.ones((512, 512), np.float32), np.empty((8, 512), np.float32)
ops.matmul(out, x, w)
"""


def test_a_program_ends_while_workers_wait() -> None:
    for ending in ("", "import time; time.sleep(0.01)", "del ops"):
        done = run_python(USE + ending)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_computes_on() -> None:
    code = """
import os
child = os.fork()
out[:] = 0
ops.matmul(out, x, w)
assert (out == 512).all()
if not child:
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
del ops
print("both")
"""
    done = run_python(USE + code)
    assert done.stdout == "both\n", done.stderr


# ---- Checks and buffers


def refused(words: str, op: Callable[..., None], *arguments: Any) -> None:
    """The call raises a ValueError that has each of the words."""
    with pytest.raises(ValueError, match=op.__name__) as caught:
        op(*arguments)
    for word in words.split():
        assert word in str(caught.value)


def test_arguments_are_checked() -> None:
    ops = cpu.CpuOps()
    x, weight, out = normal(2, 32), normal(3, 32), normal(2, 3)
    refused("weight contiguous", ops.matmul, out, x, normal(32, 3).T)
    refused("x numpy", ops.matmul, out, x.tolist(), weight)
    refused("x float32 float16", ops.matmul, out, x.astype(np.float16), weight)
    refused("x [32]", ops.matmul, out, x[0], weight)
    refused("bias [3] [4]", ops.matmul, out, x, weight, normal(4))
    refused("x float32", ops.matmul, out, x.astype(x.dtype.newbyteorder()), weight)
    out.setflags(write=False)
    refused("out read-only", ops.matmul, out, x, weight)


def test_what_would_reach_outside_of_an_array_is_refused() -> None:
    ops = cpu.CpuOps()
    table, row = normal(3, 8), normal(1, 8)
    for bad in (-1, 3):
        refused(f"ids {bad}", ops.rows, row, ints(bad), table)
        refused(f"rows {bad}", ops.take_rows, row, table, ints(bad))
        refused(f"rows {bad}", ops.apply_edits, table, ints(bad), ints(0), normal(1), normal(1))
        refused(f"rows {bad}", ops.mask, table, ints(bad), ints(0)[:, None])
        refused("ids 8", ops.apply_edits, table, ints(0), ints(8), normal(1), normal(1))
    caches, k = (np.zeros((2, 1, 8, 4), np.float32), np.zeros((2, 1, 4, 8), np.float32)), normal(1, 1, 8)
    refused("slots 8", ops.write_cache, *caches, k, k, ints(8))
    refused("target 2", ops.copy_blocks, caches[0], ints(0), ints(2))
    places = (ints(0), ints(0)[:, None], ints(0, 0, 0))
    for bad in (-1, 2):
        refused(f"experts {bad}", ops.group_rows, *places, ints(bad)[:, None])
        refused(f"slots {bad}", ops.combine, row, table[:2], ints(bad)[:, None], normal(1, 1))
    for bounds in ((0, 2), (-1, 0), (1, 0)):
        refused("offsets", ops.matmul_experts, normal(1, 3), row, ints(*bounds), (table,), None)
    both = (table, table.astype(np.float16))
    refused("weights alike", ops.matmul_experts, normal(2, 3), normal(2, 8), ints(0, 1, 2), both, None)
    refused("weights [3, 8]", ops.matmul_experts, normal(1, 3), row, ints(0, 1), (table[:2],), None)
    refused("weights numpy", ops.matmul_experts, normal(1, 3), row, ints(0, 1), (None,), None)

    def attention(tables: list[int], starts: list[int], context: int) -> None:
        arrays = ints(*tables)[None], ints(*starts), ints(context)
        ops.attention(np.empty_like(k), k, *caches, *arrays, 1.0)

    attention([1, 0], [0, 1], 8)
    refused("block_tables 2", attention, [1, 2], [0, 1], 8)
    refused("block_tables -1", attention, [1, -1], [0, 1], 5)
    refused("block_tables short", attention, [1], [0, 1], 5)
    refused("query_start", attention, [1], [0, 2], 4)
    refused("context_lens", attention, [1], [0, 1], 0)


@pytest.mark.parametrize("make", ["empty", "zeros"])
def test_buffers_start_on_cache_lines_and_large_ones_on_pages(make: str) -> None:
    ops = cpu.CpuOps()
    for shape, dtype in (((3, 5), "float32"), ((7,), "bfloat16"), ((1, 4), "int32")):
        array = getattr(ops, make)(shape, dtype)
        assert array.shape == shape
        assert array.ctypes.data % 64 == 0
        assert array.flags.c_contiguous
        assert array.flags.writeable
    assert getattr(ops, make)((300, 300), "float32").ctypes.data % 4096 == 0


@pytest.mark.skipif(sys.platform != "linux", reason="resident pages are told exactly on Linux only")
def test_what_little_is_written_at_the_start_of_zeros_takes_no_large_page() -> None:
    caches = [cpu.CpuOps().zeros((16 << 20,), "float16") for _ in range(16)]
    before = platform.current_rss()
    for cache in caches:
        cache[: 64 << 10] = 1
    assert platform.current_rss() - before < 16 * (512 << 10)
    assert not caches[0][64 << 10 :].any()
