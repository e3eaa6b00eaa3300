"""What a checkpoint is, told without loading it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

from tests.cli.conftest import Shell
from tests.engine.checkpoints import BOS, CONTEXT, EOS, TEMPLATE, VOCAB, write
from tests.models.tiny import TinyModels
from tramontane.llm import LLM


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write(tmp_path / "tiny")


def change(folder: Path, file: str, **changes: Any) -> None:
    path = folder / file
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **changes}))


def inspected(shell: Shell, path: Path, *arguments: str) -> dict[str, Any]:
    result = shell("inspect", "-m", str(path), "--json", *arguments)
    assert result.exit_code == 0, result.stderr
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def test_the_report(shell: Shell, tiny: Path) -> None:
    report = inspected(shell, tiny)
    stored = load_file(tiny / "model.safetensors")
    arch = report["architecture"]
    assert (arch["name"], arch["layers"], arch["windows"]) == ("qwen2", 4, [9])
    assert (arch["heads"], arch["kv_heads"], arch["context_length"]) == ([4], [2], CONTEXT)
    assert arch["latent_size"] == []
    assert report["parameters"] == sum(tensor.size for tensor in stored.values())
    assert report["tensors"]["count"] == len(stored)
    assert report["tensors"]["bytes"] == sum(tensor.nbytes for tensor in stored.values())
    assert report["tensors"]["by_type"]["F32"]["count"] == len(stored)
    assert report["tokenizer"]["vocab_size"] == VOCAB
    assert report["tokenizer"]["bos"] == {"id": BOS, "text": "<s>"}
    assert [token["id"] for token in report["tokenizer"]["eos"]] == [EOS]
    assert report["chat_template"] == TEMPLATE
    assert report["loads"]
    assert report["problems"] == []


def test_latent_attention_is_told_by_what_it_keeps(shell: Shell, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the extra 'transformers' is not installed")
    model = TinyModels(tmp_path).get("deepseek-v3").path
    config = json.loads((model / "config.json").read_text())
    size = config["kv_lora_rank"] + config["qk_rope_head_dim"]
    arch = inspected(shell, model)["architecture"]
    assert (arch["heads"], arch["kv_heads"], arch["latent_size"]) == ([config["num_attention_heads"]], [], [size])
    shown = shell("inspect", "-m", str(model)).stdout
    assert f" wide, over a vector of {size} a token" in shown
    assert "of keys and values" not in shown


def test_an_embedder(shell: Shell, tiny: Path) -> None:
    assert (inspected(shell, tiny)["generates"], inspected(shell, tiny)["embedding"]) == (True, None)
    change(tiny, "config.json", architectures=["Qwen2Model"])
    tensors = load_file(tiny / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if n != "lm_head.weight"}, tiny / "model.safetensors")
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (tiny / "modules.json").write_text(json.dumps(modules))
    (tiny / "1_Pooling").mkdir()
    change(tiny, "1_Pooling/config.json", pooling_mode="lasttoken")
    change(tiny, "config_sentence_transformers.json", prompts={"query": "Q: "})
    change(tiny, "sentence_bert_config.json", max_seq_length=64)
    report = inspected(shell, tiny)
    assert (report["generates"], report["loads"], report["architecture"]["head"]) == (False, True, False)
    assert report["embedding"] == {
        "pooling": ["lasttoken"],
        "normalize": True,
        "dimensions": 32,
        "max_length": 64,
        "prompts": {"query": "Q: "},
        "labels": 0,
    }
    shown = shell("inspect", "-m", str(tiny)).stdout
    assert "embeds          lasttoken, normalized, 32 wide" in shown
    assert "writes          nothing: it reads texts" in shown
    refused = shell("run", "-m", str(tiny), "hello")
    assert refused.exit_code != 0
    assert "reads texts and writes none" in refused.stderr
    (tiny / "modules.json").write_text('[{"path": "", "type": "their.own.Module"}]')
    report = inspected(shell, tiny)
    assert not report["loads"]
    assert "their.own.Module" in " ".join(report["problems"])


def test_memory_is_what_an_engine_takes(shell: Shell, tiny: Path) -> None:
    memory = inspected(shell, tiny, "--context", "96", "--batch", "3")["memory"]
    with LLM(tiny, context_length=96, max_num_seqs=3) as llm:
        llm.generate("warm", max_tokens=1)
        stats = llm.stats()
    assert memory["weights_bytes"] == stats.weight_bytes
    assert memory["cache_bytes"] == pytest.approx(stats.cache_bytes, rel=0.2)  # the engine keeps what a step may add
    assert memory["workspace_bytes"] == pytest.approx(stats.workspace_bytes, rel=0.5)
    assert memory["total_bytes"] == sum(memory[f"{part}_bytes"] for part in ("weights", "cache", "workspace"))


def test_for_people(shell: Shell, tiny: Path) -> None:
    shown = shell("inspect", "-m", str(tiny), "--batch", "2").stdout
    report = inspected(shell, tiny)
    for words in ("qwen2, 4 layers of 32", "4 heads, 2 of keys", "windows of 9", f"2 sequences of {CONTEXT} tokens"):
        assert words in shown
    assert [line for line in shown.splitlines() if line.startswith("loads")] == [
        f"loads           yes, natively, on {report['kernels']} kernels"
    ]
    assert "  tools         left out by the template" in shown.splitlines()
    assert shell("inspect", "-m", str(tiny), "--template").stdout == TEMPLATE + "\n"


def test_what_a_file_says_cannot_steer_the_terminal(shell: Shell, tiny: Path) -> None:
    change(tiny, "config.json", _name_or_path="evil\x1b]0;title\x07\nname")
    change(tiny, "tokenizer_config.json", chat_template="{# \x1b[2J #}hi")
    shown = shell("inspect", "-m", str(tiny)).stdout
    assert "evil]0;title name" in shown
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "\x1b" not in shell("inspect", "-m", str(tiny), "--template").stdout


def test_what_goes_through_transformers(shell: Shell, tiny: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    change(tiny, "config.json", model_type="biogpt", architectures=["BioGptForCausalLM"])
    report = inspected(shell, tiny)
    assert report["loads"]
    assert report["through_transformers"]
    assert "yes, through transformers" in shell("inspect", "-m", str(tiny)).stdout


def test_why_it_cannot_be_loaded(shell: Shell, tiny: Path) -> None:
    tensors = load_file(tiny / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["lm_head.weight"].astype(np.int8)}, tiny / "model.safetensors")
    (tiny / "tokenizer.json").unlink()
    change(tiny, "tokenizer_config.json", chat_template="{% if %}")
    report = inspected(shell, tiny)
    assert not report["loads"]
    assert report["memory"] is None
    assert [
        word in problem for word, problem in zip(["I8", "tokenizer.json", "template"], report["problems"], strict=True)
    ]
    change(tiny, "config.json", model_type="elephant")
    report = inspected(shell, tiny)
    assert report["architecture"] == {"name": "elephant"}
    assert "elephant" in report["problems"][0]
    shown = shell("inspect", "-m", str(tiny))
    assert shown.exit_code == 0
    assert "elephant" in shown.stdout
    refused = shell("inspect", "-m", str(tiny), "--template")
    assert refused.exit_code == 1
    assert "no chat template" in refused.stderr


def test_failures(shell: Shell, tiny: Path) -> None:
    too_long = shell("inspect", "-m", str(tiny), "--context", str(CONTEXT + 1))
    assert too_long.exit_code == 2
    assert f"exceeds the model's {CONTEXT}" in too_long.stderr
    assert shell("inspect", "-m", str(tiny), "--template", "--json").exit_code == 2
    (tiny / "model.safetensors").write_bytes(b"\0" * 50)
    corrupt = shell("inspect", "-m", str(tiny))
    assert corrupt.exit_code == 1
    assert "model.safetensors" in corrupt.stderr
    assert not corrupt.stdout


def test_a_gguf_file(shell: Shell, smollm2: Path) -> None:
    report = inspected(shell, smollm2)
    assert report["format"] == "gguf"
    assert report["parameters"] == 134_515_008
    assert {name: row["count"] for name, row in report["tensors"]["by_type"].items()} == {
        "Q4_1": 210,
        "Q8_0": 1,
        "F32": 61,
    }
    assert report["licence"] == "apache-2.0"
    assert report["tokenizer"]["kind"] == "gpt2, smollm"
    assert report["tokenizer"]["eos"] == [{"id": 0, "text": "<|endoftext|>"}, {"id": 2, "text": "<|im_end|>"}]
    assert report["quantization"] == {"method": "Q4_1", "bits_per_weight": 5.74}
    assert report["container"] == "GGUF version 3"
    assert report["chat_template"].startswith("{%")
    assert report["loads"]


def test_the_tokenizer_for_other_programs(shell: Shell, smollm2: Path, tmp_path: Path) -> None:
    assert shell("inspect", "-m", str(smollm2), "--save-tokenizer", str(tmp_path / "new")).exit_code == 0
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "new" / "tokenizer.json"))
    assert theirs.encode("<|im_start|>user\nhi <|im_end|>\n").ids == [1, 4093, 198, 6004, 216, 2, 198]
    assert "<|im_start|>" in (tmp_path / "new" / "tokenizer_config.json").read_text(encoding="utf-8")


def test_without_a_template(shell: Shell, stories15m: Path) -> None:
    assert inspected(shell, stories15m)["chat_template"] is None
    assert "none: it completes text" in shell("inspect", "-m", str(stories15m)).stdout
