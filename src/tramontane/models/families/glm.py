"""GLM-4: pairs of neighbours rotated in half of each head, fused gates; GLM-4.5 and dots.llm1, DeepSeek's experts
under plain attention."""

from __future__ import annotations

from tramontane.models.families.base import (
    MAX_LAYERS,
    Family,
    GGUFTensors,
    change_attention,
    change_layers,
    hf_decoder,
    hf_layer_types,
    hf_window,
)
from tramontane.models.families.deepseek import grouped_router, shared_experts
from tramontane.models.families.experts import expert_names
from tramontane.models.families.gguf import EXPERT_KEYS, gguf_decoder
from tramontane.models.families.qwen import HEAD_NORMS
from tramontane.models.fields import Fields
from tramontane.models.names import GATE_UP, GGUF_NAMES, HF_NAMES, Fused
from tramontane.models.spec import HeadNormSpec, ModelSpec, RouterSpec


def _glm(fields: Fields) -> ModelSpec:
    fields = fields.told(rms_norm_eps=1.5625e-7, head_dim=128)
    spec = hf_decoder(fields, "glm", partial_rotary=0.5, interleaved=True)
    return change_attention(spec, qkv_bias=fields.boolean("attention_bias", True))


def _glm4(fields: Fields) -> ModelSpec:
    return change_layers(_glm(fields), placement="sandwich")


def _glm4_moe(fields: Fields) -> ModelSpec:
    fields = fields.told(rms_norm_eps=1e-5, n_shared_experts=1, first_k_dense_replace=1)
    spec = hf_decoder(fields, "glm4_moe", partial_rotary=0.5)
    norms = HeadNormSpec(spec.layers[0].norm) if fields.boolean("use_qk_norm", False) else None
    spec = change_attention(spec, qkv_bias=fields.boolean("attention_bias", False), head_norm=norms)
    return shared_experts(fields, spec, grouped_router(fields))


def _dots1(fields: Fields) -> ModelSpec:
    count, bias = fields.integer("num_hidden_layers", high=MAX_LAYERS), fields.boolean("attention_bias", False)
    window, first = hf_window(fields, 4096), fields.integer("max_window_layers", 62, low=0)
    windows = hf_layer_types(fields, count, window) or [window if i >= first else None for i in range(count)]
    spec = hf_decoder(fields, "dots1", windows=windows)
    spec = change_attention(spec, head_norm=HeadNormSpec(spec.layers[0].norm), qkv_bias=bias, output_bias=bias)
    return shared_experts(fields, spec, grouped_router(fields.told(norm_topk_prob=False)))


def _glm_from_gguf(fields: Fields, tensors: GGUFTensors) -> ModelSpec:
    return gguf_decoder(fields, tensors, "glm", interleaved=True)


def _glm4_from_gguf(fields: Fields, tensors: GGUFTensors) -> ModelSpec:
    return change_layers(gguf_decoder(fields, tensors, "glm4", interleaved=True), placement="sandwich")


def _moe_from_gguf(fields: Fields, tensors: GGUFTensors) -> ModelSpec:
    """Layers that guess at further tokens stand behind those of the model, and are counted with them."""
    spare = fields.integer("nextn_predict_layers", 0, low=0)
    fields = fields.changed(**{f"{fields.prefix}block_count": fields.integer("block_count", high=MAX_LAYERS) - spare})
    return gguf_decoder(fields, tensors, "glm4_moe", router=RouterSpec("sigmoid", group_score="top2"))


_FUSED = {"mlp.gate_proj": None, "mlp.up_proj": None, "mlp.gate_up_proj": Fused(GATE_UP)}
_GLM4 = {
    "post_self_attn_layernorm": "attention_post_norm",
    "post_attention_layernorm": "mlp_norm",
    "post_mlp_layernorm": "mlp_post_norm",
}
_GGUF_FUSED = GGUF_NAMES.with_layer({"ffn_gate": None, "ffn_up": Fused(GATE_UP)})
_MOE_NAMES = HF_NAMES.with_layer({**HEAD_NORMS, **expert_names()}, spare_layers=1)

FAMILIES = {
    "glm": Family(_glm, names=HF_NAMES.with_layer(_FUSED)),
    "chatglm": Family(from_gguf=_glm_from_gguf, gguf_names=_GGUF_FUSED),
    "glm4": Family(
        _glm4, names=HF_NAMES.with_layer({**_FUSED, **_GLM4}), from_gguf=_glm4_from_gguf, gguf_names=_GGUF_FUSED
    ),
    "glm4_moe": Family(_glm4_moe, names=_MOE_NAMES),
    "glm4moe": Family(
        from_gguf=_moe_from_gguf,
        gguf_names=GGUF_NAMES.with_layer({"post_attention_norm": "mlp_norm"}, spare_layers=1),
        gguf_keys=EXPERT_KEYS | {"nextn_predict_layers"},
    ),
    "dots1": Family(_dots1, names=_MOE_NAMES, from_gguf=_moe_from_gguf, gguf_keys=EXPERT_KEYS),
}
