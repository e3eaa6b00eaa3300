"""Checkpoints to decoders: names, dtypes, refusals, and the memory that loading takes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.loading.checkpoints import CONFIG, hf_tensors, write_folder, write_gguf
from tramontane import platform
from tramontane.errors import CorruptCheckpoint, InvalidRequest, ModelNotFound, OutOfMemory, UnsupportedModel
from tramontane.kernels.reference import ReferenceOps
from tramontane.loading.binding import bind
from tramontane.loading.build import load_model
from tramontane.loading.checkpoint import open_checkpoint
from tramontane.loading.tensors import TensorEntry
from tramontane.models.families import spec_from_hf
from tramontane.models.names import GGUF_NAMES, HF_NAMES, NameMap
from tramontane.models.parameters import wanted_parameters

OPS = ReferenceOps(threads=1, deterministic=False)


def test_every_parameter_has_a_name_in_each_source() -> None:
    def parts(names: NameMap, name: str) -> tuple[str, ...]:
        target = names.target(name)
        assert target is not None
        return target.parts

    assert all(HF_NAMES.target(name) for name in hf_tensors())
    assert parts(HF_NAMES, "model.layers.1.self_attn.q_proj.weight") == ("layers.1.attention.q",)
    assert parts(HF_NAMES, "lm_head.weight") == ("head",)
    assert parts(GGUF_NAMES, "blk.1.attn_q.bias") == ("layers.1.attention.q.bias",)
    assert parts(GGUF_NAMES, "output.weight") == ("head",)
    assert parts(GGUF_NAMES, "blk.12.attn_qkv.weight") == tuple(f"layers.12.attention.{x}" for x in "qkv")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.01.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "model.layers.-1.mlp.up_proj.weight",
        "score.weight",
        "model.norm.scale",
    ],
)
def test_unknown_tensors_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedModel, match=re.escape(name)):
        bind(HF_NAMES, {name: TensorEntry((4,), "F32", 16)}, spec_from_hf(CONFIG), "here")


def test_matrices_stay_where_they_are_mapped(tmp_path: Path) -> None:
    loaded = load_model(write_folder(tmp_path / "m"), OPS)
    weight = loaded.decoder.parameters["layers.0.mlp.up"].tensors()["weight"]
    assert not weight.flags.writeable
    assert np.shares_memory(weight, loaded.checkpoint.array("model.layers.0.mlp.up_proj.weight"))
    assert loaded.weight_bytes == sum(
        4 * int(np.prod(wanted.shape)) for wanted in wanted_parameters(loaded.spec).values()
    )
    assert (loaded.dtype, loaded.cache_dtype()) == ("float32", "float32")
    assert loaded.cache_dtype("bfloat16") == "bfloat16"


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype_converts_matrices_and_vectors_become_float32(tmp_path: Path, stored: Any, dtype: str) -> None:
    tensors = hf_tensors(dtype=stored)
    loaded = load_model(write_folder(tmp_path / "m", tensors), OPS, dtype=dtype)
    wanted = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    weight = loaded.decoder.parameters["head"].tensors()["weight"]
    assert weight.dtype == wanted
    assert np.array_equal(weight, tensors["lm_head.weight"].astype(wanted))
    norm: Any = loaded.decoder.parameters["norm"]
    assert norm.dtype == np.float32
    assert np.array_equal(norm, tensors["model.norm.weight"].astype(np.float32))
    assert loaded.dtype == dtype
    assert loaded.cache_dtype() == ("float32" if dtype == "float32" else "float16")


def test_dtype_leaves_quantized_weights(tmp_path: Path) -> None:
    head = {"output.weight": np.ones((50, 32), np.float32)}
    loaded = load_model(write_gguf(tmp_path / "m.gguf", tensors=head, matrices="Q4_0"), OPS, dtype="bfloat16")
    assert {loaded.formats[name] for name in loaded.formats if name.startswith("layers")} == {"Q4_0"}
    assert (loaded.formats["head"], loaded.dtype, loaded.cache_dtype()) == ("BF16", "bfloat16", "float16")
    blocks = loaded.decoder.parameters["layers.0.attention.q"].tensors()["blocks"]
    assert np.shares_memory(blocks, loaded.checkpoint.array("blk.0.attn_q.weight"))


def test_float16_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    tensors = hf_tensors()
    tensors["lm_head.weight"][3, 4] = 1e6
    folder = write_folder(tmp_path / "m", tensors)
    with pytest.raises(UnsupportedModel, match=r"lm_head\.weight.*float16"):
        load_model(folder, OPS, dtype="float16")
    load_model(folder, OPS, dtype="bfloat16")


def test_an_unknown_dtype_is_named() -> None:
    with pytest.raises(InvalidRequest, match="int8"):
        load_model("anywhere", OPS, dtype="int8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, "layers.2.attention_norm is missing"),
        ({"num_hidden_layers": 1}, "layers.1.attention_norm is not part"),
        ({"intermediate_size": 96}, r"mlp.gate has shape \[64, 32\] instead of \[96, 32\]"),
        ({"attention_bias": True}, "attention.q.bias is missing"),
        ({"vocab_size": 51}, "embedding has shape"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = write_folder(tmp_path / "m", hf_tensors(), **change)
    with pytest.raises(UnsupportedModel, match=message):
        load_model(folder, OPS)


@pytest.mark.parametrize(
    ("family", "name"),
    [("phi3", "model.layers.0.self_attn.qkv_proj.weight"), ("opt", "model.decoder.embed_positions.weight")],
)
def test_a_number_is_no_matrix_to_be_cut(tmp_path: Path, family: str, name: str) -> None:
    config = {"model_type": family, "architectures": None, "ffn_dim": 64}
    with pytest.raises(UnsupportedModel, match="are not those"):
        load_model(write_folder(tmp_path / "m", {name: np.array(1, np.float32)}, **config), OPS)


def test_no_more_layers_are_left_out_than_guess_at_further_tokens() -> None:
    spec = spec_from_hf({**CONFIG, "num_hidden_layers": 1})
    tensors = {name: TensorEntry(array.shape, "F32", array.nbytes) for name, array in hf_tensors().items()}
    for spare in (0, 1):
        found = bind(replace(HF_NAMES, spare_layers=spare), tensors, spec, "a test")
        assert ("layers.1.mlp.up" in found) == (spare == 0)
    third = {name.replace("layers.1.", "layers.2."): entry for name, entry in tensors.items()}
    assert "layers.2.mlp.up" in bind(replace(HF_NAMES, spare_layers=1), third, spec, "a test")


def test_unloadable_formats_are_named(tmp_path: Path) -> None:
    tensors = hf_tensors()
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.float64)
    with pytest.raises(UnsupportedModel, match=r"lm_head\.weight.*F64"):
        load_model(write_folder(tmp_path / "m", tensors), OPS)


def test_a_tied_head_may_be_stored_again_but_not_differ(tmp_path: Path) -> None:
    tensors = hf_tensors()
    with pytest.raises(UnsupportedModel, match="tie_word_embeddings"):
        load_model(write_folder(tmp_path / "differs", tensors, tie_word_embeddings=True), OPS)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    loaded = load_model(write_folder(tmp_path / "same", tensors, tie_word_embeddings=True), OPS)
    assert "head" not in loaded.decoder.parameters
    del tensors["lm_head.weight"]
    load_model(write_folder(tmp_path / "absent", tensors, tie_word_embeddings=True), OPS)
    with pytest.raises(UnsupportedModel, match="head is missing"):
        load_model(write_folder(tmp_path / "untied", tensors), OPS)


def test_too_little_memory_is_said_before_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "m")
    monkeypatch.setattr(platform, "available_memory", lambda: 20_000)
    with pytest.raises(OutOfMemory, match=r"KiB.*19\.5 KiB"):
        load_model(folder, OPS)


def test_a_checkpoint_shows_what_stands_beside_its_weights(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    assert open_checkpoint(folder).folder == folder
    assert open_checkpoint(folder).generation_config == {"eos_token_id": 2}
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "x"}))
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "eos_token_id": [2, 3]}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("R")
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.kind == "safetensors"
        assert checkpoint.additional_templates == {"rag": "R"}
        assert checkpoint.tokenizer_config == {"chat_template": "x"}
        assert checkpoint.generation_config == {"temperature": 0.6, "eos_token_id": [2, 3]}
        assert checkpoint.chat_template == "{{ messages }}"
        entry = checkpoint.tensors["lm_head.weight"]
        assert (entry.shape, entry.format, entry.nbytes) == ((50, 32), "F32", 6400)
    assert open_checkpoint(folder / "model.safetensors").spec() == open_checkpoint(folder).spec()


def test_gguf_recommends_sampling(tmp_path: Path) -> None:
    wishes = {"general.sampling.temp": 0.7, "general.sampling.top_k": 20, "general.sampling.penalty_repeat": 1.05}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", wishes))
    assert checkpoint.generation_config == {"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.05}
    assert checkpoint.kind == "gguf"
    assert checkpoint.metadata["general.architecture"] == "llama"


@pytest.mark.skipif(sys.platform != "linux", reason="pages of a map are told apart on Linux only")
def test_what_has_been_loaded_keeps_no_page_of_the_file_and_no_list_of_tokens(tmp_path: Path) -> None:
    tokens = ["piece"] * 50_000
    path = write_gguf(tmp_path / "m.gguf", {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.bos_token_id": 1})

    def resident() -> int:
        """Kilobytes of the file's map."""
        maps = Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace")
        return sum(map(int, re.findall(rf"{re.escape(str(path))}\nSize:.*?\nRss: +(\d+) kB", maps, re.DOTALL)))

    with open_checkpoint(path) as checkpoint:
        spec, norm = checkpoint.spec(), checkpoint.array("output_norm.weight").copy()
        assert checkpoint.metadata["tokenizer.ggml.tokens"] == tokens
        assert resident() > 100
        checkpoint.forget_tokens()
        checkpoint.release_all()
        assert resident() == 0
        assert "tokenizer.ggml.tokens" not in checkpoint.metadata
        assert checkpoint.metadata["tokenizer.ggml.bos_token_id"] == 1
        assert checkpoint.spec() == spec
        assert np.array_equal(checkpoint.array("output_norm.weight"), norm)


def test_rope_factors_are_read_and_checked(tmp_path: Path) -> None:
    factors = np.array([1.0, 1.5, 2.0, 4.0], np.float32)
    sound = open_checkpoint(write_gguf(tmp_path / "a.gguf", tensors={"rope_freqs.weight": factors}))
    assert sound.spec().layers[0].attention.rope.factors == (1.0, 1.5, 2.0, 4.0)
    wrong = open_checkpoint(write_gguf(tmp_path / "b.gguf", tensors={"rope_freqs.weight": factors[None].repeat(2, 0)}))
    with pytest.raises(CorruptCheckpoint, match="rope_freqs"):
        wrong.spec()


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"hidden_size": 1', "\udcff"])
def test_a_broken_config_is_corrupt(tmp_path: Path, text: str) -> None:
    folder = write_folder(tmp_path / "m")
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CorruptCheckpoint, match=r"config\.json"):
        open_checkpoint(folder)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"config\.json"):
        open_checkpoint(tmp_path)
    with pytest.raises(ModelNotFound):
        open_checkpoint(tmp_path / "no.gguf")


PEAK = """
import sys
from tramontane import platform
from tramontane.kernels import for_device
from tramontane.loading.build import load_model

path, dtype = sys.argv[1:]
ops = for_device("cpu")
before = platform.current_rss()
loaded = load_model(path, ops, dtype=dtype)
print(before, platform.peak_rss(), loaded.weight_bytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="pages of a map are not given back on Windows")
@pytest.mark.parametrize("dtype", ["auto", "float16", "bfloat16"])
@pytest.mark.parametrize("model", ["stories15m", "smollm2"])
def test_peak_memory_is_what_stays(model: str, dtype: str, request: pytest.FixtureRequest) -> None:
    """Resident pages count maps and arrays alike: a matrix that was packed is given back before the next one is read.
    The megabytes are for what a checkpoint tells of itself, its vocabulary above all."""
    path = request.getfixturevalue(model)
    run = subprocess.run([sys.executable, "-c", PEAK, str(path), dtype], capture_output=True, text=True, check=True)
    before, peak, weights = map(int, run.stdout.split())
    assert peak - before <= 1.1 * weights + (16 << 20)
