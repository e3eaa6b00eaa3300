"""Encoders end to end against transformers: states, pooling, pairs; their names, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.kernels.modules import make
from tests.models.encoders import CASES, TinyEncoder, TinyEncoders, text
from tramontane import LLM, ContextLengthExceeded, UnsupportedModel
from tramontane.engine.encoder import Encoder, Task, Text
from tramontane.kernels.workspace import Workspace
from tramontane.loading.build import checked_plan, load_model
from tramontane.loading.checkpoint import open_checkpoint
from tramontane.loading.memory import estimate
from tramontane.models.decoder import Decoder
from tramontane.models.spec import ModelSpec

OPTIONS: dict[str, Any] = {"kernels": "reference", "threads": 1, "max_num_batched_tokens": 48, "device": "cpu"}
LENGTHS = (1, 4, 5, 6, 11, 12, 13, 30, 60, 94)
TEXTS = [text(length, length) for length in LENGTHS]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> TinyEncoders:
    return TinyEncoders(tmp_path_factory.mktemp("encoders"))


def vectors(found: Any) -> Any:
    return np.array([one.vector for one in found])


@pytest.mark.parametrize("name", CASES)
def test_states_are_transformers(encoders: TinyEncoders, name: str) -> None:
    """Texts shorter and longer than windows and steps, together and each alone."""
    encoder = encoders.get(name)
    given = [part for part in TEXTS if len(part.split()) + 2 <= _context(name)]
    states = [encoder.states(one) for one in given]
    with LLM(encoder.path, **OPTIONS) as llm:
        for pooling, pool in _POOLS.items():
            expected = np.array([pool(one).numpy() for one in states])
            np.testing.assert_allclose(vectors(llm.embed(given, pooling=pooling)), expected, atol=1e-4)  # type: ignore[call-overload]
        default = vectors(llm.embed(given))
        np.testing.assert_allclose(default, np.array([one.mean(0).numpy() for one in states]), atol=1e-4)
        np.testing.assert_allclose(vectors([llm.embed(one) for one in given]), default, atol=1e-5)
        assert llm.capabilities().context_length == _context(name)


def _context(name: str) -> int:
    return 94 if "roberta" in name else 96


_POOLS: dict[str, Any] = {
    "cls": lambda states: states[0],
    "lasttoken": lambda states: states[-1],
    "max": lambda states: states.max(0).values,
}


@pytest.mark.parametrize("kernels", ["cpu", "torch"])
@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_every_kernel_module(encoders: TinyEncoders, name: str, kernels: str) -> None:
    encoder = encoders.get(name)
    with LLM(encoder.path, **{**OPTIONS, "kernels": kernels}) as llm:
        expected = np.array([encoder.states(one).mean(0).numpy() for one in TEXTS[:9]])
        np.testing.assert_allclose(vectors(llm.embed(TEXTS[:9])), expected, atol=1e-4)


def test_deterministic_is_bit_by_bit(encoders: TinyEncoders) -> None:
    with LLM(encoders.get("modernbert").path, **{**OPTIONS, "deterministic": True}) as llm:
        assert [llm.embed(one) for one in TEXTS] == llm.embed(TEXTS)


def test_an_encoder_writes_nothing(encoders: TinyEncoders) -> None:
    with LLM(encoders.get("bert").path, **OPTIONS) as llm:
        can = llm.capabilities()
        assert (can.generates, can.chat, can.embeds, can.reranks) == (False, False, True, False)
        with pytest.raises(UnsupportedModel, match=r"bert model reads texts and writes none\. Use embed\(\), or"):
            llm.generate("w1")
        with pytest.raises(UnsupportedModel, match="no classification head"):
            llm.rerank("w1", ["w2"])
        stats = llm.stats()
        assert stats.cache_bytes < 100_000
        with pytest.raises(ContextLengthExceeded):
            llm.embed(text(200), truncate=False)
        cut = llm.embed(text(200))
        assert cut.truncated
        assert cut.usage.prompt_tokens == 96
    with LLM(encoders.get("bert").path, **OPTIONS, context_length=20) as llm:
        assert llm.embed(text(30)).usage.prompt_tokens == 20


def _attention(spec: ModelSpec, index: int, **changes: Any) -> ModelSpec:
    layers = list(spec.layers)
    layers[index] = replace(layers[index], attention=replace(layers[index].attention, **changes))
    return replace(spec, layers=tuple(layers))


CHANGES: dict[str, tuple[str, Callable[[ModelSpec], ModelSpec]]] = {
    "a window wider": ("modernbert", lambda spec: _attention(spec, 1, window=8)),
    "a window narrower": ("modernbert", lambda spec: _attention(spec, 1, window=6)),
    "no window": ("modernbert", lambda spec: _attention(spec, 4, window=None)),
    "causal": ("modernbert", lambda spec: _attention(spec, 0, causal=True)),
    "the last layer causal": ("bert", lambda spec: _attention(spec, 2, causal=True)),
    "no rotation": ("nomic_bert", lambda spec: _attention(spec, 2, rope=None)),
    "norms before": (
        "bert",
        lambda spec: replace(spec, layers=(*spec.layers[:2], replace(spec.layers[2], placement="pre"))),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_field_shows(encoders: TinyEncoders, change: str) -> None:
    name, changed = CHANGES[change]
    loaded = load_model(encoders.get(name).path, make("reference"))

    def mean(decoder: Decoder) -> Any:
        ids = np.random.default_rng(1).integers(4, 97, 60).tolist()
        task = Task([Text(tuple(ids))], ["mean"])
        sizes = {"block_size": 16, "context_length": 96, "max_num_batched_tokens": 96, "max_num_seqs": 1}
        encoder = Encoder(decoder, Workspace(decoder.ops, 96), cache_dtype="float32", **sizes)  # type: ignore[arg-type]
        encoder.add(task)
        encoder.step()
        return task.future.result(0)[0]

    assert isinstance(loaded.decoder, Decoder)
    other = Decoder(changed(loaded.spec), loaded.decoder.parameters, loaded.ops)
    assert np.abs(mean(other) - mean(loaded.decoder)).max() > 1e-3, "ten times what parity allows"


# ---- names and layouts ----------------------------------------------------------------------------------------


def renamed(encoder: TinyEncoder, folder: Path, rename: Any, **config: Any) -> Path:
    """A copy with other tensor names (None: left out) and settings."""
    import json

    from safetensors.numpy import load_file, save_file

    folder.mkdir()
    for file in ("tokenizer.json", "config.json"):
        (folder / file).write_bytes((encoder.path / file).read_bytes())
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config or settings))
    tensors = rename(load_file(encoder.path / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors")
    return folder


def same(encoder: TinyEncoder, folder: Path) -> None:
    with LLM(folder, **OPTIONS) as llm:
        expected = np.array([encoder.states(one).mean(0).numpy() for one in TEXTS[:5]])
        np.testing.assert_allclose(vectors(llm.embed(TEXTS[:5])), expected, atol=1e-4)


def test_old_names_of_bert(encoders: TinyEncoders, tmp_path: Path) -> None:
    """A masked language model of old, with its head, a prefix, and gammas and betas."""

    def rename(tensors: dict[str, Any]) -> dict[str, Any]:
        old = {
            "bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
            for name, t in tensors.items()
        }
        head = {"cls.predictions.bias": np.zeros(97, np.float32)}
        return {**old, **head, "bert.embeddings.position_ids": np.arange(96)[None]}

    same(encoders.get("bert"), renamed(encoders.get("bert"), tmp_path / "old", rename))


def test_nomic_in_both_layouts(encoders: TinyEncoders, tmp_path: Path) -> None:
    """transformers writes the names that the model was published with, and computes with others."""
    encoder = encoders.get("nomic_bert")
    inner = {name: tensor.numpy() for name, tensor in encoder.model.state_dict().items()}
    assert "layers.0.self_attn.q_proj.weight" in inner
    same(encoder, renamed(encoder, tmp_path / "new", lambda tensors: inner))
    config = {
        "model_type": "nomic_bert",
        "architectures": ["NomicBertModel"],
        "vocab_size": 97,
        "n_embd": 48,
        "n_head": 4,
        "n_inner": 80,
        "n_layer": 3,
        "n_positions": 96,
        "layer_norm_epsilon": 0.05,
        "activation_function": "swiglu",
        "rotary_emb_base": 70,
        "rotary_emb_fraction": 1.0,
        "rotary_emb_interleaved": False,
        "rotary_scaling_factor": None,
        "type_vocab_size": 2,
        "causal": False,
        "prenorm": False,
        "qkv_proj_bias": False,
        "mlp_fc1_bias": False,
        "mlp_fc2_bias": False,
    }
    same(encoder, renamed(encoder, tmp_path / "published", dict, **config))


def test_modernbert_as_it_was_published(encoders: TinyEncoders, tmp_path: Path) -> None:
    """Thetas and the pattern of layers as settings of their own, and a masked language model's head."""
    import json

    encoder = encoders.get("modernbert")
    config = json.loads((encoder.path / "config.json").read_text())
    for key in ("rope_parameters", "layer_types"):
        config.pop(key)
    config |= {"global_rope_theta": 700.0, "local_rope_theta": 50.0, "global_attn_every_n_layers": 3}
    config["architectures"] = ["ModernBertForMaskedLM"]

    def rename(tensors: dict[str, Any]) -> dict[str, Any]:
        inner = {f"model.{name}": tensor for name, tensor in tensors.items()}
        return {**inner, "head.dense.weight": np.ones((48, 48), np.float32), "decoder.bias": np.ones(97, np.float32)}

    same(encoder, renamed(encoder, tmp_path / "published", rename, **config))


@pytest.mark.parametrize(
    ("name", "changes", "word"),
    [
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ("bert", {"is_decoder": True}, "is_decoder"),
        ("bert", {"hidden_act": "mish"}, "hidden_act"),
        ("bert", {"architectures": ["BertForTokenClassification"]}, "architectures"),
        ("roberta", {"pad_token_id": 0}, "pad_token_id"),
        ("nomic_bert", {"moe_every_n_layers": 2}, "moe_every_n_layers"),
        ("nomic_bert", {"prenorm": True}, "prenorm"),
        ("nomic_bert", {"rotary_emb_fraction": 0.5}, "rotary_emb_fraction"),
        ("nomic_bert", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type"),
        ("modernbert", {"rope_parameters": {"full_attention": {"rope_type": "linear"}}}, "rope_type"),
        ("modernbert", {"layer_types": ["chunked_attention"] * 5}, "layer_types"),
    ],
)
def test_what_is_not_honoured_is_refused_by_its_key(tmp_path: Path, name: str, changes: Any, word: str) -> None:
    encoder = TinyEncoder(name, tmp_path)
    encoder.configure(**changes)
    with pytest.raises(UnsupportedModel, match=word):
        LLM(encoder.path, **OPTIONS)


@pytest.mark.parametrize("name", ["bert", "nomic_bert", "modernbert"])
def test_memory_is_what_was_estimated(encoders: TinyEncoders, name: str) -> None:
    with open_checkpoint(encoders.get(name).path) as checkpoint:
        needed = estimate(checked_plan(checkpoint), context_length=96, batch=1, max_num_batched_tokens=48)
    with LLM(encoders.get(name).path, **OPTIONS) as llm:
        llm.embed(TEXTS)
        stats = llm.stats()
    assert stats.weight_bytes == needed.weights
    assert stats.workspace_bytes == pytest.approx(needed.workspace, rel=0.05)
