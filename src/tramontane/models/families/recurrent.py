"""Models whose layers keep a state of fixed size, all of them or most: Mamba-2, LFM2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from tramontane.models.families.base import (
    MAX_LAYERS,
    Family,
    change_attention,
    change_mlp,
    hf_decoder,
    with_experts,
)
from tramontane.models.families.experts import expert_names, hf_experts
from tramontane.models.fields import SIZE, Fields
from tramontane.models.names import Fused, NameMap
from tramontane.models.spec import (
    ConvSpec,
    HeadNormSpec,
    LayerSpec,
    MLPSpec,
    ModelSpec,
    NormSpec,
    RouterSpec,
    StateSpaceSpec,
    StateSpec,
)

_UNBOUNDED = 1 << 20
"""Positions of a model that counts none."""


def with_states(spec: ModelSpec, state: StateSpec, attending: Sequence[bool]) -> ModelSpec:
    """The spec with a state in place of attention in all layers but those that are `attending`."""
    layers = tuple(
        layer if attends else replace(layer, attention=None, state=state)
        for layer, attends in zip(spec.layers, attending, strict=True)
    )
    return replace(spec, layers=layers)


def attending_layers(fields: Fields, default: Sequence[bool]) -> Sequence[bool]:
    """Which layers attend, as `layer_types` says; `default` without that key."""
    kinds = fields.get("layer_types")
    if kinds is None:
        return default
    if not isinstance(kinds, list) or len(kinds) != len(default):
        raise fields.corrupt("layer_types", f"is not a list of {len(default)} kinds, one a layer")
    known = {"full_attention": True, "attention": True, "conv": False, "linear_attention": False, "mamba": False}
    if any(not isinstance(kind, str) or kind not in known for kind in kinds):
        raise fields.unsupported("layer_types", f"This build has {', '.join(known)}.")
    return [known[kind] for kind in kinds]


# ---- LFM2 -----------------------------------------------------------------------------------------------------


def _lfm2(fields: Fields) -> ModelSpec:
    fields = fields.told({"intermediate_size": "block_ff_dim"})
    spec = _lfm2_decoder(fields, "lfm2")
    inner = fields.integer("intermediate_size", 12288)
    if fields.boolean("block_auto_adjust_ff_dim", True):
        multiple = fields.integer("block_multiple_of", 256)
        inner = int(fields.number("block_ffn_dim_multiplier", 1.0) * int(2 * inner / 3))
        inner = -(-inner // multiple) * multiple
    return change_mlp(spec, intermediate_size=inner)


def _lfm2_moe(fields: Fields) -> ModelSpec:
    spec = _lfm2_decoder(fields, "lfm2_moe")
    router = RouterSpec(
        "sigmoid",
        normalize=fields.boolean("norm_topk_prob", True),
        scale=fields.number("routed_scaling_factor", 1.0),
        correction=fields.boolean("use_expert_bias", True),
    )
    moe = hf_experts(fields, MLPSpec(fields.integer("moe_intermediate_size", 1792)), router, defaults=(32, 4))
    return with_experts(spec, moe, range(fields.integer("num_dense_layers", 2, low=0)))


def _lfm2_decoder(fields: Fields, family: str) -> ModelSpec:
    fields = fields.told({"tie_word_embeddings": "tie_embedding"}, rope_theta=1e6)
    norm = NormSpec(eps=fields.number("norm_eps", 1e-5, high=1.0))
    spec = change_attention(hf_decoder(fields, family, norm=norm, tied=True), head_norm=HeadNormSpec(norm))
    kernel, bias = fields.integer("conv_L_cache", 3, low=2, high=SIZE), fields.boolean("conv_bias", False)
    count, stated = len(spec.layers), fields.get("full_attn_idxs")
    attending = list(range(count)) if stated is None else stated
    if not isinstance(attending, list) or any(type(index) is not int for index in attending):
        raise fields.corrupt("full_attn_idxs", "is not a list of layers")
    default = [index in attending for index in range(count)]
    return with_states(spec, ConvSpec(spec.hidden_size, kernel, bias), attending_layers(fields, default))


_LFM2_NAMES = NameMap(
    fixed={"embed_tokens": "embedding", "embedding_norm": "norm", "lm_head": "head"},
    layer_prefix="layers.",
    layer={
        "operator_norm": "attention_norm",
        "self_attn.q_proj": "attention.q",
        "self_attn.k_proj": "attention.k",
        "self_attn.v_proj": "attention.v",
        "self_attn.out_proj": "attention.o",
        "self_attn.q_layernorm": "attention.q_norm",
        "self_attn.k_layernorm": "attention.k_norm",
        "conv.in_proj": Fused(("state.input_gate", "state.output_gate", "state.value")),
        "conv.conv": "state.conv",
        "conv.out_proj": "state.out",
        "ffn_norm": "mlp_norm",
        "feed_forward.w1": "mlp.gate",
        "feed_forward.w3": "mlp.up",
        "feed_forward.w2": "mlp.down",
        **expert_names("feed_forward", projections=("w1", "w3", "w2")),
        "feed_forward.expert_bias": "moe.router.correction",
    },
    optional_prefixes=("model.",),
)


# ---- Mamba-2 --------------------------------------------------------------------------------------------------


def _mamba2(fields: Fields) -> ModelSpec:
    fields.only(hidden_act="silu")
    hidden = fields.integer("hidden_size", 4096)
    norm = NormSpec(eps=fields.number("layer_norm_epsilon", 1e-5, high=1.0))
    state = StateSpaceSpec(
        num_heads=fields.integer("num_heads", 128),
        head_dim=fields.integer("head_dim", 64),
        state_size=fields.integer("state_size", 128),
        num_groups=fields.integer("n_groups", 8),
        kernel=fields.integer("conv_kernel", 4, low=2),
        norm=norm,
        conv_bias=fields.boolean("use_conv_bias", True),
        bias=fields.boolean("use_bias", False),
        step_limit=step_limit(fields),
    )
    check_state_space(fields, "n_groups", state, fields.integer("expand", 2) * hidden)
    layer = LayerSpec(None, None, norm, state=state)
    return ModelSpec(
        family="mamba2",
        hidden_size=hidden,
        vocab_size=fields.integer("vocab_size", 32768),
        context_length=_UNBOUNDED,
        layers=(layer,) * fields.integer("num_hidden_layers", 64, high=MAX_LAYERS),
        norm=norm,
        tied_embeddings=fields.boolean("tie_word_embeddings", False),
    )


def step_limit(fields: Fields) -> tuple[float, float]:
    """`time_step_limit`: two numbers, of which the upper may be infinite."""
    limit = fields.get("time_step_limit")
    if limit is None:
        return 0.0, float("inf")
    if not isinstance(limit, list) or len(limit) != 2:
        raise fields.corrupt("time_step_limit", "is not a list of two numbers")
    low, high = (_bound(value) for value in limit)
    if not 0 <= low < high:
        raise fields.corrupt("time_step_limit", "is not a lower and an upper bound")
    return low, high


def _bound(value: object) -> float:
    """-1 for what is no number. JSON has no infinity: it comes as a string, or as an object that tells the type."""
    if isinstance(value, dict):
        value = value.get("__float__", value.get("value"))
    try:
        return -1.0 if isinstance(value, bool) or not isinstance(value, (int, float, str)) else float(value)
    except ValueError:
        return -1.0


def check_state_space(fields: Fields, key: str, state: StateSpaceSpec, inner: int) -> None:
    """Hold heads and groups to each other and to the inner size; `key`: of the groups."""
    if state.inner_size != inner:
        whole = f"{state.num_heads} heads of {state.head_dim}"
        raise fields.corrupt(key, f"goes with {whole}, which are not {inner} channels")
    if state.num_heads % state.num_groups:
        raise fields.corrupt(key, f"is {state.num_groups}, which does not divide {state.num_heads} heads")


STATE_SPACE: Mapping[str, str | Fused] = {
    "in_proj": Fused(("state.gate", "state.mixed", "state.step")),
    "conv1d": "state.conv",
    "dt_bias": "state.step_bias",
    "A_log": "state.log_decay",
    "D": "state.skip",
    "norm": "state.norm",
    "out_proj": "state.out",
}
"""Names of a state space's tensors, below its own."""

_MAMBA2_NAMES = NameMap(
    fixed={"embeddings": "embedding", "norm_f": "norm", "lm_head": "head"},
    layer_prefix="layers.",
    layer={"norm": "attention_norm", **{f"mixer.{name}": target for name, target in STATE_SPACE.items()}},
    optional_prefixes=("backbone.",),
)

FAMILIES = {
    "lfm2": Family(_lfm2, names=_LFM2_NAMES),
    "lfm2_moe": Family(_lfm2_moe, names=_LFM2_NAMES),
    "mamba2": Family(_mamba2, names=_MAMBA2_NAMES),
}
