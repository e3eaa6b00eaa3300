"""The ops of layers that keep a state of fixed size a sequence, token by token: the truth, for numpy and torch alike.

Owns their meaning. As every token is one step of one formula, a state depends neither on chunks nor on neighbours, bit
for bit. Must not know: weights, layers, models, other kernel modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tramontane.kernels.base import Array
from tramontane.kernels.checks import FLOAT32, INT32, check


class RecurrentOps:
    """The part of `Ops` that reads and writes states."""

    deterministic: bool
    library: Any = np
    """What has exp and log1p for the module's arrays."""

    def causal_conv(
        self,
        out: Array,
        x: Array,
        state: Array,
        weight: Array,
        bias: Array | None,
        places: Array,
        query_start: Array,
        context_lens: Array,
        silu: bool = False,
    ) -> None:
        check_conv(out, x, state, weight, bias, places, query_start, context_lens)
        kernel = int(weight.shape[1])
        for a, b, seen in self._sequences(state, places, query_start, context_lens):
            rows = self.library.concatenate((seen[0], x[a:b]))
            total = rows[: b - a] * weight[:, 0]
            for tap in range(1, kernel):
                total = total + rows[tap : tap + b - a] * weight[:, tap]
            total = total if bias is None else total + bias
            out[a:b] = total * self._logistic(total) if silu else total
            seen[0] = rows[b - a :]

    def state_scan(
        self,
        out: Array,
        mixed: Array,
        step: Array,
        state: Array,
        step_bias: Array,
        decay: Array,
        skip: Array,
        places: Array,
        query_start: Array,
        context_lens: Array,
        low: float,
        high: float,
    ) -> None:
        groups = check_scan(out, mixed, step, state, step_bias, decay, skip, places, query_start, context_lens)
        _, heads, width, size = state.shape
        shape, inner = (groups, heads // groups, width, size), heads * width
        for a, b, memory in self._sequences(state, places, query_start, context_lens):
            steps = self._softplus(step[a:b] + step_bias).clip(low, high)
            keeps = self.library.exp(steps * decay)
            memory = memory.reshape(shape)
            for t in range(b - a):
                row = mixed[a + t]
                x = row[:inner].reshape(shape[:3])
                write, read = row[inner:].reshape(2, groups, 1, 1, size)
                keep, length = (each[t].reshape(*shape[:2], 1) for each in (keeps, steps))
                memory *= keep[..., None]
                memory += (length * x)[..., None] * write
                out[a + t] = (self._read(read, memory, -1) + skip.reshape(*shape[:2], 1) * x).reshape(-1)

    def delta_scan(
        self,
        out: Array,
        mixed: Array,
        step: Array,
        rate: Array,
        state: Array,
        step_bias: Array,
        decay: Array,
        places: Array,
        query_start: Array,
        context_lens: Array,
    ) -> None:
        groups = check_delta(out, mixed, step, rate, state, step_bias, decay, places, query_start, context_lens)
        _, heads, keys, width = state.shape
        shape = (groups, heads // groups, keys, width)
        for a, b, memory in self._sequences(state, places, query_start, context_lens):
            keeps = self.library.exp(self._softplus(step[a:b] + step_bias) * decay)
            rates = self._logistic(rate[a:b])
            memory = memory.reshape(shape)
            for t in range(b - a):
                both = mixed[a + t, : 2 * groups * keys].reshape(2, groups, 1, keys)
                query, key = both * ((both * both).sum(-1)[..., None] + 1e-6) ** -0.5
                memory *= keeps[t].reshape(*shape[:2], 1, 1)
                value = mixed[a + t, 2 * groups * keys :].reshape(*shape[:2], width)
                wrong = (value - self._read(key[..., None], memory, -2)) * rates[t].reshape(*shape[:2], 1)
                memory += key[..., None] * wrong[..., None, :]
                out[a + t] = self._read((query * keys**-0.5)[..., None], memory, -2).reshape(-1)

    def _sequences(
        self, state: Array, places: Array, query_start: Array, context_lens: Array
    ) -> Iterator[tuple[int, int, Array]]:
        """(first row, row after the last, the state, which is read and written) of each sequence that has rows."""
        starts, contexts = self._integers(query_start), self._integers(context_lens)
        for s, (place, context) in enumerate(zip(self._integers(places), contexts, strict=True)):
            a, b = starts[s], starts[s + 1]
            if a < b:
                memory = state[place] if place >= 0 else self.library.zeros_like(state[place])
                if context == b - a:
                    memory[...] = 0
                yield a, b, memory

    def _read(self, vectors: Array, memory: Array, axis: int) -> Array:
        """Of each memory [..., rows, columns] and its vector, along the axis that `vectors` [..., 1, columns] or
        [..., rows, 1] has in full."""
        if self.deterministic:  # libraries' products may differ with their number of threads
            return (memory * vectors).sum(axis)
        pair = (memory, vectors.swapaxes(-1, -2)) if axis == -1 else (vectors.swapaxes(-1, -2), memory)
        return (pair[0] @ pair[1]).squeeze(axis)

    @staticmethod
    def _integers(array: Array) -> list[int]:
        values: list[int] = array.tolist()
        return values

    def _softplus(self, x: Array) -> Array:
        return x.clip(min=0) + self.library.log1p(self.library.exp(-abs(x)))

    def _logistic(self, x: Array) -> Array:
        with np.errstate(over="ignore"):
            return 1 / (1 + self.library.exp(-x))


def _check_places(op: str, places: Array, query_start: Array, context_lens: Array) -> None:
    sizes = check(
        op,
        ("places", places, "S", INT32),
        ("query_start", query_start, "S+1", INT32),
        ("context_lens", context_lens, "S", INT32),
    )
    if sizes["S+1"] != sizes["S"] + 1:
        raise ValueError(f"{op}: query_start has {sizes['S+1']} entries for {sizes['S']} sequences")


def check_conv(
    out: Array,
    x: Array,
    state: Array,
    weight: Array,
    bias: Array | None,
    places: Array,
    query_start: Array,
    context_lens: Array,
) -> None:
    """Hold the arguments of `Ops.causal_conv` to their shapes."""
    sizes = check(
        "causal_conv",
        ("out", out, "T C", FLOAT32),
        ("x", x, "T C", FLOAT32),
        ("state", state, "places one kernel-1 C", FLOAT32),
        ("weight", weight, "C kernel", FLOAT32),
        ("bias", bias, "C", FLOAT32),
    )
    if sizes["one"] != 1 or sizes["kernel"] != sizes["kernel-1"] + 1:
        raise ValueError(f"causal_conv: a state of {list(state.shape)} for a kernel of {sizes['kernel']}")
    _check_places("causal_conv", places, query_start, context_lens)


def check_scan(
    out: Array,
    mixed: Array,
    step: Array,
    state: Array,
    step_bias: Array,
    decay: Array,
    skip: Array,
    places: Array,
    query_start: Array,
    context_lens: Array,
) -> int:
    """Hold the arguments of `Ops.state_scan` to their shapes; returns the number of groups."""
    sizes = check(
        "state_scan",
        ("out", out, "T inner", FLOAT32),
        ("mixed", mixed, "T channels", FLOAT32),
        ("step", step, "T H", FLOAT32),
        ("state", state, "places H P N", FLOAT32),
        ("step_bias", step_bias, "H", FLOAT32),
        ("decay", decay, "H", FLOAT32),
        ("skip", skip, "H", FLOAT32),
    )
    groups, left = divmod(sizes["channels"] - sizes["inner"], 2 * sizes["N"])
    if sizes["inner"] != sizes["H"] * sizes["P"] or left or groups < 1 or sizes["H"] % groups:
        raise ValueError(f"state_scan: {sizes['channels']} channels do not fit a state of {list(state.shape)}")
    _check_places("state_scan", places, query_start, context_lens)
    return groups


def check_delta(
    out: Array,
    mixed: Array,
    step: Array,
    rate: Array,
    state: Array,
    step_bias: Array,
    decay: Array,
    places: Array,
    query_start: Array,
    context_lens: Array,
) -> int:
    """Hold the arguments of `Ops.delta_scan` to their shapes; returns the number of key heads."""
    sizes = check(
        "delta_scan",
        ("out", out, "T inner", FLOAT32),
        ("mixed", mixed, "T channels", FLOAT32),
        ("step", step, "T H", FLOAT32),
        ("rate", rate, "T H", FLOAT32),
        ("state", state, "places H K V", FLOAT32),
        ("step_bias", step_bias, "H", FLOAT32),
        ("decay", decay, "H", FLOAT32),
    )
    groups, left = divmod(sizes["channels"] - sizes["inner"], 2 * sizes["K"])
    if sizes["inner"] != sizes["H"] * sizes["V"] or left or groups < 1 or sizes["H"] % groups:
        raise ValueError(f"delta_scan: {sizes['channels']} channels do not fit a state of {list(state.shape)}")
    _check_places("delta_scan", places, query_start, context_lens)
    return groups
