"""Qwen2.5-Coder-1.5B, a GGUF file of 1.1 GB: it answers, shows tools as transformers would, and computes the same."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.models.dequantized import dequantized
from tests.models.harness import Rig
from tests.models.test_real_models import transformers_logits
from tramontane.cli.inspect import examine
from tramontane.kernels import for_device
from tramontane.llm import LLM
from tramontane.loading.build import load_model

pytestmark = pytest.mark.slow

QUESTION = [{"role": "user", "content": "Write a Python function that returns the n-th Fibonacci number."}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city, “now”.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Its name, as <people> write it."}},
                "required": ["city"],
            },
        },
    }
]
ASKED = [
    {"role": "system", "content": "You are terse."},
    {"role": "user", "content": "How is the weather in Ljubljana?"},
]


@pytest.fixture(scope="module")
def llm(qwen_coder: Path) -> Iterator[LLM]:
    with LLM(qwen_coder, context_length=1024) as llm:
        yield llm


def test_it_answers_with_code(llm: LLM) -> None:
    result = llm.chat(QUESTION, temperature=0, max_tokens=120)
    assert "def " in result.text
    assert "fib" in result.text.lower()


def test_inspect_lists_its_tool_template(qwen_coder: Path) -> None:
    report = examine(str(qwen_coder))
    assert (report["loads"], report["takes_tools"], report["chat_templates"]) == (True, True, ["default"])
    assert "<tool_call>" in report["chat_template"]
    assert (report["quantization"]["method"], report["context_length"]) == ("Q4_K_M", 32768)
    assert report["parameters"] == 1_777_088_000


def test_tools_are_shown_as_transformers_shows_them(llm: LLM, qwen_coder: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from tokenizers import Tokenizer, models

    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), chat_template=examine(str(qwen_coder))["chat_template"]
    )
    expected = reference.apply_chat_template(ASKED, tools=TOOLS, tokenize=False, add_generation_prompt=True)
    result = llm.chat(ASKED, template_kwargs={"tools": TOOLS}, echo=True, max_tokens=40, temperature=0)
    assert result.text.startswith(expected)
    answer = result.text.removeprefix(expected)
    assert '"name": "get_weather", "arguments": {"city": "Ljubljana"}' in answer, "the model has seen them"


def test_logits(qwen_coder: Path) -> None:
    rng = np.random.default_rng(0)
    ids = [int(token) for token in rng.integers(0, 151_643, 24)]
    model = dequantized(qwen_coder)
    expected = transformers_logits(model, ids)
    del model
    gc.collect()
    # Activations as they are, not rounded to eight bits as the fast kernels do.
    loaded = load_model(qwen_coder, for_device("cpu", threads=2, deterministic=True, exact=True))
    rig = Rig(loaded.decoder, block_size=16, num_blocks=4)
    assert np.abs(rig.run(ids, [15, 1]) - expected).max() < 2e-3
