"""OLMo: norms without weights (1), behind each branch (2, 3), and a mixture of experts (OLMoE)."""

from __future__ import annotations

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
    hf_rope,
    hf_window,
    positive,
    with_experts,
)
from tramontane.models.families.experts import expert_names, hf_experts
from tramontane.models.families.gguf import EXPERT_KEYS, gguf_decoder
from tramontane.models.families.qwen import HEAD_NORMS
from tramontane.models.fields import Fields
from tramontane.models.names import HF_NAMES
from tramontane.models.spec import HeadNormSpec, MLPSpec, ModelSpec, NormSpec, RouterSpec


def _biases(fields: Fields, spec: ModelSpec) -> ModelSpec:
    bias = fields.boolean("attention_bias", False)
    return change_attention(spec, qkv_bias=bias, output_bias=bias)


def _olmo(fields: Fields) -> ModelSpec:
    spec = _biases(fields, hf_decoder(fields, "olmo", norm=NormSpec("layer", 1e-5, weight=False)))
    return change_attention(spec, clip=positive(fields, "clip_qkv"))


def _olmo2(fields: Fields) -> ModelSpec:
    return _behind(_biases(fields, hf_decoder(fields.told(rms_norm_eps=1e-5), "olmo2")))


def _behind(spec: ModelSpec) -> ModelSpec:
    norms = HeadNormSpec(spec.layers[0].norm, "all")
    return change_layers(change_attention(spec, head_norm=norms), placement="post")


def _olmo3(fields: Fields) -> ModelSpec:
    """A stretch of positions is that of layers that see all; those with a window keep theirs."""
    fields = fields.told(rms_norm_eps=1e-5, rope_theta=5e5)
    count, window = fields.integer("num_hidden_layers", high=MAX_LAYERS), hf_window(fields, 4096)
    windows = hf_layer_types(fields, count, window) or [window if (i + 1) % 4 else None for i in range(count)]
    spec = _behind(_biases(fields, hf_decoder(fields, "olmo3", windows=windows, rotary=False)))
    stated = fields.mapping("rope_parameters")
    whole, local = (stated.get(f"{kind}_attention") for kind in ("full", "sliding"))
    head_dim, scaling = spec.attentions[0].head_dim, fields.get("rope_scaling") or whole
    ropes = {
        True: hf_rope(fields.changed(rope_parameters=local, rope_scaling=None), head_dim),
        False: hf_rope(fields.changed(rope_parameters=scaling, rope_scaling=None), head_dim),
    }
    return each_attention(spec, lambda _, each: replace(each, rope=ropes[each.window is not None]))


def _olmoe(fields: Fields) -> ModelSpec:
    spec = _biases(fields, hf_decoder(fields.told(rms_norm_eps=1e-5), "olmoe"))
    norm, expert = spec.layers[0].norm, spec.layers[0].mlp
    assert isinstance(expert, MLPSpec)
    spec = change_attention(spec, head_norm=HeadNormSpec(norm, "all"), clip=positive(fields, "clip_qkv"))
    router = RouterSpec(normalize=fields.boolean("norm_topk_prob", False))
    return with_experts(spec, hf_experts(fields, expert, router, defaults=(64, 8)))


def _olmo_from_gguf(fields: Fields, tensors: GGUFTensors) -> ModelSpec:
    spec = gguf_decoder(fields, tensors, "olmo", interleaved=True)
    norm = replace(spec.layers[0].norm, weight=False)
    clip = positive(fields, "attention.clamp_kqv")
    return replace(change_layers(change_attention(spec, clip=clip), norm=norm), norm=norm)


def _olmo2_from_gguf(fields: Fields, tensors: GGUFTensors) -> ModelSpec:
    return change_layers(gguf_decoder(fields, tensors, "olmo2"), placement="post")


def _olmoe_from_gguf(fields: Fields, tensors: GGUFTensors) -> ModelSpec:
    return gguf_decoder(fields, tensors, "olmoe", router=RouterSpec(normalize=False))


POST_NAMES = HF_NAMES.with_layer(
    {
        **HEAD_NORMS,
        "input_layernorm": None,
        "post_attention_layernorm": "attention_post_norm",
        "post_feedforward_layernorm": "mlp_post_norm",
    }
)

FAMILIES = {
    "olmo": Family(_olmo, from_gguf=_olmo_from_gguf, gguf_keys=frozenset({"attention.clamp_kqv"})),
    "olmo2": Family(_olmo2, names=POST_NAMES, from_gguf=_olmo2_from_gguf),
    "olmo3": Family(_olmo3, names=POST_NAMES),
    "olmoe": Family(
        _olmoe,
        names=HF_NAMES.with_layer({**HEAD_NORMS, **expert_names()}),
        from_gguf=_olmoe_from_gguf,
        gguf_keys=EXPERT_KEYS,
    ),
}
