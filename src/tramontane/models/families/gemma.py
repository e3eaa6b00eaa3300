"""Gemma's generations: scaled embeddings, norms stored less one, gated GELU, and from the second on windows and norms
around each branch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tramontane.models.families.base import (
    MAX_LAYERS,
    Family,
    GGUFTensors,
    change_attention,
    change_layers,
    each_attention,
    hf_decoder,
    hf_layer_types,
    hf_rope,
    hf_window,
    positive,
)
from tramontane.models.families.gguf import gguf_decoder, gguf_rope
from tramontane.models.fields import POSITIONS, Fields
from tramontane.models.names import GGUF_NAMES, HF_NAMES
from tramontane.models.spec import HeadNormSpec, ModelSpec, RopeSpec

_NORMS = r"(.*[._])?norm"
_CAPS = (50.0, 30.0)
"""Of attention's scores and of logits, where a file of the second generation says nothing."""


def _gemma(fields: Fields, family: str = "gemma", windows: Sequence[int | None] | None = None) -> ModelSpec:
    fields.only(**{} if family == "gemma3" else {"use_bidirectional_attention": False})
    key = "hidden_activation" if fields.get("hidden_activation") else "hidden_act"
    if fields.get("hidden_act") == "gelu" and key == "hidden_act":  # as the first files call the approximation
        fields = fields.changed(**{key: "gelu_pytorch_tanh"})
    fields = fields.told({"hidden_act": key}, hidden_act="gelu_pytorch_tanh", head_dim=256)
    spec = hf_decoder(fields, family, windows=windows, rotary=family != "gemma3", tied=True)
    bias = fields.boolean("attention_bias", False)
    spec = change_attention(spec, qkv_bias=bias, output_bias=bias)
    return replace(spec, embedding_scale=math.sqrt(spec.hidden_size))


def _gemma2(fields: Fields, family: str = "gemma2", every: int = 2, caps: tuple[float, float] = _CAPS) -> ModelSpec:
    """`every`: which layers see all where no layer_types say so; `caps`: defaults, of attention's and the logits'."""
    count = fields.integer("num_hidden_layers", high=MAX_LAYERS)
    window = hf_window(fields, 4096)
    every = fields.integer("sliding_window_pattern", every)
    windows = hf_layer_types(fields, count, window) or [window if (i + 1) % every else None for i in range(count)]
    spec = _gemma(fields, family, windows)
    scale = fields.number("query_pre_attn_scalar", 256.0) ** -0.5
    cap = positive(fields, "attn_logit_softcapping", caps[0])
    spec = change_attention(change_layers(spec, placement="sandwich"), scale=scale, softcap=cap)
    return replace(spec, logit_softcap=positive(fields, "final_logit_softcapping", caps[1]))


def _gemma3(fields: Fields) -> ModelSpec:
    fields = fields.told(
        num_attention_heads=8, num_key_value_heads=4, vocab_size=262208, max_position_embeddings=131072
    )
    fields.only(attn_logit_softcapping=None)
    spec = _gemma2(fields, "gemma3", 6, (0.0, 0.0))
    stated = fields.mapping("rope_parameters")
    if "full_attention" in stated or "sliding_attention" in stated:
        whole, local = stated.get("full_attention"), stated.get("sliding_attention")
    else:  # the older spelling, in which all that is stated of a stretch is of layers that see all
        whole, local = fields.get("rope_scaling") or stated, {}
    whole_fields = fields.changed(rope_parameters=whole, rope_scaling=None).told(rope_theta=1e6)
    local_fields = fields.changed(rope_parameters=local, rope_scaling=None, rope_theta=None)
    head_dim = spec.attentions[0].head_dim
    local_fields = local_fields.told({"rope_theta": "rope_local_base_freq"})
    spec = _with_ropes(spec, hf_rope(whole_fields, head_dim), hf_rope(local_fields, head_dim))
    return _both_ways(spec) if fields.boolean("use_bidirectional_attention", False) else spec


def _both_ways(spec: ModelSpec) -> ModelSpec:
    """EmbeddingGemma: half of a window lies ahead of a token, half behind."""

    def seen(window: int | None) -> int | None:
        return None if window is None else window // 2 + 1

    return each_attention(spec, lambda _, each: replace(each, causal=False, window=seen(each.window)))


def _gemma3_text_half(fields: Fields) -> ModelSpec:
    return _gemma3(Fields(fields.mapping("text_config"), f"text_config of {fields.source}"))


def _with_ropes(spec: ModelSpec, whole: RopeSpec, local: RopeSpec) -> ModelSpec:
    """With these rotary positions in layers that see all and in those with a window, and with norms of heads."""
    spec = change_attention(spec, head_norm=HeadNormSpec(spec.layers[0].norm))
    return each_attention(spec, lambda _, each: replace(each, rope=whole if each.window is None else local))


def _gemma_from_gguf(fields: Fields, tensors: GGUFTensors, family: str = "gemma", every: int = 0) -> ModelSpec:
    """`every`: as in `_gemma2`; 0: no layer has a window."""
    count = fields.integer("block_count", high=MAX_LAYERS)
    default = 4096 if family == "gemma2" else 0
    window = fields.integer("attention.sliding_window", default, low=0, high=POSITIONS) or None
    windows = [window if every and (i + 1) % every else None for i in range(count)]
    spec = gguf_decoder(fields, tensors, family, activation="gelu_tanh", windows=windows)
    return replace(spec, embedding_scale=math.sqrt(spec.hidden_size))


def _gemma2_from_gguf(
    fields: Fields,
    tensors: GGUFTensors,
    family: str = "gemma2",
    every: int = 2,
    caps: tuple[float, float] = _CAPS,
) -> ModelSpec:
    spec = change_layers(_gemma_from_gguf(fields, tensors, family, every), placement="sandwich")
    # Files do not say by what queries are divided; llama.cpp knows the one size that differs, by its layers.
    attention = spec.attentions[0]
    divisor = spec.hidden_size / attention.num_heads if len(spec.layers) in (46, 62) else attention.head_dim
    spec = change_attention(spec, scale=divisor**-0.5, softcap=positive(fields, "attn_logit_softcapping", caps[0]))
    return replace(spec, logit_softcap=positive(fields, "final_logit_softcapping", caps[1]))


def _gemma3_from_gguf(fields: Fields, tensors: GGUFTensors) -> ModelSpec:
    spec = _gemma2_from_gguf(fields, tensors, "gemma3", 6, (0.0, 0.0))
    whole = gguf_rope(fields.told(defaults={"rope.freq_base": 1e6}), spec.attentions[0].head_dim, tensors, False)
    local = RopeSpec(fields.number("rope.freq_base_swa", 10000.0, low=1.0), whole.dim)
    return _with_ropes(spec, whole, local)


def _gemma_embedding_from_gguf(fields: Fields, tensors: GGUFTensors) -> ModelSpec:
    fields.only(**{"attention.causal": False})
    fields = fields.changed(**{f"{fields.prefix}attention.causal": None})
    return replace(_both_ways(_gemma3_from_gguf(fields, tensors)), head=False)


_NAMES = HF_NAMES.with_layer({}, shifted=_NORMS)
_SANDWICH: dict[str, Any] = {
    "post_attention_layernorm": "attention_post_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}
_NAMES2 = _NAMES.with_layer(_SANDWICH)
_NAMES3 = _NAMES2.with_layer({"self_attn.q_norm": "attention.q_norm", "self_attn.k_norm": "attention.k_norm"})
_TEXT_HALF = _NAMES3.with_layer(
    {},
    ignored=r"(model\.)?(vision_tower|multi_modal_projector)\..*",
    optional_prefixes=("model.language_model.", "language_model.model.", "language_model.", "model."),
)
_KEYS2 = frozenset({"attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"})
_KEYS3 = _KEYS2 | {"rope.freq_base_swa"}

_EMBEDDING_NAMES = replace(GGUF_NAMES, ignored=rf"{GGUF_NAMES.ignored}|dense_[23]\.weight")
_EMBEDDING_KEYS = _KEYS3 | {f"dense_{place}_feat_{way}" for place in (2, 3) for way in ("in", "out")}

FAMILIES = {
    "gemma": Family(_gemma, _NAMES, _gemma_from_gguf),
    "gemma2": Family(_gemma2, _NAMES2, _gemma2_from_gguf, gguf_keys=_KEYS2),
    "gemma3_text": Family(_gemma3, _NAMES3),
    "gemma3": Family(_gemma3_text_half, _TEXT_HALF, _gemma3_from_gguf, gguf_keys=_KEYS3),
    "gemma-embedding": Family(None, GGUF_NAMES, _gemma_embedding_from_gguf, _EMBEDDING_NAMES, _EMBEDDING_KEYS),
}
