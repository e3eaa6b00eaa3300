"""BLOOM, MPT and Falcon: fused projections, and positions told by ALiBi (Press et al., 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tramontane.models.families.base import (
    Family,
    GGUFTensors,
    change_attention,
    change_layers,
    change_mlp,
    hf_decoder,
    positive,
)
from tramontane.models.families.gguf import gguf_decoder
from tramontane.models.fields import Fields
from tramontane.models.names import GGUF_NAMES, QKV, Fused, NameMap
from tramontane.models.spec import ModelSpec, NormSpec

_KEYS: Mapping[str, str] = {
    "hidden_size": "n_embed",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "seq_length",
}
"""Our name -> an older one of theirs."""
_MAX_HEADS = 4096


def with_slopes(spec: ModelSpec, fields: Fields, steepest: float = 8.0, scale: float = 1.0) -> ModelSpec:
    """ALiBi's slopes: a geometric series down to 2 ** -steepest over a power of two of heads; further heads take the
    odd places of a series twice as fine. `scale`: of all."""
    heads = spec.attentions[0].num_heads
    if heads > _MAX_HEADS:
        raise fields.corrupt("num_attention_heads", f"is {heads}, more than {_MAX_HEADS}")
    whole = 1 << (heads.bit_length() - 1)
    powers = [steepest * (i + 1) / whole for i in range(whole)]
    powers += [steepest * (2 * i + 1) / (2 * whole) for i in range(heads - whole)]
    return change_attention(spec, slopes=tuple(scale * 2.0**-power for power in powers))


def _bloom(fields: Fields) -> ModelSpec:
    fields = fields.told(_KEYS, hidden_act="gelu_pytorch_tanh", max_position_embeddings=2048)
    fields.only(apply_residual_connection_post_layernorm=False)
    fields = fields.told(intermediate_size=4 * fields.integer("hidden_size"))
    norm = NormSpec("layer", fields.number("layer_norm_epsilon", 1e-5, high=1.0), bias=True)
    spec = change_mlp(hf_decoder(fields, "bloom", norm=norm, rotary=False, tied=True), gated=False, bias=True)
    spec = change_attention(with_slopes(spec, fields), qkv_bias=True, output_bias=True)
    return replace(spec, embedding_norm=norm)


def _mpt(fields: Fields) -> ModelSpec:
    names = {"hidden_size": "d_model", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}
    fields = fields.told({**names, "max_position_embeddings": "max_seq_len"}, hidden_act="gelu")
    fields.only(no_bias=True, norm_type="low_precision_layernorm", logit_scale=None, expansion_ratio=4)
    fields = fields.told(intermediate_size=4 * fields.integer("hidden_size"))
    attn = Fields(fields.mapping("attn_config"), f"attn_config of {fields.source}")
    attn.only(alibi=True, qk_ln=False, prefix_lm=False, attn_uses_sequence_id=False)
    attn.only(attn_type="multihead_attention")
    norm = NormSpec("layer", fields.number("layer_norm_epsilon", 1e-5, high=1.0))
    spec = change_mlp(hf_decoder(fields, "mpt", norm=norm, rotary=False, tied=True), gated=False)
    return change_attention(
        with_slopes(spec, fields, attn.number("alibi_bias_max", 8.0)),
        scale=attn.number("softmax_scale") if attn.get("softmax_scale") is not None else None,
        clip=positive(attn, "clip_qkv"),
    )


def _falcon(fields: Fields) -> ModelSpec:
    fields = fields.told(_KEYS, hidden_act="gelu", max_position_embeddings=2048)
    fields = fields.told(
        {"hidden_act": "activation", "intermediate_size": "ffn_hidden_size", "num_kv_heads": "n_head_kv"}
    )
    fields = fields.told(intermediate_size=4 * fields.integer("hidden_size"))
    grouped, alibi = fields.boolean("new_decoder_architecture", False), fields.boolean("alibi", False)
    heads = fields.integer("num_attention_heads")
    one = not grouped and fields.boolean("multi_query", True)
    kv_heads = 1 if one else fields.integer("num_kv_heads", heads) if grouped else heads
    fields = fields.changed(num_key_value_heads=kv_heads)
    norm = NormSpec("layer", fields.number("layer_norm_epsilon", 1e-5, high=1.0), bias=True)
    bias = fields.boolean("bias", False)
    spec = change_mlp(hf_decoder(fields, "falcon", norm=norm, rotary=not alibi, tied=True), gated=False, bias=bias)
    spec = change_attention(spec, qkv_bias=bias, output_bias=bias)
    if alibi:  # the slopes are scaled along with the products
        spec = with_slopes(spec, fields, scale=spec.attentions[0].head_dim ** -0.5)
    parallel = grouped or fields.boolean("parallel_attn", True)
    shared = fields.integer("num_ln_in_parallel_attn", 2 if grouped else 1) == 1
    return change_layers(spec, parallel=parallel, shared_norm=parallel and shared)


def _bloom_from_gguf(fields: Fields, tensors: GGUFTensors) -> ModelSpec:
    spec = gguf_decoder(fields, tensors, "bloom", activation="gelu_tanh", gated=False, rotary=False)
    return with_slopes(spec, fields)


def _mpt_from_gguf(fields: Fields, tensors: GGUFTensors) -> ModelSpec:
    spec = gguf_decoder(fields, tensors, "mpt", activation="gelu", gated=False, rotary=False)
    spec = change_attention(spec, clip=positive(fields, "attention.clamp_kqv"))
    steepest = positive(fields, "attention.max_alibi_bias")
    return with_slopes(spec, fields, steepest) if steepest else spec


def _falcon_from_gguf(fields: Fields, tensors: GGUFTensors) -> ModelSpec:
    spec = gguf_decoder(fields, tensors, "falcon", activation="gelu", gated=False)
    return change_layers(spec, parallel=True, shared_norm="blk.0.attn_norm_2.weight" not in tensors.shapes)


_BLOOM = NameMap(
    fixed={
        "word_embeddings": "embedding",
        "word_embeddings_layernorm": "embedding_norm",
        "ln_f": "norm",
        "lm_head": "head",
    },
    layer_prefix="h.",
    layer={
        "input_layernorm": "attention_norm",
        "self_attention.query_key_value": Fused(QKV, "grouped"),
        "self_attention.dense": "attention.o",
        "post_attention_layernorm": "mlp_norm",
        "mlp.dense_h_to_4h": "mlp.up",
        "mlp.dense_4h_to_h": "mlp.down",
    },
    optional_prefixes=("transformer.",),
)
_FALCON = _BLOOM.with_layer({"ln_attn": "attention_norm", "ln_mlp": "mlp_norm"})
_MPT = NameMap(
    fixed={"wte": "embedding", "norm_f": "norm", "lm_head": "head"},
    layer_prefix="blocks.",
    layer={
        "norm_1": "attention_norm",
        "attn.Wqkv": Fused(QKV),
        "attn.out_proj": "attention.o",
        "norm_2": "mlp_norm",
        "ffn.up_proj": "mlp.up",
        "ffn.down_proj": "mlp.down",
    },
    optional_prefixes=("transformer.",),
)
_FALCON_GGUF = GGUF_NAMES.with_layer(
    {}, variant=("blk.0.attn_norm_2.weight", {"attn_norm": "mlp_norm", "attn_norm_2": "attention_norm"})
)

FAMILIES = {
    "bloom": Family(_bloom, _BLOOM, _bloom_from_gguf),
    "mpt": Family(_mpt, _MPT, _mpt_from_gguf, gguf_keys=frozenset({"attention.max_alibi_bias", "attention.clamp_kqv"})),
    "falcon": Family(_falcon, _FALCON, _falcon_from_gguf, _FALCON_GGUF),
}
