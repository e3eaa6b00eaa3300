"""Weights in the place of parameters: what torch's functions make of them is what they make of the values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.kernels.modules import make

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from tramontane.models.fallback.tensors import WeightTensor, to_array, to_tensor  # noqa: E402
from tramontane.weights import make_weight  # noqa: E402

F = torch.nn.functional


@pytest.fixture(params=["cpu", "torch"])
def ops(request: pytest.FixtureRequest) -> Any:
    return make(request.param)


def weight(ops: Any, rows: int, columns: int, seed: int = 0) -> tuple[WeightTensor, Any]:
    """A weight as a tensor, and its values."""
    values = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    return WeightTensor([[make_weight(ops, "F32", (rows, columns), {"weight": values})]]), torch.from_numpy(values)


X, IDS = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([[4, 0], [5, 4]])
HANDLED: dict[str, Callable[[Any], Any]] = {
    "linear": lambda w: F.linear(X, w),
    "linear with a bias": lambda w: F.linear(X, w, torch.arange(6.0)),
    "embedding": lambda w: F.embedding(IDS, w, 0),
    "rows": lambda w: w[IDS],
    "turned": lambda w: X @ w.T,
    "turned again": lambda w: F.linear(X, w.t().transpose(0, 1)),
    "addmm": lambda w: torch.addmm(torch.arange(6.0), X[0], w.transpose(0, 1)),
    "joined": lambda w: F.linear(X, torch.cat([w, w], dim=0), torch.arange(12.0)),
    "one of a stack": lambda w: F.linear(X, torch.stack([w, w], dim=0)[torch.tensor(1)]),
    "stacks joined": lambda w: F.linear(X, torch.cat([torch.stack([w, w])] * 2, dim=1)[0]),
    "a stack turned": lambda w: X @ torch.stack([w, w]).transpose(1, 2)[1],
}
VALUES: dict[str, Callable[[Any], Any]] = {
    "sums": lambda w: w.sum(dim=1),
    "slices": lambda w: w[1:4],
    "products of stacks": lambda w: torch.bmm(X, torch.stack([w, w]).transpose(1, 2)),
    "beside": lambda w: torch.cat([w, w], dim=1),
    "weights of weights": lambda w: w @ w.T,
}


@pytest.mark.parametrize("name", [*HANDLED, *VALUES])
def test_functions_give_what_the_values_give(name: str, ops: Any) -> None:
    held, values = weight(ops, 6, 8)
    function = {**HANDLED, **VALUES}[name]
    np.testing.assert_allclose(function(held), function(values), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", HANDLED)
def test_products_and_lookups_ask_for_no_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WeightTensor, "dense", None)
    HANDLED[name](weight(make("cpu"), 6, 8)[0])


def test_it_is_a_parameter_like_others() -> None:
    held, values = weight(make("cpu"), 6, 8)
    layer = torch.nn.Linear(8, 6)
    layer.weight = torch.nn.Parameter(held, requires_grad=False)
    assert isinstance(layer.weight, WeightTensor)
    assert (layer.weight.shape, layer.weight.dtype, layer.weight.dim()) == (values.shape, torch.float32, 2)
    assert not held.asked
    np.testing.assert_allclose(layer.weight.dense(), values)
    assert held.asked


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32])
def test_arrays_and_tensors_share_memory(dtype: Any) -> None:
    ops, tensor = make("cpu"), torch.zeros(4, 2).to(dtype)
    array = to_array(ops, tensor)
    tensor[1, 1] = 3
    assert float(array[1, 1]) == 3
    assert to_tensor(array).data_ptr() == tensor.data_ptr()
    assert to_tensor(array).dtype == dtype
