"""Llamas with a LayerNorm: StarCoder2, StableLM, Nemotron."""

from __future__ import annotations

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
from tramontane.models.fields import Fields
from tramontane.models.names import HF_NAMES
from tramontane.models.spec import HeadNormSpec, ModelSpec, NormSpec


def _starcoder2(fields: Fields) -> ModelSpec:
    fields = fields.told(hidden_act="gelu_pytorch_tanh", num_key_value_heads=2)
    norm = NormSpec("layer", fields.number("norm_epsilon", 1e-5, high=1.0), bias=True)
    count = fields.integer("num_hidden_layers", high=MAX_LAYERS)
    window = hf_window(fields)
    spec = hf_decoder(fields, "starcoder2", norm=norm, windows=[window] * count, tied=True)
    bias = fields.boolean("use_bias", True)
    return change_mlp(change_attention(spec, qkv_bias=bias, output_bias=bias), gated=False, bias=bias)


def _starcoder2_from_gguf(fields: Fields, tensors: GGUFTensors) -> ModelSpec:
    return gguf_decoder(fields, tensors, "starcoder2", activation="gelu_tanh", gated=False)


def _stablelm(fields: Fields) -> ModelSpec:
    norm = NormSpec("layer", fields.number("layer_norm_eps", 1e-5, high=1.0), bias=True)
    spec = hf_decoder(fields, "stablelm", norm=norm, partial_rotary=0.25)
    head_norm = HeadNormSpec(NormSpec("layer", norm.eps), "heads") if fields.boolean("qk_layernorm", False) else None
    parallel = fields.boolean("use_parallel_residual", False)
    spec = change_attention(spec, qkv_bias=fields.boolean("use_qkv_bias", False), head_norm=head_norm)
    return change_layers(spec, parallel=parallel, shared_norm=parallel)


def _stablelm_from_gguf(fields: Fields, tensors: GGUFTensors) -> ModelSpec:
    parallel = "blk.0.ffn_norm.weight" not in tensors.shapes  # as llama.cpp tells: the key says true of every file
    spec = gguf_decoder(fields, tensors, "stablelm")
    return change_layers(spec, parallel=parallel, shared_norm=parallel)


def _nemotron(fields: Fields) -> ModelSpec:
    fields = fields.told(hidden_act="relu2")
    norm = NormSpec("layer", fields.number("norm_eps", 1e-5, high=1.0), bias=True)
    spec = hf_decoder(fields, "nemotron", norm=norm, partial_rotary=0.5)
    bias = fields.boolean("attention_bias", False)
    spec = change_attention(spec, qkv_bias=bias, output_bias=bias)
    return change_mlp(spec, gated=False, bias=fields.boolean("mlp_bias", False))


def _nemotron_from_gguf(fields: Fields, tensors: GGUFTensors) -> ModelSpec:
    return gguf_decoder(fields, tensors, "nemotron", activation="relu_squared", gated=False)


_STARCODER2 = HF_NAMES.with_layer({"mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down"})
_STABLELM = HF_NAMES.with_layer({
    "self_attn.q_layernorm.norms.*": "attention.q_norm",
    "self_attn.k_layernorm.norms.*": "attention.k_norm",
})  # fmt: skip

FAMILIES = {
    "starcoder2": Family(_starcoder2, _STARCODER2, _starcoder2_from_gguf),
    "stablelm": Family(_stablelm, _STABLELM, _stablelm_from_gguf, gguf_keys=frozenset({"use_parallel_residual"})),
    "nemotron": Family(_nemotron, HF_NAMES.with_layer({}, shifted=r"(.*[._])?norm"), _nemotron_from_gguf),
}
