"""Families: what a checkpoint says of itself, as a ModelSpec; one small function a family and source.

Owns the keys of Hugging Face configs and GGUF metadata and their defaults (those of transformers' config classes and
of llama.cpp). Everything a config says is honoured or refused by its key. Must not know: arrays, files, how a spec is
computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tramontane.errors import UnsupportedModel
from tramontane.layers.rope import yarn_magnitude
from tramontane.models.fields import POSITIONS, Fields
from tramontane.models.spec import Activation, LayerSpec, ModelSpec, RopeScaling, RopeSpec

_MAX_LAYERS = 4096
_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}


@dataclass(frozen=True)
class GGUFTensors:
    """What a spec needs of a GGUF file besides its metadata."""

    shapes: Mapping[str, tuple[int, ...]]
    rope_factors: tuple[float, ...] | None = None
    """The values of `rope_freqs.weight`, where the file has it."""


def spec_from_hf(config: Mapping[str, Any], architecture: str = "auto", source: str = "config.json") -> ModelSpec:
    """The spec that a `config.json` describes, read as `architecture` ("auto": its `model_type`).

    Raises CorruptCheckpoint for missing or impossible values and UnsupportedModel for what this build lacks, both
    naming the key.
    """
    fields = Fields(config, source)
    name = fields.text("model_type") if architecture == "auto" else architecture
    family = _family(name, source)
    classes = config.get("architectures") or []
    causal = isinstance(classes, list) and all(str(kind).endswith("ForCausalLM") for kind in classes)
    if architecture == "auto" and not causal:
        raise fields.unsupported("architectures", f"Pass architecture={name!r} to load it as a causal language model.")
    return family.from_hf(fields)


def spec_from_gguf(
    metadata: Mapping[str, Any], tensors: GGUFTensors, architecture: str = "auto", source: str = "GGUF metadata"
) -> ModelSpec:
    """The spec that a GGUF file's metadata and tensors describe; raises as `spec_from_hf`."""
    stored = Fields(metadata, source).text("general.architecture")
    family = _family(stored if architecture == "auto" else architecture, source)
    fields = Fields(metadata, source, f"{stored}.")
    fields.known(_GGUF_KEYS)
    return family.from_gguf(fields, tensors)


# ---- Hugging Face ---------------------------------------------------------------------------------------------


def _llama_from_hf(fields: Fields) -> ModelSpec:
    fields.only(sliding_window=None, layer_types=None, is_causal=True)
    attention_bias, mlp_bias = fields.boolean("attention_bias", False), fields.boolean("mlp_bias", False)
    return _hf_decoder(fields, "llama", attention_bias, attention_bias, mlp_bias, _full)


def _qwen2_from_hf(fields: Fields) -> ModelSpec:
    fields.only(attention_bias=True, mlp_bias=False, use_mrope=False, is_causal=True)
    return _hf_decoder(fields, "qwen2", True, False, False, _qwen2_windows)


def _hf_decoder(
    fields: Fields,
    family: str,
    qkv_bias: bool,
    output_bias: bool,
    mlp_bias: bool,
    windows: Callable[[Fields, int], Sequence[int | None]],
) -> ModelSpec:
    """What configs of the llama lineage have in common."""
    hidden_size = fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", hidden_size // num_heads)
    activation = _ACTIVATIONS.get(fields.text("hidden_act", "silu"))
    if activation is None:
        raise fields.unsupported("hidden_act", f"This build has {', '.join(_ACTIVATIONS)}.")
    num_kv_heads = fields.integer("num_key_value_heads", num_heads)
    _check_heads(fields, "num_key_value_heads", num_heads, num_kv_heads)
    norm_eps = fields.number("rms_norm_eps", 1e-6, high=1.0)
    rope = _hf_rope(fields, head_dim)
    layers = tuple(
        LayerSpec(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            intermediate_size=fields.integer("intermediate_size"),
            rope=rope,
            activation=activation,
            norm_eps=norm_eps,
            window=window,
            qkv_bias=qkv_bias,
            output_bias=output_bias,
            mlp_bias=mlp_bias,
        )
        for window in windows(fields, fields.integer("num_hidden_layers", high=_MAX_LAYERS))
    )
    return ModelSpec(
        family=family,
        hidden_size=hidden_size,
        vocab_size=fields.integer("vocab_size"),
        context_length=_hf_context_length(fields, rope),
        layers=layers,
        norm_eps=norm_eps,
        tied_embeddings=fields.boolean("tie_word_embeddings", False),
    )


def _full(fields: Fields, count: int) -> Sequence[int | None]:
    return [None] * count


def _qwen2_windows(fields: Fields, count: int) -> Sequence[int | None]:
    """A window a layer: `layer_types` decides; without it the layers from `max_window_layers` on slide."""
    window = None
    if fields.boolean("use_sliding_window", False):
        window = fields.integer("sliding_window", 4096, high=POSITIONS)
    kinds = fields.get("layer_types")
    if kinds is None:
        first = fields.integer("max_window_layers", 28, low=0)
        return [window if index >= first else None for index in range(count)]
    if not isinstance(kinds, list) or len(kinds) != count:
        raise fields.corrupt("layer_types", f"is not a list of {count} kinds, one a layer")
    known = {"full_attention": None, "sliding_attention": window}
    if any(not isinstance(kind, str) or kind not in known for kind in kinds):
        raise fields.unsupported("layer_types", f"This build has {', '.join(known)}.")
    if window is None and "sliding_attention" in kinds:
        raise fields.corrupt("layer_types", "has sliding_attention, but use_sliding_window is false")
    return [known[kind] for kind in kinds]


def _hf_rope(fields: Fields, head_dim: int) -> RopeSpec:
    """`rope_parameters`, or the older `rope_scaling` beside `rope_theta`; where both stand, the older decides."""
    key = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    rope = Fields(fields.mapping(key), f"{key} of {fields.source}")
    if any(isinstance(value, Mapping) for value in rope.values.values()):
        raise fields.unsupported(key)
    fields.only(partial_rotary_factor=1.0)
    rope.only(partial_rotary_factor=1.0)
    theta = rope.number("rope_theta", fields.number("rope_theta", 10000.0, low=1.0), low=1.0)
    if head_dim % 2:
        raise fields.corrupt("head_dim", f"is {head_dim}, not even as rotary positions need")
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind not in _HF_SCALINGS:
        which = "rope_type" if rope.get("rope_type") else "type"
        raise rope.unsupported(which, f"This build has {', '.join(_HF_SCALINGS)}.")
    keys, read = _HF_SCALINGS[kind]
    rope.known({"rope_type", "type", "rope_theta", "partial_rotary_factor", *keys})
    limit = fields.integer("max_position_embeddings", high=POSITIONS)
    original_key = "original_max_position_embeddings"
    place = rope if fields.get(original_key) is None else fields
    original = place.integer(original_key, limit, high=POSITIONS)
    return RopeSpec(theta=theta, dim=head_dim, scaling=read(rope, original, limit))


def _no_scaling(rope: Fields, original: int, limit: int) -> RopeScaling | None:
    return None


def _linear(rope: Fields, original: int, limit: int) -> RopeScaling:
    return RopeScaling("linear", rope.number("factor"))


def _llama3(rope: Fields, original: int, limit: int) -> RopeScaling:
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if high <= low:
        raise rope.corrupt("high_freq_factor", f"is {high:g}, not above low_freq_factor {low:g}")
    return RopeScaling("llama3", rope.number("factor"), original, low_freq_factor=low, high_freq_factor=high)


def _yarn(rope: Fields, original: int, limit: int) -> RopeScaling:
    factor = rope.number("factor", limit / original)
    scales = [rope.number(key) for key in ("mscale", "mscale_all_dim") if rope.get(key)]
    attention = None
    if rope.get("attention_factor") is not None:
        attention = rope.number("attention_factor")
    elif len(scales) == 2:
        attention = yarn_magnitude(factor, scales[0]) / yarn_magnitude(factor, scales[1])
    return RopeScaling(
        "yarn",
        factor,
        original,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        attention_factor=attention,
        truncate=rope.boolean("truncate", True),
    )


# rope_type -> (the keys it has, how they are read)
_HF_SCALINGS: Mapping[str, tuple[tuple[str, ...], Callable[[Fields, int, int], RopeScaling | None]]] = {
    "default": ((), _no_scaling),
    "linear": (("factor",), _linear),
    "llama3": (("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"), _llama3),
    "yarn": (
        (
            *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
            *("mscale", "mscale_all_dim", "truncate"),
        ),
        _yarn,
    ),
}


def _hf_context_length(fields: Fields, rope: RopeSpec) -> int:
    """`max_position_embeddings`; checkpoints that ship without YaRN and ask to switch it on leave that unstretched."""
    limit = fields.integer("max_position_embeddings", high=POSITIONS)
    if rope.scaling is None or rope.scaling.kind != "yarn":
        return limit
    return min(max(limit, int(rope.scaling.original_context_length * rope.scaling.factor)), POSITIONS)


# ---- GGUF -----------------------------------------------------------------------------------------------------

_GGUF_KEYS = frozenset({
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "tensor_data_layout",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "attention.causal", "expert_count", "expert_used_count",
    "rope.dimension_count", "rope.freq_base", "rope.scale_linear",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.attn_factor",
    "rope.scaling.yarn_attn_factor", "rope.scaling.finetuned", "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "rope.scaling.yarn_log_multiplier",
})  # fmt: skip


def _llama_from_gguf(fields: Fields, tensors: GGUFTensors) -> ModelSpec:
    """llama.cpp stores llama's q and k with the pairs of rotary positions interleaved."""
    return _gguf_decoder(fields, tensors, "llama", interleaved=True)


def _qwen2_from_gguf(fields: Fields, tensors: GGUFTensors) -> ModelSpec:
    return _gguf_decoder(fields, tensors, "qwen2", interleaved=False)


def _gguf_decoder(fields: Fields, tensors: GGUFTensors, family: str, *, interleaved: bool) -> ModelSpec:
    """Biases and tying are what the tensors say: the metadata has no keys for them."""
    fields.only(**{"expert_count": 0, "expert_used_count": 0, "attention.causal": True})
    if fields.get("tensor_data_layout") not in (None, "Meta AI original pth"):
        raise fields.unsupported("tensor_data_layout")
    hidden_size = fields.integer("embedding_length")
    norm_eps = fields.number("attention.layer_norm_rms_epsilon", high=1.0)
    embedding = tensors.shapes.get("token_embd.weight", (0,))
    return ModelSpec(
        family=family,
        hidden_size=hidden_size,
        vocab_size=fields.integer("vocab_size", embedding[0]),
        context_length=fields.integer("context_length", high=POSITIONS),
        layers=tuple(
            _gguf_layer(fields, tensors, index, hidden_size, norm_eps, interleaved)
            for index in range(fields.integer("block_count", high=_MAX_LAYERS))
        ),
        norm_eps=norm_eps,
        tied_embeddings="output.weight" not in tensors.shapes,
    )


def _gguf_layer(
    fields: Fields, tensors: GGUFTensors, index: int, hidden_size: int, norm_eps: float, interleaved: bool
) -> LayerSpec:
    num_heads = _per_layer(fields, "attention.head_count", index)
    num_kv_heads = _per_layer(fields, "attention.head_count_kv", index, num_heads)
    _check_heads(fields, "attention.head_count_kv", num_heads, num_kv_heads)
    head_dim = fields.integer("attention.key_length", hidden_size // num_heads)
    if fields.integer("attention.value_length", head_dim) != head_dim:
        raise fields.unsupported("attention.value_length", f"Keys and values must have one length, {head_dim}.")
    shapes = tensors.shapes
    return LayerSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=_per_layer(fields, "feed_forward_length", index),
        rope=_gguf_rope(fields, head_dim, tensors.rope_factors, interleaved),
        norm_eps=norm_eps,
        qkv_bias=f"blk.{index}.attn_q.bias" in shapes,
        output_bias=f"blk.{index}.attn_output.bias" in shapes,
        mlp_bias=f"blk.{index}.ffn_gate.bias" in shapes,
    )


def _per_layer(fields: Fields, key: str, index: int, default: int | None = None) -> int:
    """An integer, or a list of one a layer."""
    value = fields.get(key)
    if not isinstance(value, list):
        return fields.integer(key, default)
    if len(value) <= index:
        raise fields.corrupt(key, f"has {len(value)} values, fewer than layers")
    return Fields({key: value[index]}, fields.source).integer(key)


def _gguf_rope(fields: Fields, head_dim: int, factors: tuple[float, ...] | None, interleaved: bool) -> RopeSpec:
    dim = fields.integer("rope.dimension_count", head_dim, high=head_dim)
    if dim % 2:
        raise fields.corrupt("rope.dimension_count", f"is {dim}, not even")
    if factors is not None and (len(factors) != dim // 2 or not all(math.isfinite(f) and f > 0 for f in factors)):
        problem = f"is {dim}, but rope_freqs.weight is not {dim // 2} positive numbers"
        raise fields.corrupt("rope.dimension_count", problem)
    theta = fields.number("rope.freq_base", 10000.0, low=1.0)
    return RopeSpec(theta, dim, interleaved, _gguf_scaling(fields), factors)


def _gguf_scaling(fields: Fields) -> RopeScaling | None:
    kind = fields.text("rope.scaling.type", "linear" if fields.get("rope.scale_linear") else "none")
    magnitude = fields.number("rope.scaling.attn_factor", fields.number("rope.scaling.yarn_attn_factor", 1.0))
    fields.only(**{"rope.scaling.yarn_log_multiplier": 0.0, "rope.scaling.yarn_ext_factor": 1.0})
    if kind != "yarn" and magnitude != 1.0:
        raise fields.unsupported("rope.scaling.attn_factor")
    if kind == "none":
        return None
    factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 1.0))
    if kind == "linear":
        return RopeScaling("linear", factor)
    if kind != "yarn":
        raise fields.unsupported("rope.scaling.type", "This build has none, linear, yarn.")
    return RopeScaling(
        "yarn",
        factor,
        fields.integer("rope.scaling.original_context_length", fields.integer("context_length"), high=POSITIONS),
        beta_fast=fields.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=fields.number("rope.scaling.yarn_beta_slow", 1.0),
        attention_factor=magnitude * yarn_magnitude(factor),
    )


# ---- the table ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    from_hf: Callable[[Fields], ModelSpec]
    from_gguf: Callable[[Fields, GGUFTensors], ModelSpec]


FAMILIES: Mapping[str, Family] = {
    "llama": Family(_llama_from_hf, _llama_from_gguf),
    "qwen2": Family(_qwen2_from_hf, _qwen2_from_gguf),
}


def _family(name: str, source: str) -> Family:
    if name not in FAMILIES:
        raise UnsupportedModel(
            f"{source} is of architecture {name[:60]!r}, which this build does not have.",
            f"It has {', '.join(FAMILIES)}; architecture= reads a checkpoint as one of them.",
        )
    return FAMILIES[name]


def _check_heads(fields: Fields, key: str, num_heads: int, num_kv_heads: int) -> None:
    if num_heads % num_kv_heads:
        raise fields.corrupt(key, f"is {num_kv_heads}, which does not divide {num_heads} heads")
