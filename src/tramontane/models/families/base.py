"""What families have in common: the table's row, and readers of the keys that configs of Hugging Face share.

Owns the defaults of those keys (those of transformers' config classes). Everything a config says is honoured or refused
by its key. Must not know: arrays, files, how a spec is computed, any one family.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tramontane.layers.rope import yarn_magnitude
from tramontane.models.fields import POSITIONS, Fields
from tramontane.models.names import GGUF_NAMES, HF_NAMES, NameMap
from tramontane.models.spec import (
    Activation,
    AttentionSpec,
    LayerSpec,
    MLPSpec,
    ModelSpec,
    MoESpec,
    NormSpec,
    RopeScaling,
    RopeSpec,
)
from tramontane.records import dataclass

MAX_LAYERS = 4096
ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "gelu_quick",
    "relu": "relu",
    "relu2": "relu_squared",
}


@dataclass(frozen=True)
class GGUFTensors:
    """What a spec needs of a GGUF file besides its metadata."""

    shapes: Mapping[str, tuple[int, ...]]
    rope_factors: tuple[float, ...] | None = None
    """The values of `rope_freqs.weight`, where the file has it."""
    long_factors: tuple[float, ...] = ()
    """Those of `rope_factors_long.weight`."""
    short_factors: tuple[float, ...] = ()
    """Those of `rope_factors_short.weight`."""

    def shape(self, index: int, name: str) -> tuple[int, ...] | None:
        """Of one layer's tensor; None where it has none of this name."""
        return self.shapes.get(f"blk.{index}.{name}")


@dataclass(frozen=True)
class Family:
    """How one kind of model is read. A source that is None is not known for it."""

    from_hf: Callable[[Fields], ModelSpec] | None = None
    names: NameMap | Callable[[Fields], NameMap] = HF_NAMES
    """Of safetensors, or how they follow from the configuration."""
    from_gguf: Callable[[Fields, GGUFTensors], ModelSpec] | None = None
    gguf_names: NameMap = GGUF_NAMES
    gguf_keys: frozenset[str] = frozenset()
    """Metadata that it honours beyond what all do."""


# ---- changing specs -------------------------------------------------------------------------------------------


def change_layers(spec: ModelSpec, **changes: Any) -> ModelSpec:
    """The spec with these fields in every layer."""
    return replace(spec, layers=tuple(replace(layer, **changes) for layer in spec.layers))


def change_mlp(spec: ModelSpec, **changes: Any) -> ModelSpec:
    """The spec with these fields in every layer's MLP; mixtures of experts stay as they are."""
    layers = tuple(
        replace(layer, mlp=replace(layer.mlp, **changes)) if isinstance(layer.mlp, MLPSpec) else layer
        for layer in spec.layers
    )
    return replace(spec, layers=layers)


def change_attention(spec: ModelSpec, **changes: Any) -> ModelSpec:
    """The spec with these fields in every layer's attention."""
    return each_attention(spec, lambda index, attention: replace(attention, **changes))


def each_attention(spec: ModelSpec, change: Callable[[int, AttentionSpec], AttentionSpec]) -> ModelSpec:
    """The spec with what `change` makes of each layer's index and attention, where a layer has one."""
    layers = tuple(
        replace(layer, attention=change(index, layer.attention)) if layer.attention else layer
        for index, layer in enumerate(spec.layers)
    )
    return replace(spec, layers=layers)


def with_experts(spec: ModelSpec, moe: MoESpec, dense: Container[int] = ()) -> ModelSpec:
    """The spec with a mixture of experts in place of each layer's MLP, but those of the layers `dense`."""
    layers = tuple(layer if index in dense else replace(layer, mlp=moe) for index, layer in enumerate(spec.layers))
    return replace(spec, layers=layers)


# ---- configs of the llama lineage -----------------------------------------------------------------------------


def hf_decoder(
    fields: Fields,
    family: str,
    *,
    norm: NormSpec | None = None,
    windows: Sequence[int | None] | None = None,
    partial_rotary: float = 1.0,
    interleaved: bool = False,
    rotary: bool = True,
    tied: bool = False,
) -> ModelSpec:
    """What configs of the llama lineage have in common: pre-norm attention and a gated MLP, no biases.

    `norm`: None reads rms_norm_eps; `windows`: one a layer; `partial_rotary`: the default of partial_rotary_factor;
    `rotary` False: no layer has rotary positions; `tied`: the default of tie_word_embeddings.
    """
    hidden_size = fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", hidden_size // num_heads)
    num_kv_heads = fields.integer("num_key_value_heads", num_heads)
    check_heads(fields, "num_key_value_heads", num_heads, num_kv_heads)
    norm = norm or NormSpec(eps=fields.number("rms_norm_eps", 1e-6, high=1.0))
    rope = hf_rope(fields, head_dim, partial_rotary, interleaved) if rotary else None
    mlp = MLPSpec(fields.integer("intermediate_size"), hf_activation(fields))
    count = fields.integer("num_hidden_layers", high=MAX_LAYERS)
    attention = AttentionSpec(num_heads, num_kv_heads, head_dim, rope)
    layers = tuple(LayerSpec(replace(attention, window=window), mlp, norm) for window in windows or [None] * count)
    return ModelSpec(
        family=family,
        hidden_size=hidden_size,
        vocab_size=fields.integer("vocab_size"),
        context_length=hf_context_length(fields, rope),
        layers=layers,
        norm=norm,
        tied_embeddings=fields.boolean("tie_word_embeddings", tied),
    )


def hf_activation(fields: Fields, key: str = "hidden_act", default: str = "silu") -> Activation:
    activation = ACTIVATIONS.get(fields.text(key, default))
    if activation is None:
        raise fields.unsupported(key, f"This build has {', '.join(ACTIVATIONS)}.")
    return activation


def hf_layer_types(fields: Fields, count: int, window: int | None) -> list[int | None] | None:
    """A window a layer, as `layer_types` says; None without that key."""
    kinds = fields.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or len(kinds) != count:
        raise fields.corrupt("layer_types", f"is not a list of {count} kinds, one a layer")
    known = {"full_attention": None, "sliding_attention": window}
    if any(not isinstance(kind, str) or kind not in known for kind in kinds):
        raise fields.unsupported("layer_types", f"This build has {', '.join(known)}.")
    if window is None and "sliding_attention" in kinds:
        raise fields.corrupt("layer_types", "has sliding_attention, but no sliding_window is in use")
    return [known[kind] for kind in kinds]


def hf_window(fields: Fields, default: int | None = None) -> int | None:
    """`sliding_window`: null is none, absent is `default`."""
    if fields.get("sliding_window") is None:
        return None if fields.stated("sliding_window") else default
    return fields.integer("sliding_window", high=POSITIONS)


def positive(fields: Fields, key: str, default: float = 0.0) -> float:
    """A positive number; 0, null and false say that there is none, told as 0; absent is `default`."""
    if not fields.stated(key):
        return default
    return fields.number(key) if fields.get(key) else 0.0


def check_heads(fields: Fields, key: str, num_heads: int, num_kv_heads: int) -> None:
    if num_heads % num_kv_heads:
        raise fields.corrupt(key, f"is {num_kv_heads}, which does not divide {num_heads} heads")


def check_experts(fields: Fields, key: str, moe: MoESpec) -> None:
    """Hold a mixture's numbers against each other; `key` is that of experts a token."""
    router = moe.router
    per_group = moe.num_experts // router.groups
    if moe.num_experts % router.groups or router.top_groups > router.groups:
        stated = f"gives {router.top_groups} of {router.groups} groups"
        raise fields.corrupt(key, f"is {moe.top_k}, but the configuration {stated} of {moe.num_experts} experts")
    if moe.top_k > per_group * router.top_groups or (router.groups > 1 and per_group < 2):
        raise fields.corrupt(key, f"is {moe.top_k} of {moe.num_experts} experts in {router.groups} groups")


# ---- rotary positions -----------------------------------------------------------------------------------------


def hf_rope(
    fields: Fields, head_dim: int, partial: float = 1.0, interleaved: bool = False, theta: float = 10000.0
) -> RopeSpec:
    """`rope_parameters`, or the older `rope_scaling` beside `rope_theta`; where both stand, the older decides.

    `partial`, `theta`: the defaults of partial_rotary_factor and rope_theta.
    """
    key = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    rope = Fields(fields.mapping(key), f"{key} of {fields.source}")
    if any(isinstance(value, Mapping) for value in rope.values.values()):
        raise fields.unsupported(key)
    partial = rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", partial, high=1.0), high=1.0)
    theta = rope.number("rope_theta", fields.number("rope_theta", theta, low=1.0), low=1.0)
    dim = int(head_dim * partial)
    if dim % 2 or not dim:
        whole = f"head_dim {head_dim} with {dim} rotated elements"
        raise fields.corrupt("head_dim", f"gives {whole}; rotary positions need an even number of them")
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
    return RopeSpec(theta, dim, interleaved, read(rope, original, limit))


def _no_scaling(rope: Fields, original: int, limit: int) -> RopeScaling | None:
    return None


def _linear(rope: Fields, original: int, limit: int) -> RopeScaling:
    return RopeScaling("linear", rope.number("factor"))


def _dynamic(rope: Fields, original: int, limit: int) -> RopeScaling:
    return RopeScaling("dynamic", rope.number("factor"), limit)


def _longrope(rope: Fields, original: int, limit: int) -> RopeScaling:
    factor = rope.number("factor", limit / original)
    attention = rope.number("attention_factor") if rope.get("attention_factor") is not None else None
    short, long = (rope.numbers(key) for key in ("short_factor", "long_factor"))
    return RopeScaling("longrope", factor, original, attention_factor=attention, short_factors=short, long_factors=long)


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
    "dynamic": (("factor",), _dynamic),
    "longrope": (
        ("factor", "short_factor", "long_factor", "original_max_position_embeddings", "attention_factor"),
        _longrope,
    ),
    "llama3": (("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"), _llama3),
    "yarn": (
        (
            *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
            *("mscale", "mscale_all_dim", "truncate"),
        ),
        _yarn,
    ),
}


def hf_context_length(fields: Fields, rope: RopeSpec | None) -> int:
    """`max_position_embeddings`; checkpoints that ship without a stretch and ask to switch it on leave it as it was."""
    limit = fields.integer("max_position_embeddings", high=POSITIONS)
    if rope is None or rope.scaling is None or rope.scaling.kind not in ("yarn", "dynamic"):
        return limit
    return min(max(limit, int(rope.scaling.original_context_length * rope.scaling.factor)), POSITIONS)
