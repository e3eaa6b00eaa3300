"""A mixture of experts (Shazeer et al., 2017): route, sort by expert, one product an expert, weigh and add.

Must not know: attention, which model it is part of, how experts are stored.
"""

from __future__ import annotations

from tramontane.kernels import Array, Ops
from tramontane.kernels.workspace import Workspace
from tramontane.layers.linear import Linear
from tramontane.layers.mlp import MLP
from tramontane.records import dataclass
from tramontane.weights.experts import Experts


@dataclass(frozen=True)
class ExpertLinear:
    """The same projection of every expert, with biases float32 [E,N] or None."""

    weight: Experts
    bias: Array | None = None

    def __call__(self, out: Array, x: Array, offsets: Array) -> None:
        self.weight.matmul(out, x, offsets, self.bias)


@dataclass(frozen=True)
class Router:
    """Which experts a token goes to: a projection to one logit an expert, and what `Ops.route` makes of it."""

    linear: Linear
    top_k: int
    score: str
    normalize: bool
    scale: float
    correction: Array | None = None
    groups: int = 1
    top_groups: int = 1
    group_score: str = "max"
    jitter: float = 0.0

    def __call__(self, ops: Ops, x: Array, rows: int, workspace: Workspace) -> tuple[Array, Array]:
        """Weights float32 [T,k] and experts int32 [T,k] of x [T,H]."""
        logits = workspace.take("moe.logits", rows, self.linear.weight.shape[0])
        weights = workspace.take("moe.weights", rows, self.top_k)
        experts = workspace.take("moe.experts", rows, self.top_k, dtype="int32")
        self.linear(logits, x)
        ops.route(
            *(weights, experts, logits, self.correction, self.score, self.normalize, self.scale),
            *(self.groups, self.top_groups, self.group_score, self.jitter),
        )
        return weights, experts


class MoE:
    """y = sum of weight * expert(x) over the chosen experts, plus what the shared expert says."""

    def __init__(
        self,
        ops: Ops,
        router: Router,
        gate: ExpertLinear | None,
        up: ExpertLinear,
        down: ExpertLinear,
        activation: str,
        limit: float = 0.0,
        shared: MLP | None = None,
        shared_gate: Linear | None = None,
    ) -> None:
        self.ops = ops
        self.router = router
        self.gate, self.up, self.down = gate, up, down
        self.activation, self.limit = activation, limit
        self.shared, self.shared_gate = shared, shared_gate

    def __call__(self, out: Array, x: Array, rows: int, workspace: Workspace) -> None:
        """out[T,H] from x[T,H], T = rows; out may be x."""
        ops, k = self.ops, self.router.top_k
        hidden = self.down.weight.shape[1]
        shared, gate = self._shared(x, rows, workspace)
        weights, experts = self.router(ops, x, rows, workspace)
        tokens = ops.view(workspace.take("moe.tokens", rows, k, dtype="int32"), (rows * k,))
        slots = workspace.take("moe.slots", rows, k, dtype="int32")
        offsets = workspace.fixed("moe.offsets", self.up.weight.shape[0] + 1, dtype="int32")
        ops.group_rows(tokens, slots, offsets, experts)
        grouped = ops.view(workspace.take("moe.rows", rows, k, hidden), (rows * k, hidden))
        ops.take_rows(grouped, x, tokens)
        self._experts(grouped, grouped, offsets, rows, workspace)
        ops.combine(out, grouped, slots, weights)
        if shared is not None and gate is not None:
            ops.add_gated(out, shared, gate)
        elif shared is not None:
            ops.add(out, shared)

    def _experts(self, out: Array, x: Array, offsets: Array, rows: int, workspace: Workspace) -> None:
        ops, k, inner = self.ops, self.router.top_k, self.up.weight.shape[1]
        up = ops.view(workspace.take("moe.up", rows, k, inner), (rows * k, inner))
        self.up(up, x, offsets)
        if self.gate is None:
            ops.activation(up, up, self.activation)
            self.down(out, up, offsets)
            return
        gate = ops.view(workspace.take("moe.gate", rows, k, inner), (rows * k, inner))
        self.gate(gate, x, offsets)
        ops.gated_activation(gate, gate, up, self.activation, self.limit)
        self.down(out, gate, offsets)

    def _shared(self, x: Array, rows: int, workspace: Workspace) -> tuple[Array | None, Array | None]:
        """What the shared expert says [T,H] and its gate's logits [T,1]: before x may be overwritten."""
        shared = gate = None
        if self.shared is not None:
            shared = workspace.take("moe.shared", rows, self.shared.down.weight.shape[0])
            self.shared(shared, x, rows, workspace)
        if self.shared_gate is not None:
            gate = workspace.take("moe.shared_gate", rows, 1)
            self.shared_gate(gate, x)
        return shared, gate
