"""Encoders: models that see a text both ways and give the states of its tokens: BERT and its kin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tramontane.models.families.base import (
    ACTIVATIONS,
    MAX_LAYERS,
    Family,
    GGUFTensors,
    hf_activation,
    hf_layer_types,
)
from tramontane.models.families.gguf import gguf_rope
from tramontane.models.fields import POSITIONS, Fields
from tramontane.models.names import GATE_UP, GGUF_NAMES, QKV, Fused, NameMap
from tramontane.models.spec import AttentionSpec, LayerSpec, MLPSpec, ModelSpec, NormSpec, RopeSpec


def _encoder(
    family: str,
    layer: LayerSpec,
    count: int,
    *,
    hidden_size: int,
    vocab_size: int,
    context_length: int,
    token_types: int = 0,
    positions: int = 0,
) -> ModelSpec:
    """`count` equal layers, each normed behind the sums with its branches, over normed embeddings."""
    return ModelSpec(
        family=family,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        context_length=context_length,
        layers=(layer,) * count,
        norm=None,
        head=False,
        embedding_norm=layer.norm,
        positions=positions,
        token_types=token_types,
    )


def _heads(fields: Fields, hidden_size: int, key: str) -> tuple[int, int]:
    """Heads, and the elements of each."""
    heads = fields.integer(key)
    if hidden_size % heads:
        raise fields.corrupt(key, f"is {heads}, which does not divide the hidden size {hidden_size}")
    return heads, hidden_size // heads


# ---- BERT and RoBERTa -----------------------------------------------------------------------------------------


def _bert(fields: Fields) -> ModelSpec:
    return _bert_like(fields, "bert", 0)


def _roberta(fields: Fields) -> ModelSpec:
    fields.only(pad_token_id=1)
    return _bert_like(fields, "roberta", _ROBERTA_FIRST)


_ROBERTA_FIRST = 2
"""The first position: those up to the padding token's id are for padding."""


def _distilbert(fields: Fields) -> ModelSpec:
    return replace(_bert_like(fields.told(_DISTILBERT_KEYS), "distilbert", 0), token_types=0)


_DISTILBERT_KEYS = {
    "hidden_size": "dim",
    "num_attention_heads": "n_heads",
    "num_hidden_layers": "n_layers",
    "intermediate_size": "hidden_dim",
    "hidden_act": "activation",
}


def _bert_like(fields: Fields, family: str, first: int) -> ModelSpec:
    fields.only(position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
    hidden_size = fields.integer("hidden_size")
    heads, head_dim = _heads(fields, hidden_size, "num_attention_heads")
    rows = fields.integer("max_position_embeddings", low=first + 1) - first
    return _encoder(
        family,
        LayerSpec(
            AttentionSpec(heads, heads, head_dim, None, causal=False, qkv_bias=True, output_bias=True),
            MLPSpec(fields.integer("intermediate_size"), hf_activation(fields, default="gelu"), gated=False, bias=True),
            NormSpec("layer", fields.number("layer_norm_eps", 1e-12, high=1.0), bias=True),
            placement="residual",
        ),
        fields.integer("num_hidden_layers", high=MAX_LAYERS),
        hidden_size=hidden_size,
        vocab_size=fields.integer("vocab_size"),
        context_length=rows,
        token_types=fields.integer("type_vocab_size", 2),
        positions=rows,
    )


_BERT_NORMS = {"embeddings.LayerNorm": "embedding_norm"}
_BERT_LAYER_NORMS = {"attention.output.LayerNorm": "attention_norm", "output.LayerNorm": "mlp_norm"}


def _old_norms(names: Mapping[str, str]) -> dict[str, str]:
    """What the oldest checkpoints call the weight and bias of a norm."""
    weights = {f"{name}.gamma": target for name, target in names.items()}
    return {**names, **weights, **{f"{name}.beta": f"{target}.bias" for name, target in names.items()}}


_BERT_NAMES = NameMap(
    fixed={
        "embeddings.word_embeddings": "embedding",
        "embeddings.position_embeddings": "positions",
        "embeddings.token_type_embeddings": "token_types",
        **_old_norms(_BERT_NORMS),
    },
    layer_prefix="encoder.layer.",
    layer={
        "attention.self.query": "attention.q",
        "attention.self.key": "attention.k",
        "attention.self.value": "attention.v",
        "attention.output.dense": "attention.o",
        "intermediate.dense": "mlp.up",
        "output.dense": "mlp.down",
        **_old_norms(_BERT_LAYER_NORMS),
    },
    ignored=r"((bert|roberta)\.)?(embeddings\.position_ids|pooler\..*)|(cls|lm_head|classifier|qa_outputs)\..*",
    optional_prefixes=("bert.", "roberta."),
)


_DISTILBERT_NAMES = NameMap(
    fixed={
        "embeddings.word_embeddings": "embedding",
        "embeddings.position_embeddings": "positions",
        "embeddings.LayerNorm": "embedding_norm",
    },
    layer_prefix="transformer.layer.",
    layer={
        "attention.q_lin": "attention.q",
        "attention.k_lin": "attention.k",
        "attention.v_lin": "attention.v",
        "attention.out_lin": "attention.o",
        "sa_layer_norm": "attention_norm",
        "ffn.lin1": "mlp.up",
        "ffn.lin2": "mlp.down",
        "output_layer_norm": "mlp_norm",
    },
    ignored=r"(vocab_transform|vocab_layer_norm|vocab_projector|pre_classifier|classifier)\..*",
    optional_prefixes=("distilbert.",),
)


# ---- Nomic ----------------------------------------------------------------------------------------------------


def _nomic_bert(fields: Fields) -> ModelSpec:
    """Both layouts: that of transformers, and that which the model was published with."""
    for key in ("moe_every_n_layers", "num_experts", "rotary_scaling_factor", "rotary_emb_scale_base"):
        if fields.get(key):
            raise fields.unsupported(key)
    fields.only(prenorm=False, use_rms_norm=False, parallel_block=False, causal=False)
    fields = fields.told(_NOMIC_KEYS)
    hidden_size = fields.integer("hidden_size")
    heads, head_dim = _heads(fields, hidden_size, "num_attention_heads")
    bias, mlp_bias = fields.boolean("qkv_proj_bias", False), fields.boolean("mlp_fc1_bias", False)
    fields.only(mlp_fc2_bias=mlp_bias, head_dim=head_dim)
    return _encoder(
        "nomic-bert",
        LayerSpec(
            AttentionSpec(
                heads,
                heads,
                head_dim,
                _nomic_rope(fields, head_dim),
                causal=False,
                qkv_bias=bias,
                output_bias=bias,
            ),
            MLPSpec(
                fields.integer("intermediate_size"),
                hf_activation(Fields({"hidden_act": _nomic_activation(fields)}, fields.source)),
                bias=mlp_bias,
            ),
            NormSpec("layer", fields.number("layer_norm_eps", 1e-12, high=1.0), bias=True),
            placement="residual",
        ),
        fields.integer("num_hidden_layers", high=MAX_LAYERS),
        hidden_size=hidden_size,
        vocab_size=fields.integer("vocab_size"),
        context_length=fields.integer("max_position_embeddings", high=POSITIONS),
        token_types=fields.integer("type_vocab_size", 2, low=0),
    )


_NOMIC_KEYS = {
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
    "layer_norm_eps": "layer_norm_epsilon",
}


def _nomic_activation(fields: Fields) -> str:
    stated = fields.text("activation_function", fields.text("hidden_act", "silu"))
    return {"swiglu": "silu", "geglu": "gelu"}.get(stated, stated)


def _nomic_rope(fields: Fields, head_dim: int) -> RopeSpec:
    fields.only(rotary_emb_fraction=1.0, rotary_emb_interleaved=False)
    rope = Fields(fields.mapping("rope_parameters"), f"rope_parameters of {fields.source}")
    rope.only(rope_type="default", partial_rotary_factor=1.0)
    theta = rope.number("rope_theta", fields.number("rotary_emb_base", 1000.0, low=1.0), low=1.0)
    return RopeSpec(theta, head_dim)


_NOMIC_NAMES = NameMap(
    fixed={
        "embeddings.word_embeddings": "embedding",
        "embeddings.token_type_embeddings": "token_types",
        "embeddings.LayerNorm": "embedding_norm",
        "emb_ln": "embedding_norm",
    },
    layer_prefix="layers.",
    layer={
        "self_attn.q_proj": "attention.q",
        "self_attn.k_proj": "attention.k",
        "self_attn.v_proj": "attention.v",
        "self_attn.o_proj": "attention.o",
        "post_attention_layernorm": "attention_norm",
        "mlp.gate_proj": "mlp.gate",
        "mlp.up_proj": "mlp.up",
        "mlp.down_proj": "mlp.down",
        "post_mlp_layernorm": "mlp_norm",
        "attn.Wqkv": Fused(QKV),
        "attn.out_proj": "attention.o",
        "norm1": "attention_norm",
        "mlp.fc12": "mlp.gate",
        "mlp.fc11": "mlp.up",
        "mlp.fc2": "mlp.down",
        "norm2": "mlp_norm",
    },
    ignored=r"((nomic_)?bert\.)?(embeddings\.position_ids|pooler\..*)|(cls|lm_head|classifier)\..*",
    optional_prefixes=("nomic_bert.", "bert.", "encoder."),
)


# ---- ModernBERT -----------------------------------------------------------------------------------------------


def _modernbert(fields: Fields) -> ModelSpec:
    hidden_size = fields.integer("hidden_size")
    heads, head_dim = _heads(fields, hidden_size, "num_attention_heads")
    count = fields.integer("num_hidden_layers", high=MAX_LAYERS)
    window = fields.integer("local_attention", 128) // 2 + 1
    windows = hf_layer_types(fields, count, window)
    if windows is None:
        every = fields.integer("global_attn_every_n_layers", 3)
        windows = [window if index % every else None for index in range(count)]
    bias = fields.boolean("attention_bias", False)
    norm = NormSpec("layer", fields.number("norm_eps", 1e-5, high=1.0), bias=fields.boolean("norm_bias", False))
    activation = hf_activation(fields, "hidden_activation", "gelu")
    mlp = MLPSpec(fields.integer("intermediate_size"), activation, bias=fields.boolean("mlp_bias", False))
    full = _modernbert_rope(fields, head_dim, "full_attention", "global_rope_theta", 160000.0)
    local = _modernbert_rope(fields, head_dim, "sliding_attention", "local_rope_theta", 10000.0)
    layers = tuple(
        LayerSpec(
            AttentionSpec(
                heads,
                heads,
                head_dim,
                full if window is None else local,
                window=window,
                causal=False,
                qkv_bias=bias,
                output_bias=bias,
            ),
            mlp,
            norm,
            attention_norm=index > 0,
        )
        for index, window in enumerate(windows)
    )
    return ModelSpec(
        family="modernbert",
        hidden_size=hidden_size,
        vocab_size=fields.integer("vocab_size"),
        context_length=fields.integer("max_position_embeddings", 8192, high=POSITIONS),
        layers=layers,
        norm=norm,
        head=False,
        embedding_norm=norm,
    )


def _modernbert_rope(fields: Fields, head_dim: int, kind: str, key: str, default: float) -> RopeSpec:
    every = Fields(fields.mapping("rope_parameters"), f"rope_parameters of {fields.source}")
    rope = Fields(every.mapping(kind), every.source)
    rope.known({"rope_type", "rope_theta"})
    rope.only(rope_type="default")
    return RopeSpec(rope.number("rope_theta", fields.number(key, default, low=1.0), low=1.0), head_dim)


_MODERNBERT_NAMES = NameMap(
    fixed={
        "embeddings.tok_embeddings": "embedding",
        "embeddings.norm": "embedding_norm",
        "final_norm": "norm",
    },
    layer_prefix="layers.",
    layer={
        "attn_norm": "attention_norm",
        "attn.Wqkv": Fused(QKV),
        "attn.Wo": "attention.o",
        "mlp_norm": "mlp_norm",
        "mlp.Wi": Fused(GATE_UP),
        "mlp.Wo": "mlp.down",
    },
    ignored=r"(head|decoder|classifier)\..*",
    optional_prefixes=("model.",),
)


# ---- GGUF -----------------------------------------------------------------------------------------------------


def _bert_from_gguf(fields: Fields, tensors: GGUFTensors) -> ModelSpec:
    return _gguf_encoder(fields, tensors, "bert", "gelu")


def _nomic_from_gguf(fields: Fields, tensors: GGUFTensors) -> ModelSpec:
    head_dim = fields.integer("embedding_length") // fields.integer("attention.head_count")
    return _gguf_encoder(fields, tensors, "nomic-bert", "silu", gguf_rope(fields, head_dim, tensors, False))


def _gguf_encoder(
    fields: Fields, tensors: GGUFTensors, family: str, activation: str, rope: RopeSpec | None = None
) -> ModelSpec:
    """Biases and tables are what the tensors say."""
    fields.only(**{"attention.causal": False, "expert_count": 0})
    hidden_size = fields.integer("embedding_length")
    heads, head_dim = _heads(fields, hidden_size, "attention.head_count")
    shapes = tensors.shapes
    qkv_bias = "blk.0.attn_q.bias" in shapes or "blk.0.attn_qkv.bias" in shapes
    attention = AttentionSpec(heads, heads, head_dim, rope, causal=False, qkv_bias=qkv_bias)
    gated, mlp_bias = "blk.0.ffn_gate.weight" in shapes, "blk.0.ffn_up.bias" in shapes
    norm = NormSpec("layer", fields.number("attention.layer_norm_epsilon", high=1.0), bias=True)
    context = fields.integer("context_length", high=POSITIONS)
    positions = shapes.get("position_embd.weight", (0,))[0]
    return _encoder(
        family,
        LayerSpec(
            replace(attention, output_bias="blk.0.attn_output.bias" in shapes),
            MLPSpec(fields.integer("feed_forward_length"), ACTIVATIONS[activation], gated=gated, bias=mlp_bias),
            norm,
            placement="residual",
        ),
        fields.integer("block_count", high=MAX_LAYERS),
        hidden_size=hidden_size,
        vocab_size=fields.integer("vocab_size", shapes.get("token_embd.weight", (0,))[0]),
        context_length=min(context, positions) if positions else context,
        token_types=_rows(shapes, "token_types.weight"),
        positions=positions,
    )


def _rows(shapes: Mapping[str, tuple[int, ...]], name: str) -> int:
    """Of a table, or of a vector that stands for its only row."""
    shape = shapes.get(name, ())
    return shape[0] if len(shape) == 2 else min(len(shape), 1)


def _modernbert_from_gguf(fields: Fields, tensors: GGUFTensors) -> ModelSpec:
    fields.only(**{"attention.causal": False})
    hidden_size = fields.integer("embedding_length")
    heads, head_dim = _heads(fields, hidden_size, "attention.head_count")
    window = fields.integer("attention.sliding_window", 128, high=POSITIONS) // 2 + 1
    every = fields.integer("attention.sliding_window_pattern", 3)
    full = gguf_rope(fields, head_dim, tensors, False)
    local = replace(full, theta=fields.number("rope.freq_base_swa", 10000.0, low=1.0))
    norm = NormSpec("layer", fields.number("attention.layer_norm_epsilon", high=1.0))
    mlp = MLPSpec(fields.integer("feed_forward_length"), "gelu")
    attention = AttentionSpec(heads, heads, head_dim, full, causal=False)
    sliding = replace(attention, rope=local, window=window)
    return ModelSpec(
        family="modernbert",
        hidden_size=hidden_size,
        vocab_size=fields.integer("vocab_size", tensors.shapes.get("token_embd.weight", (0,))[0]),
        context_length=fields.integer("context_length", high=POSITIONS),
        layers=tuple(
            LayerSpec(sliding if index % every else attention, mlp, norm, attention_norm=index > 0)
            for index in range(fields.integer("block_count", high=MAX_LAYERS))
        ),
        norm=norm,
        head=False,
        embedding_norm=norm,
    )


_KEYS = frozenset({"classifier.output_labels"})
_SLIDING_KEYS = _KEYS | frozenset(
    {"attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"}
)
_CLASSIFIER = rf"{GGUF_NAMES.ignored}|cls(\.output|\.norm)?\.(weight|bias)"
_GGUF = GGUF_NAMES.with_layer(
    {"attn_output_norm": "attention_norm", "layer_output_norm": "mlp_norm"}, ignored=_CLASSIFIER
)
_MODERNBERT_GGUF = GGUF_NAMES.with_layer({"ffn_up": Fused(GATE_UP)}, ignored=_CLASSIFIER)

FAMILIES = {
    "bert": Family(_bert, _BERT_NAMES, _bert_from_gguf, _GGUF, _KEYS),
    **dict.fromkeys(
        ("roberta", "xlm-roberta", "camembert"),
        Family(_roberta, replace(_BERT_NAMES, skipped={"positions": _ROBERTA_FIRST})),
    ),
    "distilbert": Family(_distilbert, _DISTILBERT_NAMES),
    "nomic_bert": Family(_nomic_bert, _NOMIC_NAMES),
    "nomic-bert": Family(None, _NOMIC_NAMES, _nomic_from_gguf, _GGUF, _KEYS),
    "modernbert": Family(_modernbert, _MODERNBERT_NAMES),
    "modern-bert": Family(None, _MODERNBERT_NAMES, _modernbert_from_gguf, _MODERNBERT_GGUF, _SLIDING_KEYS),
}
