"""Which checkpoints go through transformers, what is said where they cannot, and that nothing hostile gets through."""

from __future__ import annotations

import gc
import importlib.util
import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.kernels.modules import make
from tramontane.errors import CorruptCheckpoint, UnsupportedModel
from tramontane.loading.build import load_model

OPS = make("reference")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model that this build has no decoder for."""
    pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    from tests.models import zoo

    zoo.save_tiny("biogpt", tmp_path / "m")
    return tmp_path / "m"


def change(folder: Path, **settings: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


def test_without_the_extra_it_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name))
    with pytest.raises(UnsupportedModel, match=r"'biogpt'.*pip install 'tramontane\[transformers\]'"):
        load_model(folder, OPS)


def test_importing_it_without_transformers_names_the_extra() -> None:
    code = "import sys; sys.modules['transformers'] = None; import tramontane.models.fallback"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "MissingExtra" in result.stderr
    assert "tramontane[transformers]" in result.stderr


def test_loading_a_model_of_our_own_imports_no_torch(tmp_path: Path) -> None:
    from tests.loading.checkpoints import CONFIG, hf_tensors, write_folder

    write_folder(tmp_path / "m", hf_tensors(CONFIG), **CONFIG)
    code = (
        "import sys; from tramontane.kernels import for_device; from tramontane.loading.build import load_model; "
        "load_model(sys.argv[1], for_device('cpu', kernels='reference')); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "m")], check=True)


@pytest.mark.parametrize("model_type", ["openai-gpt", "recurrent_gemma"])
def test_what_cannot_run_names_the_backend_that_can(model_type: str, tmp_path: Path) -> None:
    """One keeps nothing of the tokens before, the other keeps it in its modules."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from tests.models import zoo

    zoo.save_tiny(model_type, tmp_path / "m")
    with pytest.raises(UnsupportedModel, match=rf"'{model_type}'.*one row: its? .*backend='transformers'"):
        load_model(tmp_path / "m", OPS)


def test_what_transformers_does_not_know_is_refused_by_both(folder: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"'gpt9'.*transformers \S+ does not know"):
        load_model(change(folder, model_type="gpt9"), OPS)


def test_only_models_that_continue_texts_fall_back(folder: Path) -> None:
    with pytest.raises(UnsupportedModel, match="biogpt") as refused:
        load_model(change(folder, architectures=["BioGptForTokenClassification"]), OPS)
    assert "transformers" not in str(refused.value)


def test_code_of_the_repository_is_never_run(folder: Path) -> None:
    (folder / "modeling.py").write_text("raise SystemExit('it ran')")
    (folder / "configuration.py").write_text("raise SystemExit('it ran')")
    remote = {"AutoConfig": "configuration.C", "AutoModelForCausalLM": "modeling.M"}
    assert load_model(change(folder, auto_map=remote), OPS).spec.family == "biogpt"


def test_how_a_model_is_to_be_loaded_is_ours_to_say(folder: Path) -> None:
    """Settings of loaders, which may name packages, kernels or precisions, are no part of the model."""
    words = {"dtype": "float16", "attn_implementation": "org/kernel", "fusion_config": {"patch_embeddings": True}}
    assert load_model(change(folder, **words), OPS).dtype == "float32"


def test_pickles_are_not_looked_at(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"not a pickle")
    load_model(folder, OPS)
    (folder / "model.safetensors").unlink()
    with pytest.raises(Exception, match="safetensors"):
        load_model(folder, OPS)


def test_missing_parameters_are_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "fc1.weight" in name)
    save_file({n: t for n, t in tensors.items() if n != name}, folder / "model.safetensors")
    with pytest.raises(CorruptCheckpoint, match=r"fc1\.weight"):
        load_model(folder, OPS)


def test_parameters_of_other_shapes_are_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "fc1.weight" in name)
    save_file({**tensors, name: np.ones((3, 5), np.float32)}, folder / "model.safetensors")
    with pytest.raises(UnsupportedModel, match="does not load"):
        load_model(folder, OPS)


HOSTILE: list[dict[str, Any]] = [
    {"num_hidden_layers": 1 << 40},
    {"num_hidden_layers": 10**6},
    {"num_hidden_layers": 5000},
    {"intermediate_size": 1 << 30},
    {"max_position_embeddings": 1 << 30},
    {"hidden_size": 1 << 40},
    {"hidden_size": -64},
    {"num_attention_heads": 0},
    {"vocab_size": "97"},
    {"hidden_act": "mish9"},
    {"max_position_embeddings": {"a": [1]}},
    {"num_hidden_layers": None},
    {"is_encoder_decoder": True, "layer_types": [[["x"]]]},
]


@pytest.mark.parametrize("settings", HOSTILE, ids=str)
def test_impossible_settings_end_in_our_errors(settings: dict[str, Any], folder: Path) -> None:
    with pytest.raises((CorruptCheckpoint, UnsupportedModel)):
        load_model(change(folder, **settings), OPS)


def test_settings_of_very_many_modules_are_refused(folder: Path) -> None:
    settings = {"model_type": "stablelm", "hidden_act": "mish", "qk_layernorm": True, "architectures": None}
    heads = {"num_attention_heads": 1 << 16, "num_key_value_heads": 1 << 16, "hidden_size": 8 << 16}
    with pytest.raises(CorruptCheckpoint, match="num_attention_heads is 65536, too many"):
        load_model(change(folder, **settings, **heads), OPS)


def test_its_memory_goes_with_the_last_who_holds_it(folder: Path) -> None:
    loaded = load_model(folder, OPS)
    gc.collect()
    gc.disable()
    try:
        weights = [weakref.ref(value) for value in loaded.decoder.matrices.values()]
        del loaded
        assert weights
        assert not any(weight() is not None for weight in weights)
    finally:
        gc.enable()
