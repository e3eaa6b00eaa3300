"""The same files through all three backends with a model, from Python and from the shell: greedy text is the same, as
far as the two likeliest tokens are further apart than the backends' arithmetics."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import missing, model_path
from tramontane import LLM
from tramontane.backends.registry import declared
from tramontane.types import Result

MODELS = {"SmolLM2-135M-Instruct.Q4_1.gguf": 0.5, "stories15m": 0.01}
"""By how much the log probabilities of two tokens must differ for the text to be certain. mistral.rs rounds what it
multiplies with quantized weights to eight bits; in float32 only the order of sums differs."""
PROMPTS = ["Once upon a time", "The wind that comes over the mountains", "A list of colours:"]
COUNT = 24

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Path:
    return model_path(request.param)


@pytest.fixture(scope="module")
def wanted(model: Path) -> list[tuple[LLM, Result]]:
    llm = LLM(model, backend="native", threads=2)
    return [(llm, llm.generate(prompt, temperature=0.0, max_tokens=COUNT, logprobs=2)) for prompt in PROMPTS]


def skip_without(name: str, model: Path) -> None:
    needed = [*declared(name).modules, *(("accelerate", "gguf") if name == "transformers" else ())]
    for module in needed:
        if importlib.util.find_spec(module) is None:
            missing(f"{module} is not installed")


def parting(llm: LLM, result: Result, other: str) -> int | None:
    """The number of the token by which another text goes its own way; None where it does not."""
    if other == result.text:
        return None
    ids, prompt = result.token_ids, list(result.prompt_ids)
    before = len(llm.detokenize(prompt))
    for count in range(1, len(ids) + 1):
        if not other.startswith(llm.detokenize([*prompt, *ids[:count]])[before:].rstrip("�")):
            return count - 1
    return len(ids) - 1


@pytest.mark.parametrize("name", ["transformers", "mistralrs"])
def test_greedy_text_is_that_of_native(name: str, model: Path, wanted: list[tuple[LLM, Result]]) -> None:
    skip_without(name, model)
    with LLM(model, backend=name) as llm:
        found = [llm.generate(prompt, temperature=0.0, max_tokens=COUNT).text for prompt in PROMPTS]
    for prompt, text, (native, result) in zip(PROMPTS, found, wanted, strict=True):
        at = parting(native, result, text)
        if at is None:
            continue
        (first, one, best), (second, other, next_best) = result.choices[0].logprobs[at].top
        told = f"{prompt!r}, token {at}: native {one!r} ({first}) before {other!r} ({second}) by {best - next_best:.3f}"
        print(f"{name} and native differ on {model.name}: {told}")
        assert best - next_best < MODELS[model.name], f"{told}; {text!r} is not {result.text!r}"


@pytest.mark.parametrize("name", ["native", "transformers", "mistralrs"])
def test_the_shell_says_what_python_says(name: str, model: Path) -> None:
    skip_without(name, model)
    with LLM(model, backend=name) as llm:
        text = llm.generate(PROMPTS[0], temperature=0.0, max_tokens=COUNT).text
    command = [sys.executable, "-m", "tramontane", "run", "--backend", name, "-m", str(model), "--raw"]
    asked = ["--temperature", "0", "--max-tokens", str(COUNT), PROMPTS[0]]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([*command, *asked], capture_output=True, encoding="utf-8", timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip("\n") == text.rstrip("\n")
