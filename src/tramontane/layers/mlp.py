"""Feed-forward layers, gated (Shazeer, 2020) or plain.

Must not know: attention, which model they are part of.
"""

from __future__ import annotations

from tramontane.kernels import Array, Ops
from tramontane.kernels.workspace import Workspace
from tramontane.layers.linear import Linear


class MLP:
    """y = down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate."""

    def __init__(
        self, ops: Ops, gate: Linear | None, up: Linear, down: Linear, activation: str, limit: float = 0.0
    ) -> None:
        """`activation`: a kind that `Ops.gated_activation` (or `Ops.activation`) knows; `limit`: its bound."""
        self.ops = ops
        self.gate, self.up, self.down = gate, up, down
        self.activation = activation
        self.limit = limit
        self.intermediate_size = up.weight.shape[0]

    def __call__(self, out: Array, x: Array, rows: int, workspace: Workspace) -> None:
        """out[T,H] from x[T,H], T = rows; out may be x."""
        up = workspace.take("mlp.up", rows, self.intermediate_size)
        self.up(up, x)
        if self.gate is None:
            self.ops.activation(up, up, self.activation)
            self.down(out, up)
            return
        gate = workspace.take("mlp.gate", rows, self.intermediate_size)
        self.gate(gate, x)
        self.ops.gated_activation(gate, gate, up, self.activation, self.limit)
        self.down(out, gate)
