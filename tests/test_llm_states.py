"""LLM over models with states: greedy answers are those of transformers, for several prompts at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine import checkpoints
from tests.engine.checkpoints import VOCAB
from tests.models.cases import CASES
from tests.models.tiny import randomize
from tramontane import LLM, InvalidRequest

PROMPTS = ["a", "The tramontane", "is a wind from the north that " * 3, "The tramontane, again"]


def write(name: str, folder: Path) -> Any:
    """The model of a case with a tokenizer of bytes."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    case = CASES[name]
    config = transformers.AutoConfig.for_model(case.model_type, **{**case.settings, "vocab_size": VOCAB})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    randomize(torch, model, seed=5)
    model.save_pretrained(folder)
    checkpoints.write_tokenizer(folder, None)
    return model


@pytest.mark.parametrize("name", ["lfm2", "mamba2", "qwen3-next"])
def test_greedy_answers_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    model = write(name, tmp_path)
    with LLM(tmp_path, threads=1, max_tokens=16, temperature=0.0, ignore_eos=True) as llm:
        first = llm.generate(PROMPTS)
        again = llm.generate(PROMPTS[2])
        stats = llm.stats()
    for result in first:
        ids = list(result.prompt_ids)
        with torch.no_grad():
            want = model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False, eos_token_id=None)
        assert list(result.choices[0].token_ids) == want[0, len(ids) :].tolist()
    assert again.choices[0].token_ids == first[2].choices[0].token_ids
    assert stats.cached_tokens == 64, "the state after four blocks of the long prompt was remembered"
    assert stats.cache_bytes > 0


def test_blocks_of_a_model_without_attention_are_refused(tmp_path: Path) -> None:
    write("mamba2", tmp_path)
    with pytest.raises(InvalidRequest, match="num_blocks"):
        LLM(tmp_path, num_blocks=10)
