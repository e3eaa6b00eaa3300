"""Which of the wheel's ways of loading each kind of files takes, and the options that go with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.backends.mistralrs.fake import Wheel
from tramontane.backends.mistralrs.options import settle
from tramontane.backends.mistralrs.source import find, isq_for, runner_arguments
from tramontane.backends.mistralrs.xlora import staged
from tramontane.errors import InvalidRequest, ModelNotFound, TramontaneError, UnsupportedModel


def arguments(path: Path, tmp_path: Path, **options: Any) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The kind of Which, its arguments, and those of the Runner besides."""
    settings = settle(options, {})
    stage = tmp_path / "stage"
    stage.mkdir()
    found = runner_arguments(Wheel, find(path, settings.options), settings, tmp_path / "template.jinja", stage)
    which = found.pop("which")
    return type(which).__name__, which.kwargs, found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    (folder / "model.safetensors").touch()
    return folder


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(64))
    return tmp_path / "m.gguf"


@pytest.fixture
def xlora(tmp_path: Path) -> Path:
    """The files of an X-LoRA checkpoint with two adapters, empty where nobody looks."""
    folder = tmp_path / "xlora"
    for name in ("one", "two"):
        (folder / name).mkdir(parents=True)
        (folder / name / "adapter_model.safetensors").write_text(name)
        (folder / name / "adapter_config.json").touch()
    (folder / "xlora_classifier.safetensors").touch()
    (folder / "xlora_config.json").write_text("{}")
    (folder / "order.json").write_text(json.dumps({"order": ["two", "one"]}))
    return folder


def test_a_folder(folder: Path, tmp_path: Path) -> None:
    kind, which, runner = arguments(
        folder, tmp_path, dtype="bfloat16", architecture="llama", quantization="Q4_K", max_num_seqs=3, engine_seed=7,
        prefix_cache_n=2, kv_cache=False, topology=folder / "config.json", imatrix=folder / "config.json",
        calibration_file=folder / "config.json", write_uqff=tmp_path / "out.uqff",
    )  # fmt: skip
    assert kind == "Plain"
    assert which.pop("arch") is Wheel.Architecture.Llama
    assert which == {
        "model_id": str(folder),
        "dtype": "bf16",
        "topology": str(folder / "config.json"),
        "imatrix": str(folder / "config.json"),
        "calibration_file": str(folder / "config.json"),
        "write_uqff": str(tmp_path / "out.uqff"),
    }
    assert runner == {
        "max_seqs": 3,
        "no_kv_cache": True,
        "prefix_cache_n": 2,
        "token_source": "none",
        "jinja_explicit": str(tmp_path / "template.jinja"),
        "in_situ_quant": "Q4K",
        "seed": 7,
    }


def test_a_safetensors_file_is_its_folder(folder: Path, tmp_path: Path) -> None:
    assert arguments(folder / "model.safetensors", tmp_path)[1]["model_id"] == str(folder)


@pytest.mark.parametrize(
    ("config", "extra", "kind"),
    [
        ({"vision_config": {"x": 1}}, None, "MultimodalPlain"),
        ({"audio_config": {"x": 1}}, None, "MultimodalPlain"),
        ({"architectures": ["Gemma3TextModel"]}, "modules.json", "Embedding"),
        ({"architectures": ["Qwen3ForCausalLM"]}, None, "Plain"),
        ([], None, "Plain"),
    ],
)
def test_kinds_of_folders(folder: Path, tmp_path: Path, config: Any, extra: str | None, kind: str) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    if extra is not None:
        (folder / extra).touch()
    assert arguments(folder, tmp_path)[0] == kind


def test_adapters_of_a_folder(folder: Path, tmp_path: Path) -> None:
    kind, which, _ = arguments(folder, tmp_path, adapters={"a": str(folder)}, max_adapters=2, max_adapter_rank=8)
    assert kind == "Lora"
    assert [adapter.args for adapter in which["adapters"]] == [("a", str(folder))]
    assert (which["max_adapters"], which["max_rank"]) == (2, 8)


def test_a_gguf_file(gguf: Path, tmp_path: Path) -> None:
    kind, which, runner = arguments(gguf, tmp_path, isq="Q8_0", adapters={}, max_adapters=2)
    assert kind == "GGUF"
    assert (which["quantized_model_id"], which["quantized_filename"]) == (str(tmp_path), "m.gguf")
    assert (which["adapters"], which["max_adapters"], runner["in_situ_quant"]) == ([], 2, "Q8_0")
    settings = settle({"mmproj": gguf}, {})
    assert find(gguf, settings.options).kind == "multimodal"


def test_the_environments_quantization_leaves_quantized_models_alone(gguf: Path, folder: Path) -> None:
    settings = settle({}, {"MISTRALRS_ISQ": "Q4K"})
    assert isq_for(find(gguf, settings.options), settings) is None
    assert isq_for(find(folder, settings.options), settings) == "Q4K"


def test_split_gguf_files(tmp_path: Path) -> None:
    names = [f"m-{i:05d}-of-00002.gguf" for i in (1, 2)]
    (tmp_path / names[0]).write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(ModelNotFound, match="00002-of-00002"):
        arguments(tmp_path / names[0], tmp_path)
    (tmp_path / "stage").rmdir()
    (tmp_path / names[1]).write_bytes(b"GGUF" + bytes(64))
    assert arguments(tmp_path / names[1], tmp_path)[1]["quantized_filename"] == names


def test_an_old_ggml_file(tmp_path: Path) -> None:
    file = tmp_path / "m.bin"
    file.write_bytes(b"tjgg" + bytes(64))
    with pytest.raises(ModelNotFound, match=r"tokenizer\.json"):
        arguments(file, tmp_path)
    (tmp_path / "stage").rmdir()
    (tmp_path / "tokenizer.json").touch()
    kind, which, _ = arguments(file, tmp_path, gqa=8)
    assert (kind, which["gqa"], which["quantized_filename"]) == ("GGML", 8, "m.bin")


def test_uqff(folder: Path, tmp_path: Path) -> None:
    for name in ("q4-0.uqff", "q4-1.uqff"):
        (folder / name).touch()
    assert arguments(folder, tmp_path)[1]["from_uqff"] == ["q4-0.uqff", "q4-1.uqff"]
    (tmp_path / "stage").rmdir()
    (folder / "q8-0.uqff").touch()
    assert arguments(folder / "q8-0.uqff", tmp_path)[1]["from_uqff"] == "q8-0.uqff"
    (tmp_path / "stage").rmdir()
    with pytest.raises(UnsupportedModel, match="q4, q8"):
        arguments(folder, tmp_path)


@pytest.mark.parametrize(
    ("file", "options", "field"),
    [
        ("m.gguf", {"architecture": "llama"}, "architecture"),
        ("m.gguf", {"gqa": 2}, "gqa"),
        ("model", {"mmproj": "m.gguf"}, "mmproj"),
        ("model", {"max_edge": 2}, "max_edge"),
        ("model", {"kind": "embedding", "adapters": {}}, "adapters"),
        ("model", {"architecture": "Abacus"}, "architecture"),
        ("model", {"adapters": {}, "imatrix": "m.gguf"}, "imatrix"),
        ("m.gguf", {"kind": "embedding"}, "kind"),
    ],
)
def test_options_without_use(
    file: str, options: dict[str, Any], field: str, folder: Path, gguf: Path, tmp_path: Path
) -> None:
    given = {name: tmp_path / value if value == "m.gguf" else value for name, value in options.items()}
    with pytest.raises(InvalidRequest) as caught:
        arguments(tmp_path / file, tmp_path, **given)
    assert caught.value.field == field


def test_xlora(folder: Path, xlora: Path, gguf: Path, tmp_path: Path) -> None:
    options = {"xlora": xlora, "xlora_order": xlora / "order.json", "tgt_non_granular_index": 1}
    kind, which, _ = arguments(folder, tmp_path, **options)
    stage = Path(which["xlora_model_id"])
    assert kind == "XLora"
    assert (which["model_id"], which["order"]) == (str(folder), str(xlora / "order.json"))
    assert which["tgt_non_granular_index"] == 1
    assert sorted(path.name for path in stage.iterdir()) == [
        "one.adapter_config.json", "one.adapter_model.safetensors", "two.adapter_config.json",
        "two.adapter_model.safetensors", "xlora_classifier.safetensors", "xlora_config.json",
    ]  # fmt: skip
    assert (stage / "two.adapter_model.safetensors").read_text() == "two"
    with pytest.raises(InvalidRequest, match="adapters"):
        arguments(folder, tmp_path / "model", adapters={}, **options)


@pytest.mark.parametrize(
    ("order", "says"),
    [
        ("{}", "order"),
        ('{"order": []}', "order"),
        ('{"order": ["one", "onetwo"]}', "Rename"),
        ('{"order": ["../one"]}', "no name"),
        ('{"order": ["three"]}', "three"),
        ("[]", "not an object"),
        ("{", "not JSON"),
    ],
)
def test_a_wrong_ordering_file(xlora: Path, tmp_path: Path, order: str, says: str) -> None:
    (xlora / "order.json").write_text(order)
    with pytest.raises(TramontaneError, match=says):
        staged(xlora, xlora / "order.json", tmp_path)


def test_an_adapter_elsewhere(xlora: Path, tmp_path: Path) -> None:
    (xlora / "two").rename(tmp_path / "moved")
    (xlora / "xlora_config.json").write_text(json.dumps({"adapters": {"two": str(tmp_path / "moved")}}))
    stage = tmp_path / "stage"
    stage.mkdir()
    assert (staged(xlora, xlora / "order.json", stage) / "two.adapter_config.json").exists()
    (xlora / "xlora_classifier.safetensors").unlink()
    with pytest.raises(ModelNotFound, match="classifier"):
        staged(xlora, xlora / "order.json", tmp_path)
