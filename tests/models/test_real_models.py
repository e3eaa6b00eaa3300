"""Real checkpoints beside transformers: the same logits within 1e-3, in float32 and with a float32 cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.models.harness import KERNELS, Rig, make
from tramontane.loading.build import load_model

pytestmark = pytest.mark.slow

MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
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


def neighbours_to_halves(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """The partners of a rotation, neighbours in llama.cpp's order of rows, half a head apart again."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def transformers_logits(model: Any, ids: list[int]) -> NDArray[Any]:
    import torch

    with torch.no_grad():
        logits: NDArray[Any] = model.eval()(torch.tensor([ids])).logits[0].float().numpy()
    return logits


@pytest.fixture(scope="module")
def smollm2_dequantized(smollm2: Path) -> Any:
    """A LlamaForCausalLM with the values that the gguf package reads."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    reader = gguf.GGUFReader(smollm2)

    def value(key: str) -> Any:
        return reader.fields[f"llama.{key}"].contents()

    heads, kv_heads = value("attention.head_count"), value("attention.head_count_kv")
    config = transformers.LlamaConfig(
        vocab_size=value("vocab_size"),
        hidden_size=value("embedding_length"),
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=value("context_length"),
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": value("rope.freq_base")},
        tie_word_embeddings=True,
    )
    state = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1].tolist())
        prefix, module = "", tensor.name.removesuffix(".weight")
        if module.startswith("blk."):
            _, index, module = module.split(".")
            prefix = f"model.layers.{index}."
        if module in ("attn_q", "attn_k"):
            values = neighbours_to_halves(values, heads if module == "attn_q" else kv_heads)
        state[f"{prefix}{MODULES[module]}.weight"] = torch.from_numpy(np.array(values, np.float32))
    model = transformers.LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    model.tie_weights()
    return model


@pytest.mark.parametrize("kernels", KERNELS)
def test_smollm2(kernels: str, smollm2: Path, smollm2_dequantized: Any) -> None:
    ids = [int(token) for token in np.random.default_rng(0).integers(0, 49152, 150)]
    loaded = load_model(smollm2, make(f"{kernels}/deterministic"))
    rig = Rig(loaded.decoder, block_size=16, num_blocks=16)
    assert np.abs(rig.run(ids, [100, 1]) - transformers_logits(smollm2_dequantized, ids)).max() < 1e-3


@pytest.mark.parametrize("kernels", KERNELS)
def test_stories15m(kernels: str, stories15m: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    context = json.loads((stories15m / "config.json").read_text())["max_position_embeddings"]
    ids = [int(token) for token in np.random.default_rng(1).integers(0, 32000, context)]
    model = transformers.AutoModelForCausalLM.from_pretrained(stories15m, dtype="float32")
    loaded = load_model(stories15m, make(kernels))
    rig = Rig(loaded.decoder, block_size=16, num_blocks=32)
    assert np.abs(rig.run(ids, [100, 1]) - transformers_logits(model, ids)).max() < 1e-3
