"""Pooling and the layers after it, against torch."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest

from tramontane.models.heads import ACTIVATIONS, Dense, EmbeddingHead, Norm, Pool, ScoringHead
from tramontane.types import Pooling

MODES: tuple[Pooling, ...] = get_args(Pooling)


def states(length: int, width: int = 5) -> Any:
    return np.random.default_rng(length).standard_normal((length, width)).astype(np.float32)


def expected(mode: str, given: Any, skip: int) -> Any:
    """By the definitions, over the tokens that count, with weights by their place in the whole text."""
    kept, places = given[skip:], np.arange(1, len(given) + 1)[skip:]
    return {
        "cls": kept[0],
        "lasttoken": kept[-1],
        "max": kept.max(0),
        "mean": kept.mean(0),
        "mean_sqrt_len_tokens": kept.sum(0) / np.sqrt(len(kept)),
        "weightedmean": (kept * places[:, None]).sum(0) / places.sum(),
    }[mode]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("length", "skip"), [(1, 0), (7, 0), (7, 3), (7, 6)])
def test_pooling_in_pieces_is_pooling_at_once(mode: Pooling, length: int, skip: int) -> None:
    given = states(length)
    for size in (1, 2, 3, length):
        pool = Pool([mode], length, skip)
        for at in range(0, length, size):
            pool.add(given[at : at + size])
        assert pool.vector().dtype == np.float32
        np.testing.assert_allclose(pool.vector(), expected(mode, given, skip), rtol=1e-6, atol=1e-6)


def test_several_modes_are_joined_and_the_last_token_always_counts() -> None:
    given = states(4)
    pool = Pool(["cls", "mean"], 4)
    pool.add(given)
    np.testing.assert_allclose(pool.vector(), np.concatenate([given[0], given.mean(0)]), rtol=1e-6)
    pool = Pool(["mean"], 4, skip=9)
    pool.add(given)
    np.testing.assert_array_equal(pool.vector(), given[3])


def test_layers_are_torchs() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    functions = {
        "identity": lambda x: x,
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        "relu": torch.relu,
    }
    assert functions.keys() <= ACTIVATIONS.keys()
    x = 3 * states(1, 6)[0]
    linear = torch.nn.Linear(6, 4)
    weight, bias = linear.weight.detach().numpy(), linear.bias.detach().numpy()
    with torch.no_grad():
        for name, function in functions.items():
            wanted = function(linear(torch.tensor(x))).numpy()
            np.testing.assert_allclose(Dense(weight, bias, name)(x), wanted, rtol=1e-5, atol=1e-6)
        wanted = torch.nn.functional.layer_norm(torch.tensor(x), (6,), torch.tensor(weight[0]), None, 0.1).numpy()
        np.testing.assert_allclose(Norm(weight[0], None, 0.1)(x), wanted, rtol=1e-5, atol=1e-6)


def test_an_embedding_is_projected_then_cut_then_normalized() -> None:
    layer = Dense(states(6, 5), None, "tanh")
    head = EmbeddingHead(("mean",), (layer,), normalize=True)
    pooled = states(1)[0]
    whole = np.tanh(layer.weight @ pooled)
    np.testing.assert_allclose(head.vector(pooled), whole / np.linalg.norm(whole), rtol=1e-6)
    np.testing.assert_allclose(head.vector(pooled, dimensions=2), whole[:2] / np.linalg.norm(whole[:2]), rtol=1e-6)
    np.testing.assert_allclose(head.vector(pooled, normalize=False), whole, rtol=1e-6)
    assert head.width(5) == 6
    assert EmbeddingHead(("mean", "cls")).width(5) == 10
    zero = EmbeddingHead(("mean",), normalize=True).vector(np.zeros(5, np.float32))
    assert not zero.any()


def test_a_score_is_the_activated_logit() -> None:
    head = ScoringHead("cls", (Dense(states(1), np.array([-40.0], np.float32), "identity"),), "sigmoid")
    pooled = states(2)[1]
    logit = float(head.layers[0](pooled)[0])
    assert head.labels == 1
    assert head.score(pooled) == pytest.approx(1 / (1 + np.exp(-logit)))
    assert head.score(-1000 * np.abs(pooled) * np.sign(head.layers[0].weight[0])) == 0.0
