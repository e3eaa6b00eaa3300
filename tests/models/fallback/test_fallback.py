"""Models of transformers on our cache and weights: their logits, whole and in any pieces, are those of transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.kernels.modules import make
from tests.loading.quantized import writers
from tramontane.errors import UnsupportedModel
from tramontane.kernels import Ops
from tramontane.loading.checkpoint import open_checkpoint
from tramontane.loading.fallback import Fallback, load_fallback
from tramontane.models.spec import cache_groups

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from tests.models import zoo  # noqa: E402
from tramontane.models.fallback.tensors import WeightTensor  # noqa: E402

WAYS = {
    "biogpt": "one row",  # positions from a table, counted from two
    "cwm": "one row",  # windows
    "vaultgemma": "one row",  # softcaps and windows
    "granite_swa": "one row",  # sinks
    "flex_olmo": "one row",  # experts
    "gpt2": "one row",  # matrices the other way round
    "minicpm3": "one row",  # keys wider than values
    "gemma4_text": "one row",  # layers that share keys and values
    "codegen": "sequence by sequence",  # branches side by side, attention of its own
    "lfm3": "sequence by sequence",  # convolutions beside attention
    "mamba": "token by token",  # states alone, continued a token at a time
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """A model of a type, and its folder, made once."""

    @cache
    def made(model_type: str) -> tuple[Any, Path]:
        folder = tmp_path_factory.mktemp(model_type)
        return zoo.save_tiny(model_type, folder), folder

    return made


def load(folder: Path, ops: Ops, dtype: str = "auto") -> Fallback:
    """Through transformers even where this build has a decoder of its own."""
    return load_fallback(open_checkpoint(folder), ops, dtype, UnsupportedModel("It is tried.", ""))


def logits_of(model: Any, ids: list[int]) -> NDArray[Any]:
    with torch.no_grad():
        logits: NDArray[Any] = model(input_ids=torch.tensor([ids])).logits[0].float().numpy()
    return logits


def reloaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)


def assert_same(model: Any, decoder: Any, ids: list[int]) -> None:
    wanted = logits_of(model, ids)
    for ours, theirs in zoo.compared(decoder, ids, wanted):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=zoo.TOLERANCE)


@pytest.mark.parametrize("model_type", WAYS)
def test_logits_are_those_of_transformers(model_type: str, tiny: Any) -> None:
    model, folder = tiny(model_type)
    found = load(folder, make("cpu"))
    assert found.model.way.name == WAYS[model_type]
    assert_same(model, found.model, zoo.tokens_of(model_type))


@pytest.mark.parametrize("kernels", ["reference", "torch"])
@pytest.mark.parametrize("model_type", ["cwm", "gpt2", "lfm3"])
def test_other_kernels(kernels: str, model_type: str, tiny: Any) -> None:
    model, folder = tiny(model_type)
    assert_same(model, load(folder, make(kernels)).model, zoo.tokens_of(model_type))


def test_the_spec_tells_what_the_engine_asks(tiny: Any) -> None:
    spec = load(tiny("cwm")[1], make("cpu")).model.spec
    assert (spec.vocab_size, spec.hidden_size, spec.context_length, spec.states) == (zoo.VOCAB, 64, 128, [])
    assert {group.window for group in cache_groups(spec)} == {None, 9}
    assert load(tiny("biogpt")[1], make("cpu")).model.spec.context_length == 128  # its table has two rows more
    assert load(tiny("lfm3")[1], make("cpu")).model.spec.states
    assert len(load(tiny("gemma4_text")[1], make("cpu")).model.spec.layers) == zoo.LAYERS - 2  # two are handed theirs


# ---- weights ------------------------------------------------------------------------------------------------------


def test_matrices_stay_where_they_are_mapped(tiny: Any) -> None:
    for model_type in ("cwm", "flex_olmo"):
        found = load(tiny(model_type)[1], make("reference"))
        names = found.model.matrices
        assert {name for name in names if name.endswith(("q_proj.weight", "lm_head.weight", "embed_tokens.weight"))}
        for name, value in names.items():
            for parts in value.weights:
                for weight in parts:
                    assert not weight.tensors()["weight"].flags.writeable, name
        small = [value for value in found.model.module.model.parameters() if not isinstance(value, WeightTensor)]
        assert all(value.dim() == 1 for value in small)


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_other_dtypes(dtype: str, tiny: Any, tmp_path: Path) -> None:
    zoo.save_tiny("flex_olmo", tmp_path / "first").to(torch.bfloat16).save_pretrained(tmp_path / "m")
    found = load(tmp_path / "m", make("cpu"), dtype)
    kept = {"auto": "BF16", "float32": "F32"}[dtype]
    assert set(found.formats.values()) == {kept}
    assert {
        weight.format for value in found.model.matrices.values() for parts in value.weights for weight in parts
    } == {kept}
    assert found.dtype == ("bfloat16" if dtype == "auto" else "float32")
    assert_same(reloaded(tmp_path / "m"), found.model, zoo.tokens_of("flex_olmo"))


def write_quantized(folder: Path, model: Any, write: writers.Writer, settings: dict[str, Any]) -> Any:
    """Save the model with its layers' matrices as `write` writes them; transformers' model of the values that these
    stand for."""
    from safetensors.numpy import load_file, save_file

    model.save_pretrained(folder / "plain")
    rng = np.random.default_rng(3)
    stored, plain = {}, load_file(folder / "plain" / "model.safetensors")
    for name, values in plain.items():
        turned = ".c_" in name  # of GPT-2: a quantizer stores what the layer computes with, outputs by inputs
        if values.ndim < 2 or "norm" in name or not (turned or "_proj." in name):
            stored[name] = values
            continue
        tensors, written = write(rng, *(values.shape[::-1] if turned else values.shape))
        plain[name] = np.ascontiguousarray(written.T if turned else written) / 8
        for ending, array in tensors.items():
            scaled = (array / 8).astype(array.dtype) if "scale" in ending else array
            stored[name.removesuffix("weight") + ending] = np.ascontiguousarray(scaled)
    save_file(plain, folder / "plain" / "model.safetensors", metadata={"format": "pt"})
    save_file(stored, folder / "model.safetensors")
    config = json.loads((folder / "plain" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return reloaded(folder / "plain")


QUANTIZED: dict[str, tuple[str, writers.Writer, dict[str, Any], str]] = {
    "gptq": (
        "arcee",
        partial(writers.gptq, bits=4, group=32),
        {"quant_method": "gptq", "bits": 4, "group_size": 32},
        "INT4",
    ),
    "gptq-turned": (
        "gpt2",
        partial(writers.gptq, bits=4, group=32),
        {"quant_method": "gptq", "bits": 4, "group_size": 32},
        "INT4",
    ),
    "fp8-experts": (
        "flex_olmo",
        partial(writers.fp8, kind="block", name="weight_scale_inv", block=32),
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]},
        "FP8",
    ),
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_matrices_stay_quantized(name: str, tiny: Any, tmp_path: Path) -> None:
    model_type, write, settings, format = QUANTIZED[name]
    twin = write_quantized(tmp_path, tiny(model_type)[0], write, settings)
    found = load(tmp_path, make("cpu"))
    kept = {weight.format for value in found.model.matrices.values() for parts in value.weights for weight in parts}
    assert kept == {"F32", format}
    ids = zoo.tokens_of(model_type)
    wanted = logits_of(twin, ids)
    largest = np.abs(wanted).max()
    for ours, theirs in zoo.compared(found.model, ids, wanted):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=zoo.TOLERANCE * largest)


# ---- all of them --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_most_models_of_transformers_run(tmp_path: Path) -> None:
    """What docs/models.md tells, made anew."""
    trials = [zoo.attempt(name, tmp_path / name, make("cpu")) for name in zoo.model_types()]
    assert not [trial for trial in trials if trial.how and not trial.right]
    assert sum(trial.right for trial in trials) >= 0.85 * len(trials)
