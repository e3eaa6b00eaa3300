"""OpenAI's gpt-oss: sinks, windows in every other layer, experts with biases and a clamped activation."""

from __future__ import annotations

from tramontane.models.families.base import (
    MAX_LAYERS,
    Family,
    GGUFTensors,
    change_attention,
    hf_decoder,
    hf_layer_types,
    hf_window,
    with_experts,
)
from tramontane.models.families.experts import EXPERTS, hf_experts
from tramontane.models.families.gguf import EXPERT_KEYS, gguf_decoder
from tramontane.models.fields import POSITIONS, Fields
from tramontane.models.names import GGUF_NAMES, HF_NAMES, Fused
from tramontane.models.spec import MLPSpec, ModelSpec, RouterSpec

_STRETCH = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}
_LIMIT = 7.0


def _gpt_oss(fields: Fields) -> ModelSpec:
    fields.only(swiglu_alpha=1.702, hidden_act="silu")
    if not fields.get("rope_scaling"):
        fields = fields.told(rope_parameters=_STRETCH)
    fields = fields.told(head_dim=64, rms_norm_eps=1e-5, rope_theta=150000.0)
    count, window = fields.integer("num_hidden_layers", high=MAX_LAYERS), hf_window(fields, 128)
    windows = hf_layer_types(fields, count, window) or [None if i % 2 else window for i in range(count)]
    bias = fields.boolean("attention_bias", True)
    spec = change_attention(hf_decoder(fields, "gpt_oss", windows=windows), qkv_bias=bias, output_bias=bias, sinks=True)
    limit = fields.number("swiglu_limit", _LIMIT)
    expert = MLPSpec(fields.integer("intermediate_size"), "swiglu_clamped", bias=True, limit=limit)
    return with_experts(spec, hf_experts(fields, expert, RouterSpec(bias=True), defaults=(128, 4)))


def _from_gguf(fields: Fields, tensors: GGUFTensors) -> ModelSpec:
    count = fields.integer("block_count", high=MAX_LAYERS)
    window = fields.integer("attention.sliding_window", high=POSITIONS)
    windows = [None if index % 2 else window for index in range(count)]
    return gguf_decoder(
        fields, tensors, "gpt_oss", activation="swiglu_clamped", limit=_LIMIT, windows=windows, router=RouterSpec()
    )


_FUSED = Fused(EXPERTS, "alternating")
_NAMES = HF_NAMES.with_layer(
    {
        "self_attn.sinks": "attention.sinks",
        "mlp.router": "moe.router",
        "mlp.experts.gate_up_proj": _FUSED,
        "mlp.experts.gate_up_proj_bias": Fused(tuple(f"{part}.bias" for part in EXPERTS), "alternating"),
        "mlp.experts.down_proj": "moe.experts.down",
        "mlp.experts.down_proj_bias": "moe.experts.down.bias",
        # MXFP4's matrices are stored like any other: outputs first.
        "mlp.experts.gate_up_proj.weight": _FUSED,
        "mlp.experts.down_proj.weight": "moe.experts.down",
    },
    transposed=frozenset({"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}),
)

FAMILIES = {
    "gpt_oss": Family(_gpt_oss, names=_NAMES),
    "gpt-oss": Family(
        from_gguf=_from_gguf,
        gguf_names=GGUF_NAMES.with_layer({"post_attention_norm": "mlp_norm"}),
        gguf_keys=EXPERT_KEYS | {"attention.sliding_window"},
    ),
}
