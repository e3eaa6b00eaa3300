"""Llama and its closest kin: pre-norm, RMSNorm, rotary positions, gated MLPs."""

from __future__ import annotations

from collections.abc import Sequence

from tramontane.models.families.base import (
    MAX_LAYERS,
    Family,
    GGUFTensors,
    change_attention,
    change_mlp,
    hf_decoder,
    hf_layer_types,
)
from tramontane.models.families.gguf import EXPERT_KEYS, gguf_decoder
from tramontane.models.fields import POSITIONS, Fields
from tramontane.models.names import GGUF_NAMES
from tramontane.models.spec import ModelSpec, RouterSpec


def _llama(fields: Fields) -> ModelSpec:
    fields.only(sliding_window=None, layer_types=None, is_causal=True)
    bias = fields.boolean("attention_bias", False)
    spec = change_attention(hf_decoder(fields, "llama"), qkv_bias=bias, output_bias=bias)
    return change_mlp(spec, bias=fields.boolean("mlp_bias", False))


def _llama_from_gguf(fields: Fields, tensors: GGUFTensors) -> ModelSpec:
    """Mistral's and Mixtral's files are of this architecture too."""
    return gguf_decoder(fields, tensors, "llama", interleaved=True, router=RouterSpec())


def _qwen2(fields: Fields) -> ModelSpec:
    fields.only(attention_bias=True, mlp_bias=False, use_mrope=False, is_causal=True)
    count = fields.integer("num_hidden_layers", high=MAX_LAYERS)
    return change_attention(hf_decoder(fields, "qwen2", windows=qwen2_windows(fields, count)), qkv_bias=True)


def qwen2_windows(fields: Fields, count: int) -> Sequence[int | None]:
    """A window a layer: `layer_types` decides; without it the layers from `max_window_layers` on slide."""
    window = None
    if fields.boolean("use_sliding_window", False):
        window = fields.integer("sliding_window", 4096, high=POSITIONS)
    stated = hf_layer_types(fields, count, window)
    if stated is None:
        first = fields.integer("max_window_layers", 28, low=0)
        return [window if index >= first else None for index in range(count)]
    return stated


def _qwen2_from_gguf(fields: Fields, tensors: GGUFTensors) -> ModelSpec:
    return gguf_decoder(fields, tensors, "qwen2")


# Mixtral's first files have a tensor an expert.
_OLD_EXPERTS = {f"ffn_{part}.*": f"moe.experts.{part}" for part in ("gate", "up", "down")}

FAMILIES = {
    "llama": Family(
        _llama, from_gguf=_llama_from_gguf, gguf_names=GGUF_NAMES.with_layer(_OLD_EXPERTS), gguf_keys=EXPERT_KEYS
    ),
    "qwen2": Family(_qwen2, from_gguf=_qwen2_from_gguf),
}
