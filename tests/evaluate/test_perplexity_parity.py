"""Perplexity of real models on real text, beside transformers on the same ids and the same weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tramontane import LLM
from tramontane.evaluate.perplexity import cut_windows, perplexity

pytestmark = pytest.mark.slow

WINDOWS = 20
BOS = 1  # of both models

torch = pytest.importorskip("torch", reason="the reference perplexity needs torch")
transformers = pytest.importorskip("transformers", reason="the reference perplexity needs transformers")


def dequantized_llama(path: Path) -> Any:
    """A GGUF llama as transformers computes it, its weights dequantized by the gguf package."""
    gguf = pytest.importorskip("gguf", reason="the reference weights are dequantized by gguf")
    reader = gguf.GGUFReader(path)

    def number(key: str) -> Any:
        return reader.fields[f"llama.{key}"].contents()

    heads, kv_heads = number("attention.head_count"), number("attention.head_count_kv")
    arrays = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    vocab, hidden = arrays["token_embd.weight"].shape
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=number("feed_forward_length"),
            num_hidden_layers=number("block_count"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=number("context_length"),
            rms_norm_eps=number("attention.layer_norm_rms_epsilon"),
            rope_theta=number("rope.freq_base"),
            rope_parameters={"rope_type": "default", "rope_theta": number("rope.freq_base")},
            tie_word_embeddings="output.weight" not in arrays,
        )
    )
    names = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        **{f"attn_{short}": f"self_attn.{short}_proj" for short in "qkv"},
        "attn_output": "self_attn.o_proj",
        **{f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
    }
    state = {
        "model.embed_tokens.weight": arrays["token_embd.weight"],
        "model.norm.weight": arrays["output_norm.weight"],
    }
    state["lm_head.weight"] = arrays.get("output.weight", arrays["token_embd.weight"])
    for name, array in arrays.items():
        if name.startswith("blk."):
            _, layer, part, _ = name.split(".")
            rotary = {"attn_q": heads, "attn_k": kv_heads}.get(part)
            if rotary:  # from adjacent pairs back to halves
                rows = array.reshape(rotary, -1, 2, array.shape[1])
                array = rows.swapaxes(1, 2).reshape(array.shape)
            state[f"model.layers.{layer}.{names[part]}.weight"] = array
    model.load_state_dict({name: torch.from_numpy(np.array(a, np.float32)) for name, a in state.items()})
    return model.eval()


def reference_perplexity(model: Any, windows: list[list[int]]) -> float:
    nll, tokens = 0.0, 0
    with torch.no_grad():
        for window in windows:
            logprobs = torch.log_softmax(model(torch.tensor([window])).logits[0, :-1].double(), -1)
            nll -= logprobs.gather(1, torch.tensor(window[1:])[:, None]).sum().item()
            tokens += len(window) - 1
    return math.exp(nll / tokens)


@pytest.mark.parametrize("name", ["stories15m", "smollm2"])
def test_perplexity_equals_transformers(name: str, request: pytest.FixtureRequest, wikitext: Path) -> None:
    path: Path = request.getfixturevalue(name)
    text = wikitext.read_text(encoding="utf-8")
    with LLM(path) as llm:
        ours = perplexity(llm, text, windows=WINDOWS, bos=BOS)
        ids = llm.tokenize(text, add_special_tokens=False)
        size = min(1024, llm.capabilities().context_length)
    model = (
        transformers.LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        if path.is_dir()
        else dequantized_llama(path)
    )
    windows = list(cut_windows(ids, size, [BOS]))[:WINDOWS]
    assert ours.windows == WINDOWS
    assert ours.tokens == sum(len(window) - 1 for window in windows)
    assert ours.perplexity == pytest.approx(reference_perplexity(model, windows), rel=1e-3)
