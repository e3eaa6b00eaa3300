"""The ops that keep states, on every kernel module: beside what transformers computes, and whatever the chunks are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.kernels.modules import MODULES, make
from tramontane.kernels import Ops

Arrays = dict[str, NDArray[Any]]
TOLERANCE = 2e-5
LENGTHS = (7, 1, 12)


@pytest.fixture(params=MODULES)
def ops(request: pytest.FixtureRequest) -> Ops:
    return make(request.param)


def normal(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return rng.standard_normal(shape, dtype=np.float32)


CONV = {"kernel": 4, "channels": 6}
SCAN = {"heads": 6, "width": 3, "size": 5, "groups": 2}
DELTA = {"heads": 6, "keys": 4, "values": 3, "groups": 2}


def conv_inputs(rng: np.random.Generator, rows: int) -> tuple[Arrays, tuple[int, ...], int]:
    """What the op takes a row and a channel; the shape of a state; the width of its output."""
    k, c = CONV.values()
    arrays = {"x": normal(rng, rows, c), "weight": normal(rng, c, k), "bias": normal(rng, c)}
    return arrays, (1, k - 1, c), c


def scan_inputs(rng: np.random.Generator, rows: int) -> tuple[Arrays, tuple[int, ...], int]:
    h, p, n, g = SCAN.values()
    arrays = {"mixed": normal(rng, rows, h * p + 2 * g * n), "step": normal(rng, rows, h)}
    arrays |= {"step_bias": normal(rng, h), "decay": -np.exp(normal(rng, h)), "skip": normal(rng, h)}
    return arrays, (h, p, n), h * p


def delta_inputs(rng: np.random.Generator, rows: int) -> tuple[Arrays, tuple[int, ...], int]:
    h, k, v, g = DELTA.values()
    arrays = {"mixed": normal(rng, rows, 2 * g * k + h * v), "step": normal(rng, rows, h), "rate": normal(rng, rows, h)}
    arrays |= {"step_bias": normal(rng, h), "decay": -np.exp(normal(rng, h))}
    return arrays, (h, k, v), h * v


def torch_conv(a: Arrays) -> NDArray[Any]:
    torch = pytest.importorskip("torch")
    x, weight, bias = (torch.from_numpy(a[name]) for name in ("x", "weight", "bias"))
    out = torch.nn.functional.conv1d(
        x.T[None], weight[:, None], bias, padding=weight.shape[1] - 1, groups=weight.shape[0]
    )
    values: NDArray[Any] = torch.nn.functional.silu(out[0, :, : len(x)].T).numpy()
    return values


def torch_scan(a: Arrays) -> NDArray[Any]:
    mamba2 = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    import torch

    h, p, n, g = SCAN.values()
    t = {name: torch.from_numpy(array)[None] for name, array in a.items()}
    x, write, read = torch.split(t["mixed"], [h * p, g * n, g * n], dim=-1)
    state, out = torch.zeros(1, h, p, n), []
    for i in range(x.shape[1]):  # step by step: its other form has no bounds of its own
        wide = (1, h, p)
        out.append(
            mamba2.mamba2_selective_state_update(
                state,
                x[:, i].reshape(wide),
                t["step"][:, i, :, None].expand(wide),
                t["decay"][0, :, None, None].expand(h, p, n),
                write[:, i].reshape(1, g, n),
                read[:, i].reshape(1, g, n),
                t["skip"][0, :, None].expand(h, p),
                t["step_bias"][0, :, None].expand(h, p),
                True,
            ).reshape(-1)
        )
    values: NDArray[Any] = torch.stack(out).numpy()
    return values


def torch_delta(a: Arrays) -> NDArray[Any]:
    qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    import torch

    h, k, v, g = DELTA.values()
    t = {name: torch.from_numpy(array)[None] for name, array in a.items()}
    query, key, value = torch.split(t["mixed"], [g * k, g * k, h * v], dim=-1)
    decay = t["decay"] * torch.nn.functional.softplus(t["step"] + t["step_bias"])
    out, _ = qwen.torch_recurrent_gated_delta_rule(
        query.reshape(1, -1, g, k),
        key.reshape(1, -1, g, k),
        value.reshape(1, -1, h, v),
        g=decay,
        beta=t["rate"].sigmoid(),
        use_qk_l2norm_in_kernel=True,
    )
    values: NDArray[Any] = out[0].reshape(-1, h * v).numpy()
    return values


Inputs = Callable[[np.random.Generator, int], tuple[Arrays, tuple[int, ...], int]]
BY_ROW = ("x", "mixed", "step", "rate")
CASES: dict[str, tuple[Inputs, Callable[[Arrays], NDArray[Any]], tuple[str, ...], tuple[Any, ...]]] = {
    # op -> its inputs, the reference, the arrays before the state and behind it, what follows the places
    "causal_conv": (conv_inputs, torch_conv, ("x", "|", "weight", "bias"), (True,)),
    "state_scan": (scan_inputs, torch_scan, ("mixed", "step", "|", "step_bias", "decay", "skip"), (0.0, np.inf)),
    "delta_scan": (delta_inputs, torch_delta, ("mixed", "step", "rate", "|", "step_bias", "decay"), ()),
}


def run(
    ops: Ops,
    op: str,
    arrays: Arrays,
    width: int,
    state: Any,
    sequences: Sequence[tuple[int, int, int, int]],
    more: tuple[Any, ...] | None = None,
) -> NDArray[Any]:
    """The output of sequences (first row, row after the last, rows computed before, place)."""
    rows = np.concatenate([np.arange(a, b) for a, b, _, _ in sequences])
    order = [name if name == "|" else arrays[name][rows] if name in BY_ROW else arrays[name] for name in CASES[op][2]]
    moved = [state if isinstance(each, str) else ops.from_host(np.ascontiguousarray(each)) for each in order]
    lengths = [b - a for a, b, _, _ in sequences]
    where = ([place for *_, place in sequences], np.cumsum([0, *lengths]), [b - a + c for a, b, c, _ in sequences])
    out = ops.from_host(np.full((len(rows), width), np.nan, np.float32))
    getattr(ops, op)(
        *(out, *moved),
        *(ops.from_host(np.array(each, np.int32)) for each in where),
        *(CASES[op][3] if more is None else more),
    )
    ops.synchronize()
    return np.array(ops.to_host(out))


def spoiled(ops: Ops, shape: tuple[int, ...], places: int = 6) -> Any:
    """States that nobody may read."""
    return ops.from_host(np.full((places, *shape), np.nan, np.float32))


@pytest.mark.parametrize("op", CASES)
def test_sequences_in_one_batch_are_what_transformers_computes_of_each(ops: Ops, op: str) -> None:
    make_inputs, reference, *_ = CASES[op]
    arrays, shape, width = make_inputs(np.random.default_rng(1), sum(LENGTHS))
    starts = np.cumsum([0, *LENGTHS])
    sequences = [(int(a), int(a) + n, 0, place) for a, n, place in zip(starts, LENGTHS, (4, 1, -1), strict=False)]
    state = spoiled(ops, shape)
    ours = run(ops, op, arrays, width, state, sequences)
    for a, b, _, _ in sequences:
        alone = {name: array[a:b] if name in BY_ROW else array for name, array in arrays.items()}
        assert np.abs(ours[a:b] - reference(alone)).max() < TOLERANCE
    left = np.array(ops.to_host(state))
    assert np.isfinite(left[[4, 1]]).all()
    assert np.isnan(left[[0, 2, 3, 5]]).all(), "a place that is not theirs"


@pytest.mark.parametrize("op", CASES)
def test_a_sequence_in_pieces_beside_others_is_bit_for_bit_the_same(ops: Ops, op: str) -> None:
    make_inputs = CASES[op][0]
    arrays, shape, width = make_inputs(np.random.default_rng(2), 30)
    whole, state = spoiled(ops, shape), spoiled(ops, shape)
    want = run(ops, op, arrays, width, whole, [(0, 20, 0, 2)])
    first = run(ops, op, arrays, width, state, [(0, 1, 0, 3)])
    middle = run(ops, op, arrays, width, state, [(20, 26, 0, 5), (1, 14, 1, 3)])
    last = run(ops, op, arrays, width, state, [(14, 20, 14, 3), (26, 30, 6, 5)])
    assert np.array_equal(np.concatenate((first, middle[6:], last[:6])), want)
    assert np.array_equal(ops.to_host(state)[3], ops.to_host(whole)[2])


def test_steps_of_time_stay_within_their_bounds(ops: Ops) -> None:
    arrays, shape, width = scan_inputs(np.random.default_rng(3), 9)
    low, high = np.log(np.expm1(np.float32([0.3, 0.6])))  # what softplus makes the bounds of
    inside = {**arrays, "step": np.clip(arrays["step"] + arrays["step_bias"], low, high) - arrays["step_bias"]}
    free, bound = spoiled(ops, shape), spoiled(ops, shape)
    ours = run(ops, "state_scan", arrays, width, bound, [(0, 9, 0, 0)], (0.3, 0.6))
    assert np.abs(ours - run(ops, "state_scan", inside, width, free, [(0, 9, 0, 0)])).max() < TOLERANCE


def test_a_convolution_without_bias_and_activation(ops: Ops) -> None:
    arrays, shape, _ = conv_inputs(np.random.default_rng(4), 5)
    x, weight = arrays["x"], arrays["weight"]
    out, state = ops.from_host(np.empty_like(x)), spoiled(ops, shape)
    where = [ops.from_host(np.array(each, np.int32)) for each in ([0], [0, 5], [5])]
    ops.causal_conv(out, ops.from_host(x), state, ops.from_host(weight), None, *where)
    want = [sum(weight[:, 3 - j] * x[t - j] for j in range(min(t, 3) + 1)) for t in range(5)]
    assert np.abs(ops.to_host(out) - np.array(want)).max() < TOLERANCE


@pytest.mark.parametrize("op", CASES)
def test_states_of_another_shape_are_refused(ops: Ops, op: str) -> None:
    arrays, shape, width = CASES[op][0](np.random.default_rng(5), 3)
    with pytest.raises(ValueError, match=op):
        run(ops, op, arrays, width, spoiled(ops, (*shape[:-1], shape[-1] + 1)), [(0, 3, 0, 0)])
