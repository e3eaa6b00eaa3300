"""Mixers whose memory of all tokens before has a fixed size: short convolutions, state spaces, delta rules.

Owns the order project, convolve, scan, gate, project. A sequence's state is read and written at its place. Must not
know: whose place that is, which model a mixer is part of.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from tramontane.kernels import Array, Ops
from tramontane.kernels.workspace import Workspace
from tramontane.layers.context import BatchContext
from tramontane.layers.linear import Linear
from tramontane.layers.norm import Norm
from tramontane.records import dataclass


@dataclass(frozen=True)
class Conv:
    """A causal convolution of each channel with itself over the last tokens."""

    weight: Array
    """float32 [C, kernel], the oldest token first."""
    bias: Array | None
    silu: bool

    def __call__(self, ops: Ops, out: Array, x: Array, state: Array, batch: BatchContext) -> None:
        """out[T,C] from x[T,C]."""
        where = (batch.states, batch.query_start, batch.context_lens)
        ops.causal_conv(out, x, state, self.weight, self.bias, *where, self.silu)


class Mixer(ABC):
    """What mixes a batch's rows with what their sequences have seen, by a state."""

    def __init__(self, ops: Ops, conv: Conv, out: Linear) -> None:
        self.ops, self.conv, self.out = ops, conv, out

    @abstractmethod
    def __call__(
        self, out: Array, x: Array, batch: BatchContext, state: tuple[Array, ...], workspace: Workspace
    ) -> None:
        """out[T,H] from x[T,H]; `state`, as `models.spec.state_shapes` has it, stands after these tokens then. out may
        be x."""


class GatedConv(Mixer):
    """out(output_gate(x) * conv(input_gate(x) * value(x)))."""

    def __init__(
        self, ops: Ops, conv: Conv, out: Linear, *, input_gate: Linear, output_gate: Linear, value: Linear
    ) -> None:
        super().__init__(ops, conv, out)
        self.input_gate, self.output_gate, self.value = input_gate, output_gate, value

    def __call__(
        self, out: Array, x: Array, batch: BatchContext, state: tuple[Array, ...], workspace: Workspace
    ) -> None:
        ops, rows, width = self.ops, batch.num_tokens, self.value.weight.shape[0]
        gate = workspace.take("state.gate", rows, width)
        value = workspace.take("state.mixed", rows, width)
        mixed = workspace.take("state.convolved", rows, width)
        self.input_gate(gate, x)
        self.value(value, x)
        ops.multiply(value, gate)
        self.conv(ops, mixed, value, state[0], batch)
        self.output_gate(gate, x)
        ops.multiply(mixed, gate)
        self.out(out, mixed)


@dataclass(frozen=True)
class Decay:
    """How a head forgets: by exp(rate * softplus(step + bias)) a token."""

    rate: Array
    """float32 [heads], below zero."""
    bias: Array
    """float32 [heads]."""


class StateSpace(Mixer):
    """A selective state space with a scalar decay a head (Dao and Gu, 2024), gated before its norm."""

    def __init__(
        self,
        ops: Ops,
        conv: Conv,
        out: Linear,
        *,
        gate: Linear,
        mixed: Linear,
        step: Linear,
        decay: Decay,
        skip: Array,
        norm: Norm,
        num_groups: int,
        step_limit: tuple[float, float],
    ) -> None:
        """`norm`: with a weight for each of `num_groups` parts of a row."""
        super().__init__(ops, conv, out)
        self.gate, self.mixed, self.step = gate, mixed, step
        self.decay, self.skip, self.norm = decay, skip, norm
        self.num_groups, self.step_limit = num_groups, step_limit

    def __call__(
        self, out: Array, x: Array, batch: BatchContext, state: tuple[Array, ...], workspace: Workspace
    ) -> None:
        ops, rows, inner = self.ops, batch.num_tokens, self.gate.weight.shape[0]
        channels = self.mixed.weight.shape[0]
        gate = workspace.take("state.gate", rows, inner)
        step = workspace.take("state.step", rows, self.step.weight.shape[0])
        mixed = workspace.take("state.mixed", rows, channels)
        convolved = workspace.take("state.convolved", rows, channels)
        scanned = workspace.take("state.scanned", rows, inner)
        self.gate(gate, x)
        self.mixed(mixed, x)
        self.step(step, x)
        self.conv(ops, convolved, mixed, state[0], batch)
        where = (batch.states, batch.query_start, batch.context_lens)
        decay = self.decay
        ops.state_scan(scanned, convolved, step, state[1], decay.bias, decay.rate, self.skip, *where, *self.step_limit)
        ops.gated_activation(gate, gate, scanned, "silu")
        parts = ops.view(gate, (rows * self.num_groups, inner // self.num_groups))
        self.norm(parts, parts)
        self.out(out, gate)


class DeltaRule(Mixer):
    """Linear attention by the gated delta rule (Yang et al., 2024), gated behind a norm of each head."""

    def __init__(
        self,
        ops: Ops,
        conv: Conv,
        out: Linear,
        *,
        q: Linear,
        k: Linear,
        v: Linear,
        gate: Linear,
        step: Linear,
        rate: Linear,
        decay: Decay,
        norm: Norm,
    ) -> None:
        super().__init__(ops, conv, out)
        self.q, self.k, self.v = q, k, v
        self.gate, self.step, self.rate = gate, step, rate
        self.decay, self.norm = decay, norm

    def __call__(
        self, out: Array, x: Array, batch: BatchContext, state: tuple[Array, ...], workspace: Workspace
    ) -> None:
        ops, rows, inner = self.ops, batch.num_tokens, self.gate.weight.shape[0]
        heads = self.step.weight.shape[0]
        step, rate = (workspace.take(f"state.{name}", rows, heads) for name in ("step", "rate"))
        gate = workspace.take("state.gate", rows, inner)
        scanned = workspace.take("state.scanned", rows, inner)
        mixed = self._mixed(x, rows, workspace)
        convolved = workspace.take("state.convolved", rows, int(mixed.shape[1]))
        for linear, target in ((self.step, step), (self.rate, rate), (self.gate, gate)):
            linear(target, x)
        self.conv(ops, convolved, mixed, state[0], batch)
        where = (batch.states, batch.query_start, batch.context_lens)
        ops.delta_scan(scanned, convolved, step, rate, state[1], self.decay.bias, self.decay.rate, *where)
        by_head = ops.view(scanned, (rows * heads, inner // heads))
        self.norm(by_head, by_head)
        ops.gated_activation(gate, gate, scanned, "silu")
        self.out(out, gate)

    def _mixed(self, x: Array, rows: int, workspace: Workspace) -> Array:
        """Queries, keys and values side by side, float32 [T,C]."""
        linears = (self.q, self.k, self.v)
        widths = [linear.weight.shape[0] for linear in linears]
        mixed = workspace.take("state.mixed", rows, sum(widths))
        joint, at = self.ops.view(mixed, (rows, 1, sum(widths))), 0
        for name, linear, width in zip("qkv", linears, widths, strict=True):
            part = workspace.take(f"state.{name}", rows, width)
            linear(part, x)
            self.ops.place(joint, self.ops.view(part, (rows, 1, width)), at, 0, width)
            at += width
        return mixed
