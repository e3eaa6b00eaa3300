"""Hybrids of known kin, most of whose layers keep states: Granite 4 (state spaces), Qwen3-Next, 3.5 (delta rules)."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace
from typing import Any

from tramontane.models.families.base import (
    Family,
    change_attention,
    change_mlp,
    hf_decoder,
    with_experts,
)
from tramontane.models.families.experts import expert_names, hf_experts, sparse_steps
from tramontane.models.families.granite import MOE_NAMES, granite, with_granite_experts
from tramontane.models.families.qwen import HEAD_NORMS
from tramontane.models.families.recurrent import (
    STATE_SPACE,
    attending_layers,
    check_state_space,
    step_limit,
    with_states,
)
from tramontane.models.fields import Fields
from tramontane.models.names import GATE_UP, HF_NAMES, Fused, NameMap
from tramontane.models.spec import DeltaSpec, HeadNormSpec, MLPSpec, ModelSpec, RouterSpec, StateSpaceSpec

# ---- Granite 4 --------------------------------------------------------------------------------------------------


def _granite_hybrid(fields: Fields) -> ModelSpec:
    fields.only(hidden_act="silu")  # of convolutions too, which have no other here
    if fields.get("position_embedding_type") not in (None, "nope", "rope"):
        raise fields.unsupported("position_embedding_type", "This build has rope and nope.")
    spec = granite(fields, "granitemoehybrid", rotary=fields.get("position_embedding_type") == "rope")
    spec = with_states(spec, _granite_state(fields, spec), attending_layers(fields, [False] * len(spec.layers)))
    if _has_experts(fields):
        return with_granite_experts(fields, spec)
    return change_mlp(spec, intermediate_size=fields.integer("shared_intermediate_size", 1024))


def _has_experts(fields: Fields) -> bool:
    return fields.integer("num_local_experts", 8, low=0) > 0


def _granite_state(fields: Fields, spec: ModelSpec) -> StateSpaceSpec:
    heads = fields.integer("mamba_n_heads", 128)
    inner = fields.integer("mamba_expand", 2) * spec.hidden_size
    stated = fields.get("mamba_d_head") not in (None, "auto")
    state = StateSpaceSpec(
        num_heads=heads,
        head_dim=fields.integer("mamba_d_head") if stated else inner // heads,
        state_size=fields.integer("mamba_d_state", 256),
        num_groups=fields.integer("mamba_n_groups", 1),
        kernel=fields.integer("mamba_d_conv", 4, low=2),
        norm=spec.layers[0].norm,
        conv_bias=fields.boolean("mamba_conv_bias", True),
        bias=fields.boolean("mamba_proj_bias", False),
        step_limit=step_limit(fields),
    )
    check_state_space(fields, "mamba_n_groups", state, inner)
    return state


def _granite_names(fields: Fields) -> NameMap:
    names = MOE_NAMES.with_layer({f"mamba.{name}": target for name, target in STATE_SPACE.items()})
    if _has_experts(fields):
        return names
    return names.with_layer({"shared_mlp.input_linear": Fused(GATE_UP), "shared_mlp.output_linear": "mlp.down"})


# ---- Qwen3-Next and Qwen3.5 --------------------------------------------------------------------------------------


def _qwen3_next(fields: Fields) -> ModelSpec:
    spec = _delta_decoder(fields, "qwen3_next", num_key_value_heads=2)
    return _with_experts(fields, spec, (512, 10), sparse_steps(fields, len(spec.layers)))


def _qwen3_5(fields: Fields) -> ModelSpec:
    return _delta_decoder(_text(fields), "qwen3_5", num_key_value_heads=4)


def _qwen3_5_moe(fields: Fields) -> ModelSpec:
    fields = _text(fields)
    spec = _delta_decoder(fields, "qwen3_5_moe", num_key_value_heads=2, intermediate_size=1)
    return _with_experts(fields, spec, (256, 8))


def _text(fields: Fields) -> Fields:
    """The settings of the half that writes, where there is one that sees; of text, positions have one axis."""
    if fields.get("text_config"):
        fields = Fields(fields.mapping("text_config"), f"text_config of {fields.source}")
    rope = {key: value for key, value in fields.mapping("rope_parameters").items() if not key.startswith("mrope_")}
    return fields.changed(rope_parameters=rope)


def _delta_decoder(fields: Fields, family: str, **defaults: Any) -> ModelSpec:
    """Gated attention, in most layers replaced by delta rules, and an MLP; `defaults` of keys."""
    fields = fields.told(head_dim=256, num_attention_heads=16, **defaults)
    fields.only(hidden_act="silu")
    spec = hf_decoder(fields, family, partial_rotary=0.25)
    bias, norm, count = fields.boolean("attention_bias", False), spec.layers[0].norm, len(spec.layers)
    spec = change_attention(spec, head_norm=HeadNormSpec(norm), qkv_bias=bias, output_bias=bias, output_gate=True)
    delta = DeltaSpec(
        num_heads=fields.integer("linear_num_value_heads", 32),
        num_key_heads=fields.integer("linear_num_key_heads", 16),
        key_dim=fields.integer("linear_key_head_dim", 128),
        value_dim=fields.integer("linear_value_head_dim", 128),
        kernel=fields.integer("linear_conv_kernel_dim", 4, low=2),
        norm=norm,
    )
    if delta.num_heads % delta.num_key_heads:
        raise fields.corrupt("linear_num_value_heads", f"is no multiple of {delta.num_key_heads} heads of keys")
    every = fields.integer("full_attention_interval", 4)
    return with_states(spec, delta, attending_layers(fields, [(i + 1) % every == 0 for i in range(count)]))


def _with_experts(fields: Fields, spec: ModelSpec, defaults: tuple[int, int], dense: Container[int] = ()) -> ModelSpec:
    """`defaults`: of the number of experts, and of those of a token."""
    expert = MLPSpec(fields.integer("moe_intermediate_size", 512))
    shared = replace(expert, intermediate_size=fields.integer("shared_expert_intermediate_size", 512))
    router = RouterSpec(normalize=fields.boolean("norm_topk_prob", True))
    moe = hf_experts(fields, expert, router, defaults=defaults, shared=shared, shared_gate=True)
    return with_experts(spec, moe, dense)


def _delta_names(fields: Fields) -> NameMap:
    heads = _text(fields).integer("num_attention_heads", 16)
    return HF_NAMES.with_layer(
        {
            **HEAD_NORMS,
            **expert_names(shared="shared_expert"),
            "mlp.shared_expert_gate": "moe.shared_gate",
            "self_attn.q_proj": Fused(("attention.q", "attention.gate"), "grouped", heads),
            "linear_attn.in_proj_qkvz": Fused(("state.q", "state.k", "state.v", "state.gate"), "grouped"),
            "linear_attn.in_proj_ba": Fused(("state.rate", "state.step"), "grouped"),
            "linear_attn.in_proj_qkv": Fused(("state.q", "state.k", "state.v")),
            "linear_attn.in_proj_z": "state.gate",
            "linear_attn.in_proj_b": "state.rate",
            "linear_attn.in_proj_a": "state.step",
            "linear_attn.conv1d": "state.conv",
            "linear_attn.dt_bias": "state.step_bias",
            "linear_attn.A_log": "state.log_decay",
            "linear_attn.norm": "state.norm",
            "linear_attn.out_proj": "state.out",
        },
        ignored=r"mtp\..*|model\.visual\..*",
        optional_prefixes=("model.language_model.", "model."),
        shifted=r"norm|layers\.\d+\.(attention_norm|mlp_norm|attention\.[qk]_norm)",
    )


FAMILIES = {
    "granitemoehybrid": Family(_granite_hybrid, names=_granite_names),
    "qwen3_next": Family(_qwen3_next, names=_delta_names),
    "qwen3_5": Family(_qwen3_5, names=_delta_names),
    "qwen3_5_text": Family(_qwen3_5, names=_delta_names),
    "qwen3_5_moe": Family(_qwen3_5_moe, names=_delta_names),
    "qwen3_5_moe_text": Family(_qwen3_5_moe, names=_delta_names),
}
