"""Cohere's Command: two branches in parallel behind one LayerNorm without bias, and scaled logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tramontane.models.families.base import (
    MAX_LAYERS,
    Family,
    GGUFTensors,
    change_attention,
    change_layers,
    each_attention,
    hf_decoder,
    hf_layer_types,
)
from tramontane.models.families.gguf import gguf_decoder
from tramontane.models.fields import POSITIONS, Fields
from tramontane.models.names import GGUF_NAMES, HF_NAMES
from tramontane.models.spec import HeadNormSpec, ModelSpec, NormSpec


def _cohere(fields: Fields, family: str = "cohere", windows: Sequence[int | None] | None = None) -> ModelSpec:
    fields = fields.told(rope_theta=500000.0 if family == "cohere" else 10000.0)
    norm = NormSpec("layer", fields.number("layer_norm_eps", 1e-5, high=1.0))
    spec = hf_decoder(fields, family, norm=norm, windows=windows, interleaved=True, tied=True)
    head_norm = HeadNormSpec(norm, "heads") if fields.boolean("use_qk_norm", False) else None
    bias = fields.boolean("attention_bias", False)
    spec = change_attention(spec, qkv_bias=bias, output_bias=bias, head_norm=head_norm)
    spec = change_layers(spec, parallel=True, shared_norm=True)
    return replace(spec, logit_scale=fields.number("logit_scale", 0.0625))


def _cohere2(fields: Fields) -> ModelSpec:
    fields.only(use_qk_norm=False)
    count = fields.integer("num_hidden_layers", high=MAX_LAYERS)
    window = fields.integer("sliding_window", 4096, high=POSITIONS)
    if fields.stated("sliding_window") and fields.get("sliding_window") is None:
        raise fields.unsupported("sliding_window", "Layers without positions must be told from others by their window.")
    every = fields.integer("sliding_window_pattern", 4)
    windows = hf_layer_types(fields, count, window) or [window if (i + 1) % every else None for i in range(count)]
    return _rotated_in_windows(_cohere(fields, "cohere2", windows))


def _rotated_in_windows(spec: ModelSpec) -> ModelSpec:
    """Layers that see all have no positions."""
    return each_attention(spec, lambda _, each: replace(each, rope=None) if each.window is None else each)


def _cohere_from_gguf(
    fields: Fields, tensors: GGUFTensors, family: str = "cohere", windows: Sequence[int | None] | None = None
) -> ModelSpec:
    spec = gguf_decoder(fields, tensors, family, interleaved=True, windows=windows)
    spec = change_layers(spec, parallel=True, shared_norm=True)
    return replace(spec, logit_scale=fields.number("logit_scale", 1.0))


def _cohere2_from_gguf(fields: Fields, tensors: GGUFTensors) -> ModelSpec:
    window = fields.integer("attention.sliding_window", high=POSITIONS)
    count = fields.integer("block_count", high=MAX_LAYERS)
    windows = [window if (i + 1) % 4 else None for i in range(count)]
    return _rotated_in_windows(_cohere_from_gguf(fields, tensors, "cohere2", windows))


_NAMES = HF_NAMES.with_layer({"self_attn.q_norm": "attention.q_norm", "self_attn.k_norm": "attention.k_norm"})

FAMILIES = {
    "cohere": Family(_cohere, _NAMES),
    "command-r": Family(None, GGUF_NAMES, _cohere_from_gguf, gguf_keys=frozenset({"logit_scale"})),
    "cohere2": Family(
        _cohere2, _NAMES, _cohere2_from_gguf, gguf_keys=frozenset({"logit_scale", "attention.sliding_window"})
    ),
}
