"""Recorded computations: run again on other values, they give what calling the ops anew gives."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.kernels.modules import MODULES, ints, make, normal
from tramontane.kernels import Ops, cpu
from tramontane.kernels.plans import MOST, Plans
from tramontane.kernels.reference import ReferenceOps

ROWS, WIDTH, EXPERTS = 6, 32, 3


class Computation:
    """A bit of everything whose result, or reach, depends on values: ids, offsets, block tables, lengths."""

    def __init__(self, ops: Ops) -> None:
        rng = np.random.default_rng(1)
        device = ops.from_host
        self.ops = ops
        self.ids, self.slots = device(ints(*range(ROWS))), device(ints(*range(ROWS)))
        self.tables, self.starts, self.lens = device(ints(0, 1)[None]), device(ints(0, ROWS)), device(ints(ROWS))
        self.embedding = ops.pack(device(normal(rng, 20, WIDTH)), "F32")
        self.router = device(normal(rng, EXPERTS, WIDTH))
        self.experts = tuple(ops.pack(device(normal(rng, WIDTH, WIDTH)), "F32") for _ in range(EXPERTS))
        self.caches = ops.zeros((4, 2, 16, 4), "float32"), ops.zeros((4, 2, 4, 16), "float32")
        self.x, self.out, self.sorted, self.both = (ops.zeros((n * ROWS, WIDTH), "float32") for n in (1, 1, 2, 2))
        self.logits, self.weights = ops.zeros((ROWS, EXPERTS), "float32"), ops.zeros((ROWS, 2), "float32")
        self.chosen, self.places = ops.zeros((ROWS, 2), "int32"), ops.zeros((ROWS, 2), "int32")
        self.order, self.offsets = ops.zeros((2 * ROWS,), "int32"), ops.zeros((EXPERTS + 1,), "int32")

    def __call__(self) -> None:
        ops, heads = self.ops, (ROWS, 2, 16)
        ops.rows(self.x, self.ids, self.embedding)
        ops.write_cache(*self.caches, ops.view(self.x, heads), ops.view(self.x, heads), self.slots)
        arrays = (ops.view(self.out, heads), ops.view(self.x, heads), *self.caches)
        ops.attention(*arrays, self.tables, self.starts, self.lens, 0.3)
        ops.rms_norm(self.x, self.out, None, 1e-5)
        ops.matmul(self.logits, self.x, self.router)
        ops.route(self.weights, self.chosen, self.logits, None, "softmax", True, 1.0)
        ops.group_rows(self.order, self.places, self.offsets, self.chosen)
        ops.take_rows(self.sorted, self.x, self.order)
        ops.matmul_experts(self.both, self.sorted, self.offsets, self.experts, None)
        ops.combine(self.out, self.both, self.places, self.weights)

    def change(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        for array, values in (
            (self.ids, rng.integers(0, 20, ROWS)),
            (self.slots, 4 * 2 + np.arange(ROWS)),
            (self.tables, [[2, 3]]),
        ):
            self.ops.to_host(array)[...] = values

    def result(self) -> Any:
        return self.ops.to_host(self.out).copy()


@pytest.mark.parametrize("module", MODULES)
def test_replayed_as_computed_anew(module: str) -> None:
    ops = make(module, threads=1 if module.startswith("reference") else 2)
    if ops.device != "cpu":
        pytest.skip("the test writes into what the ops read")
    recorded, anew = Computation(ops), Computation(ops)
    replay = ops.record(recorded)
    anew()
    np.testing.assert_array_equal(recorded.result(), anew.result())
    assert (replay is None) == (not ops.name.startswith("cpu-")), "only the compiled module replays"
    for seed in range(5) if replay else ():
        for each in (recorded, anew):
            each.change(seed)
        assert replay is not None
        replay()
        anew()
        np.testing.assert_array_equal(recorded.result(), anew.result())


needs_cpu = pytest.mark.skipif(not cpu.available(), reason="the compiled module is not built")


@needs_cpu
def test_rows_that_are_padded_are_padded_each_time() -> None:
    rng = np.random.default_rng(0)
    ops, x, weight, out = cpu.CpuOps(), normal(rng, 3, 40), normal(rng, 5, 40), np.zeros((3, 5), np.float32)
    replay = ops.record(lambda: ops.matmul(out, x, weight))  # a matrix in rows, of no whole vectors
    assert replay is not None
    for _ in range(3):
        x[...] = normal(rng, 3, 40)
        replay()
        np.testing.assert_allclose(out, x @ weight.T, rtol=1e-5, atol=1e-5)


@needs_cpu
def test_values_are_checked_each_time() -> None:
    ops = cpu.CpuOps()
    one = Computation(ops)
    replay = ops.record(one)
    assert replay is not None
    for array, at, bad, words in (
        (one.ids, 3, 32, "rows: ids holds 32"),  # a panel is 16 rows
        (one.slots, 0, -1, "write_cache: slots holds -1"),
        (one.tables, (0, 1), 4, "attention: block_tables hold 4"),
        (one.lens, 0, 9, "attention: block_tables are too short"),
        (one.starts, 1, 5, "attention: query_start"),
    ):
        before = array.copy()
        array[at] = bad
        with pytest.raises(ValueError, match=words):
            replay()
        array[...] = before
    replay()


@needs_cpu
def test_what_is_no_op_is_not_recorded() -> None:
    ops = cpu.CpuOps()
    x = np.ones((1, 4), np.float32)

    def conv() -> None:
        state = np.zeros((1, 1, 1, 4), np.float32)
        ops.causal_conv(x, x.copy(), state, np.ones((4, 2), np.float32), None, ints(0), ints(0, 1), ints(1))

    others: list[Callable[[], Any]] = [
        *(conv, lambda: ops.to_host(x), lambda: ops.from_host(x)),
        lambda: ops.pack(np.ones((2, 4), np.float32), "F32"),
    ]
    for compute in others:
        assert ops.record(compute) is None
    assert ops.record(lambda: ops.scale(x, 2.0)) is not None


@needs_cpu
def test_a_failure_ends_the_recording_and_other_threads_are_not_in_it() -> None:
    ops = cpu.CpuOps()
    x, other = np.ones((1, 4), np.float32), np.ones((1, 4), np.float32)

    def elsewhere() -> None:
        thread = threading.Thread(target=lambda: (ops.scale(other, 3.0), ops.to_host(other)))
        thread.start()
        thread.join()

    def compute() -> None:
        ops.scale(x, 2.0)
        elsewhere()

    with pytest.raises(ValueError, match="rms_norm"):
        ops.record(lambda: ops.rms_norm(x, other[0], None, 1e-5))
    with pytest.raises(ValueError, match="records"):
        ops.record(lambda: ops.record(compute) and None)
    replay = ops.record(compute)
    assert replay is not None
    replay()
    assert (x[0, 0], other[0, 0]) == (4, 3)


@needs_cpu
def test_a_plan_keeps_what_it_points_to() -> None:
    def made() -> tuple[Callable[[], None] | None, Any]:
        ops = cpu.CpuOps(2)
        one = Computation(ops)
        return ops.record(one), one.out

    replay, out = made()
    gc.collect()
    expected = out.copy()
    out[...] = 0
    assert replay is not None
    replay()
    np.testing.assert_array_equal(out, expected)


def test_the_latest_used_are_kept() -> None:
    calls: list[int] = []

    class Counting(ReferenceOps):
        def record(self, compute: Callable[[], None]) -> Callable[[], None] | None:
            compute()
            calls.append(-1)
            return lambda: None

    def compute(key: int) -> int:
        calls.append(key)
        return key

    plans = Plans(Counting())
    for key in (0, 1, 0, *range(2, MOST + 1)):
        assert plans.run(key, lambda key=key: compute(key)) == key  # type: ignore[misc]
    assert calls.count(-1) == MOST + 1
    calls.clear()
    for key in (0, 1):  # 1 has gone
        plans.run(key, lambda key=key: compute(key))  # type: ignore[misc]
    assert calls == [1, -1]


def test_what_cannot_be_replayed_is_computed_each_time() -> None:
    results = iter("abc")
    plans = Plans(ReferenceOps())
    assert [plans.run("key", lambda: next(results)) for _ in range(3)] == ["a", "b", "c"]
