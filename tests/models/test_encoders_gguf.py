"""Encoders out of GGUF files, written by llama.cpp's conventions: the same vectors and scores as transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.models.encoders import SPECIAL, WORDS, TinyEncoder, text, write_tokenizer
from tramontane import LLM, CorruptCheckpoint, UnsupportedModel
from tramontane.loading.checkpoint import open_checkpoint

OPTIONS: dict[str, Any] = {"kernels": "reference", "threads": 1, "max_num_batched_tokens": 48, "device": "cpu"}
TEXTS = [text(length, length) for length in (1, 6, 12, 13, 40, 90)]
MEAN, CLS, LAST, RANK = 1, 2, 3, 4
# (case, architecture, pooling); files do not say which activation: it is the one that the models were published with
CASES = [
    ("bert", "bert", MEAN),
    ("bert", "bert", CLS),
    ("xlm-roberta", "bert", CLS),
    ("nomic_bert", "nomic-bert", MEAN),
    ("modernbert", "modern-bert", LAST),
]


def tensors_of(encoder: TinyEncoder, architecture: str) -> dict[str, Any]:
    """By llama.cpp's names: fused matrices where it has them, and without the positions that are for padding."""
    gguf = pytest.importorskip("gguf", reason="the gguf package writes the files")
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper().replace("-", "_")), 9)
    found: dict[str, Any] = {}
    state = {name: tensor.numpy() for name, tensor in encoder.model.state_dict().items()}
    for name, values in state.items():
        inner = name
        for prefix in ("bert.", "roberta.", "model."):
            inner = inner.removeprefix(prefix)
        if ".q_proj." in inner:
            values = np.concatenate([state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
        elif ".k_proj." in inner or ".v_proj." in inner or inner.endswith("position_ids") or "inv_freq" in inner:
            continue
        for new, old in _NOMIC.items() if architecture == "nomic-bert" else ():
            inner = inner.replace(new, old)
        if "roberta" in encoder.path.name and "position_embeddings" in inner:
            values = values[2:]
        mapped = names.get_name(inner, try_suffixes=(".weight", ".bias"))
        if mapped is None and inner.startswith("pooler"):
            continue
        assert mapped is not None, inner
        found[mapped] = values
    return found


_NOMIC = {
    "layers.": "encoder.layers.",
    "self_attn.q_proj": "attn.Wqkv",
    "embeddings.LayerNorm": "emb_ln",
    "self_attn.o_proj": "attn.out_proj",
    "post_attention_layernorm": "norm1",
    "post_mlp_layernorm": "norm2",
    "up_proj": "fc11",
    "gate_proj": "fc12",
    "down_proj": "fc2",
}


def write(encoder: TinyEncoder, path: Path, architecture: str, pooling: int | None, **changes: Any) -> Path:
    gguf = pytest.importorskip("gguf", reason="the gguf package writes the files")
    config, writer = encoder.model.config, gguf.GGUFWriter(path, architecture)
    tensors = tensors_of(encoder, architecture)
    writer.add_context_length(94 if "roberta" in encoder.path.name else 96)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_eps(0.05)
    writer.add_causal_attention(False)
    if pooling is not None:
        writer.add_uint32(f"{architecture}.pooling_type", pooling)
    if architecture == "nomic-bert":
        writer.add_rope_freq_base(70.0)
    if architecture == "modern-bert":
        writer.add_rope_freq_base(700.0)
        writer.add_float32("modern-bert.rope.freq_base_swa", 50.0)
        writer.add_sliding_window(12)
        writer.add_sliding_window_pattern(3)
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    writer.add_tokenizer_model("bert")
    writer.add_token_list([*SPECIAL, *(f"\u2581{word}" for word in WORDS)])
    writer.add_token_types([3] * len(SPECIAL) + [1] * len(WORDS))
    for name, number in (("cls", 0), ("seperator", 2), ("unknown", 3), ("padding", 1)):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
    for name, values in {**tensors, **changes}.items():
        writer.add_tensor(name, np.ascontiguousarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny(name: str, folder: Path, kind: str = "Model", **settings: Any) -> TinyEncoder:
    return TinyEncoder(name, folder, kind, **settings, **({} if name == "nomic_bert" else {"hidden_act": "gelu"}))


@pytest.mark.parametrize(("name", "architecture", "pooling"), CASES)
def test_vectors_are_transformers(tmp_path: Path, name: str, architecture: str, pooling: int) -> None:
    """Normalized, as all that embed with llama.cpp do, and pooled as the file says."""
    encoder = tiny(name, tmp_path)
    path = write(encoder, tmp_path / "model.gguf", architecture, pooling)
    states = [encoder.states(one) for one in TEXTS]
    pooled = [{MEAN: one.mean(0), CLS: one[0], LAST: one[-1]}[pooling].numpy() for one in states]
    with LLM(path, **OPTIONS) as llm:
        got = np.array([one.vector for one in llm.embed(TEXTS)])
        np.testing.assert_allclose(got, pooled / np.linalg.norm(pooled, axis=1, keepdims=True), atol=1e-4)
        plain = np.array([one.vector for one in llm.embed(TEXTS, normalize=False)])
        np.testing.assert_allclose(plain, pooled, atol=1e-4)
        with pytest.raises(UnsupportedModel, match="writes none"):
            llm.generate("w1")


@pytest.mark.parametrize("name", ["bert", "xlm-roberta"])
def test_a_reranker(tmp_path: Path, name: str) -> None:
    """`cls` is the dense layer before the last, `cls.output` the last."""
    encoder = tiny(name, tmp_path, "ForSequenceClassification", num_labels=1)
    heads = (
        {"cls": "classifier.dense", "cls.output": "classifier.out_proj"}
        if name == "xlm-roberta"
        else {"cls": "bert.pooler.dense", "cls.output": "classifier"}
    )
    state = {key: value.numpy() for key, value in encoder.model.state_dict().items()}
    kept = {key: value for key, value in state.items() if key.startswith(("bert.", "roberta."))}
    tensors = {
        f"{ours}.{kind}": state[f"{theirs}.{kind}"] for ours, theirs in heads.items() for kind in ("weight", "bias")
    }
    encoder.model.state_dict = lambda: {  # type: ignore[method-assign]
        key: encoder.torch.tensor(value) for key, value in kept.items() if "pooler" not in key
    }
    path = write(encoder, tmp_path / "model.gguf", "bert", RANK, **tensors)
    del encoder.model.state_dict
    if name == "xlm-roberta":  # this file's tokenizer joins pairs as BERT's does
        write_tokenizer(encoder.path, pairs="bert")
        encoder.load_tokenizer()
    logits = encoder.logits("w1 w2 w3", TEXTS[:4])[:, 0]
    with LLM(path, **OPTIONS) as llm:
        scores = {one.index: one.score for one in llm.rerank("w1 w2 w3", TEXTS[:4]).results}
        np.testing.assert_allclose([scores[i] for i in range(4)], 1 / (1 + np.exp(-logits)), atol=1e-4)


def test_files_that_say_nothing_or_nonsense(tmp_path: Path) -> None:
    encoder = TinyEncoder("bert", tmp_path)
    with LLM(write(encoder, tmp_path / "silent.gguf", "bert", None), **OPTIONS) as llm:
        expected = encoder.states(TEXTS[1]).mean(0).numpy()
        np.testing.assert_allclose(llm.embed(TEXTS[1]).vector, expected, atol=1e-4)
    with pytest.raises(CorruptCheckpoint, match="pooling_type"):
        LLM(write(encoder, tmp_path / "odd.gguf", "bert", 9), **OPTIONS)
    with pytest.raises(CorruptCheckpoint, match=r"cls\.output"):
        LLM(write(encoder, tmp_path / "headless.gguf", "bert", RANK), **OPTIONS)
    norm = {"cls.norm.weight": np.ones(48, np.float32)}
    with pytest.raises(UnsupportedModel, match=r"cls\.norm"):
        LLM(write(encoder, tmp_path / "normed.gguf", "bert", RANK, **norm), **OPTIONS)


def test_a_table_of_one_type_may_be_a_vector(tmp_path: Path) -> None:
    encoder = tiny("xlm-roberta", tmp_path)
    types = encoder.model.state_dict()["embeddings.token_type_embeddings.weight"].numpy()
    path = write(encoder, tmp_path / "model.gguf", "bert", MEAN, **{"token_types.weight": types[0]})
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.spec().token_types == 1
