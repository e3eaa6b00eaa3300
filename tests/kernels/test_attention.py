"""Attention of every kernel module over paged caches: all that scores can be, any geometry, and determinism."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.kernels import oracles
from tests.kernels.modules import DETERMINISTIC, call, ints, make, normal, unset
from tramontane.kernels import Ops
from tramontane.kernels.cells import CELLS, numpy_dtype, read_keys, read_values, rotate, write_keys, write_values

each_dtype = pytest.mark.parametrize("dtype", CELLS)
quick = settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])

PLAIN: dict[str, Any] = {}
KINDS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "bidirectional": {"causal": False},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "slopes": {"slopes": True},
    "all": {"softcap": 2.5, "sinks": True, "slopes": True},
    "bidirectional with all": {"causal": False, "softcap": 0.7, "sinks": True},
}
each_kind = pytest.mark.parametrize("kind", KINDS)

LATENT = [((5, 1), (24, 16), 16), ((16, 1), (576, 512), 16), ((6, 2), (27, 20), 4), ((130, 1), (40, 32), 16)]
"""Query and key heads, elements of keys and values, tokens of a block."""


class Paged:
    """Sequences with their keys and values laid out in a paged cache, whose unwritten slots are NaN."""

    def __init__(
        self,
        rng: np.random.Generator,
        lengths: Sequence[int],
        query_heads: int,
        heads: int,
        width: int,
        size: int,
        dtype: str = "float32",
        spare: int = 0,
        value_width: int | None = None,
        latent: bool = False,
    ) -> None:
        """`latent`: the values are the beginning of the keys, of which the second cache has the rest."""
        self.size, self.latent = size, latent
        self.sinks, self.slopes = normal(rng, query_heads) * 2, rng.random(query_heads, np.float32)
        value_width = value_width or width
        widths = (value_width, width - value_width) if latent else (width, value_width)
        self.k, self.v = ([normal(rng, n, heads, w) for n in lengths] for w in widths)
        self.q = [normal(rng, n, query_heads, width) for n in lengths]
        counts = [-(-n // size) for n in lengths]
        blocks = rng.permutation(sum(counts) + 2)
        self.tables = np.full((len(lengths), max(counts, default=0) + spare), -1, np.int32)
        cells = CELLS[dtype]
        self.k_cache, self.v_cache = (
            rng.integers(0, 256, shape, np.uint8).view(numpy_dtype(cells.dtype))
            if cells.top
            else np.full(shape, np.nan, np.float32).astype(numpy_dtype(cells.dtype))
            for shape in cells.shapes(len(blocks), heads, size, *widths)
        )
        for s, n in enumerate(lengths):
            self.tables[s, : counts[s]] = blocks[sum(counts[:s]) : sum(counts[: s + 1])]
            table = self.tables[s, : counts[s]]
            slots = (table[:, None] * size + np.arange(size, dtype=np.int32)).reshape(-1)[:n]
            write_keys(self.k_cache, self.k[s], slots)
            write_values(self.v_cache, self.v[s], slots)
            # What the caches stand for is what attention is held to; how near that is to what was written: test_cells.
            held = read_keys(self.k_cache[table], widths[0]), read_values(self.v_cache[table], widths[1])
            keys, self.v[s] = (x.swapaxes(1, 2).reshape(-1, heads, x.shape[3])[:n] for x in held)
            self.k[s] = rotate(keys) if cells.top else keys
            if latent:
                self.k[s], self.v[s] = np.concatenate((self.k[s], self.v[s]), axis=-1), self.k[s]

    def attend(
        self,
        ops: Ops,
        rows: Sequence[tuple[int, int, int]],
        scale: float,
        window: int = 0,
        kind: dict[str, Any] = PLAIN,
    ) -> list[NDArray[Any]]:
        """The rows [start, stop) of sequences, as one step: (sequence, start, stop) each; `kind`: of `KINDS`."""
        q = np.concatenate([self.q[s][a:b] for s, a, b in rows]) if rows else np.empty((0, *self.q[0].shape[1:]))
        starts = np.cumsum([0] + [b - a for _, a, b in rows]).astype(np.int32)
        tables = self.tables[np.array([s for s, _, _ in rows], int)]
        for i, (_, a, _) in enumerate(rows):
            if window:  # blocks that every row's window has left may be gone
                tables[i, : max(0, a - window + 1) // self.size] = -1
        contexts = ints(*(b for _, _, b in rows))
        scores = self._scores(kind)
        args = (q.astype(np.float32), self.k_cache, self.v_cache, tables, starts, contexts, scale, window)
        out = call(ops, "attention", unset(*q.shape[:2], self.v[0].shape[2]), *args, *scores.values(), self.latent)
        return [out[a:b] for a, b in pairwise(starts)]

    def expected(
        self, s: int, start: int, stop: int, scale: float, window: int = 0, kind: dict[str, Any] = PLAIN
    ) -> NDArray[Any]:
        scores = self._scores(kind)
        return oracles.attention(self.q[s][start:stop], self.k[s][:stop], self.v[s][:stop], scale, window, **scores)

    def _scores(self, kind: dict[str, Any]) -> dict[str, Any]:
        """Arguments of `Ops.attention` behind the window, in order."""
        return {
            "causal": kind.get("causal", True),
            "softcap": kind.get("softcap", 0.0),
            "sinks": self.sinks if kind.get("sinks") else None,
            "slopes": self.slopes if kind.get("slopes") else None,
        }


# A whole prompt, a chunk of one, single tokens (decode), a sequence without rows, the second half of one.
MIXED = [(0, 0, 1), (1, 0, 50), (2, 15, 16), (3, 32, 33), (5, 3, 3), (4, 20, 61), (5, 3, 7)]


@each_dtype
@pytest.mark.parametrize("window", [0, 5, 40])
@pytest.mark.parametrize(("query_heads", "heads", "width", "size"), [(9, 3, 64, 16), (4, 4, 8, 4), (7, 1, 20, 16)])
def test_attention(
    ops: Ops, dtype: str, window: int, query_heads: int, heads: int, width: int, size: int, rng: np.random.Generator
) -> None:
    paged = Paged(rng, [1, 50, 16, 33, 70, 7], query_heads, heads, width, size, dtype, spare=2)
    for (s, a, b), actual in zip(MIXED, paged.attend(ops, MIXED, 0.3, window), strict=True):
        np.testing.assert_allclose(actual, paged.expected(s, a, b, 0.3, window), atol=3e-6, rtol=3e-6)


@each_kind
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize(
    ("heads", "widths", "size"), [((9, 3), (64, 64), 16), ((4, 4), (24, 16), 4), ((6, 2), (8, 40), 16)]
)
def test_every_kind_of_score(
    ops: Ops,
    kind: str,
    window: int,
    heads: tuple[int, int],
    widths: tuple[int, int],
    size: int,
    rng: np.random.Generator,
) -> None:
    dtype = "float32" if size == 4 else "float16"
    paged = Paged(rng, [1, 50, 16, 33, 70, 7], *heads, widths[0], size, dtype, spare=2, value_width=widths[1])
    for (s, a, b), actual in zip(MIXED, paged.attend(ops, MIXED, 0.3, window, KINDS[kind]), strict=True):
        np.testing.assert_allclose(actual, paged.expected(s, a, b, 0.3, window, KINDS[kind]), atol=4e-6, rtol=4e-6)


@each_dtype
@pytest.mark.parametrize(("heads", "widths", "size"), LATENT)
def test_values_that_lie_in_the_keys(
    ops: Ops, dtype: str, heads: tuple[int, int], widths: tuple[int, int], size: int, rng: np.random.Generator
) -> None:
    paged = Paged(rng, [1, 50, 16, 33, 70, 7], *heads, widths[0], size, dtype, 2, widths[1], latent=True)
    for kind, window in ((PLAIN, 0), (PLAIN, 5), (KINDS["all"], 40), (KINDS["bidirectional with all"], 0)):
        for (s, a, b), actual in zip(MIXED, paged.attend(ops, MIXED, 0.1, window, kind), strict=True):
            np.testing.assert_allclose(actual, paged.expected(s, a, b, 0.1, window, kind), atol=2e-5, rtol=1e-5)


@each_dtype
@pytest.mark.parametrize(("latent", "kind"), [(False, "plain"), (False, "sinks"), (False, "softcap"), (True, "sinks")])
def test_keys_that_are_joined(ops: Ops, dtype: str, latent: bool, kind: str, rng: np.random.Generator) -> None:
    """What rows find among the last tokens, then among two stretches that they see all of (of which one has fewer
    tokens than there are rows), is what they find among all."""
    lengths, width, size = (700, 90), 40, 16
    heads = (6, 1) if latent else (6, 2)
    paged = Paged(rng, lengths, *heads, width, size, dtype, value_width=32, latent=latent)
    rows = [(0, 660, 700), (1, 40, 90)]
    q = np.concatenate([paged.q[s][a:b] for s, a, b in rows])
    out, totals = unset(*q.shape[:2], 32), unset(*q.shape[:2])
    sinks, softcap = paged.sinks if kind == "sinks" else None, 1.5 if kind == "softcap" else 0.0
    cuts = [(0, 16), (16, 32), (32, None)]
    for first, last in reversed(cuts):
        tables = paged.tables[:, first // size : None if last is None else last // size]
        contexts = ints(*((n if last is None else last) - first for n in lengths))
        lists, ending = (tables, ints(0, 40, 90), contexts), last is None
        arguments = (q, paged.k_cache, paged.v_cache, *lists, 0.2, 0, ending, softcap, sinks if ending else None, None)
        out, totals = _joined(ops, out, totals, arguments, latent, not ending)
    for (s, a, b), actual in zip(rows, (out[:40], out[40:]), strict=True):
        np.testing.assert_allclose(actual, paged.expected(s, a, b, 0.2, 0, KINDS[kind]), atol=2e-5, rtol=1e-5)


def _joined(
    ops: Ops, out: NDArray[Any], totals: NDArray[Any], arguments: tuple[Any, ...], latent: bool, joins: bool
) -> tuple[NDArray[Any], NDArray[Any]]:
    out, totals = (ops.from_host(x.copy()) for x in (out, totals))
    moved = (ops.from_host(np.ascontiguousarray(x)) if isinstance(x, np.ndarray) else x for x in arguments)
    ops.attention(out, *moved, latent, totals, joins)
    ops.synchronize()
    return np.array(ops.to_host(out)), np.array(ops.to_host(totals))


def test_a_total_is_the_logarithm_of_the_sum(ops: Ops, rng: np.random.Generator) -> None:
    paged = Paged(rng, [20], 2, 1, 8, 4)
    arguments = (paged.q[0], paged.k_cache, paged.v_cache, paged.tables, ints(0, 20), ints(20), 0.5)
    rest = (0, True, 0.0, paged.sinks, None)
    totals = _joined(ops, unset(20, 2, 8), unset(20, 2), (*arguments, *rest), False, False)[1]
    scores = np.einsum("nhd,ld->nhl", paged.q[0].astype(np.float64), paged.k[0][:, 0]) * 0.5
    seen = np.where(np.tri(20, dtype=bool)[:, None], np.exp(scores), 0).sum(axis=-1) + np.exp(paged.sinks)
    np.testing.assert_allclose(totals, np.log(seen), atol=3e-6)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_latent_attention_does_not_depend_on_chunks_nor_on_neighbours(
    fixed: Ops, dtype: str, rng: np.random.Generator
) -> None:
    paged = Paged(rng, [100, 67, 540], 16, 1, 40, 16, dtype, value_width=32, latent=True)
    whole = [paged.attend(fixed, [(s, 0, n)], 0.2)[0] for s, n in enumerate((100, 67, 540))]
    for a, b in pairwise([0, 1, 38, 40, 99, 100]):
        rows = [(2, 539, 540), (0, a, b), (1, 15, 19)]
        for actual, (s, start, stop) in zip(paged.attend(fixed, rows, 0.2), rows, strict=True):
            np.testing.assert_array_equal(actual, whole[s][start:stop])


@pytest.mark.parametrize(
    "widths", [(80, 80), (96, 96), (112, 112), (128, 128), (192, 128), (256, 256), (576, 512), (512, 576)]
)
def test_every_head_size_that_models_have(ops: Ops, widths: tuple[int, int], rng: np.random.Generator) -> None:
    paged = Paged(rng, [35, 20], 4, 2, widths[0], 16, "bfloat16", value_width=widths[1])
    rows = [(0, 30, 35), (1, 0, 20)]
    for (s, a, b), actual in zip(rows, paged.attend(ops, rows, widths[0] ** -0.5), strict=True):
        expected = paged.expected(s, a, b, widths[0] ** -0.5)
        np.testing.assert_allclose(actual, expected, atol=4e-6, rtol=4e-6)


def test_scores_may_be_large(ops: Ops, rng: np.random.Generator) -> None:
    """Sinks far above and below all scores, steep slopes, and scores far beyond the cap."""
    paged = Paged(rng, [90, 40], 4, 2, 16, 16)
    paged.sinks[:] = [500, -500, 0, 60]
    paged.slopes[:] = [3, 0, 0.25, 50]
    rows = [(0, 60, 90), (1, 39, 40)]
    for kind in KINDS.values():
        for (s, a, b), actual in zip(rows, paged.attend(ops, rows, 20.0, 0, kind), strict=True):
            np.testing.assert_allclose(actual, paged.expected(s, a, b, 20.0, 0, kind), atol=5e-5, rtol=5e-5)


def test_long_prompts_go_in_pieces(ops: Ops, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    if hasattr(ops, "_gather"):  # torch's bound on what it holds at a time, made small enough to matter
        monkeypatch.setattr(ops, "_gather", 20_000)
    paged = Paged(rng, [300, 280, 280, 9], 4, 2, 16, 16)
    rows = [(0, 0, 300), (1, 10, 270), (2, 20, 280), (3, 8, 9)]
    for (s, a, b), actual in zip(rows, paged.attend(ops, rows, 0.25, 100), strict=True):
        np.testing.assert_allclose(actual, paged.expected(s, a, b, 0.25, 100), atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize(("window", "causal"), [(0, True), (700, True), (0, False)])
def test_contexts_of_many_parts(ops: Ops, window: int, causal: bool, rng: np.random.Generator) -> None:
    """Longer than what is merged at once, read by one row, by a few and by many; windows that begin within a part."""
    kind = {"causal": causal, "sinks": True}
    paged = Paged(rng, [1500, 1030], 4, 2, 16, 16, "float16")
    rows = [(0, 1499, 1500), (1, 1000, 1030), (0, 1100, 1400)]
    for (s, a, b), actual in zip(rows, paged.attend(ops, rows, 0.25, window, kind), strict=True):
        np.testing.assert_allclose(actual, paged.expected(s, a, b, 0.25, window, kind), atol=4e-6, rtol=4e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "fp8"])
@pytest.mark.parametrize("window", [0, 600])
def test_parts_of_a_long_context_do_not_depend_on_how_they_are_shared(
    dtype: str, window: int, rng: np.random.Generator
) -> None:
    """One row alone is cut among threads, of many rows some tiles are, and one thread cuts nothing."""
    cpu = pytest.importorskip("tramontane.kernels.cpu")
    paged = Paged(rng, [1700, 600, 1100], 8, 2, 32, 16, dtype)
    for module in (f"cpu-{isa}" for isa in cpu.isas()):
        one, three = make(module, threads=1), make(module, threads=3)
        many = paged.attend(one, [(0, 1500, 1700), (1, 0, 600), (2, 1099, 1100)], 0.2, window)
        for ops in (one, three):
            alone = paged.attend(ops, [(0, 1699, 1700)], 0.2, window)[0]
            np.testing.assert_array_equal(alone, many[0][199:])
            np.testing.assert_array_equal(paged.attend(ops, [(2, 1099, 1100)], 0.2, window)[0], many[2])
            among = paged.attend(ops, [(2, 1099, 1100), (1, 580, 600), (0, 1500, 1700)], 0.2, window)
            for actual, right in zip(among, (many[2], many[1][580:], many[0]), strict=True):
                np.testing.assert_array_equal(actual, right)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("heads", [5, 16, 130])
def test_heads_that_share_one_vector_are_shared_out(dtype: str, heads: int, rng: np.random.Generator) -> None:
    """Among more threads than a short context has parts, a long one, and two sequences."""
    cpu = pytest.importorskip("tramontane.kernels.cpu")
    paged = Paged(rng, [300, 1100], heads, 1, 40, 16, dtype, value_width=32, latent=True)
    for module in (f"cpu-{isa}" for isa in cpu.isas()):
        one, many = make(module, threads=1), [make(module, threads=threads) for threads in (2, 3, 8)]
        for rows in ([(0, 299, 300)], [(1, 1099, 1100)], [(0, 290, 293), (1, 1098, 1100)]):
            right = paged.attend(one, rows, 0.2, 0, KINDS["all"])
            for ops in many:
                for actual, expected in zip(paged.attend(ops, rows, 0.2, 0, KINDS["all"]), right, strict=True):
                    np.testing.assert_array_equal(actual, expected)


# ---- Fast arithmetic, where bfloat16 is multiplied: tiles of sixteen rows and more, and fewer over caches of bfloat16

ROUNDING = 0.05
"""What products of bfloat16 may change in a result of about one, with scores of about two; in all, a hundredth."""


@pytest.fixture(params=["avx512_bf16", "amx_emulated"])
def fast(request: pytest.FixtureRequest) -> Ops:
    cpu = pytest.importorskip("tramontane.kernels.cpu")
    if request.param not in cpu.isas(emulated=True):
        pytest.skip(f"no {request.param} here")
    ops: Ops = cpu.CpuOps(isa=request.param)
    return ops


def near(actual: NDArray[Any], expected: NDArray[Any]) -> None:
    error = np.abs(actual - expected)
    assert error.max(initial=0) < ROUNDING
    assert np.linalg.norm(error) <= 0.01 * np.linalg.norm(expected)


@each_dtype
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize(
    ("query_heads", "heads", "width", "value_width", "size"),
    [(9, 3, 64, 64, 16), (4, 4, 8, 8, 4), (7, 1, 20, 36, 16), (40, 2, 33, 32, 32), (4, 2, 96, 48, 48)],
)
def test_many_rows_in_bfloat16(
    fast: Ops,
    dtype: str,
    window: int,
    query_heads: int,
    heads: int,
    width: int,
    value_width: int,
    size: int,
    rng: np.random.Generator,
) -> None:
    """The same, with rounded queries, weights and, of float16, caches; a cache of float32 is not rounded. Nor are few
    rows, but over a cache of bfloat16 that has rows to pair."""
    paired = dtype == "bfloat16" and size % 16 == value_width % 16 == width % 2 == 0
    paged = Paged(rng, [1, 50, 16, 33, 70, 7], query_heads, heads, width, size, dtype, 2, value_width)
    scale = 2 * width**-0.5
    for (s, a, b), actual in zip(MIXED, paged.attend(fast, MIXED, scale, window), strict=True):
        expected = paged.expected(s, a, b, scale, window)
        near(actual, expected)
        if ((b - a) * query_heads // heads < 16 and not paired) or dtype == "float32":
            np.testing.assert_allclose(actual, expected, atol=3e-6, rtol=3e-6)
        elif b > max(a, 1):  # it is another way
            assert np.abs(actual - expected).max() > 1e-5


@each_kind
@pytest.mark.parametrize("window", [0, 5, 600])
def test_many_rows_in_bfloat16_of_every_kind_of_score(
    fast: Ops, kind: str, window: int, rng: np.random.Generator
) -> None:
    """Contexts of many parts, and what others left in their blocks."""
    paged = Paged(rng, [700, 90, 17], 6, 2, 32, 16, "bfloat16", value_width=48)
    rows = [(0, 600, 700), (1, 0, 90), (2, 0, 17)]
    for (s, a, b), actual in zip(rows, paged.attend(fast, rows, 0.2, window, KINDS[kind]), strict=True):
        near(actual, paged.expected(s, a, b, 0.2, window, KINDS[kind]))


@each_kind
@pytest.mark.parametrize("window", [7, 600])
@pytest.mark.parametrize(
    ("groups", "width", "value_width", "size"), [(range(1, 9), 64, 64, 16), ((2,), 40, 80, 32), ((13,), 128, 16, 48)]
)
def test_few_rows_in_bfloat16(
    fast: Ops,
    kind: str,
    window: int,
    groups: Sequence[int],
    width: int,
    value_width: int,
    size: int,
    rng: np.random.Generator,
) -> None:
    """Any number of query heads to a key, tokens at odd places, and what others left behind the last of them."""
    for shared in groups:
        paged = Paged(rng, [530, 90, 17, 1], 2 * shared, 2, width, size, "bfloat16", value_width=value_width)
        steps = [(0, 529, 530), (1, 88, 89), (2, 16, 17), (3, 0, 1), (0, 508, 508 + 15 // shared)]
        for (s, a, b), actual in zip(steps, paged.attend(fast, steps, 0.2, window, KINDS[kind]), strict=True):
            near(actual, paged.expected(s, a, b, 0.2, window, KINDS[kind]))


def test_few_rows_in_bfloat16_depend_on_nothing_else(fast: Ops, rng: np.random.Generator) -> None:
    """Not on the other rows, as long as these are few, nor on threads."""
    paged = Paged(rng, [1100, 300], 6, 2, 64, 16, "bfloat16")
    together = paged.attend(fast, [(0, 1096, 1100), (1, 297, 300)], 0.1)
    for ops in (fast, make(fast.name, threads=3, exact=False)):
        for row in range(4):
            alone = paged.attend(ops, [(0, 1096 + row, 1097 + row)], 0.1)[0]
            np.testing.assert_array_equal(alone[0], together[0][row])
        np.testing.assert_array_equal(paged.attend(ops, [(1, 297, 300)], 0.1)[0], together[1])


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_many_rows_in_bfloat16_do_not_depend_on_threads(fast: Ops, dtype: str, rng: np.random.Generator) -> None:
    paged = Paged(rng, [1100, 300], 4, 2, 64, 16, dtype)
    rows = [(0, 1000, 1100), (1, 0, 300)]
    three = make(fast.name, threads=3, exact=False)
    for one, other in zip(paged.attend(fast, rows, 0.1), paged.attend(three, rows, 0.1), strict=True):
        np.testing.assert_array_equal(one, other)


@each_dtype
def test_deterministic_attention_rounds_nothing(fast: Ops, dtype: str, rng: np.random.Generator) -> None:
    module, paged = fast.name, Paged(rng, [100], 4, 2, 64, 16, dtype)
    exact, fixed = make(module), make(f"{module}/deterministic", exact=False)
    for rows in ([(0, 0, 100)], [(0, 99, 100)], [(0, 40, 90)]):
        np.testing.assert_array_equal(paged.attend(exact, rows, 0.1)[0], paged.attend(fixed, rows, 0.1)[0])


def test_attention_of_nothing(ops: Ops, rng: np.random.Generator) -> None:
    paged = Paged(rng, [5], 2, 1, 8, 4)
    assert paged.attend(ops, [], 1.0, 0) == []
    assert [len(r) for r in paged.attend(ops, [(0, 5, 5)], 1.0, 0)] == [0]


@quick
@given(data=st.data())
def test_attention_of_any_geometry(ops: Ops, data: st.DataObject) -> None:
    draw = data.draw
    heads, shared = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    size, widths = draw(st.sampled_from([1, 2, 5, 16])), (draw(st.integers(1, 33)), draw(st.integers(1, 33)))
    dtype = draw(st.sampled_from(["float32", "int8"]))
    paged = Paged(rng, lengths, heads * shared, heads, widths[0], size, dtype, value_width=widths[1])
    window = draw(st.integers(0, 45))
    kind = KINDS[draw(st.sampled_from(list(KINDS)))]
    rows = []
    for s, n in enumerate(lengths):
        stop = draw(st.integers(1, n))
        rows.append((s, draw(st.integers(0, stop)), stop))
    for (s, a, b), actual in zip(rows, paged.attend(ops, rows, 0.2, window, kind), strict=True):
        np.testing.assert_allclose(actual, paged.expected(s, a, b, 0.2, window, kind), atol=4e-6, rtol=4e-6)


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.get("causal", True)])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "fp8"])
@pytest.mark.parametrize("window", [0, 7, 40])
def test_attention_does_not_depend_on_chunks_nor_on_neighbours(
    fixed: Ops, dtype: str, window: int, kind: str, rng: np.random.Generator
) -> None:
    lengths = [100, 67, 16, 130]
    paged = Paged(rng, lengths, 9, 3, 32, 16, dtype, value_width=24)
    whole = [paged.attend(fixed, [(s, 0, n)], 0.125, window, KINDS[kind])[0] for s, n in enumerate(lengths)]
    together = paged.attend(fixed, [(s, 0, n) for s, n in enumerate(lengths)], 0.125, window, KINDS[kind])
    for alone, among in zip(whole, together, strict=True):
        np.testing.assert_array_equal(alone, among)
    for cuts in ([0, 1, 38, 40, 100], [0, 16, 32, 64, 100], [0, 99, 100]):
        for a, b in pairwise(cuts):
            rows = [(3, 128, 130), (0, a, b), (2, 15, 16)]
            np.testing.assert_array_equal(paged.attend(fixed, rows, 0.125, window, KINDS[kind])[1], whole[0][a:b])


@pytest.mark.parametrize("kind", ["bidirectional", "bidirectional with all"])
def test_whole_sequences_do_not_depend_on_neighbours(fixed: Ops, kind: str, rng: np.random.Generator) -> None:
    lengths = [100, 67, 16, 130]
    paged = Paged(rng, lengths, 9, 3, 32, 16)
    together = paged.attend(fixed, [(s, 0, n) for s, n in enumerate(lengths)], 0.125, 0, KINDS[kind])
    for s, n in enumerate(lengths):
        np.testing.assert_array_equal(paged.attend(fixed, [(s, 0, n)], 0.125, 0, KINDS[kind])[0], together[s])


@pytest.mark.parametrize("module", DETERMINISTIC)
@each_kind
def test_attention_does_not_depend_on_threads(module: str, kind: str, rng: np.random.Generator) -> None:
    paged = Paged(rng, [150, 97, 8], 6, 2, 48, 16, value_width=32)
    rows = [(0, 80, 150), (1, 96, 97), (2, 0, 8)]
    three = np.concatenate(paged.attend(make(module, threads=3), rows, 0.1, 60, KINDS[kind]))
    one = np.concatenate(paged.attend(make(module, threads=1), rows, 0.1, 60, KINDS[kind]))
    np.testing.assert_array_equal(one, three)


def test_what_does_not_fit_is_refused(ops: Ops, rng: np.random.Generator) -> None:
    paged = Paged(rng, [9, 5], 4, 2, 8, 4, value_width=6)
    q, out = normal(rng, 3, 4, 8), unset(3, 4, 6)
    caches, lists = (paged.k_cache, paged.v_cache), (paged.tables, ints(0, 2, 3), ints(9, 5))
    good = (out, q, *caches, *lists, 1.0, 0, True, 0.0, paged.sinks, paged.slopes, False, None, False)
    call(ops, "attention", *good)
    wrong: list[dict[int, Any]] = [
        {0: unset(3, 4, 8)},
        {1: normal(rng, 3, 3, 8), 0: unset(3, 3, 6)},
        {1: q.astype(np.float64)},
        {2: paged.k_cache[:, :1].copy()},
        {3: paged.v_cache[:, :, :2].copy()},
        {3: paged.v_cache.astype(np.float16)},
        {2: np.zeros_like(paged.k_cache, np.int8), 3: np.zeros_like(paged.v_cache, np.int8)},
        {4: paged.tables.astype(np.int64)},
        {5: ints(0, 3)},
        {11: paged.sinks[:3].copy()},
        {12: paged.slopes.astype(np.float64)},
        {9: False},
        {13: True},
        {14: unset(3, 3)},
        {14: unset(3, 4), 15: True},
        {11: None, 15: True},
    ]
    for change in wrong:
        arguments = [change.get(i, argument) for i, argument in enumerate(good)]
        with pytest.raises(ValueError, match="attention"):
            call(ops, "attention", *arguments)
