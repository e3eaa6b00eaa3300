"""Feed-forward layers, gated (Shazeer, 2020) or plain.

Must not know: attention, which model they are part of.
"""

from __future__ import annotations

from tramontane.kernels import Array, Ops
from tramontane.kernels.workspace import Workspace
from tramontane.layers.linear import Linear, Linears


class MLP:
    """y = down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate."""

    def __init__(
        self, ops: Ops, gate: Linear | None, up: Linear, down: Linear, activation: str, limit: float = 0.0
    ) -> None:
        """`activation`: a kind that `Ops.gated_activation` (or `Ops.activation`) knows; `limit`: its bound."""
        self.ops = ops
        self.gated, self.down = gate is not None, down
        self.inner = Linears(up) if gate is None else Linears(gate, up)
        self.activation = activation
        self.limit = limit
        self.intermediate_size = up.weight.shape[0]

    def __call__(self, out: Array, x: Array, rows: int, workspace: Workspace) -> None:
        """out[T,H] from x[T,H], T = rows; out may be x."""
        up = workspace.take("mlp.up", rows, self.intermediate_size)
        if not self.gated:
            self.inner([up], x)
            self.ops.activation(up, up, self.activation)
            self.down(out, up)
            return
        gate = workspace.take("mlp.gate", rows, self.intermediate_size)
        self.inner([gate, up], x)
        self.ops.gated_activation(gate, gate, up, self.activation, self.limit)
        self.down(out, gate)
