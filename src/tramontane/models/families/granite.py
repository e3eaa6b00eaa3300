"""IBM's Granite: a llama whose streams are scaled, and its mixtures of experts."""

from __future__ import annotations

from dataclasses import replace

from tramontane.models.families.base import (
    Family,
    GGUFTensors,
    change_attention,
    change_layers,
    change_mlp,
    hf_decoder,
    with_experts,
)
from tramontane.models.families.experts import EXPERTS, hf_experts
from tramontane.models.families.gguf import EXPERT_KEYS, gguf_decoder
from tramontane.models.fields import Fields
from tramontane.models.names import HF_NAMES, Fused
from tramontane.models.spec import MLPSpec, ModelSpec, RouterSpec


def granite(fields: Fields, family: str = "granite", rotary: bool = True) -> ModelSpec:
    """What all of them share; `rotary`: whether there are positions."""
    bias = fields.boolean("attention_bias", False)
    spec = change_mlp(hf_decoder(fields, family, rotary=rotary), bias=fields.boolean("mlp_bias", False))
    spec = change_attention(spec, scale=fields.number("attention_multiplier", 1.0), qkv_bias=bias, output_bias=bias)
    return replace(
        change_layers(spec, residual_scale=fields.number("residual_multiplier", 1.0)),
        embedding_scale=fields.number("embedding_multiplier", 1.0),
        logit_scale=1 / fields.number("logits_scaling", 1.0),
    )


def _granite_moe(fields: Fields) -> ModelSpec:
    return with_granite_experts(fields, granite(fields, "granitemoe"))


def with_granite_experts(fields: Fields, spec: ModelSpec) -> ModelSpec:
    """The spec with the experts, and the one that all share."""
    expert = spec.layers[0].mlp
    assert isinstance(expert, MLPSpec)
    inner = fields.integer("shared_intermediate_size", 0, low=0)
    shared = replace(expert, intermediate_size=inner) if inner else None
    return with_experts(spec, hf_experts(fields, expert, RouterSpec(), defaults=(8, 2), shared=shared))


def _from_gguf(fields: Fields, tensors: GGUFTensors) -> ModelSpec:
    spec = gguf_decoder(fields, tensors, "granite", interleaved=True, router=RouterSpec())
    scale = fields.number("attention.scale") if fields.get("attention.scale") else None
    spec = change_attention(spec, scale=scale)
    return replace(
        change_layers(spec, residual_scale=fields.number("residual_scale", 1.0)),
        embedding_scale=fields.number("embedding_scale", 1.0),
        logit_scale=1 / fields.number("logit_scale", 1.0),
    )


_KEYS = EXPERT_KEYS | {"attention.scale", "residual_scale", "embedding_scale", "logit_scale"}
MOE_NAMES = HF_NAMES.with_layer(
    {
        "block_sparse_moe.router": "moe.router",
        "block_sparse_moe.router.layer": "moe.router",
        "block_sparse_moe.input_linear": Fused(EXPERTS),
        "block_sparse_moe.output_linear": "moe.experts.down",
        "block_sparse_moe.experts.gate_up_proj": Fused(EXPERTS),
        "block_sparse_moe.experts.down_proj": "moe.experts.down",
        "shared_mlp.input_linear": Fused(("moe.shared.gate", "moe.shared.up")),
        "shared_mlp.output_linear": "moe.shared.down",
    }
)

FAMILIES = {
    "granite": Family(granite, from_gguf=_from_gguf, gguf_keys=_KEYS),
    "granitemoe": Family(_granite_moe, names=MOE_NAMES, from_gguf=_from_gguf, gguf_keys=_KEYS),
    "granitemoeshared": Family(_granite_moe, names=MOE_NAMES),
}
