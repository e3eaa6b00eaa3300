"""Models whose code lies beside their weights: InternLM2 and Baichuan, llamas with fused projections."""

from __future__ import annotations

from dataclasses import replace

from tramontane.models.families.alibi import with_slopes
from tramontane.models.families.base import Family, GGUFTensors, change_attention, hf_decoder
from tramontane.models.families.gguf import gguf_decoder
from tramontane.models.fields import Fields
from tramontane.models.names import HF_NAMES, MISTRAL_NAMES, QKV, Fused, NameMap
from tramontane.models.spec import ModelSpec

_BAICHUAN2_VOCABULARY = 125696


def _internlm2(fields: Fields) -> ModelSpec:
    bias = fields.boolean("bias", False)
    return change_attention(hf_decoder(fields, "internlm2"), qkv_bias=bias, output_bias=bias)


def _internlm2_from_gguf(fields: Fields, tensors: GGUFTensors) -> ModelSpec:
    return gguf_decoder(fields, tensors, "internlm2", interleaved=True)


def _baichuan(fields: Fields) -> ModelSpec:
    """The models of 13 billion parameters have ALiBi, and no key for the length of their positions."""
    rotary = fields.get("max_position_embeddings") is not None
    fields = fields.told({"max_position_embeddings": "model_max_length"})
    spec = hf_decoder(fields, "baichuan", rotary=rotary)
    return spec if rotary else with_slopes(spec, fields)


def _baichuan_names(fields: Fields) -> NameMap:
    """Baichuan 2, told by its training's z-loss or its vocabulary, brings the rows of its head to length one."""
    second = fields.stated("z_loss_weight") or fields.get("vocab_size") == _BAICHUAN2_VOCABULARY
    return replace(_BAICHUAN, unit_rows=frozenset({"head"})) if second else _BAICHUAN


def _baichuan_from_gguf(fields: Fields, tensors: GGUFTensors) -> ModelSpec:
    """Files do not tell the two kinds apart; llama.cpp knows the larger one by its layers."""
    rotary = fields.get("block_count") != 40
    spec = gguf_decoder(fields, tensors, "baichuan", interleaved=rotary, rotary=rotary)
    return spec if rotary else with_slopes(spec, fields)


_INTERNLM2 = replace(
    MISTRAL_NAMES.with_layer(
        {
            **{f"attention.w{part}": None for part in "qkv"},
            "attention.wqkv": Fused(QKV, "grouped"),
        }
    ),
    ignored=HF_NAMES.ignored,
    optional_prefixes=("model.",),
)
_BAICHUAN = HF_NAMES.with_layer(
    {
        **{f"self_attn.{part}_proj": None for part in "qkv"},
        "self_attn.W_pack": Fused(QKV),
    }
)

FAMILIES = {
    "internlm2": Family(_internlm2, names=_INTERNLM2, from_gguf=_internlm2_from_gguf),
    "baichuan": Family(_baichuan, names=_baichuan_names, from_gguf=_baichuan_from_gguf),
}
