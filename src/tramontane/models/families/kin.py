"""Models that are a llama but for a thing or two: SmolLM3, EXAONE, ERNIE 4.5, Hunyuan, Seed-OSS, Helium, Arcee."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from tramontane.models.families.base import (
    MAX_LAYERS,
    Family,
    GGUFTensors,
    change_attention,
    change_layers,
    change_mlp,
    each_attention,
    hf_activation,
    hf_decoder,
    hf_layer_types,
    hf_window,
    with_experts,
)
from tramontane.models.families.experts import expert_names, hf_experts
from tramontane.models.families.gguf import EXPERT_KEYS, gguf_decoder
from tramontane.models.families.olmo import POST_NAMES
from tramontane.models.fields import POSITIONS, Fields
from tramontane.models.names import GGUF_NAMES, HF_NAMES, NameMap
from tramontane.models.spec import HeadNormSpec, MLPSpec, ModelSpec, RouterSpec


def _with_biases(fields: Fields, spec: ModelSpec, output: str = "attention_bias") -> ModelSpec:
    """`attention_bias`, and what `output` says of the projection behind attention; `mlp_bias`."""
    bias = fields.boolean("attention_bias", False)
    spec = change_attention(spec, qkv_bias=bias, output_bias=bool(output) and fields.boolean(output, False))
    return change_mlp(spec, bias=fields.boolean("mlp_bias", False))


def without_rope(spec: ModelSpec, layers: Iterable[int]) -> ModelSpec:
    """The spec without rotary positions in these layers (Yang et al., 2025)."""
    plain = set(layers)
    return each_attention(spec, lambda index, each: replace(each, rope=None) if index in plain else each)


# ---- SmolLM3 ---------------------------------------------------------------------------------------------------


def _smollm3(fields: Fields) -> ModelSpec:
    count = fields.integer("num_hidden_layers", high=MAX_LAYERS)
    interval = fields.integer("no_rope_layer_interval", 4, high=MAX_LAYERS)
    rotated = fields.get("no_rope_layers") or [int((index + 1) % interval != 0) for index in range(count)]
    if not isinstance(rotated, list) or len(rotated) != count:
        raise fields.corrupt("no_rope_layers", f"is not a list of {count}, one a layer")
    plain = [index for index, one in enumerate(rotated) if not one]
    window = hf_window(fields) if fields.boolean("use_sliding_window", False) else None
    windows = hf_layer_types(fields, count, window) or [window if i in plain else None for i in range(count)]
    spec = hf_decoder(fields.told(rope_theta=2e6), "smollm3", windows=windows, tied=True)
    return without_rope(_with_biases(fields, spec), plain)


def _smollm3_from_gguf(fields: Fields, tensors: GGUFTensors) -> ModelSpec:
    spec = gguf_decoder(fields, tensors, "smollm3", interleaved=True)
    return without_rope(spec, range(3, len(spec.layers), 4))


# ---- EXAONE ----------------------------------------------------------------------------------------------------


def _exaone(fields: Fields) -> ModelSpec:
    """EXAONE 3: a llama under other names."""
    names = {
        "num_hidden_layers": "num_layers",
        "rms_norm_eps": "layer_norm_epsilon",
        "hidden_act": "activation_function",
    }
    return hf_decoder(fields.told(names, layer_norm_epsilon=1e-5), "exaone")


def _exaone_from_gguf(fields: Fields, tensors: GGUFTensors) -> ModelSpec:
    return gguf_decoder(fields, tensors, "exaone")


def _exaone4(fields: Fields) -> ModelSpec:
    fields = fields.told(rms_norm_eps=1e-5)
    count, window = fields.integer("num_hidden_layers", high=MAX_LAYERS), hf_window(fields, 4096)
    pattern = fields.get("sliding_window_pattern")
    every = len(pattern) if isinstance(pattern, str) else fields.integer("sliding_window_pattern", 4, low=0)
    windows = hf_layer_types(fields, count, window) or [
        window if (index + 1) % max(every, 1) else None for index in range(count)
    ]
    return _norms_behind(hf_decoder(fields, "exaone4", windows=windows), window is not None)


def _exaone4_from_gguf(fields: Fields, tensors: GGUFTensors) -> ModelSpec:
    count = fields.integer("block_count", high=MAX_LAYERS)
    stated = fields.get("attention.sliding_window")
    window = fields.integer("attention.sliding_window", high=POSITIONS) if stated else None
    windows = [window if (index + 1) % 4 else None for index in range(count)]
    return _norms_behind(gguf_decoder(fields, tensors, "exaone4", windows=windows), window is not None)


def _norms_behind(spec: ModelSpec, windowed: bool) -> ModelSpec:
    """EXAONE 4's norms; `windowed`: the model has a window, and layers that do not use it do without positions."""
    spec = change_attention(spec, head_norm=HeadNormSpec(spec.layers[0].norm))
    whole = [index for index, each in enumerate(spec.attentions) if windowed and each.window is None]
    return without_rope(change_layers(spec, placement="post"), whole)


_EXAONE_NAMES = NameMap(
    fixed={"wte": "embedding", "ln_f": "norm", "lm_head": "head"},
    layer_prefix="h.",
    layer={
        "ln_1": "attention_norm",
        **{f"attn.attention.{part}_proj": f"attention.{part}" for part in ("q", "k", "v")},
        "attn.attention.out_proj": "attention.o",
        "ln_2": "mlp_norm",
        "mlp.c_fc_0": "mlp.gate",
        "mlp.c_fc_1": "mlp.up",
        "mlp.c_proj": "mlp.down",
    },
    ignored=r"(transformer\.)?(h\.\d+\.attn\.attention\.)?rotary(_emb)?\.inv_freq",
    optional_prefixes=("transformer.",),
)

# ---- ERNIE 4.5 -------------------------------------------------------------------------------------------------


def _ernie(fields: Fields, family: str = "ernie4_5", head_dim: int | None = 128) -> ModelSpec:
    fields = fields.told(rms_norm_eps=1e-5, rope_theta=5e5, head_dim=head_dim)
    bias = fields.boolean("use_bias", False)
    spec = change_mlp(hf_decoder(fields, family, interleaved=True, tied=True), bias=bias)
    return change_attention(spec, qkv_bias=bias, output_bias=bias)


def _ernie_moe(fields: Fields) -> ModelSpec:
    fields.only(use_bias=False, moe_gate="topk", moe_use_aux_free=True)
    spec = _ernie(fields, "ernie4_5_moe", None)
    count = len(spec.layers)
    first, last = fields.integer("moe_layer_start_index", 1, low=0), fields.integer("moe_layer_end_index", -1, low=-1)
    step = fields.integer("moe_layer_interval", 1, high=MAX_LAYERS)
    expert = MLPSpec(fields.integer("moe_intermediate_size", 1536), hf_activation(fields))
    number = fields.integer("moe_num_shared_experts", 2, low=0)
    shared = replace(expert, intermediate_size=expert.intermediate_size * number) if number else None
    router = RouterSpec(correction=True)
    moe = hf_experts(fields, expert, router, keys=("moe_num_experts",), top_k="moe_k", defaults=(64, 6), shared=shared)
    sparse = range(first, count if last < 0 else last + 1)
    return with_experts(spec, moe, [i for i in range(count) if i not in sparse or (i + 1) % step])


def _ernie_from_gguf(fields: Fields, tensors: GGUFTensors) -> ModelSpec:
    return gguf_decoder(fields, tensors, "ernie4_5", interleaved=True, router=RouterSpec())


# ---- Hunyuan, Seed-OSS, Helium, Arcee ----------------------------------------------------------------------------


def _hunyuan(fields: Fields) -> ModelSpec:
    fields = fields.told(rms_norm_eps=1e-5)
    fields.only(use_qk_norm=True, use_cla=False)
    key = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    rope = Fields(fields.mapping(key), f"{key} of {fields.source}")
    if rope.get("alpha"):  # the base is stretched once and for all, whatever the kind is called
        dim = fields.integer("head_dim", fields.integer("hidden_size") // fields.integer("num_attention_heads"))
        theta = rope.number("rope_theta", fields.number("rope_theta", 10000.0, low=1.0), low=1.0)
        theta *= rope.number("alpha") ** (dim / max(dim - 2, 1))
        fields = fields.changed(**{key: {"rope_type": "default", "rope_theta": theta}})
    return _norms_after_rope(_with_biases(fields, hf_decoder(fields, "hunyuan_v1_dense")))


def _norms_after_rope(spec: ModelSpec) -> ModelSpec:
    return change_attention(spec, head_norm=HeadNormSpec(spec.layers[0].norm, after_rope=True))


def _hunyuan_from_gguf(fields: Fields, tensors: GGUFTensors) -> ModelSpec:
    return _norms_after_rope(gguf_decoder(fields, tensors, "hunyuan_v1_dense"))


def _seed_oss(fields: Fields) -> ModelSpec:
    fields = fields.told(head_dim=128, attention_bias=True)
    return _with_biases(fields, hf_decoder(fields, "seed_oss"), "attention_out_bias")


def _seed_oss_from_gguf(fields: Fields, tensors: GGUFTensors) -> ModelSpec:
    return gguf_decoder(fields, tensors, "seed_oss")


def _helium(fields: Fields) -> ModelSpec:
    fields = fields.told(rms_norm_eps=1e-8, rope_theta=1e5, head_dim=128)
    return _with_biases(fields, hf_decoder(fields, "helium", interleaved=True), "")


def _arcee(fields: Fields) -> ModelSpec:
    fields = fields.told(rms_norm_eps=1e-5, hidden_act="relu2")
    return change_mlp(_with_biases(fields, hf_decoder(fields, "arcee")), gated=False)


def _arcee_from_gguf(fields: Fields, tensors: GGUFTensors) -> ModelSpec:
    return gguf_decoder(fields, tensors, "arcee", interleaved=True, activation="relu_squared", gated=False)


_HEAD_NORMS = {"self_attn.query_layernorm": "attention.q_norm", "self_attn.key_layernorm": "attention.k_norm"}
_SEED_NAMES = GGUF_NAMES.with_layer({"post_attention_norm": "mlp_norm"})
_ERNIE_MOE_NAMES = HF_NAMES.with_layer(
    {**expert_names(), "mlp.moe_statics.e_score_correction_bias": "moe.router.correction"},
    ignored=HF_NAMES.ignored + r"|(model\.)?mtp_.*",
)

FAMILIES = {
    "smollm3": Family(_smollm3, from_gguf=_smollm3_from_gguf),
    "exaone": Family(_exaone, names=_EXAONE_NAMES, from_gguf=_exaone_from_gguf),
    "exaone4": Family(
        _exaone4,
        names=POST_NAMES,
        from_gguf=_exaone4_from_gguf,
        gguf_keys=frozenset({"attention.sliding_window"}),
    ),
    "ernie4_5": Family(_ernie, from_gguf=_ernie_from_gguf),
    "ernie4_5_moe": Family(_ernie_moe, names=_ERNIE_MOE_NAMES),
    "ernie4_5-moe": Family(from_gguf=_ernie_from_gguf, gguf_keys=EXPERT_KEYS | {"interleave_moe_layer_step"}),
    "hunyuan_v1_dense": Family(_hunyuan, names=HF_NAMES.with_layer(_HEAD_NORMS)),
    "hunyuan-dense": Family(from_gguf=_hunyuan_from_gguf),
    "seed_oss": Family(_seed_oss, from_gguf=_seed_oss_from_gguf, gguf_names=_SEED_NAMES),
    "helium": Family(_helium),
    "arcee": Family(_arcee, from_gguf=_arcee_from_gguf),
}
