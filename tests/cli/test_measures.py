"""`bench`, `eval perplexity` and `doctor`: what they print, over a scripted model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Shell
from tramontane import __version__
from tramontane.backends.base import Backend
from tramontane.backends.declared import Declared
from tramontane.backends.mock import PROMPT_LOGPROB, MockBackend
from tramontane.backends.registry import BUILT_IN, declared
from tramontane.cli import bench, doctor
from tramontane.errors import UnsupportedModel
from tramontane.llm import LLM

Use = Callable[[Backend], None]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "memory_bandwidth", lambda: 10.0)


def test_bench_ends_with_json(shell: Shell, answering: Use) -> None:
    answering(MockBackend())
    arguments = ["bench", "--rounds", "1", "--prompt", "20", "--generate", "5", "--batch", "3"]
    result = shell(*arguments)
    assert result.exit_code == 0
    report = json.loads(result.stdout.splitlines()[-1])
    assert (report["prompt_tokens"], report["generated_tokens"], report["batch_sequences"]) == (20, 5, 3)
    speeds = ("prefill_tokens_per_s", "decode_tokens_per_s", "batch_tokens_per_s", "ttft_128_ms")
    assert all(report[name] > 0 for name in speeds)
    assert report["decode_bandwidth_share"] == 0  # the mock has no weights to read
    assert len(result.stdout.splitlines()) == len(report) + 1
    only = shell(*arguments, "--json").stdout
    assert only.count("\n") == 1
    assert json.loads(only).keys() == report.keys()


def test_every_prompt_of_the_benchmark_is_another() -> None:
    with LLM.from_backend(MockBackend()) as llm:
        prompts = [tuple(bench._ids(llm, 40, seed)) for seed in ("prefill 0", "prefill 1", "batch 0 1", "batch 0 2")]
    assert len(set(prompts)) == 4
    assert {len(prompt) for prompt in prompts} == {40}


def test_a_prompt_that_does_not_fit_is_refused(shell: Shell, answering: Use) -> None:
    answering(MockBackend())
    result = shell("bench", "--prompt", "9999", "--rounds", "1")
    assert result.exit_code == 2
    assert "9999 tokens" in result.stderr


def test_memory_bandwidth_is_positive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert bench.memory_bandwidth(1 << 22, rounds=1) > 0


def test_perplexity(shell: Shell, answering: Use, tmp_path: Path) -> None:
    answering(MockBackend(context_length=64))
    text = tmp_path / "text.txt"
    text.write_text("All work and no play makes Jack a dull boy. " * 5, encoding="utf-8")
    result = shell("eval", "perplexity", str(text), "--json", "--context", "32", "--windows", "3")
    report = json.loads(result.stdout)
    assert report["perplexity"] == pytest.approx(math.exp(-PROMPT_LOGPROB))
    assert (report["windows"], report["tokens"]) == (3, 3 * 31)
    assert shell("eval", "perplexity", str(text), "--context", "32").stdout.startswith("perplexity 2.7183 over ")
    refused = shell("eval", "perplexity", str(text), "--context", "65")
    assert refused.exit_code == 2
    assert "65" in refused.stderr


def test_doctor(shell: Shell) -> None:
    report = json.loads(shell("doctor", "--json").stdout)
    assert report["system"]["tramontane"] == __version__
    assert report["devices"]["cpu"] == "available"
    assert set(report["extras"]) == {"torch", "cuda", "transformers", "mistralrs", "grammar", "server"}
    assert report["packages"]["numpy"]
    assert set(report["backends"]) >= set(BUILT_IN)
    assert report["backends"]["native"].startswith("chat, embed, generate")
    assert "without" in report["backends"]["mock"]
    shown = shell("doctor")
    assert shown.exit_code == bool(report["problems"])
    assert ("All is well." in shown.stdout) == (not report["problems"])


def test_doctor_tells_of_backends_that_are_not_here(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Declared, "missing", lambda self: list(self.modules))
    broken = {"odd": UnsupportedModel("It is broken."), "mistralrs": declared("mistralrs")}
    monkeypatch.setattr("tramontane.backends.registry.all_declared", lambda: broken)
    result = shell("doctor")
    assert result.exit_code == 1
    assert "not installed: pip install 'tramontane[mistralrs]'" in result.stdout
    assert "problem: the backend odd cannot be used: It is broken." in result.stdout


def test_doctor_names_what_is_missing(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_CORE", (*doctor._CORE, "no-such-package"))
    result = shell("doctor")
    assert result.exit_code == 1
    assert "problem: no-such-package is missing: pip install no-such-package" in result.stdout


def test_doctor_tries_the_cache_and_the_kernels(shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRAMONTANE_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr("tramontane.kernels.cpu.available", lambda: False)
    result = shell("doctor", "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert any("cannot be written" in problem for problem in report["problems"])
    assert any("C++20 compiler" in problem for problem in report["problems"])
    assert report["kernels"]["cpu"] == "reference"
