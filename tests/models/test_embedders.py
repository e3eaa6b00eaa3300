"""Decoders as embedders, with the files of sentence-transformers beside them: Qwen3-Embedding's and EmbeddingGemma's
kinds, against transformers' states taken through what those files say by torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.models.cases import CASES
from tests.models.encoders import text, write_tokenizer
from tests.models.tiny import randomize
from tramontane import LLM, UnsupportedModel
from tramontane.types import Pooling

OPTIONS: dict[str, Any] = {"kernels": "reference", "threads": 1, "max_num_batched_tokens": 48, "device": "cpu"}
TEXTS = [text(length, length) for length in (1, 4, 5, 9, 10, 30, 60, 120)]


class Embedder:
    """A tiny model of transformers' `AutoModel`, its tokenizer, and modules after it."""

    def __init__(self, folder: Path, case: str, **settings: Any) -> None:
        self.torch = torch = pytest.importorskip("torch", reason="torch is not installed")
        self.transformers = transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        self.path = folder
        model_type, own = CASES[case].model_type, {**CASES[case].settings, **settings}
        config = transformers.AutoConfig.for_model(model_type, **own)
        model = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
        randomize(torch, model, seed=3)
        model.save_pretrained(folder)
        # Loading may change the settings again (the halves of Gemma's windows): what is saved is what is meant.
        self.model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").float().eval()
        write_tokenizer(folder)
        self.tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        self.layers: list[Any] = []

    def modules(self, *kinds: str, pooling: Pooling, widths: Sequence[int] = (), **pooled: Any) -> None:
        """Write modules.json and the modules' folders; a Dense to each of `widths`."""
        entries, inputs, rest = [], self.model.config.hidden_size, list(widths)
        for place, kind in enumerate(kinds):
            folder = self.path / ("" if kind == "Transformer" else f"{place}_{kind}")
            folder.mkdir(exist_ok=True)
            name = folder.name if kind != "Transformer" else ""
            entries.append(
                {"idx": place, "name": str(place), "path": name, "type": f"sentence_transformers.models.{kind}"}
            )
            if kind == "Pooling":
                (folder / "config.json").write_text(json.dumps({"pooling_mode": pooling, **pooled}))
            if kind == "Dense":
                self._dense(folder, inputs, inputs := rest.pop(0))
        (self.path / "modules.json").write_text(json.dumps(entries))

    def _dense(self, folder: Path, inputs: int, outputs: int) -> None:
        from safetensors.torch import save_file

        layer = self.torch.nn.Linear(inputs, outputs, bias=False)
        self.layers.append(layer)
        save_file({"linear.weight": layer.weight.detach()}, folder / "model.safetensors")
        identity = "torch.nn.modules.linear.Identity"
        config = {"in_features": inputs, "out_features": outputs, "bias": False, "activation_function": identity}
        (folder / "config.json").write_text(json.dumps(config))

    def vectors(self, texts: Sequence[str], pooling: Pooling, normalize: bool, dimensions: int | None = None) -> Any:
        found = []
        for one in texts:
            with self.torch.no_grad():
                states = self.model(self.torch.tensor([self.tokenizer(one)["input_ids"]])).last_hidden_state[0]
                pooled = {"lasttoken": states[-1], "mean": states.mean(0), "cls": states[0]}[pooling]
                for layer in self.layers:
                    pooled = layer(pooled)
                pooled = pooled[:dimensions]
                found.append((self.torch.nn.functional.normalize(pooled, dim=0) if normalize else pooled).numpy())
        return np.array(found)


def vectors(found: Any) -> Any:
    return np.array([one.vector for one in found])


def test_qwen3_embedding(tmp_path: Path) -> None:
    """The last token's state, normalized; queries get an instruction."""
    embedder = Embedder(tmp_path, "qwen3")
    embedder.modules("Transformer", "Pooling", "Normalize", pooling="lasttoken", include_prompt=True)
    prompts = {"prompts": {"query": "w3 w4 ", "document": ""}, "default_prompt_name": None}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    with LLM(tmp_path, **OPTIONS) as llm:
        expected = embedder.vectors(TEXTS, "lasttoken", normalize=True)
        np.testing.assert_allclose(vectors(llm.embed(TEXTS)), expected, atol=1e-4)
        asked = embedder.vectors([f"w3 w4 {one}" for one in TEXTS], "lasttoken", normalize=True)
        np.testing.assert_allclose(vectors(llm.embed(TEXTS, prompt_name="query")), asked, atol=1e-4)
        short = embedder.vectors(TEXTS, "lasttoken", normalize=True, dimensions=16)
        np.testing.assert_allclose(vectors(llm.embed(TEXTS, dimensions=16)), short, atol=1e-4)
        with pytest.raises(UnsupportedModel, match="qwen3 model reads texts and writes none"):
            llm.generate("w1")


def test_embedding_gemma(tmp_path: Path) -> None:
    """Tokens see both ways, half a window each; the mean goes through two layers."""
    embedder = Embedder(tmp_path, "gemma3", use_bidirectional_attention=True, sliding_window=30)
    kinds = ("Transformer", "Pooling", "Dense", "Dense", "Normalize")
    embedder.modules(*kinds, pooling="mean", widths=(80, 48))
    written = json.loads((tmp_path / "config.json").read_text())["sliding_window"]
    with LLM(tmp_path, **OPTIONS) as llm:
        expected = embedder.vectors(TEXTS, "mean", normalize=True)
        np.testing.assert_allclose(vectors(llm.embed(TEXTS)), expected, atol=1e-4)
        assert not llm.capabilities().generates
    # Guards the above against a window that would make no difference.
    (tmp_path / "config.json").write_text(
        (tmp_path / "config.json")
        .read_text()
        .replace(f'"sliding_window": {written}', f'"sliding_window": {written + 2}')
    )
    with LLM(tmp_path, **OPTIONS) as llm:
        assert np.abs(vectors(llm.embed(TEXTS)) - expected).max() > 1e-3


def test_embedding_gemma_out_of_gguf(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package writes the files")
    from tests.models.encoders import SPECIAL, WORDS

    embedder = Embedder(tmp_path, "gemma3", use_bidirectional_attention=True, sliding_window=30)
    embedder.modules("Transformer", "Pooling", "Dense", "Dense", "Normalize", pooling="mean", widths=(80, 48))
    names, config = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA_EMBEDDING, 9), embedder.model.config
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gemma-embedding")
    writer.add_context_length(256)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_causal_attention(False)
    writer.add_uint32("gemma-embedding.pooling_type", 1)
    # The converter writes what config.json says, before loading halves it.
    writer.add_sliding_window(json.loads((tmp_path / "config.json").read_text())["sliding_window"])
    writer.add_rope_freq_base(500.0)
    writer.add_float32("gemma-embedding.rope.freq_base_swa", 60.0)
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(3.0)
    writer.add_tokenizer_model("bert")
    writer.add_token_list([*SPECIAL, *(f"\u2581{word}" for word in WORDS)])
    writer.add_token_types([3] * len(SPECIAL) + [1] * len(WORDS))
    for name, number in (("cls", 0), ("seperator", 2), ("unknown", 3), ("padding", 1)):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
    for name, tensor in embedder.model.state_dict().items():
        mapped = names.get_name(f"model.{name}", try_suffixes=(".weight",))
        if mapped is not None:
            shift = 1 if name.endswith("norm.weight") else 0
            writer.add_tensor(mapped, np.ascontiguousarray(tensor.numpy() + np.float32(shift)))
    for place, layer in enumerate(embedder.layers, start=2):
        writer.add_uint32(f"gemma-embedding.dense_{place}_feat_in", layer.in_features)
        writer.add_uint32(f"gemma-embedding.dense_{place}_feat_out", layer.out_features)
        writer.add_tensor(f"dense_{place}.weight", layer.weight.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with LLM(tmp_path / "model.gguf", **OPTIONS) as llm:
        expected = embedder.vectors(TEXTS, "mean", normalize=True)
        np.testing.assert_allclose(vectors(llm.embed(TEXTS)), expected, atol=1e-4)
