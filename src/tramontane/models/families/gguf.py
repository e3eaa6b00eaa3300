"""What GGUF files of all families have in common: llama.cpp's metadata keys and their defaults.

Owns these keys. What a file says is honoured or refused by its key. Must not know: arrays, files, how a spec is
computed, any one family.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from tramontane.layers.rope import yarn_magnitude
from tramontane.models.families.base import MAX_LAYERS, GGUFTensors, check_experts, check_heads
from tramontane.models.fields import POSITIONS, Fields
from tramontane.models.spec import (
    Activation,
    AttentionSpec,
    HeadNormSpec,
    LayerSpec,
    MLPSpec,
    ModelSpec,
    MoESpec,
    NormSpec,
    RopeScaling,
    RopeSpec,
    RouterSpec,
)

KEYS = frozenset({
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "tensor_data_layout",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "attention.causal",
    "expert_count", "expert_used_count", "pooling_type",
    "rope.dimension_count", "rope.freq_base", "rope.scale_linear",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.attn_factor",
    "rope.scaling.yarn_attn_factor", "rope.scaling.finetuned", "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "rope.scaling.yarn_log_multiplier",
})  # fmt: skip
EXPERT_KEYS = frozenset({
    "expert_feed_forward_length", "expert_shared_feed_forward_length", "expert_shared_count", "expert_weights_scale",
    "expert_weights_norm", "expert_gating_func", "expert_group_count", "expert_group_used_count",
    "leading_dense_block_count",
})  # fmt: skip
"""Those of mixtures. Sizes, and which layers have experts, are also what the tensors say, and are read off them."""


def gguf_decoder(
    fields: Fields,
    tensors: GGUFTensors,
    family: str,
    *,
    interleaved: bool = False,
    rotary: bool = True,
    activation: Activation = "silu",
    gated: bool = True,
    limit: float = 0.0,
    windows: Sequence[int | None] | None = None,
    router: RouterSpec | None = None,
) -> ModelSpec:
    """What files of the llama lineage have in common. Biases, norms of heads and of embeddings, learned positions,
    sinks, tying and which layers have experts are what the tensors say: the metadata has no keys for them.

    `interleaved`: llama.cpp stores q and k of this family with the pairs of rotary positions side by side; `rotary`
    False: it has none; `windows`: one a layer; `router`: what routers have besides biases and corrections, None where
    the family has no experts.
    """
    fields.only(**{"attention.causal": True})
    if router is None:
        fields.only(expert_count=0, expert_used_count=0)
    if fields.get("tensor_data_layout") not in (None, "Meta AI original pth", "jploski"):
        raise fields.unsupported("tensor_data_layout")
    shapes = tensors.shapes
    norm = gguf_norm(fields, tensors)
    embedding = shapes.get("token_embd.weight", (0,))
    count = fields.integer("block_count", high=MAX_LAYERS)
    attention = [_attention(fields, tensors, index, norm, interleaved, rotary) for index in range(count)]
    plain = MLPSpec(1, activation, gated, limit=limit)
    mlp = [_feed_forward(fields, tensors, index, plain, router) for index in range(count)]
    if fields.get("expert_count") and not any(isinstance(each, MoESpec) for each in mlp):
        raise fields.corrupt("expert_count", f"is {fields.get('expert_count')}, but no tensor is an expert's")
    return ModelSpec(
        family=family,
        hidden_size=fields.integer("embedding_length"),
        vocab_size=fields.integer("vocab_size", embedding[0]),
        context_length=fields.integer("context_length", high=POSITIONS),
        layers=tuple(
            LayerSpec(replace(attention[index], window=windows[index] if windows else None), mlp[index], norm)
            for index in range(count)
        ),
        norm=norm,
        tied_embeddings="output.weight" not in shapes,
        head_bias="output.bias" in shapes,
        embedding_norm=norm if "token_embd_norm.weight" in shapes else None,
        positions=shapes.get("position_embd.weight", (0,))[0],
    )


def gguf_norm(fields: Fields, tensors: GGUFTensors) -> NormSpec:
    """The norm whose epsilon the file states; of two, that of a LayerNorm where there is a bias: converters write down
    whatever of either name a configuration has."""
    bias = "output_norm.bias" in tensors.shapes
    rms, layer = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
    if fields.get(layer) is None or (fields.get(rms) is not None and not bias):
        return NormSpec(eps=fields.number(rms, high=1.0))
    return NormSpec("layer", fields.number(layer, high=1.0), bias=bias)


def _attention(
    fields: Fields, tensors: GGUFTensors, index: int, norm: NormSpec, interleaved: bool, rotary: bool
) -> AttentionSpec:
    num_heads = per_layer(fields, "attention.head_count", index)
    num_kv_heads = per_layer(fields, "attention.head_count_kv", index, num_heads)
    check_heads(fields, "attention.head_count_kv", num_heads, num_kv_heads)
    head_dim = fields.integer("attention.key_length", fields.integer("embedding_length") // num_heads)
    if fields.integer("attention.value_length", head_dim) != head_dim:
        raise fields.unsupported("attention.value_length", f"Keys and values must have one length, {head_dim}.")
    shapes, block = tensors.shapes, f"blk.{index}"
    return AttentionSpec(
        num_heads,
        num_kv_heads,
        head_dim,
        gguf_rope(fields, head_dim, tensors, interleaved) if rotary else None,
        sinks=f"{block}.attn_sinks.weight" in shapes,
        head_norm=_head_norm(tensors, block, norm, head_dim),
        qkv_bias=f"{block}.attn_q.bias" in shapes or f"{block}.attn_qkv.bias" in shapes,
        output_bias=f"{block}.attn_output.bias" in shapes,
    )


def _head_norm(tensors: GGUFTensors, block: str, norm: NormSpec, head_dim: int) -> HeadNormSpec | None:
    """Norms of queries and keys, of the model's kind; whether heads share one is in the shape."""
    shape = tensors.shapes.get(f"{block}.attn_q_norm.weight")
    if shape is None:
        return None
    norm = replace(norm, bias=f"{block}.attn_q_norm.bias" in tensors.shapes)
    if len(shape) > 1:
        return HeadNormSpec(norm, "heads")
    return HeadNormSpec(norm, "head" if shape == (head_dim,) else "all")


def _feed_forward(
    fields: Fields, tensors: GGUFTensors, index: int, mlp: MLPSpec, router: RouterSpec | None
) -> MLPSpec | MoESpec:
    """`mlp`: what the family's MLPs and experts have besides sizes and biases."""

    def has(*names: str) -> bool:
        return any(tensors.shape(index, name) is not None for name in names)

    stored = tensors.shape(index, "ffn_up_exps.weight") or tensors.shape(index, "ffn_up.0.weight")
    if router is None or not stored:
        size = per_layer(fields, "feed_forward_length", index)
        return replace(mlp, intermediate_size=size, bias=has("ffn_up.bias", "ffn_gate.bias"))
    router = replace(
        _router(fields, router), bias=has("ffn_gate_inp.bias"), correction=has("exp_probs_b.bias", "exp_probs_b")
    )
    shared = tensors.shape(index, "ffn_up_shexp.weight")
    moe = MoESpec(
        fields.integer("expert_count"),
        fields.integer("expert_used_count"),
        replace(mlp, intermediate_size=(0, *stored)[-2], bias=has("ffn_up_exps.bias")),
        router,
        shared=replace(mlp, intermediate_size=(0, *shared)[-2]) if shared else None,
        shared_gate=has("ffn_gate_inp_shexp.weight"),
    )
    check_experts(fields, "expert_used_count", moe)
    return moe


def _router(fields: Fields, router: RouterSpec) -> RouterSpec:
    """What the keys say of the family's router."""
    functions: Mapping[int, tuple[Literal["softmax", "sigmoid"], bool]] = {
        1: ("softmax", router.normalize),
        2: ("sigmoid", router.normalize),
        3: ("softmax", True),  # over the logits of the chosen, which is the same
    }
    score, normalize = router.score, router.normalize
    if fields.get("expert_gating_func"):  # zero says nothing, here and below
        if fields.integer("expert_gating_func") not in functions:
            raise fields.unsupported("expert_gating_func", f"This build has {', '.join(map(str, functions))}.")
        score, normalize = functions[fields.integer("expert_gating_func")]
    scale = fields.number("expert_weights_scale") if fields.get("expert_weights_scale") else router.scale
    return replace(
        router,
        score=score,
        normalize=fields.boolean("expert_weights_norm", normalize),
        scale=scale,
        groups=fields.integer("expert_group_count", router.groups),
        top_groups=fields.integer("expert_group_used_count", router.top_groups),
    )


def per_layer(fields: Fields, key: str, index: int, default: int | None = None) -> int:
    """An integer, or a list of one a layer."""
    value = fields.get(key)
    if not isinstance(value, list):
        return fields.integer(key, default)
    if len(value) <= index:
        raise fields.corrupt(key, f"has {len(value)} values, fewer than layers")
    return Fields({key: value[index]}, fields.source).integer(key)


def gguf_rope(fields: Fields, head_dim: int, tensors: GGUFTensors, interleaved: bool) -> RopeSpec:
    factors = tensors.rope_factors
    dim = fields.integer("rope.dimension_count", head_dim, high=head_dim)
    if dim % 2:
        raise fields.corrupt("rope.dimension_count", f"is {dim}, not even")
    if factors is not None and (len(factors) != dim // 2 or not all(math.isfinite(f) and f > 0 for f in factors)):
        problem = f"is {dim}, but rope_freqs.weight is not {dim // 2} positive numbers"
        raise fields.corrupt("rope.dimension_count", problem)
    theta = fields.number("rope.freq_base", 10000.0, low=1.0)
    return RopeSpec(theta, dim, interleaved, _gguf_scaling(fields, tensors), factors)


def _gguf_scaling(fields: Fields, tensors: GGUFTensors) -> RopeScaling | None:
    kind = fields.text("rope.scaling.type", "linear" if fields.get("rope.scale_linear") else "none")
    magnitude = fields.number("rope.scaling.attn_factor", fields.number("rope.scaling.yarn_attn_factor", 1.0))
    fields.only(**{"rope.scaling.yarn_log_multiplier": 0.0, "rope.scaling.yarn_ext_factor": 1.0})
    original = fields.integer(
        "rope.scaling.original_context_length", fields.integer("context_length", high=POSITIONS), high=POSITIONS
    )
    if tensors.long_factors or tensors.short_factors:  # files do not name this kind
        if not all(math.isfinite(f) and f > 0 for f in (*tensors.long_factors, *tensors.short_factors)):
            raise fields.corrupt("rope.scaling.original_context_length", "has factors that are not positive numbers")
        factor = fields.integer("context_length", high=POSITIONS) / original
        return RopeScaling(
            "longrope",
            factor,
            original,
            attention_factor=magnitude,
            short_factors=tensors.short_factors,
            long_factors=tensors.long_factors,
        )
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
        original,
        beta_fast=fields.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=fields.number("rope.scaling.yarn_beta_slow", 1.0),
        attention_factor=magnitude * yarn_magnitude(factor),
    )
