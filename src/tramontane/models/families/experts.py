"""What families of mixtures of experts share: names of their tensors, and readers of their keys.

Must not know: arrays, files, how a spec is computed, any one family.
"""

from __future__ import annotations

from collections.abc import Container, Mapping

from tramontane.models.families.base import MAX_LAYERS, check_experts
from tramontane.models.fields import Fields
from tramontane.models.names import Fused
from tramontane.models.spec import MLPSpec, MoESpec, RouterSpec

EXPERTS = ("moe.experts.gate", "moe.experts.up")


def expert_names(
    block: str = "mlp",
    router: str = "gate",
    shared: str = "shared_experts",
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> Mapping[str, str | Fused]:
    """Names below a layer: each expert's tensors as they are published, and those of all in one, as transformers holds
    them since version 5."""
    parts = ("gate", "up", "down")
    return {
        f"{block}.{router}": "moe.router",
        f"{block}.{router}.e_score_correction_bias": "moe.router.correction",
        f"{block}.experts.gate_up_proj": Fused(EXPERTS),
        f"{block}.experts.down_proj": "moe.experts.down",
        **{f"{block}.experts.*.{name}": f"moe.experts.{part}" for name, part in zip(projections, parts, strict=True)},
        **{f"{block}.{shared}.{part}_proj": f"moe.shared.{part}" for part in parts},
    }


def hf_experts(
    fields: Fields,
    expert: MLPSpec,
    router: RouterSpec,
    *,
    keys: tuple[str, ...] = ("num_experts", "num_local_experts", "n_routed_experts"),
    top_k: str = "num_experts_per_tok",
    defaults: tuple[int | None, int | None] = (None, None),
    shared: MLPSpec | None = None,
    shared_gate: bool = False,
) -> MoESpec:
    """The mixture of so many experts as the first of `keys` that is there says (transformers writes another than is
    published), `top_k` for each token; `defaults` of both."""
    count = next((key for key in keys if fields.get(key) is not None), keys[0])
    moe = MoESpec(
        fields.integer(count, defaults[0]),
        fields.integer(top_k, defaults[1]),
        expert,
        router,
        shared=shared,
        shared_gate=shared_gate,
    )
    check_experts(fields, top_k, moe)
    return moe


def sparse_steps(fields: Fields, count: int) -> Container[int]:
    """The layers without experts, of Qwen's keys: `mlp_only_layers`, and all but each `decoder_sparse_step`-th."""
    only = fields.get("mlp_only_layers") or []
    if not isinstance(only, list) or any(type(index) is not int for index in only):
        raise fields.corrupt("mlp_only_layers", "is not a list of layers")
    step = fields.integer("decoder_sparse_step", 1, high=MAX_LAYERS)
    return set(only) | {index for index in range(count) if (index + 1) % step}
