"""The gated feed-forward layer (Shazeer, 2020).

Must not know: attention, which model it is part of.
"""

from __future__ import annotations

from tramontane.kernels import Array, Ops
from tramontane.kernels.workspace import Workspace
from tramontane.layers.linear import Linear


class MLP:
    """y = down(act(gate(x)) * up(x))."""

    def __init__(self, ops: Ops, gate: Linear, up: Linear, down: Linear, activation: str) -> None:
        """`activation`: a kind that `Ops.gated_activation` knows."""
        self.ops = ops
        self.gate, self.up, self.down = gate, up, down
        self.activation = activation
        self.intermediate_size = gate.weight.shape[0]

    def __call__(self, out: Array, x: Array, rows: int, workspace: Workspace) -> None:
        """out[T,H] from x[T,H], T = rows; out may be x."""
        gate = workspace.take("mlp.gate", rows, self.intermediate_size)
        up = workspace.take("mlp.up", rows, self.intermediate_size)
        self.gate(gate, x)
        self.up(up, x)
        self.ops.gated_activation(gate, gate, up, self.activation)
        self.down(out, gate)
