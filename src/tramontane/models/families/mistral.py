"""Mistral's models: a llama with a window, and its mixture of experts."""

from __future__ import annotations

from tramontane.models.families.base import (
    MAX_LAYERS,
    Family,
    GGUFTensors,
    hf_decoder,
    hf_layer_types,
    hf_window,
    with_experts,
)
from tramontane.models.families.experts import expert_names, hf_experts
from tramontane.models.families.gguf import EXPERT_KEYS, gguf_decoder
from tramontane.models.fields import Fields
from tramontane.models.names import HF_NAMES
from tramontane.models.spec import MLPSpec, ModelSpec, RouterSpec


def _mistral(fields: Fields) -> ModelSpec:
    fields.only(layer_types=None, is_causal=True)
    count = fields.integer("num_hidden_layers", high=MAX_LAYERS)
    return hf_decoder(fields, "mistral", windows=[hf_window(fields, 4096)] * count)


def _ministral(fields: Fields) -> ModelSpec:
    count, window = fields.integer("num_hidden_layers", high=MAX_LAYERS), hf_window(fields, 4096)
    return hf_decoder(fields, "ministral", windows=hf_layer_types(fields, count, window) or [window] * count)


def _mixtral(fields: Fields) -> ModelSpec:
    fields = fields.told(rms_norm_eps=1e-5, rope_theta=1e6)
    count = fields.integer("num_hidden_layers", high=MAX_LAYERS)
    spec = hf_decoder(fields, "mixtral", windows=[hf_window(fields)] * count)
    expert = spec.layers[0].mlp
    assert isinstance(expert, MLPSpec)
    return with_experts(spec, hf_experts(fields, expert, RouterSpec(), defaults=(8, 2)))


def _mistral3_from_gguf(fields: Fields, tensors: GGUFTensors) -> ModelSpec:
    return gguf_decoder(fields, tensors, "mistral", interleaved=True, router=RouterSpec())


FAMILIES = {
    "mistral": Family(_mistral),
    "mistral3": Family(from_gguf=_mistral3_from_gguf, gguf_keys=EXPERT_KEYS),
    "ministral": Family(_ministral),
    "mixtral": Family(
        _mixtral,
        names=HF_NAMES.with_layer(
            {
                **expert_names("block_sparse_moe", projections=("w1", "w3", "w2")),
                **expert_names(),
            }
        ),
    ),
}
