"""Phi-3.5-MoE: experts by SparseMixer, LayerNorm, a head with a bias."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tramontane.models.families.base import (
    MAX_LAYERS,
    Family,
    GGUFTensors,
    change_attention,
    change_layers,
    hf_decoder,
    hf_window,
    with_experts,
)
from tramontane.models.families.experts import expert_names, hf_experts
from tramontane.models.families.gguf import EXPERT_KEYS, gguf_decoder
from tramontane.models.fields import Fields
from tramontane.models.names import HF_NAMES
from tramontane.models.spec import MLPSpec, ModelSpec, NormSpec, RouterSpec


def _phimoe(fields: Fields) -> ModelSpec:
    fields = _one_magnitude(fields.told(rms_norm_eps=1e-5, rope_theta=1e6))
    norm = NormSpec("layer", fields.number("rms_norm_eps", high=1.0), bias=True)
    count = fields.integer("num_hidden_layers", high=MAX_LAYERS)
    spec = hf_decoder(fields, "phimoe", norm=norm, windows=[hf_window(fields)] * count)
    bias = fields.boolean("attention_bias", False)
    spec = change_attention(spec, qkv_bias=bias, output_bias=bias)
    expert = spec.layers[0].mlp
    assert isinstance(expert, MLPSpec)
    jitter = fields.number("router_jitter_noise", 0.01)
    router = RouterSpec("sparsemixer", normalize=False, jitter=jitter)
    moe = hf_experts(fields, expert, router, defaults=(16, 2))
    if moe.top_k != 2:
        raise fields.unsupported("num_experts_per_tok", "SparseMixer chooses two.")
    return replace(with_experts(spec, moe), head_bias=fields.boolean("lm_head_bias", False))


def _one_magnitude(fields: Fields) -> Fields:
    """longrope's scale of short and of long texts, where they are one, under the key that other families use."""
    for key in ("rope_scaling", "rope_parameters"):
        stated: dict[str, Any] = dict(fields.mapping(key))
        scales = [stated.pop(f"{length}_mscale", None) for length in ("short", "long")]
        if scales[0] != scales[1]:
            raise fields.unsupported(key, "short_mscale and long_mscale must be equal.")
        if scales[0] is not None:
            fields = fields.changed(**{key: {**stated, "attention_factor": scales[0]}})
    return fields


def _from_gguf(fields: Fields, tensors: GGUFTensors) -> ModelSpec:
    """As the model was trained, with LayerNorm and SparseMixer: llama.cpp takes RMSNorm and plain top-2 routing."""
    spec = gguf_decoder(fields, tensors, "phimoe", router=RouterSpec("sparsemixer", normalize=False))
    norm = NormSpec("layer", spec.layers[0].norm.eps, bias=True)
    return replace(change_layers(spec, norm=norm), norm=norm)


FAMILIES = {
    "phimoe": Family(
        _phimoe,
        names=HF_NAMES.with_layer(
            {
                **expert_names("block_sparse_moe", projections=("w1", "w3", "w2")),
                **expert_names(router="router"),
            }
        ),
        from_gguf=_from_gguf,
        gguf_keys=EXPERT_KEYS | {"attention.sliding_window"},
    ),
}
