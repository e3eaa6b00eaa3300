"""DeepSeek V2 and V3: latent attention, many small experts beside shared ones."""

from __future__ import annotations

from dataclasses import replace

from tramontane.layers.rope import yarn_magnitude
from tramontane.models.families.base import (
    Family,
    GGUFTensors,
    change_attention,
    hf_activation,
    hf_decoder,
    with_experts,
)
from tramontane.models.families.experts import expert_names, hf_experts
from tramontane.models.families.gguf import EXPERT_KEYS, gguf_decoder
from tramontane.models.fields import Fields
from tramontane.models.names import GGUF_NAMES, HF_NAMES, LATENT_UP
from tramontane.models.spec import LatentSpec, MLPSpec, ModelSpec, NormSpec, RouterSpec


def _latent(fields: Fields, family: str) -> ModelSpec:
    """The model with its attention; norms of latent vectors have an epsilon of their own."""
    rotated = fields.integer("qk_rope_head_dim", 64)
    fields.only(head_dim=rotated)
    spec = hf_decoder(fields.told(head_dim=rotated), family, interleaved=fields.boolean("rope_interleave", True))
    head_dim = fields.integer("qk_nope_head_dim", 128) + rotated
    key = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    weight = Fields(fields.mapping(key), key).number("mscale_all_dim", 0.0, low=-1.0)
    rope = spec.attentions[0].rope
    factor = rope.scaling.factor if rope is not None and rope.scaling is not None else 1.0
    bias = fields.boolean("attention_bias", False)
    return change_attention(
        spec,
        num_kv_heads=spec.attentions[0].num_heads,
        head_dim=head_dim,
        value_dim=fields.integer("v_head_dim", 128),
        scale=head_dim**-0.5 * yarn_magnitude(factor, weight) ** 2,
        qkv_bias=bias,
        output_bias=bias,
        latent=LatentSpec(
            fields.integer("kv_lora_rank", 512),
            fields.integer("q_lora_rank") if fields.get("q_lora_rank") else None,
            NormSpec(eps=1e-6),
        ),
    )


def shared_experts(fields: Fields, spec: ModelSpec, router: RouterSpec) -> ModelSpec:
    """The spec with experts after `first_k_dense_replace` layers, `n_shared_experts` of them for every token."""
    fields.only(moe_layer_freq=1)
    expert = MLPSpec(fields.integer("moe_intermediate_size"), hf_activation(fields))
    count = fields.integer("n_shared_experts", 0, low=0)
    shared = replace(expert, intermediate_size=expert.intermediate_size * count) if count else None
    moe = hf_experts(fields, expert, router, keys=("n_routed_experts", "num_local_experts"), shared=shared)
    return with_experts(spec, moe, range(fields.integer("first_k_dense_replace", 0, low=0)))


def _deepseek_v2(fields: Fields) -> ModelSpec:
    fields.only(norm_topk_prob=False, scoring_func="softmax", mlp_bias=False)
    method = fields.text("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise fields.unsupported("topk_method", "This build has greedy and group_limited_greedy.")
    router = RouterSpec(normalize=False, scale=fields.number("routed_scaling_factor", 1.0))
    if method != "greedy":
        groups, best = fields.integer("n_group"), fields.integer("topk_group")
        router = replace(router, groups=groups, top_groups=best)
    return shared_experts(fields, _latent(fields, "deepseek_v2"), router)


def grouped_router(fields: Fields, groups: int = 1, top_groups: int = 1) -> RouterSpec:
    """DeepSeek V3's: sigmoids, a learned correction of the choice, groups by their best two."""
    fields.only(scoring_func="sigmoid", topk_method="noaux_tc")
    return RouterSpec(
        score="sigmoid",
        normalize=fields.boolean("norm_topk_prob", True),
        scale=fields.number("routed_scaling_factor", 1.0),
        correction=True,
        groups=fields.integer("n_group", groups),
        top_groups=fields.integer("topk_group", top_groups),
        group_score="top2",
    )


def _deepseek_v3(fields: Fields) -> ModelSpec:
    fields = fields.told(routed_scaling_factor=2.5, n_shared_experts=1, first_k_dense_replace=3)
    return shared_experts(fields, _latent(fields, "deepseek_v3"), grouped_router(fields, 8, 4))


def _from_gguf(fields: Fields, tensors: GGUFTensors) -> ModelSpec:
    """V2 and V3, told apart by what their experts' gates are."""
    rotated, heads = fields.integer("rope.dimension_count"), fields.integer("attention.head_count")
    # Newer files tell the sizes of the vector that all heads share, and those of heads under keys of their own.
    shared = "_mla" if fields.get("attention.key_length_mla") else ""
    head_dim = fields.integer(f"attention.key_length{shared}")
    weight = fields.number("rope.scaling.yarn_log_multiplier", 0.0, low=-1.0) / 0.1
    second = fields.integer("expert_gating_func", 1) == 1
    router = RouterSpec(normalize=not second, group_score="max" if second else "top2")
    plain = fields.changed(
        **{
            f"{fields.prefix}{key}": value
            for key, value in {
                "attention.head_count_kv": heads,
                "attention.key_length": rotated,
                "attention.value_length": rotated,
                "rope.scaling.yarn_log_multiplier": None,
            }.items()
        }
    )
    spec = gguf_decoder(plain, tensors, "deepseek_v2" if second else "deepseek_v3", interleaved=True, router=router)
    rope = spec.attentions[0].rope
    assert rope is not None
    factor = 1.0
    if rope.scaling is not None and weight:  # cos and sin keep their size, the scores do not
        factor = rope.scaling.factor
        rope = replace(rope, scaling=replace(rope.scaling, attention_factor=1.0))
    return change_attention(
        spec,
        rope=rope,
        head_dim=head_dim,
        value_dim=fields.integer(f"attention.value_length{shared}"),
        scale=head_dim**-0.5 * yarn_magnitude(factor, weight) ** 2,
        qkv_bias="blk.0.attn_kv_a_mqa.bias" in tensors.shapes,
        latent=LatentSpec(
            fields.integer("attention.kv_lora_rank"),
            fields.integer("attention.q_lora_rank") if fields.get("attention.q_lora_rank") else None,
            NormSpec(eps=fields.number("attention.layer_norm_rms_epsilon", high=1.0)),
        ),
    )


_NAMES = HF_NAMES.with_layer(
    {
        **expert_names(),
        "self_attn.q_a_proj": "attention.q_down",
        "self_attn.q_a_layernorm": "attention.q_down_norm",
        "self_attn.q_b_proj": "attention.q",
        "self_attn.kv_a_proj_with_mqa": "attention.kv_down",
        "self_attn.kv_a_layernorm": "attention.kv_norm",
        "self_attn.kv_b_proj": LATENT_UP,
    },
    spare_layers=1,
)

FAMILIES = {
    "deepseek_v2": Family(_deepseek_v2, names=_NAMES),
    "deepseek_v3": Family(_deepseek_v3, names=_NAMES),
    "deepseek2": Family(
        from_gguf=_from_gguf,
        gguf_names=GGUF_NAMES,
        gguf_keys=EXPERT_KEYS
        | {"attention.kv_lora_rank", "attention.q_lora_rank", "attention.key_length_mla", "attention.value_length_mla"},
    ),
}
