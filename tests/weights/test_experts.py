"""Experts of any storage: the product of each by itself, in one call of the kernels or one a matrix."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.kernels.modules import FLOATS, ints, normal, unset
from tests.kernels.oracles import random_blocks
from tramontane.kernels import Ops
from tramontane.kernels.coded import TABLES
from tramontane.weights import Experts, Weight, make_weight

SHAPE = (21, 256)


def weight_of(ops: Ops, rng: np.random.Generator, format: str) -> Weight:
    if format == "INT8":
        codes = rng.integers(0, 256, SHAPE, dtype=np.uint8)
        scales = rng.random((SHAPE[0], 1), np.float32)
        layout = np.array([SHAPE[1], 1], np.int32)
        tensors = {"codes": codes, "table": TABLES["S8"], "scales": scales, "layout": layout}
        return make_weight(ops, format, SHAPE, tensors)
    if format == "Q8_0":
        return make_weight(ops, format, SHAPE, {"blocks": random_blocks(rng, format, *SHAPE)})
    dtype = {"F32": "float32", "BF16": "bfloat16"}[format]
    return make_weight(ops, format, SHAPE, {"weight": normal(rng, *SHAPE).astype(FLOATS[dtype])})


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    "formats", [("F32",) * 4, ("BF16",) * 4, ("Q8_0",) * 4, ("INT8",) * 4, ("Q8_0", "F32", "Q8_0", "INT8")]
)
def test_each_row_meets_its_expert(ops: Ops, formats: tuple[str, ...], biased: bool, rng: np.random.Generator) -> None:
    experts = Experts(ops, [weight_of(ops, rng, format) for format in formats])
    assert experts.shape == (4, *SHAPE)
    assert experts.nbytes == sum(weight.nbytes for weight in experts.weights)
    offsets = ints(0, 2, 2, 9, 10)
    x, bias = normal(rng, 10, SHAPE[1]), normal(rng, 4, SHAPE[0])
    out = ops.from_host(unset(10, SHAPE[0]))
    experts.matmul(out, ops.from_host(x), ops.from_host(offsets), ops.from_host(bias) if biased else None)
    for e, (start, stop) in enumerate(pairwise(offsets)):
        expected: NDArray[Any] = x[start:stop].astype(np.float64) @ experts.weights[e].dequantize().T
        scale = np.abs(x[start:stop]) @ np.abs(experts.weights[e].dequantize().T)
        wrong = np.abs(ops.to_host(out)[start:stop] - expected - (bias[e] if biased else 0))
        assert np.all(wrong <= 2e-6 * scale + 1e-6)
