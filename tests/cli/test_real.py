"""The commands with a real model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.shell import Terminal, environment, run

pytestmark = pytest.mark.slow

QUESTION = "What is the name of the capital city of France?"


def test_it_knows_paris(smollm2: Path) -> None:
    greedy = ["--temperature", "0", "--max-tokens", "24"]
    done = run("run", "-m", str(smollm2), *greedy, QUESTION)
    assert done.returncode == 0, done.stderr.decode()
    assert "Paris" in done.stdout.decode()
    assert done.stderr == b""
    piped = run("run", "-m", str(smollm2), *greedy, stdin=QUESTION.encode())
    assert piped.stdout == done.stdout
    report = json.loads(run("run", "-m", str(smollm2), *greedy, "--json", QUESTION).stdout)
    assert report["text"].strip() == done.stdout.decode().strip()
    assert report["usage"]["completion_tokens"] == len(report["choices"][0]["token_ids"])


def test_a_chat(smollm2: Path) -> None:
    terminal = Terminal("run", "-m", str(smollm2), "--temperature", "0", "--ignore-eos", env=environment(NO_COLOR="1"))
    terminal.expect("> ")
    terminal.send(f"{QUESTION}\r")
    terminal.expect("Paris")
    terminal.send("\x03")
    terminal.expect("(stopped)")
    terminal.expect("> ")
    terminal.send("/stats\r")
    terminal.expect("tokens/s")
    terminal.expect("> ")
    terminal.send("\x04")
    assert terminal.close() == 0


def test_a_model_without_a_template_completes(stories15m: Path) -> None:
    done = run("run", "-m", str(stories15m), "--temperature", "0", "--max-tokens", "16", "--echo", "Once upon a time")
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().startswith("Once upon a time")
    assert len(done.stdout.decode().split()) > 6


def test_bench(smollm2: Path) -> None:
    sizes = ["--prompt", "32", "--generate", "4", "--batch", "2", "--rounds", "1"]
    done = run("bench", "-m", str(smollm2), *sizes)
    assert done.returncode == 0, done.stderr.decode()
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["decode_tokens_per_s"] > 0
    assert 0 < report["decode_bandwidth_share"] < 2


def test_perplexity(smollm2: Path, wikitext: Path) -> None:
    done = run("eval", "perplexity", str(wikitext), "-m", str(smollm2), "--windows", "1", "--context", "128", "--json")
    assert done.returncode == 0, done.stderr.decode()
    report = json.loads(done.stdout)
    assert report["tokens"] == 127
    assert 5 < report["perplexity"] < 200
