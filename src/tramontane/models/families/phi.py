"""Phi: the first generations with one LayerNorm for two parallel branches; later ones llamas with fused tensors."""

from __future__ import annotations

from dataclasses import replace

from tramontane.models.families.base import (
    MAX_LAYERS,
    Family,
    GGUFTensors,
    change_attention,
    change_layers,
    change_mlp,
    hf_decoder,
    hf_window,
)
from tramontane.models.families.gguf import gguf_decoder
from tramontane.models.fields import POSITIONS, Fields
from tramontane.models.names import GATE_UP, GGUF_NAMES, HF_NAMES, QKV, Fused
from tramontane.models.spec import HeadNormSpec, ModelSpec, NormSpec


def _phi(fields: Fields) -> ModelSpec:
    fields = fields.told(hidden_act="gelu_new")
    norm = NormSpec("layer", fields.number("layer_norm_eps", 1e-5, high=1.0), bias=True)
    spec = hf_decoder(fields, "phi", norm=norm, partial_rotary=0.5)
    spec = change_mlp(change_layers(spec, parallel=True, shared_norm=True), gated=False, bias=True)
    head_norm = HeadNormSpec(norm) if fields.boolean("qk_layernorm", False) else None
    spec = change_attention(spec, qkv_bias=True, output_bias=True, head_norm=head_norm)
    return replace(spec, head_bias=True)


def _phi_from_gguf(fields: Fields, tensors: GGUFTensors) -> ModelSpec:
    spec = gguf_decoder(fields, tensors, "phi", activation="gelu_tanh", gated=False)
    return change_layers(spec, parallel=True, shared_norm=True)


def _phi3(fields: Fields) -> ModelSpec:
    fields.only(attention_bias=False, mlp_bias=False)
    fields = fields.told(rms_norm_eps=1e-5, original_max_position_embeddings=4096)
    count = fields.integer("num_hidden_layers", high=MAX_LAYERS)
    window = hf_window(fields)
    return hf_decoder(fields, "phi3", windows=[window] * count)


def _phi3_from_gguf(fields: Fields, tensors: GGUFTensors) -> ModelSpec:
    count = fields.integer("block_count", high=MAX_LAYERS)
    window = fields.integer("attention.sliding_window", 0, low=0, high=POSITIONS) or None
    return gguf_decoder(fields, tensors, "phi3", windows=[window] * count)


_PHI = HF_NAMES.with_layer(
    {
        "self_attn.dense": "attention.o",
        "self_attn.q_layernorm": "attention.q_norm",
        "self_attn.k_layernorm": "attention.k_norm",
        "mlp.fc1": "mlp.up",
        "mlp.fc2": "mlp.down",
    },
    fixed={"embed_tokens": "embedding", "final_layernorm": "norm", "lm_head": "head"},
)
_PHI3 = HF_NAMES.with_layer({"self_attn.qkv_proj": Fused(QKV), "mlp.gate_up_proj": Fused(GATE_UP)})

FAMILIES = {
    "phi": Family(_phi, _PHI),
    "phi2": Family(None, GGUF_NAMES, _phi_from_gguf),
    "phi3": Family(
        _phi3,
        _PHI3,
        _phi3_from_gguf,
        GGUF_NAMES.with_layer({"ffn_up": Fused(GATE_UP)}),
        frozenset({"attention.sliding_window"}),
    ),
}
