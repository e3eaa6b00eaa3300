"""Routing, grouping and the products of experts on every kernel module, against transformers' routers and by hand."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.kernels import oracles
from tests.kernels.modules import DETERMINISTIC, FLOATS, call, ints, make, normal, unset
from tramontane.kernels import Ops

# (score, normalize, scale, groups, top_groups, group_score): Mixtral, Qwen2-MoE, DeepSeek-V2, DeepSeek-V3, gpt-oss.
ROUTERS: dict[str, tuple[Any, ...]] = {
    "renormalized": ("softmax", True, 1.0),
    "plain": ("softmax", False, 1.0),
    "best group": ("softmax", False, 16.0, 4, 2, "max"),
    "best pairs": ("sigmoid", True, 2.5, 4, 2, "top2"),
    "sigmoid": ("sigmoid", False, 0.5),
}
each_router = pytest.mark.parametrize("router", ROUTERS)


def route(ops: Ops, logits: NDArray[Any], k: int, correction: NDArray[Any] | None, *how: Any) -> Any:
    """(weights, experts) of a router."""
    weights, experts = unset(len(logits), k), unset(len(logits), k, dtype=np.int32)
    return call(ops, "route", weights, experts, logits, correction, *how, written=2)


def expected(
    logits: NDArray[Any],
    k: int,
    correction: NDArray[Any] | None,
    score: str,
    normalize: bool,
    scale: float,
    groups: int = 1,
    top_groups: int = 1,
    group_score: str = "max",
) -> tuple[NDArray[Any], NDArray[Any]]:
    """The same in float64, one token at a time."""
    weights, experts = [], []
    for row in logits.astype(np.float64):
        scores = (
            np.exp(row - row.max()) / np.exp(row - row.max()).sum() if score == "softmax" else 1 / (1 + np.exp(-row))
        )
        choice = scores + (0 if correction is None else correction)
        members = np.array_split(np.arange(len(row)), groups)
        worth = [np.sort(choice[m])[-(1 if group_score == "max" else 2) :].sum() for m in members]
        open_groups = sorted(range(groups), key=lambda g: (-worth[g], g))[:top_groups]
        allowed = sorted((int(e) for g in open_groups for e in members[g]), key=lambda e: (-choice[e], e))
        chosen = scores[allowed[:k]]
        weights.append(scale * (chosen / chosen.sum() if normalize else chosen))
        experts.append(allowed[:k])
    return np.array(weights).reshape(-1, k), np.array(experts, int).reshape(-1, k)


@each_router
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize(("t", "experts", "k"), [(0, 8, 2), (1, 8, 2), (9, 60, 4), (130, 16, 6)])
def test_route(ops: Ops, router: str, corrected: bool, t: int, experts: int, k: int, rng: np.random.Generator) -> None:
    logits = normal(rng, t, experts) * 3
    correction = rng.random(experts, np.float32) if corrected else None
    weights, chosen = route(ops, logits, k, correction, *ROUTERS[router])
    right_weights, right = expected(logits, k, correction, *ROUTERS[router])
    np.testing.assert_array_equal(chosen, right)
    np.testing.assert_allclose(weights, right_weights, rtol=3e-6, atol=1e-7)


def test_ties_go_to_the_lower_expert(ops: Ops) -> None:
    logits = np.zeros((2, 12), np.float32)
    logits[1, [3, 9]] = 1
    for router in ROUTERS.values():
        _, chosen = route(ops, logits, 3, None, *router)
        assert chosen[0].tolist() == [0, 1, 2]
    _, chosen = route(ops, logits, 3, None, *ROUTERS["plain"])
    assert chosen[1].tolist() == [3, 9, 0]


def test_scores_of_nothing_keep_their_weights_finite(ops: Ops) -> None:
    """Sigmoids that are all zero, divided by their sum."""
    weights, chosen = route(ops, np.full((1, 4), -200, np.float32), 2, None, "sigmoid", True, 1.0)
    assert chosen.tolist() == [[0, 1]]
    assert weights.tolist() == [[0, 0]]


def test_route_is_deepseeks(ops: Ops, rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    from transformers import DeepseekV3Config

    config = DeepseekV3Config(
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        hidden_size=16,
        moe_intermediate_size=8,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    )
    router = module.DeepseekV3TopkRouter(config)
    logits, correction = normal(rng, 11, 16), rng.random(16, np.float32)
    router.weight.data = torch.eye(16)
    router.e_score_correction_bias = torch.from_numpy(correction)
    _, theirs, places = (array.detach() for array in router(torch.from_numpy(logits)))
    weights, chosen = route(ops, logits, 4, correction, "sigmoid", True, 2.5, 4, 2, "top2")
    mine, right = (
        np.take_along_axis(w, np.argsort(e, axis=1), axis=1)
        for w, e in ((weights, chosen), (theirs.numpy(), places.numpy()))
    )
    np.testing.assert_array_equal(np.sort(chosen, axis=1), np.sort(places.numpy(), axis=1))
    np.testing.assert_allclose(mine, right, rtol=2e-5)


def test_sparsemixer_is_phimoes(ops: Ops, rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("transformers.models.phimoe.modeling_phimoe")
    logits = normal(rng, 40, 16) * 2
    logits[0] = 0
    logits[1] = -np.arange(16) - 1
    logits[2, 3:5] = 9
    for jitter in (0.01, 0.1):
        theirs, places = module.sparsemixer(torch.from_numpy(logits), jitter_eps=jitter, training=False)
        how = ("sparsemixer", False, 1.0, 1, 1, "max", jitter)
        weights, chosen = route(ops, logits, 2, None, *how)
        np.testing.assert_array_equal(chosen, places.numpy())
        np.testing.assert_allclose(weights, theirs.numpy(), rtol=3e-6, atol=1e-7)
    assert [len(r) for r in route(ops, logits[:0], 2, None, *how)] == [0, 0]


@pytest.mark.parametrize(("t", "count", "k"), [(0, 4, 2), (1, 1, 1), (1, 8, 2), (37, 5, 3), (64, 128, 8)])
def test_group_rows(ops: Ops, t: int, count: int, k: int, rng: np.random.Generator) -> None:
    experts = np.array([rng.permutation(count)[:k] for _ in range(t)], np.int32).reshape(t, k)
    empty = [unset(*shape, dtype=np.int32) for shape in ((t * k,), (t, k), (count + 1,))]
    rows, slots, offsets = call(ops, "group_rows", *empty, experts, written=3)
    pairs = sorted((int(experts[i, j]), i, j) for i in range(t) for j in range(k))
    assert rows.tolist() == [i for _, i, _ in pairs]
    assert [int(slots[i, j]) for _, i, j in pairs] == list(range(t * k))
    assert offsets.tolist() == [sum(e < expert for e, _, _ in pairs) for expert in range(count + 1)]


@pytest.mark.parametrize(("t", "k", "width"), [(0, 2, 8), (1, 1, 5), (7, 3, 33), (40, 8, 64)])
def test_combine(ops: Ops, t: int, k: int, width: int, rng: np.random.Generator) -> None:
    x, weights = normal(rng, t * k, width), normal(rng, t, k)
    slots = rng.permutation(t * k).astype(np.int32).reshape(t, k)
    right = np.einsum("tk,tkd->td", weights.astype(np.float64), x[slots].astype(np.float64))
    np.testing.assert_allclose(call(ops, "combine", unset(t, width), x, slots, weights), right, rtol=1e-5, atol=2e-6)


# ---- Products


def experts_of(rng: np.random.Generator, format: str, count: int, rows: int, columns: int) -> list[NDArray[Any]]:
    if format in FLOATS:
        return [normal(rng, rows, columns).astype(FLOATS[format]) for _ in range(count)]
    return [oracles.random_blocks(rng, format, rows, columns) for _ in range(count)]


@pytest.mark.parametrize(
    ("format", "columns"), [*((name, 40) for name in FLOATS), ("Q8_0", 64), ("MXFP4", 256), ("Q4_K", 256)]
)
@pytest.mark.parametrize("sizes", [(0, 1, 0, 3, 2), (7, 0, 300, 1, 0), (0, 0, 0), (1,), (2, 2, 2, 2, 2, 2)])
def test_matmul_experts(ops: Ops, format: str, sizes: tuple[int, ...], columns: int, rng: np.random.Generator) -> None:
    """What each expert's own product gives: to the bit where that is promised."""
    offsets = np.cumsum([0, *sizes]).astype(np.int32)
    x, bias = normal(rng, offsets[-1], columns), normal(rng, len(sizes), 37)
    weights = experts_of(rng, format, len(sizes), 37, columns)
    blocks = None if format in FLOATS else format
    on_device = tuple(ops.from_host(weight) for weight in weights)
    for b in (None, bias):
        actual = call(ops, "matmul_experts", unset(offsets[-1], 37), x, offsets, on_device, blocks, b)
        for e, (start, stop) in enumerate(pairwise(offsets)):
            kind = ("matmul",) if blocks is None else ("matmul_blocks", format)
            more = (*kind[1:], None if b is None else b[e])
            own = call(ops, kind[0], unset(stop - start, 37), x[start:stop], weights[e], *more)
            np.testing.assert_array_equal(actual[start:stop], own)


@pytest.mark.parametrize("format", [*FLOATS, "Q8_0"])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_experts_of_equally_many_rows_need_no_offsets(
    ops: Ops, format: str, rows: int, rng: np.random.Generator
) -> None:
    x, bias = normal(rng, 5 * rows, 64), normal(rng, 5, 37)
    blocks = None if format in FLOATS else format
    weights = tuple(ops.from_host(weight) for weight in experts_of(rng, format, 5, 37, 64))
    offsets = (np.arange(6) * rows).astype(np.int32)
    with_them, without = (
        call(ops, "matmul_experts", unset(5 * rows, 37), x, given, weights, blocks, bias) for given in (offsets, None)
    )
    np.testing.assert_array_equal(without, with_them)


def test_experts_without_rows_are_not_touched(ops: Ops, rng: np.random.Generator) -> None:
    x, weight = normal(rng, 2, 32), ops.from_host(normal(rng, 3, 32))
    actual = call(ops, "matmul_experts", unset(2, 3), x, ints(0, 0, 2, 2), (None, weight, None), None)
    np.testing.assert_array_equal(actual, call(ops, "matmul", unset(2, 3), x, ops.to_host(weight)))


# ---- Deterministic


@pytest.mark.parametrize("module", DETERMINISTIC)
@pytest.mark.parametrize("format", ["float32", "Q4_K"])
def test_rows_of_experts_do_not_depend_on_other_rows_nor_on_threads(
    module: str, format: str, rng: np.random.Generator
) -> None:
    offsets = ints(0, 40, 41, 41, 60)
    x, weights = normal(rng, 60, 256), experts_of(rng, format, 4, 37, 256)
    blocks = None if format in FLOATS else format

    def product(ops: Ops, rows: NDArray[Any], bounds: NDArray[Any]) -> Any:
        on_device = tuple(ops.from_host(weight) for weight in weights)
        return call(ops, "matmul_experts", unset(len(rows), 37), rows, bounds, on_device, blocks)

    whole = product(make(module, threads=3), x, offsets)
    some = [0, 7, 40, 59]
    np.testing.assert_array_equal(product(make(module), x[some], ints(0, 2, 3, 3, 4)), whole[some])


@pytest.mark.parametrize("module", DETERMINISTIC)
@each_router
def test_a_route_does_not_depend_on_other_tokens_nor_on_threads(
    module: str, router: str, rng: np.random.Generator
) -> None:
    logits, correction = normal(rng, 131, 60), normal(rng, 60)
    whole = route(make(module, threads=3), logits, 4, correction, *ROUTERS[router])
    for rows in (slice(0, 1), slice(5, 7), slice(60, 67), slice(3, 67), slice(130, 131)):
        for mine, right in zip(route(make(module), logits[rows], 4, correction, *ROUTERS[router]), whole, strict=True):
            np.testing.assert_array_equal(mine, right[rows])


@pytest.mark.parametrize("module", DETERMINISTIC)
def test_a_sum_of_experts_does_not_depend_on_other_tokens(module: str, rng: np.random.Generator) -> None:
    x, weights = normal(rng, 131 * 3, 37), normal(rng, 131, 3)
    slots = rng.permutation(131 * 3).astype(np.int32).reshape(131, 3)
    whole = call(make(module, threads=3), "combine", unset(131, 37), x, slots, weights)
    for rows in (slice(0, 1), slice(60, 67), slice(130, 131)):
        alone = call(make(module), "combine", unset(len(slots[rows]), 37), x, slots[rows], weights[rows])
        np.testing.assert_array_equal(alone, whole[rows])


# ---- Checks


def test_what_does_not_fit_is_refused(ops: Ops, rng: np.random.Generator) -> None:
    logits, weights, experts = normal(rng, 3, 8), unset(3, 2), unset(3, 2, dtype=np.int32)
    good = (weights, experts, logits, None, "softmax", True, 1.0)
    places = [unset(6, dtype=np.int32), experts, unset(9, dtype=np.int32)]
    chosen = np.zeros((3, 2), np.int32)
    matrices = tuple(ops.from_host(normal(rng, 4, 32)) for _ in range(2))
    product = (unset(2, 4), normal(rng, 2, 32), ints(0, 1, 2), matrices, None)
    wrong: list[tuple[Any, ...]] = [
        ("route", unset(3, 3), *good[1:]),
        ("route", *good[:3], normal(rng, 7), *good[4:]),
        ("route", weights, experts.astype(np.int64), *good[2:]),
        ("route", *good[:4], "relu", *good[5:]),
        ("route", *good, 3),
        ("route", *good, 0),
        ("route", *good, 4, 5),
        ("route", *good, 4, 0),
        ("route", *good, 8, 1),
        ("route", *good, 8, 8, "top2"),
        ("route", *good, 2, 1, "top3"),
        ("route", unset(3, 9), unset(3, 9, dtype=np.int32), *good[2:]),
        ("route", unset(3, 3), unset(3, 3, dtype=np.int32), logits, None, "sparsemixer", False, 1.0),
        ("group_rows", unset(5, dtype=np.int32), *places[1:], chosen),
        ("group_rows", *places[:2], unset(0, dtype=np.int32), chosen),
        ("group_rows", *places, chosen.astype(np.int64)),
        ("matmul_experts", unset(2, 5), *product[1:]),
        ("matmul_experts", *product[:2], ints(0, 1), *product[3:]),
        ("matmul_experts", *product[:2], ints(1, 0, 2), *product[3:]),
        ("matmul_experts", *product[:2], ints(-1, 1, 2), *product[3:]),
        ("matmul_experts", *product[:2], ints(0, 1, 3), *product[3:]),
        ("matmul_experts", unset(3, 4), normal(rng, 3, 32), None, *product[3:]),
        ("matmul_experts", *product, normal(rng, 3, 4)),
        ("matmul_experts", *product[:4], "Q8_0"),
        ("combine", unset(3, 8), normal(rng, 6, 7), ints(0, 1, 2)[:, None], normal(rng, 3, 1)),
        ("combine", unset(3, 8), normal(rng, 6, 8), ints(0, 1, 2)[:, None], normal(rng, 3, 2)),
    ]
    for op, *arguments in wrong:
        # Modules without a kernel for all experts refuse in the product of one.
        with pytest.raises(ValueError, match="matmul" if op == "matmul_experts" else op):
            call(ops, op, *arguments)
