"""Linears of one input: the same as each alone, however they are stored."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from tests.kernels.modules import MODULES, make, normal
from tests.kernels.oracles import random_blocks
from tramontane.layers.linear import Linear, Linears
from tramontane.weights import make_weight

COLUMNS = 256
DENSE = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
COMBINATIONS = (
    ("Q4_0", "Q4_0", "Q4_0"),
    ("Q4_K", "Q6_K", "Q4_K"),
    ("F32", "Q8_0", "INT8"),
    ("INT8", "INT8"),
    ("F16", "F32", "F16", "F32"),
    ("BF16",),
)


@pytest.mark.parametrize("formats", COMBINATIONS, ids="-".join)
@pytest.mark.parametrize("module", MODULES)
def test_linears_as_each_alone(module: str, formats: tuple[str, ...]) -> None:
    ops, rng, linears = make(module), np.random.default_rng(2), []
    for index, format in enumerate(formats):
        rows = 20 + index
        if format == "INT8":
            tensors = {
                "codes": rng.integers(0, 256, (rows, COLUMNS), dtype=np.uint8),
                "table": np.arange(-128, 128, dtype=np.float32),
                "scales": rng.random((rows, COLUMNS // 32), dtype=np.float32),
                "layout": np.array([32, 1], np.int32),
            }
        elif format.startswith("Q"):
            tensors = {"blocks": random_blocks(rng, format, rows, COLUMNS)}
        else:
            tensors = {"weight": normal(rng, rows, COLUMNS).astype(DENSE[format])}
        bias = ops.from_host(normal(rng, rows)) if index % 2 else None
        linears.append(Linear(make_weight(ops, format, (rows, COLUMNS), tensors), bias))
    x = ops.from_host(normal(rng, 3, COLUMNS))
    together, alone = ([ops.zeros((3, each.weight.shape[0]), "float32") for each in linears] for _ in range(2))
    Linears(*linears)(together, x)
    for linear, out in zip(linears, alone, strict=True):
        linear(out, x)
    for ours, theirs in zip(together, alone, strict=True):
        np.testing.assert_array_equal(ops.to_host(ours), ops.to_host(theirs))
