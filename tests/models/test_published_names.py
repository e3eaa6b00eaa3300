"""Checkpoints as the hub has them: names without or with other prefixes, buffers among the parameters, a tied head
stored a second time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.models.harness import MAIN, Rig, make
from tests.models.tiny import TinyModels, tokens
from tramontane.errors import UnsupportedModel
from tramontane.loading.build import load_model
from tramontane.models.families import spec_from_hf

Tensors = dict[str, NDArray[Any]]


def _renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new): values for name, values in tensors.items()}


def _with_buffers(prefix: str) -> Callable[[Tensors], Tensors]:
    """The buffers of attention in old files: its mask, what masked scores become, rotary frequencies."""

    def changed(tensors: Tensors) -> Tensors:
        buffers = {
            f"{prefix}.bias": np.tril(np.ones((1, 1, 8, 8), bool)),
            f"{prefix}.masked_bias": np.array(-1e9, np.float32),
            f"{prefix}.rotary_emb.inv_freq": np.ones(4, np.float32),
        }
        return {**tensors, **buffers}

    return changed


def _bare_gpt2(tensors: Tensors) -> Tensors:
    return _renamed("transformer.", "")(_with_buffers("transformer.h.1.attn")(tensors))


def _head_twice(tensors: Tensors) -> Tensors:
    return {**tensors, "lm_head.weight": tensors["transformer.word_embeddings.weight"]}


PUBLISHED: Mapping[str, Callable[[Tensors], Tensors]] = {
    "gpt2": _bare_gpt2,
    "bloom": _renamed("transformer.", ""),
    "opt": _renamed("model.decoder.", "decoder."),
    "opt-post-norm": _renamed("model.decoder.", "decoder."),
    "gpt_neox": _with_buffers("gpt_neox.layers.2.attention"),
    "gptj": _with_buffers("transformer.h.0.attn"),
    "gpt_neo": _with_buffers("transformer.h.0.attn.attention"),
    "falcon": _head_twice,
}


def rewrite(source: Path, folder: Path, change: Callable[[Tensors], Tensors], config: Mapping[str, Any]) -> None:
    numpy = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    numpy.save_file(change(numpy.load_file(source / "model.safetensors")), folder / "model.safetensors")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names_are_those_of_the_same_model(name: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    tiny, ids = tiny_models.get(name), tokens(20)
    rewrite(tiny.path, tmp_path / "m", PUBLISHED[name], json.loads((tiny.path / "config.json").read_text()))
    logits = Rig(load_model(tmp_path / "m", make(str(MAIN.values[0]))).decoder).run(ids)
    assert np.abs(logits - tiny.logits(ids)).max() < 2e-4


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_half_of_gemma3_is_read_where_it_is_asked_for(
    prefix: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    tiny, ids = tiny_models.get("gemma3"), tokens(20)
    text = json.loads((tiny.path / "config.json").read_text())
    config = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}

    def change(tensors: Tensors) -> Tensors:
        image = {"vision_tower.vision_model.post_layernorm.weight": np.ones(4, np.float32)}
        return {**_renamed("model.", prefix)(tensors), **image}

    rewrite(tiny.path, tmp_path / "m", change, config)
    with pytest.raises(UnsupportedModel, match="architecture='gemma3'"):
        spec_from_hf(config)
    loaded = load_model(tmp_path / "m", make(str(MAIN.values[0])), architecture="gemma3")
    assert np.abs(Rig(loaded.decoder).run(ids) - tiny.logits(ids)).max() < 2e-4
