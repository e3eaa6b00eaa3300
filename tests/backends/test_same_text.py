"""The same files through all three backends with a model, from Python, the server and the shell: greedy text is the
same, as far as the two likeliest tokens are further apart than the backends' arithmetics. Where it differs is told."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra 'server' is not installed")
pytest.importorskip("httpx", reason="httpx is not installed")

from tests.conftest import missing, model_path
from tests.server.live import live, until
from tramontane import LLM
from tramontane.backends.registry import declared, open_backend
from tramontane.types import Result, SamplingParams


@dataclass(frozen=True)
class Case:
    """A model, what it is asked, and by how much the log probabilities of two tokens must differ for the text to be
    certain. mistral.rs rounds what it multiplies with quantized weights to eight bits; in float32 only the order of
    sums differs."""

    model: str
    certain: float
    prompts: tuple[str, ...]
    count: int
    options: Mapping[str, str] = field(default_factory=dict)
    """Of transformers, which makes floats of what is quantized."""


STORY = ("Once upon a time", "The wind that comes over the mountains", "A list of colours:")
CODE = ("def fibonacci(n):", "# Reverse a list in place")
CASES = [
    Case("SmolLM2-135M-Instruct.Q4_1.gguf", 0.5, STORY, 24),
    Case("stories15m", 0.01, STORY, 24),
    Case("qwen2.5-coder-1.5b-instruct-q4_k_m.gguf", 0.5, CODE, 8, {"dtype": "bfloat16"}),  # 6 GB; in float32 above 9
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.model.partition("-")[0])
def case(request: pytest.FixtureRequest) -> Case:
    case: Case = request.param
    model_path(case.model)
    return case


@dataclass(frozen=True)
class Wanted:
    """Native's answer, and its text after each of its tokens."""

    result: Result
    texts: tuple[str, ...]

    def parting(self, other: str) -> int | None:
        """The number of the token by which another text goes its own way; None where it does not."""
        if other == self.result.text:
            return None
        begun = (other.startswith(text.rstrip("\ufffd")) for text in self.texts)
        return next((at for at, same in enumerate(begun) if not same), len(self.texts) - 1)


@pytest.fixture(scope="module")
def wanted(case: Case) -> list[Wanted]:
    with LLM(model_path(case.model), backend="native", threads=2) as llm:
        return [answer(llm, prompt, case.count) for prompt in case.prompts]


def answer(llm: LLM, prompt: str, count: int) -> Wanted:
    result = llm.generate(prompt, temperature=0.0, max_tokens=count, logprobs=2)
    ids, before = list(result.prompt_ids), len(llm.detokenize(result.prompt_ids))
    texts = (llm.detokenize([*ids, *result.token_ids[:end]])[before:] for end in range(1, len(result.token_ids) + 1))
    return Wanted(result, tuple(texts))


def skip_without(name: str) -> None:
    needed = [*declared(name).modules, *(("accelerate", "gguf") if name == "transformers" else ())]
    for module in needed:
        if importlib.util.find_spec(module) is None:
            missing(f"{module} is not installed")


def check(name: str, case: Case, wanted: list[Wanted], found: list[str]) -> None:
    """The texts are native's as far as they are certain."""
    for prompt, text, native in zip(case.prompts, found, wanted, strict=True):
        at = native.parting(text)
        if at is None:
            continue
        (first, one, best), (second, other, next_best) = native.result.choices[0].logprobs[at].top
        told = f"{prompt!r}, token {at}: native {one!r} ({first}) before {other!r} ({second}) by {best - next_best:.3f}"
        print(f"{name} and native differ on {case.model}: {told}")
        assert best - next_best < case.certain, f"{told}; {text!r} is not {native.result.text!r}"


@pytest.mark.parametrize("name", ["native", "transformers", "mistralrs"])
def test_python_server_and_shell_say_what_native_says(name: str, case: Case, wanted: list[Wanted]) -> None:
    skip_without(name)
    asked: dict[str, Any] = {"temperature": 0.0, "max_tokens": case.count}
    model, options = model_path(case.model), case.options if name == "transformers" else {}
    with live(lambda: open_backend(model, options, SamplingParams(), backend=name), wait=False) as server:
        until(lambda: server.service.phase != "loading", seconds=1800)
        bodies = [{"prompt": prompt, **asked} for prompt in case.prompts]
        served = [server.post("/v1/completions", body, timeout=1800).json() for body in bodies]
        assert server.service.idle_backend is not None
        llm = LLM.from_backend(server.service.idle_backend)
        texts = [llm.generate(prompt, **asked).text for prompt in case.prompts]
    check(name, case, wanted, texts)
    assert [answer["choices"][0]["text"] for answer in served] == texts
    assert said_by_shell(name, model, case, options) == texts[0].rstrip("\n")


def said_by_shell(name: str, model: Path, case: Case, options: Mapping[str, str]) -> str:
    command = [sys.executable, "-m", "tramontane", "run", "--backend", name, "-m", str(model), "--raw"]
    given = [part for option, value in options.items() for part in ("-o", f"{option}={value}")]
    asked = ["--temperature", "0", "--max-tokens", str(case.count), *given, case.prompts[0]]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([*command, *asked], capture_output=True, encoding="utf-8", timeout=1800, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.rstrip("\n")
