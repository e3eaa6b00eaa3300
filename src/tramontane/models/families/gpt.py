"""GPT-2 and what grew out of it: LayerNorms, plain MLPs; learned positions, or rotary ones and parallel branches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tramontane.models.families.base import (
    MAX_LAYERS,
    Family,
    GGUFTensors,
    change_attention,
    change_layers,
    change_mlp,
    each_attention,
    hf_decoder,
)
from tramontane.models.families.gguf import gguf_decoder
from tramontane.models.fields import POSITIONS, Fields
from tramontane.models.names import QKV, Fused, NameMap
from tramontane.models.spec import ModelSpec, NormSpec, RopeSpec

_KEYS: Mapping[str, str] = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
    "hidden_act": "activation_function",
}
"""Our name -> theirs."""


def _gpt(
    fields: Fields, family: str, *, tied: bool = True, norm_key: str = "layer_norm_epsilon", **options: Any
) -> ModelSpec:
    """What they share. The inner size is four times the outer where none is stated."""
    fields = fields.told(intermediate_size=4 * fields.integer("hidden_size"))
    norm = NormSpec("layer", fields.number(norm_key, 1e-5, high=1.0), bias=True)
    spec = hf_decoder(fields, family, norm=norm, tied=tied, **{"rotary": False, **options})
    return change_mlp(spec, gated=False, bias=True)


def _gpt2(fields: Fields) -> ModelSpec:
    fields = fields.told(_KEYS, hidden_act="gelu_new")
    fields.only(add_cross_attention=False)
    spec = change_attention(_gpt(fields, "gpt2"), qkv_bias=True, output_bias=True)
    scale = spec.attentions[0].head_dim ** -0.5 if fields.boolean("scale_attn_weights", True) else 1.0
    by_layer = fields.boolean("scale_attn_by_inverse_layer_idx", False)
    spec = each_attention(spec, lambda index, each: replace(each, scale=scale / (index + 1 if by_layer else 1)))
    return replace(spec, positions=spec.context_length)


def _gpt_bigcode(fields: Fields) -> ModelSpec:
    fields = fields.told(_KEYS, hidden_act="gelu_pytorch_tanh")
    fields.only(add_cross_attention=False, scale_attn_weights=True)
    if fields.boolean("multi_query", True):
        fields = fields.changed(num_key_value_heads=1)
    spec = change_attention(_gpt(fields, "gpt_bigcode"), qkv_bias=True, output_bias=True)
    return replace(spec, positions=spec.context_length)


def _gpt_neo(fields: Fields) -> ModelSpec:
    fields = fields.told(
        {"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads", "hidden_act": "activation_function"},
        hidden_act="gelu_new",
        window_size=256,
    )
    count = fields.integer("num_hidden_layers", high=MAX_LAYERS)
    kinds = fields.get("attention_layers")
    if kinds is None:
        kinds = _repeated(fields, "attention_types", count)
    if not isinstance(kinds, list) or len(kinds) != count or any(kind not in ("global", "local") for kind in kinds):
        raise fields.corrupt("attention_layers", f"are not {count} times global or local, one a layer")
    window = fields.integer("window_size", high=POSITIONS)
    spec = _gpt(fields, "gpt_neo", windows=[window if kind == "local" else None for kind in kinds])
    return replace(change_attention(spec, scale=1.0, output_bias=True), positions=spec.context_length)


def _repeated(fields: Fields, key: str, count: int) -> list[Any]:
    """What a list of (list, how often) comes to, as far as `count` entries and what repeats last."""
    out: list[Any] = []
    stated = fields.get(key)
    for pair in stated if isinstance(stated, list) else []:
        if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], list) or type(pair[1]) is not int:
            raise fields.corrupt(key, "is not a list of (kinds, how often)")
        out += pair[0] * min(pair[1], count // max(len(pair[0]), 1) + 1)
        if len(out) > count:
            break
    return out


def _gptj(fields: Fields, family: str = "gptj") -> ModelSpec:
    fields = fields.told(_KEYS, hidden_act="gelu_new")
    spec = _gpt(fields, family, tied=False)
    head_dim = spec.attentions[0].head_dim
    dim = fields.integer("rotary_dim", 64, high=head_dim)
    if dim % 2:
        raise fields.corrupt("rotary_dim", f"is {dim}, not even")
    rope = RopeSpec(10000.0, dim, interleaved=True)
    spec = change_layers(change_attention(spec, rope=rope), parallel=True, shared_norm=True)
    return replace(spec, head_bias=True)


def _codegen(fields: Fields) -> ModelSpec:
    heads = fields.told(_KEYS).integer("num_attention_heads")
    if heads % _CODEGEN_PARTS:
        raise fields.corrupt("n_head", f"is {heads}, which does not divide into the {_CODEGEN_PARTS} parts of files")
    return _gptj(fields, "codegen")


def _gpt_neox(fields: Fields) -> ModelSpec:
    names = {"partial_rotary_factor": "rotary_pct", "rope_theta": "rotary_emb_base"}
    fields = fields.told(names, hidden_act="gelu", partial_rotary_factor=0.25)
    spec = _gpt(fields, "gpt_neox", tied=False, norm_key="layer_norm_eps", rotary=True)
    bias = fields.boolean("attention_bias", True)
    spec = change_attention(spec, qkv_bias=bias, output_bias=bias)
    return change_layers(spec, parallel=fields.boolean("use_parallel_residual", True))


def _opt(fields: Fields) -> ModelSpec:
    fields = fields.told({"intermediate_size": "ffn_dim", "hidden_act": "activation_function"}, hidden_act="relu")
    bias, before = fields.boolean("enable_bias", True), fields.boolean("do_layer_norm_before", True)
    affine = fields.boolean("layer_norm_elementwise_affine", True)
    norm = NormSpec("layer", 1e-5, weight=affine, bias=affine)
    spec = change_mlp(hf_decoder(fields, "opt", norm=norm, rotary=False, tied=True), gated=False, bias=bias)
    spec = change_attention(spec, qkv_bias=bias, output_bias=bias)
    spec = change_layers(spec, placement="pre" if before else "residual")
    width = fields.integer("word_embed_proj_dim", spec.hidden_size)
    return replace(
        spec,
        norm=norm if before and not fields.boolean("_remove_final_layer_norm", False) else None,
        positions=spec.context_length,
        embedding_size=width if width != spec.hidden_size else None,
    )


def _gpt2_from_gguf(fields: Fields, tensors: GGUFTensors) -> ModelSpec:
    return gguf_decoder(fields, tensors, "gpt2", activation="gelu_tanh", gated=False, rotary=False)


def _starcoder_from_gguf(fields: Fields, tensors: GGUFTensors) -> ModelSpec:
    return gguf_decoder(fields, tensors, "gpt_bigcode", activation="gelu_tanh", gated=False, rotary=False)


def _gpt_neox_from_gguf(fields: Fields, tensors: GGUFTensors) -> ModelSpec:
    spec = gguf_decoder(fields, tensors, "gpt_neox", activation="gelu", gated=False)
    return change_layers(spec, parallel=fields.boolean("use_parallel_residual", True))


_BUFFERS = r"(.*\.)?(attn|attention)\.(attention\.)?(bias|masked_bias|embed_positions|rotary_emb\.inv_freq)"
_GPT2 = NameMap(
    fixed={"wte": "embedding", "wpe": "positions", "ln_f": "norm", "lm_head": "head"},
    layer_prefix="h.",
    layer={
        "ln_1": "attention_norm",
        "attn.c_attn": Fused(QKV),
        "attn.c_proj": "attention.o",
        "ln_2": "mlp_norm",
        "mlp.c_fc": "mlp.up",
        "mlp.c_proj": "mlp.down",
    },
    ignored=_BUFFERS,
    optional_prefixes=("transformer.",),
    transposed=frozenset({"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
)
_BIGCODE = _GPT2.with_layer({"attn.c_attn": Fused(QKV, "grouped")}, transposed=frozenset())
_NEO = _BIGCODE.with_layer({
    "attn.attention.q_proj": "attention.q",
    "attn.attention.k_proj": "attention.k",
    "attn.attention.v_proj": "attention.v",
    "attn.attention.out_proj": "attention.o",
})  # fmt: skip
_GPTJ = _BIGCODE.with_layer({
    "attn.q_proj": "attention.q",
    "attn.k_proj": "attention.k",
    "attn.v_proj": "attention.v",
    "attn.out_proj": "attention.o",
    "mlp.fc_in": "mlp.up",
    "mlp.fc_out": "mlp.down",
})  # fmt: skip
_CODEGEN_PARTS = 4
"""Its projections are stored in so many parts, those of the machines that it was trained on."""
_CODEGEN = _GPTJ.with_layer({
    "attn.qkv_proj": Fused(("attention.q", "attention.v", "attention.k"), "grouped", _CODEGEN_PARTS),
})  # fmt: skip
_NEOX = NameMap(
    fixed={"embed_in": "embedding", "final_layer_norm": "norm", "embed_out": "head"},
    layer_prefix="layers.",
    layer={
        "input_layernorm": "attention_norm",
        "attention.query_key_value": Fused(QKV, "grouped"),
        "attention.dense": "attention.o",
        "post_attention_layernorm": "mlp_norm",
        "mlp.dense_h_to_4h": "mlp.up",
        "mlp.dense_4h_to_h": "mlp.down",
    },
    ignored=_BUFFERS,
    optional_prefixes=("gpt_neox.",),
)

_OPT = NameMap(
    fixed={
        "embed_tokens": "embedding",
        "embed_positions": "positions",
        "project_in": "project_in",
        "project_out": "project_out",
        "final_layer_norm": "norm",
        "lm_head": "head",
    },
    layer_prefix="layers.",
    layer={
        "self_attn_layer_norm": "attention_norm",
        "self_attn.q_proj": "attention.q",
        "self_attn.k_proj": "attention.k",
        "self_attn.v_proj": "attention.v",
        "self_attn.out_proj": "attention.o",
        "final_layer_norm": "mlp_norm",
        "fc1": "mlp.up",
        "fc2": "mlp.down",
    },
    optional_prefixes=("model.", "decoder."),
    skipped={"positions": 2},
)

FAMILIES = {
    "gpt2": Family(_gpt2, _GPT2, _gpt2_from_gguf),
    "gpt_bigcode": Family(_gpt_bigcode, _BIGCODE),
    "starcoder": Family(from_gguf=_starcoder_from_gguf),
    "gpt_neo": Family(_gpt_neo, _NEO),
    "gptj": Family(_gptj, _GPTJ),
    "codegen": Family(_codegen, _CODEGEN),
    "gpt_neox": Family(_gpt_neox, _NEOX),
    "gptneox": Family(from_gguf=_gpt_neox_from_gguf, gguf_keys=frozenset({"use_parallel_residual"})),
    "opt": Family(_opt, _OPT),
}
