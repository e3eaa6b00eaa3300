"""Mistral's `params.json`, the settings of its own checkpoint layout, as a ModelSpec.

Owns the keys of that file and their defaults (those of mistral-inference). Everything it says is honoured or refused
by its key. Must not know: arrays, files, how a spec is computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tramontane.models.families.base import with_experts
from tramontane.models.families.experts import hf_experts
from tramontane.models.fields import POSITIONS, Fields
from tramontane.models.spec import (
    AttentionSpec,
    LayerSpec,
    MLPSpec,
    ModelSpec,
    NormSpec,
    RopeScaling,
    RopeSpec,
    RouterSpec,
)

_MAX_LAYERS = 4096
_CONTEXT = 32768
"""Where the file states none: the shortest that a model published without one was trained for."""
_KEYS = frozenset({
    "dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "norm_eps", "vocab_size", "rope_theta",
    "sliding_window", "max_seq_len", "max_position_embeddings", "tied_embeddings", "model_type", "activation",
    "dtype", "max_batch_size", "quantization", "quantization_config", "yarn", "moe",
})  # fmt: skip
_REMEDY = "Use the model in Hugging Face's layout (config.json and model.safetensors), or as a GGUF file."


def spec_from_params(params: Mapping[str, Any], source: str = "params.json") -> ModelSpec:
    """The spec that a `params.json` describes: a llama whose rotary positions pair neighbours.

    Raises CorruptCheckpoint for missing or impossible values and UnsupportedModel for what this build lacks
    (images, sound, other positions), both naming the key.
    """
    fields = Fields(params, source)
    for key in ("vision_encoder", "multimodal"):
        if fields.get(key):
            raise fields.unsupported(key, _REMEDY)
    # Files name what a model does not have, too: empty says nothing.
    Fields({key: value for key, value in params.items() if value not in (None, {}, [], False)}, source).known(_KEYS)
    fields.only(model_type="transformer", activation="silu")
    layers = fields.integer("n_layers", high=_MAX_LAYERS)
    windows = _windows(fields, layers)
    norm_eps = fields.number("norm_eps", 1e-5, high=1.0)
    scaling = _yarn(fields)
    context = min(int(scaling.factor * scaling.original_context_length), POSITIONS) if scaling else _CONTEXT
    spec = ModelSpec(
        family="llama",
        hidden_size=fields.integer("dim"),
        vocab_size=fields.integer("vocab_size"),
        context_length=fields.integer(
            "max_seq_len", fields.integer("max_position_embeddings", context, high=POSITIONS), high=POSITIONS
        ),
        layers=tuple(_layer(fields, norm_eps, window, scaling) for window in windows),
        norm=NormSpec(eps=norm_eps),
        tied_embeddings=fields.boolean("tied_embeddings", False),
    )
    if not fields.mapping("moe"):
        return spec
    moe = Fields(fields.mapping("moe"), f"moe of {fields.source}")
    moe.known({"num_experts", "num_experts_per_tok"})
    return with_experts(spec, hf_experts(moe, MLPSpec(fields.integer("hidden_dim")), RouterSpec()))


def _yarn(fields: Fields) -> RopeScaling | None:
    """`yarn`: how positions beyond the original context are squeezed; what others call beta_fast is `beta` here, and
    beta_slow `alpha`. `apply_scale`: whether queries and keys grow with the factor, as YaRN has it."""
    if not fields.mapping("yarn"):
        return None
    yarn = Fields(fields.mapping("yarn"), f"yarn of {fields.source}")
    yarn.known({"factor", "original_max_position_embeddings", "beta", "alpha", "apply_scale"})
    if yarn.get("apply_scale") is None:  # vLLM then applies it, transformers does not
        raise yarn.unsupported("apply_scale", "Write true or false: libraries take its absence in two ways.")
    return RopeScaling(
        "yarn",
        yarn.number("factor"),
        yarn.integer("original_max_position_embeddings", high=POSITIONS),
        beta_fast=yarn.number("beta"),
        beta_slow=yarn.number("alpha"),
        attention_factor=None if yarn.boolean("apply_scale", False) else 1.0,
    )


def _layer(fields: Fields, norm_eps: float, window: int | None, scaling: RopeScaling | None) -> LayerSpec:
    num_heads = fields.integer("n_heads")
    num_kv_heads = fields.integer("n_kv_heads", num_heads)
    if num_heads % num_kv_heads:
        raise fields.corrupt("n_kv_heads", f"is {num_kv_heads}, which does not divide {num_heads} heads")
    head_dim = fields.integer("head_dim", fields.integer("dim") // num_heads)
    if head_dim % 2:
        raise fields.corrupt("head_dim", f"is {head_dim}, not even as rotary positions need")
    # The first model, the only one with one window for all, was published before the key was.
    theta = fields.number("rope_theta", 1e4 if type(fields.get("sliding_window")) is int else 1e6, low=1.0)
    rope = RopeSpec(theta, head_dim, interleaved=True, scaling=scaling)
    return LayerSpec(
        attention=AttentionSpec(num_heads, num_kv_heads, head_dim, rope, window=window),
        mlp=MLPSpec(fields.integer("hidden_dim")),
        norm=NormSpec(eps=norm_eps),
    )


def _windows(fields: Fields, layers: int) -> Sequence[int | None]:
    """A window a layer: one for all, or a list that repeats over the layers, null for none."""
    pattern = fields.get("sliding_window")
    if not isinstance(pattern, list):
        return [None if pattern is None else fields.integer("sliding_window", high=POSITIONS)] * layers
    if not pattern or layers % len(pattern):
        raise fields.corrupt("sliding_window", f"has {len(pattern)} entries, which do not divide {layers} layers")
    windows = [
        None if one is None else Fields({"sliding_window": one}, fields.source).integer("sliding_window")
        for one in pattern
    ]
    return windows * (layers // len(pattern))
