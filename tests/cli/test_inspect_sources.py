"""`tramontane inspect` of everything that loads, or that is refused for a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cli.conftest import Shell
from tests.cli.test_inspect import change, inspected
from tests.engine.checkpoints import write as write_tiny
from tests.loading import old_ggml
from tests.loading.checkpoints import write_folder, write_gguf
from tests.loading.quantized.cases import CASES, write_case
from tests.loading.test_mistral import PARAMS, random_tensors
from tests.loading.test_mistral import write as write_mistral
from tramontane.loading.ggml_types import FILE_TYPES
from tramontane.loading.gguf import GGUFFile

TOKENIZER: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["t", "1", *(f"t{i}" for i in range(46)), "<s>", "</s>"],
    "tokenizer.ggml.token_type": [1] * 48 + [3, 3],
    "tokenizer.ggml.merges": ["t 1"],
    "tokenizer.ggml.bos_token_id": 48,
    "tokenizer.ggml.eos_token_id": 49,
}


def test_file_types_are_those_of_gguf() -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    known = {kind.value: kind.name.partition("_")[2] for kind in gguf.LlamaFileType if kind.value < 1000}
    assert {number: name.replace("MXFP4_MOE", "MXFP4") for number, name in known.items()}.items() <= FILE_TYPES.items()


def test_gguf_in_parts_with_named_templates(shell: Shell, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    path = write_gguf(
        tmp_path / "m.gguf",
        {
            **TOKENIZER,
            "general.license": "mit",
            "general.file_type": 15,
            "tokenizer.chat_template": "{{ messages }}",
            "tokenizer.chat_template.tool_use": "{{ tools }}",
        },
        matrices="Q8_0",
    )
    report = inspected(shell, path)
    assert report["loads"]
    assert (report["licence"], report["container"], report["context_length"]) == ("mit", "GGUF version 3", 128)
    stored = report["tensors"]
    bits = round(8 * stored["bytes"] / report["parameters"], 2)
    assert report["quantization"] == {"method": "Q4_K_M", "bits_per_weight": bits}
    assert report["chat_template"] == "{{ messages }}"
    assert report["chat_templates"] == ["default", "tool_use"]
    assert report["takes_tools"], "the one for tools shows them"
    assert report["tokenizer"]["special"] == [{"id": 48, "text": "<s>"}, {"id": 49, "text": "</s>"}]
    assert report["tokenizer"]["named"] == {"bos_token": "<s>", "eos_token": "</s>"}
    shown = shell("inspect", "-m", str(path)).stdout
    for words in ("Q4_K_M, ", "  others        tool_use", "  special       <s>, </s>", "gpt2, gpt-2, 50 tokens"):
        assert words in shown

    parts = [tmp_path / f"s-0000{number}-of-00002.gguf" for number in (1, 2)]
    for number, part in enumerate(parts):
        writer = gguf.GGUFWriter(part, "llama")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", 11)
        with GGUFFile.open(path) as file:
            for key, value in file.metadata.items() if number == 0 else ():
                if key not in ("general.architecture", "general.alignment"):
                    writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
            for name in sorted(file.tensors)[number::2]:
                raw = gguf.GGMLQuantizationType[file.tensors[name].format]
                writer.add_tensor(name, np.array(file.data(name)), raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    split = inspected(shell, parts[1])
    assert split["container"] == "GGUF version 3, 2 parts"
    assert {key: split[key] for key in ("parameters", "tensors", "architecture", "tokenizer", "loads")} == {
        key: report[key] for key in ("parameters", "tensors", "architecture", "tokenizer", "loads")
    }


def test_gguf_of_the_other_byte_order(shell: Shell, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "elephant", endianess=gguf.GGUFEndian.BIG)
    writer.add_context_length(512)
    writer.add_tensor("trunk.weight", np.ones((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    report = inspected(shell, tmp_path / "big.gguf")
    assert report["container"] == "GGUF version 3, big-endian"
    assert (report["architecture"], report["context_length"]) == ({"name": "elephant"}, 512)
    assert (report["parameters"], report["loads"], report["kernels"]) == (128, False, None)
    (problem,) = report["problems"]
    assert "elephant" in problem
    assert "architecture=" in problem, "a remedy"


def test_mmproj(shell: Shell, tmp_path: Path) -> None:
    report = inspected(shell, write_gguf(tmp_path / "mmproj.gguf", {"general.type": "mmproj"}))
    (problem,) = report["problems"]
    assert "an mmproj file" in problem
    assert report["tokenizer"] is report["chat_template"] is report["memory"] is None


def test_llama_files_from_before_gguf(shell: Shell, tmp_path: Path) -> None:
    tokens = old_ggml.vocabulary()
    path = tmp_path / "ggml-model.bin"
    path.write_bytes(old_ggml.write(old_ggml.plain(old_ggml.llama_tensors(len(tokens))), tokens))
    report = inspected(shell, path)
    assert report["container"] == "ggjt version 3, from before GGUF"
    assert report["loads"]
    assert report["tokenizer"]["kind"] == "llama, default"


def test_mistrals_own_layout(shell: Shell, tmp_path: Path) -> None:
    path = write_mistral(tmp_path / "m", PARAMS, random_tensors(), 2)
    report = inspected(shell, path)
    assert report["container"] == "safetensors in Mistral's own layout, 2 files"
    assert report["architecture"]["heads"] == [4]
    assert "tokenizer" in report["problems"][0]
    change(path, "params.json", vision_encoder={"hidden_size": 8}, max_seq_len=777)
    report = inspected(shell, path)
    assert "vision_encoder" in report["problems"][0]
    assert report["context_length"] == 777


@pytest.mark.parametrize("name", ["awq", "int8", "fp8-blocks", "bnb-int8", "nvfp4", "mlx-4-bfloat16", "gpt-oss"])
def test_quantized_safetensors(shell: Shell, tmp_path: Path, name: str) -> None:
    write_case(tmp_path / "m", CASES[name])
    report = inspected(shell, tmp_path / "m")
    assert not [problem for problem in report["problems"] if "tokenizer" not in problem]
    assert report["quantization"]["method"]
    assert 2 < report["quantization"]["bits_per_weight"] < 32
    assert report["architecture"]["layers"]


def test_packed_numbers_are_not_counted_as_weights(shell: Shell, tmp_path: Path) -> None:
    tensors = {"model.layers.0.mlp.up_proj.qweight": np.ones((8, 8), np.int32)}
    folder = write_folder(tmp_path / "m", tensors, quantization_config={"quant_method": "elephant"})
    report = inspected(shell, folder)
    assert report["parameters"] is report["quantization"]["bits_per_weight"] is None
    assert "elephant" in report["problems"][0]
    shown = shell("inspect", "-m", str(folder)).stdout
    assert "not known: they are packed" in shown
    assert "loads           no" in shown


@pytest.mark.parametrize(
    ("readme", "licence", "expected"),
    [
        ("---\nlicense: apache-2.0\ntags:\n- x\n---\n# Model", None, "apache-2.0"),
        ("---\r\nlicense: 'mit'\r\n---\r\n", "Other words", "mit"),
        ("---\nlicense:\n- gpl-3.0\n- mit\n---\n", None, "gpl-3.0"),
        ("---\nlicense: other\nlicense_name: qwen-research\n---\n", "Words", "qwen-research"),
        ("---\nlicense: other\n---\n", "Words", "other"),
        ("# Model\nlicense: mit\n", "\n   MIT License\n\nPermission", "MIT License"),
        ("---\nno end\nlicense: mit\n", None, None),
        (None, None, None),
    ],
)
def test_licences(shell: Shell, tmp_path: Path, readme: str | None, licence: str | None, expected: str | None) -> None:
    folder = write_tiny(tmp_path / "m")
    for name, text in (("README.md", readme), ("LICENSE", licence)):
        if text is not None:
            (folder / name).write_bytes(text.encode())
    assert inspected(shell, folder)["licence"] == expected


def test_a_single_safetensors_file(shell: Shell, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m")
    report = inspected(shell, folder / "model.safetensors")
    assert report["loads"]
    assert report["tokenizer"]["kind"] == "BPE, tokenizer.json"


def test_a_template_that_shows_tools(shell: Shell, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m", template="{% for t in tools or [] %}{{ t.function | tojson }}{% endfor %}hi")
    assert inspected(shell, folder)["takes_tools"]
    assert "  tools         shown to the model" in shell("inspect", "-m", str(folder)).stdout
    change(folder, "tokenizer_config.json", chat_template="{{ raise_exception('no') }}")
    report = inspected(shell, folder)
    assert (report["takes_tools"], report["chat_templates"]) == (False, ["default"])


def test_from_the_hubs_cache_without_a_network(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    home, commit = tmp_path / "models--org--tiny", "a" * 40
    folder = write_tiny(home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    result = shell("inspect", "-m", "org/tiny", "--json")
    report = json.loads(result.stdout)
    assert (report["model"], report["path"], report["licence"]) == ("org/tiny", str(folder), "mit")
    assert report["loads"]
