"""The transformers backend: what it adds to what the conformance suite holds every backend to."""

from __future__ import annotations

import importlib.util
import json
import logging
from concurrent.futures import ThreadPoolExecutor
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
from tramontane.types import SamplingParams

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
    "llama": ("in pieces", True),
    "gemma2": ("in pieces", True),
    "opt": ("in pieces", True),
    "bloom": ("in pieces", True),
    "qwen3_next": ("in pieces", True),
    "falcon_h1": ("in pieces", True),
    "mamba": ("singly", False),
    "openai-gpt": ("anew", False),
    "trocr": ("in pieces", False),
}
"""How each goes on, and whether several go on together."""


@pytest.mark.parametrize(("model_type", "way"), WAYS.items())
def test_answers_are_those_of_the_model_however_it_goes_on(
    model_type: str, way: tuple[str, bool], tmp_path: Path
) -> None:
    model = saved(model_type, tmp_path)
    prompts = [list(checkpoints.prompt(length, seed=1)) for length in (3, 21, 33)]
    expected = [generated(model, ids, 12) for ids in prompts]
    with opened(tmp_path, max_num_batched_tokens=16) as llm:
        ours = llm.backend._executor._model  # type: ignore[attr-defined]
        assert (ours._way, ours.batches) == way
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


# ---- several at once


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sequences went through the model in each pass that several went through."""
    found: list[int] = []
    forward = transformers_model.CausalModel.forward_together

    def counted(self: Any, batch: Any, tokens: Any) -> Any:
        found.append(len(tokens))
        return forward(self, batch, tokens)

    monkeypatch.setattr(transformers_model.CausalModel, "forward_together", counted)
    return found


def test_several_go_through_the_model_together_as_each_alone(checkpoint: Path, widths: list[int]) -> None:
    """Of all lengths, with settings and seeds of their own, beginning and ending when they do."""
    prompts = [checkpoints.prompt(length, seed=length) for length in (40, 3, 17, 1, 26)]
    each = [
        SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True, logprobs=0),
        SamplingParams(seed=1, max_tokens=5, ignore_eos=True, logprobs=0),
        SamplingParams(seed=2, top_k=20, max_tokens=40, ignore_eos=True, logprobs=0),
        SamplingParams(seed=3, n=2, max_tokens=12, ignore_eos=True, logprobs=0),
        SamplingParams(temperature=0.0, repetition_penalty=1.5, max_tokens=20, ignore_eos=True, logprobs=0),
    ]
    with opened(checkpoint, max_num_seqs=4) as llm:
        assert max(widths) == 3  # tried out when it was loaded
        alone = [llm.generate(prompt, one) for prompt, one in zip(prompts, each, strict=True)]
        widths.clear()
        together = llm.generate(prompts, each)
    assert max(widths) == 4
    assert sum(widths) > 0.9 * sum(len(choice.token_ids) for one in together for choice in one.choices)
    for one, other in zip(alone, together, strict=True):
        assert [choice.token_ids for choice in one.choices] == [choice.token_ids for choice in other.choices]
        for mine, theirs in zip(one.choices, other.choices, strict=True):
            wanted = [info.logprob for info in mine.logprobs]
            assert [info.logprob for info in theirs.logprobs] == pytest.approx(wanted, abs=1e-3)


def test_those_who_leave_a_batch_leave_the_others_as_they_are(checkpoint: Path, widths: list[int]) -> None:
    with opened(checkpoint) as llm:
        wanted = llm.generate("Hello", **GREEDY | {"max_tokens": 40}).token_ids

        def ask(prompt: str, stop_after: int | None) -> tuple[int, ...]:
            seen: list[int] = []
            for chunk in llm.stream(prompt, **GREEDY | {"max_tokens": 40}):
                seen += chunk.token_ids
                if stop_after is not None and len(seen) >= stop_after:
                    break
            return tuple(seen)

        widths.clear()
        asked = [("Hello", None), ("What is that?", 3), ("Hello", None), ("x", 7)] * 2
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(lambda one: ask(*one), asked))
        assert [ids for ids, (_, leaves) in zip(found, asked, strict=True) if leaves is None] == [wanted] * 4
        assert max(widths) > 2
        assert llm.stats().running == 0


def test_windows_go_together_too(tmp_path: Path) -> None:
    """Where sequences are longer than a layer's window, and shorter."""
    saved("gemma2", tmp_path)
    prompts = [checkpoints.prompt(length, seed=1) for length in (2, 7, 30, 12)]
    with opened(tmp_path) as llm:
        alone = [llm.generate(prompt, **GREEDY, logprobs=0) for prompt in prompts]
        together = llm.generate(prompts, **GREEDY, logprobs=0)
    for one, other in zip(alone, together, strict=True):
        wanted = [info.logprob for info in one.choices[0].logprobs]
        assert [info.logprob for info in other.choices[0].logprobs] == pytest.approx(wanted, abs=1e-3)


def test_what_follows_the_longest_of_a_batch_does_not_go_together(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    zoo.save_tiny("llama", tmp_path, vocab_size=checkpoints.VOCAB, max_position_embeddings=16, rope_parameters=rope)
    checkpoints.write_tokenizer(tmp_path, checkpoints.TEMPLATE)
    with opened(tmp_path) as llm:
        assert not llm.backend._executor._model.batches  # type: ignore[attr-defined]


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
