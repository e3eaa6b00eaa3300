"""Every storage format on every kernel module: sizes, products, lookups, exact values, round trips, refusals."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.kernels.modules import MODULES, make, unset
from tests.kernels.oracles import random_blocks
from tramontane.kernels import BLOCKS, Ops
from tramontane.kernels.blocks import dequantize
from tramontane.kernels.reference import ReferenceOps
from tramontane.weights import FORMATS, make_weight

DENSE = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
each_format = pytest.mark.parametrize("format", [*DENSE, *BLOCKS])
SHAPE = (37, 512)


@pytest.fixture(params=MODULES, scope="module")
def ops(request: pytest.FixtureRequest) -> Ops:
    return make(request.param)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def stored(rng: np.random.Generator, format: str) -> tuple[dict[str, NDArray[Any]], NDArray[np.float32]]:
    """Read-only tensors of a weight of `SHAPE`, as a mapped file gives them, and the values they stand for."""
    if format in DENSE:
        tensors = {"weight": rng.standard_normal(SHAPE, dtype=np.float32).astype(DENSE[format])}
        values = tensors["weight"].astype(np.float32)
    else:
        tensors = {"blocks": random_blocks(rng, format, *SHAPE)}
        values = dequantize(format, tensors["blocks"])
    for array in tensors.values():
        array.setflags(write=False)
    return tensors, values


@each_format
def test_sizes_are_ggufs(format: str) -> None:
    gguf = pytest.importorskip("gguf")
    if format == "Q2_0":
        pytest.skip("the gguf package does not know it yet")
    elements, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[format]]
    if format == "Q8_1":  # the package has the size that it had before its two scales became halves
        nbytes = 36
    assert (FORMATS[format].elements, FORMATS[format].block_bytes) == (elements, nbytes)
    assert FORMATS[format].nbytes((3, 5, 512)) == 15 * 512 // elements * nbytes
    assert FORMATS[format].nbytes((512,)) == 512 // elements * nbytes


@pytest.mark.parametrize("format", BLOCKS)
def test_rows_must_divide_into_blocks(format: str) -> None:
    with pytest.raises(ValueError, match=format):
        FORMATS[format].nbytes((4, 100))


@each_format
def test_a_weight_is_its_values(ops: Ops, format: str, rng: np.random.Generator) -> None:
    tensors, values = stored(rng, format)
    weight = make_weight(ops, format, SHAPE, tensors)
    assert (weight.format, weight.shape) == (format, SHAPE)
    assert weight.nbytes == FORMATS[format].nbytes(SHAPE) == sum(t.nbytes for t in tensors.values())
    exact = weight.dequantize()
    assert exact.dtype == np.float32
    np.testing.assert_array_equal(exact, values)

    ids = np.array([36, 0, 0, 5], np.int32)
    rows = ops.from_host(unset(4, SHAPE[1]))
    weight.rows(rows, ops.from_host(ids))
    np.testing.assert_array_equal(ops.to_host(rows), values[ids])

    x, bias = rng.standard_normal((5, SHAPE[1]), dtype=np.float32), rng.standard_normal(SHAPE[0], dtype=np.float32)
    out, plain = ops.from_host(unset(5, SHAPE[0])), ops.from_host(unset(5, SHAPE[0]))
    weight.matmul(out, ops.from_host(x), ops.from_host(bias))
    weight.matmul(plain, ops.from_host(x))
    np.testing.assert_allclose(ops.to_host(out), ops.to_host(plain) + bias, atol=1e-5)
    bound = 2e-6 * (np.abs(x) @ np.abs(values).T) + 1e-6
    assert np.all(np.abs(ops.to_host(plain) - x.astype(np.float64) @ values.T.astype(np.float64)) <= bound)


@each_format
def test_tensors_round_trip(ops: Ops, format: str, rng: np.random.Generator) -> None:
    tensors, values = stored(rng, format)
    weight = make_weight(ops, format, SHAPE, tensors)
    again = make_weight(ops, format, SHAPE, weight.tensors())
    assert again.tensors().keys() == tensors.keys()
    for name, array in again.tensors().items():
        assert array.dtype == tensors[name].dtype
        assert array.tobytes() == tensors[name].tobytes()
    np.testing.assert_array_equal(again.dequantize(), values)


@each_format
def test_mapped_files_are_used_in_place_unless_they_are_packed(
    ops: Ops, format: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    tensors, values = stored(rng, format)
    ((name, array),) = tensors.items()
    (tmp_path / "tensor").write_bytes(array.tobytes())
    mapped = np.memmap(tmp_path / "tensor", np.uint8, "r").view(array.dtype).reshape(array.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weight = make_weight(ops, format, SHAPE, {name: mapped})
    packed = name != "codes" and ops.pack(array, format).ndim == 3
    if ops.device == "cpu" and not packed:
        assert np.shares_memory(weight.tensors()[name], mapped)
    np.testing.assert_array_equal(weight.dequantize(), values)


@each_format
def test_tensors_that_do_not_fit_are_refused(format: str, rng: np.random.Generator) -> None:
    ops = ReferenceOps()
    tensors, _ = stored(rng, format)
    ((name, array),) = tensors.items()
    for shape, wrong in (
        ((38, 512), tensors),
        ((37, 256), tensors),
        (SHAPE, {"other": array}),
        (SHAPE, {name: array, "more": array}),
        (SHAPE, {}),
        (SHAPE, {name: array.view(np.int8)}),
        (SHAPE, {name: array.reshape(-1)}),
    ):
        with pytest.raises(ValueError, match=format if name in wrong and len(wrong) == 1 else "one tensor"):
            make_weight(ops, format, shape, wrong)
    with pytest.raises(ValueError, match="format"):
        FORMATS[format].weight.from_tensors(ops, "Q9_9", SHAPE, tensors)


@pytest.mark.parametrize("format", BLOCKS)
def test_blocks_need_whole_rows(format: str) -> None:
    with pytest.raises(ValueError, match="divide"):
        make_weight(ReferenceOps(), format, (4, 100), {"blocks": np.zeros((4, 100), np.uint8)})
