"""The transformers backend: what it adds to what the conformance suite holds every backend to."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.conftest import missing
from tests.engine import checkpoints
from tests.loading.checkpoints import write_gguf
from tramontane import LLM
from tramontane.errors import CorruptCheckpoint, InvalidRequest, MissingExtra, UnsupportedModel

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from tests.models import zoo  # noqa: E402
from tramontane.backends import transformers_model  # noqa: E402

GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}


def opened(model: Path | str, **options: Any) -> LLM:
    return LLM(model, backend="transformers", threads=1, **options)


def saved(model_type: str, folder: Path) -> Any:
    model = zoo.save_tiny(model_type, folder, vocab_size=checkpoints.VOCAB)
    checkpoints.write_tokenizer(folder, checkpoints.TEMPLATE)
    return model


def generated(model: Any, ids: list[int], count: int) -> list[int]:
    """What the model answers when the whole text goes through it for each token."""
    for _ in range(count):
        with torch.no_grad():
            ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[-count:]


WAYS = {
    "llama": "in pieces",
    "gemma2": "in pieces",
    "opt": "in pieces",
    "mamba": "singly",
    "openai-gpt": "anew",
    "trocr": "in pieces",
}


@pytest.mark.parametrize(("model_type", "way"), WAYS.items())
def test_answers_are_those_of_the_model_however_it_goes_on(model_type: str, way: str, tmp_path: Path) -> None:
    model = saved(model_type, tmp_path)
    prompts = [list(checkpoints.prompt(length, seed=1)) for length in (3, 21, 33)]
    expected = [generated(model, ids, 12) for ids in prompts]
    with opened(tmp_path, max_num_batched_tokens=16) as llm:
        assert llm.backend._executor._model._way == way  # type: ignore[attr-defined]
        assert [list(result.token_ids) for result in llm.generate(prompts, **GREEDY)] == expected
        forked = llm.generate(prompts[1], n=2, **GREEDY)
        assert [list(choice.token_ids) for choice in forked.choices] == [expected[1]] * 2
        assert llm.stats().weight_bytes == sum(value.nbytes for value in model.parameters())


def test_a_seed_draws_what_it_draws_natively(checkpoint: Path) -> None:
    """The logits are equal but for rounding, and what follows is the same code."""
    asked: dict[str, Any] = {"seed": 3, "n": 2, "max_tokens": 20, "logprobs": 2}
    with LLM(checkpoint, threads=1) as native, opened(checkpoint) as plain:
        ours, theirs = native.generate("Hi", **asked), plain.generate("Hi", **asked)
    assert [choice.token_ids for choice in theirs.choices] == [choice.token_ids for choice in ours.choices]
    for mine, other in zip(ours.choices, theirs.choices, strict=True):
        assert [i.logprob for i in other.logprobs] == pytest.approx([i.logprob for i in mine.logprobs], abs=1e-3)


def test_choices_go_apart_from_one_prompt(checkpoint: Path) -> None:
    with opened(checkpoint, max_num_seqs=4) as llm:
        many = llm.generate("Hi", n=4, seed=1, max_tokens=30, ignore_eos=True)
        assert len({choice.token_ids for choice in many.choices}) == 4
        for choice in many.choices:
            ids = [*many.prompt_ids, *choice.token_ids[:20]]
            last = llm.generate(ids, temperature=0.0, max_tokens=1, logprobs=0).choices[0].logprobs[0]
            assert last.logprob <= 0
        assert llm.generate("Hi", n=4, seed=1, max_tokens=30, ignore_eos=True).choices == many.choices
        with pytest.raises(InvalidRequest, match="n"):
            llm.generate("Hi", n=5)


def test_its_options(checkpoint: Path) -> None:
    with opened(checkpoint, context_length=50, dtype="bfloat16", max_num_seqs=2) as llm:
        assert llm.capabilities().context_length == 50
        assert len(llm.generate("Hi", ignore_eos=True).token_ids) == 50 - 3
    with pytest.raises(InvalidRequest, match="context_length"):
        opened(checkpoint, context_length=10_000)
    with pytest.raises(InvalidRequest, match=r"block_size.*transformers.*native"):
        opened(checkpoint, block_size=8)


# ---- what it does not load


def test_what_a_checkpoint_lacks_is_not_made_up(checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    with pytest.raises(CorruptCheckpoint, match=r"model\.norm\.weight"):
        opened(tmp_path)


@pytest.mark.parametrize("change", [{"num_hidden_layers": 10_000}, {"vocab_size": 50_000_000}])
def test_settings_that_describe_more_than_there_is_are_refused(
    change: dict[str, int], checkpoint: Path, tmp_path: Path
) -> None:
    config = json.loads((checkpoint / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    with pytest.raises(CorruptCheckpoint, match=r"num_hidden_layers|parameters"):
        opened(tmp_path)


def test_what_it_leaves_unused_is_told(checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    save_file({**tensors, "model.extra.weight": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    with caplog.at_level(logging.WARNING, "tramontane"), opened(tmp_path):
        assert "model.extra.weight" in caplog.text


def test_a_model_that_does_not_read_from_left_to_right_is_refused(tmp_path: Path) -> None:
    saved("xlnet", tmp_path)
    with pytest.raises(UnsupportedModel, match="from left to right"):
        opened(tmp_path)


def test_a_models_own_code_does_not_run(checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"model_type": "tramontane-test", "auto_map": {"AutoModelForCausalLM": "code.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('it ran')\n")
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    with pytest.raises(UnsupportedModel, match="transformers does not run"):
        opened(tmp_path)


def test_gguf_needs_two_packages_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "model.gguf")
    monkeypatch.setattr(transformers_model, "_FOR_GGUF", ("no_such_package",))
    with pytest.raises(MissingExtra, match=r"GGUF.*tramontane\[transformers\]"):
        opened(path)


@pytest.mark.slow
def test_a_gguf_file(smollm2: Path) -> None:
    for name in ("accelerate", "gguf"):
        if importlib.util.find_spec(name) is None:
            missing(f"{name} is not installed")
    asked = [{"role": "user", "content": "Why is the sky blue?"}]
    with LLM(smollm2, threads=2, arithmetic="exact") as native, opened(smollm2) as plain:
        wanted = native.chat(asked, logprobs=1, temperature=0.0, max_tokens=24)
        found = plain.chat(asked, logprobs=1, temperature=0.0, max_tokens=24)
    assert found.prompt_ids == wanted.prompt_ids
    pairs = zip(found.choices[0].logprobs, wanted.choices[0].logprobs, strict=True)
    assert max(abs(one.logprob - other.logprob) for one, other in pairs) < 0.02
    assert found.text == wanted.text
