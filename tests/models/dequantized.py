"""Reference models out of GGUF files: the gguf package reads the values, transformers computes with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

ROWS = 8192

_MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def dequantized(path: Path) -> Any:
    """A LlamaForCausalLM or Qwen2ForCausalLM in float32 with the file's values."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    reader = gguf.GGUFReader(path)
    family = reader.fields["general.architecture"].contents()

    def value(key: str) -> Any:
        return reader.fields[f"{family}.{key}"].contents()

    heads, kv_heads = value("attention.head_count"), value("attention.head_count_kv")
    state = {}
    for tensor in reader.tensors:
        parts = np.array_split(tensor.data, -(-len(tensor.data) // ROWS))  # some dequantizers hold a matrix five times
        values = np.concatenate([gguf.quants.dequantize(part, tensor.tensor_type) for part in parts])
        values = values.reshape(tensor.shape[::-1].tolist())
        module, _, kind = tensor.name.rpartition(".")
        prefix = ""
        if module.startswith("blk."):
            _, layer, module = module.split(".")
            prefix = f"model.layers.{layer}."
        if family == "llama" and module in ("attn_q", "attn_k"):
            values = _neighbours_to_halves(values, heads if module == "attn_q" else kv_heads)
        state[f"{prefix}{_MODULES[module]}.{kind}"] = torch.from_numpy(np.array(values, np.float32))
    tied = "lm_head.weight" not in state
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    config_class, model_class = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    }[family]
    config = config_class(
        vocab_size=len(state["model.embed_tokens.weight"]),
        hidden_size=value("embedding_length"),
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=value("context_length"),
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": value("rope.freq_base")},
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    with torch.device("meta"):  # nothing is allocated twice
        model = model_class(config)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def _neighbours_to_halves(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """The partners of a rotation, neighbours in llama.cpp's order of rows, half a head apart again."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)
