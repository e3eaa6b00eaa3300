"""A transformers llama or qwen2 model as a GGUF file in llama.cpp's conventions, written with the gguf package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

MODULES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleave(values: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows of each head so that the partners of a rotation, half a head apart, become neighbours."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def write_gguf(model: Any, path: Path, kinds: Mapping[str, str] | None = None, **extra: Any) -> None:
    """`kinds`: ggml type by GGUF module (F32 otherwise); `extra`: further metadata, `__` for dots, below the family."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    config = model.config
    family = config.model_type
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_rope(gguf, writer, model)
    for key, value in extra.items():
        writer.add_key_value(f"{family}.{key.replace('__', '.')}", value, gguf.GGUFValueType.get_type(value))
    tied = config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        values = tensor.float().numpy()
        if family == "llama" and ".q_proj." in name:
            values = interleave(values, config.num_attention_heads)
        if family == "llama" and ".k_proj." in name:
            values = interleave(values, config.num_key_value_heads)
        module, kind = name.rsplit(".", 1)
        prefix, inner = "", module
        if module.startswith("model.layers."):
            index, inner = module.removeprefix("model.layers.").split(".", 1)
            prefix = f"blk.{index}."
        stored = gguf.GGMLQuantizationType[(kinds or {}).get(MODULES[inner], "F32")]
        data = gguf.quants.quantize(values, stored)
        writer.add_tensor(f"{prefix}{MODULES[inner]}.{kind}", data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_rope(gguf: Any, writer: Any, model: Any) -> None:
    """llama.cpp keeps llama3's stretch as a tensor of divisors, the others as metadata."""
    rope = model.config.rope_parameters
    kind = rope["rope_type"]
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind == "llama3":
        dim = model.config.head_dim
        plain = rope["rope_theta"] ** (-np.arange(0, dim, 2, dtype=np.float32) / dim)
        writer.add_tensor("rope_freqs.weight", (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32))
    elif kind != "default":
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
