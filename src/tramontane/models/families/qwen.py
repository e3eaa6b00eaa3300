"""Qwen3, with norms of heads, and the mixtures of experts of Qwen2 and Qwen3."""

from __future__ import annotations

from dataclasses import replace

from tramontane.models.families.base import (
    MAX_LAYERS,
    Family,
    GGUFTensors,
    change_attention,
    hf_activation,
    hf_decoder,
    hf_layer_types,
    hf_window,
    with_experts,
)
from tramontane.models.families.experts import expert_names, hf_experts, sparse_steps
from tramontane.models.families.gguf import EXPERT_KEYS, gguf_decoder
from tramontane.models.families.llama import qwen2_windows
from tramontane.models.fields import Fields
from tramontane.models.names import HF_NAMES
from tramontane.models.spec import HeadNormSpec, MLPSpec, ModelSpec, RouterSpec

HEAD_NORMS = {"self_attn.q_norm": "attention.q_norm", "self_attn.k_norm": "attention.k_norm"}


def _qwen3(fields: Fields) -> ModelSpec:
    count, bias = fields.integer("num_hidden_layers", high=MAX_LAYERS), fields.boolean("attention_bias", False)
    spec = hf_decoder(fields.told(head_dim=128), "qwen3", windows=qwen2_windows(fields, count))
    return change_attention(spec, head_norm=HeadNormSpec(spec.layers[0].norm), qkv_bias=bias, output_bias=bias)


def _qwen3_moe(fields: Fields) -> ModelSpec:
    count, bias = fields.integer("num_hidden_layers", high=MAX_LAYERS), fields.boolean("attention_bias", False)
    window = hf_window(fields, 4096) if fields.boolean("use_sliding_window", False) else None
    spec = hf_decoder(fields, "qwen3_moe", windows=[window] * count)
    spec = change_attention(spec, head_norm=HeadNormSpec(spec.layers[0].norm), qkv_bias=bias, output_bias=bias)
    router = RouterSpec(normalize=fields.boolean("norm_topk_prob", False))
    expert = MLPSpec(fields.integer("moe_intermediate_size", 768), hf_activation(fields))
    moe = hf_experts(fields, expert, router, defaults=(128, 8))
    return with_experts(spec, moe, sparse_steps(fields, count))


def _qwen2_moe(fields: Fields) -> ModelSpec:
    count = fields.integer("num_hidden_layers", high=MAX_LAYERS)
    window = hf_window(fields, 4096) if fields.boolean("use_sliding_window", False) else None
    first = fields.integer("max_window_layers", 28, low=0)
    windows = hf_layer_types(fields, count, window) or [
        window if index % 2 == 0 and index < first else None for index in range(count)
    ]
    spec = hf_decoder(fields, "qwen2_moe", windows=windows)
    spec = change_attention(spec, qkv_bias=fields.boolean("qkv_bias", True))
    router = RouterSpec(normalize=fields.boolean("norm_topk_prob", False))
    expert = MLPSpec(fields.integer("moe_intermediate_size", 1408), hf_activation(fields))
    shared = replace(expert, intermediate_size=fields.integer("shared_expert_intermediate_size", 5632))
    moe = hf_experts(fields, expert, router, defaults=(60, 4), shared=shared, shared_gate=True)
    return with_experts(spec, moe, sparse_steps(fields, count))


def _qwen3_from_gguf(fields: Fields, tensors: GGUFTensors) -> ModelSpec:
    return gguf_decoder(fields, tensors, "qwen3")


def _qwen3_moe_from_gguf(fields: Fields, tensors: GGUFTensors) -> ModelSpec:
    return gguf_decoder(fields, tensors, "qwen3_moe", router=RouterSpec())


def _qwen2_moe_from_gguf(fields: Fields, tensors: GGUFTensors) -> ModelSpec:
    return gguf_decoder(fields, tensors, "qwen2_moe", router=RouterSpec(normalize=False))


_QWEN2_MOE_NAMES = HF_NAMES.with_layer(
    {**expert_names(shared="shared_expert"), "mlp.shared_expert_gate": "moe.shared_gate"}
)

FAMILIES = {
    "qwen3": Family(_qwen3, names=HF_NAMES.with_layer(HEAD_NORMS), from_gguf=_qwen3_from_gguf),
    "qwen3_moe": Family(_qwen3_moe, names=HF_NAMES.with_layer({**HEAD_NORMS, **expert_names()})),
    "qwen3moe": Family(from_gguf=_qwen3_moe_from_gguf, gguf_keys=EXPERT_KEYS),
    "qwen2_moe": Family(_qwen2_moe, names=_QWEN2_MOE_NAMES),
    "qwen2moe": Family(from_gguf=_qwen2_moe_from_gguf, gguf_keys=EXPERT_KEYS),
}
