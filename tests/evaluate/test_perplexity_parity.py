"""Perplexity of real models on real text, beside transformers on the same ids and the same weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.models.dequantized import dequantized
from tramontane import LLM
from tramontane.evaluate.perplexity import cut_windows, perplexity

pytestmark = pytest.mark.slow

WINDOWS = 20
BOS = 1  # of both models

torch = pytest.importorskip("torch", reason="the reference perplexity needs torch")
transformers = pytest.importorskip("transformers", reason="the reference perplexity needs transformers")


def reference_perplexity(model: Any, windows: list[list[int]]) -> float:
    nll, tokens = 0.0, 0
    with torch.no_grad():
        for window in windows:
            logprobs = torch.log_softmax(model(torch.tensor([window])).logits[0, :-1].double(), -1)
            nll -= logprobs.gather(1, torch.tensor(window[1:])[:, None]).sum().item()
            tokens += len(window) - 1
    return math.exp(nll / tokens)


@pytest.mark.parametrize("name", ["stories15m", "smollm2"])
def test_perplexity_equals_transformers(name: str, request: pytest.FixtureRequest, wikitext: Path) -> None:
    path: Path = request.getfixturevalue(name)
    text = wikitext.read_text(encoding="utf-8")
    ours = {}
    for arithmetic in ("exact", "fast"):
        with LLM(path, arithmetic=arithmetic) as llm:
            ours[arithmetic] = perplexity(llm, text, windows=WINDOWS, bos=BOS)
            ids = llm.tokenize(text, add_special_tokens=False)
            size = min(1024, llm.capabilities().context_length)
    model = (
        transformers.LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        if path.is_dir()
        else dequantized(path)
    )
    windows = list(cut_windows(ids, size, [BOS]))[:WINDOWS]
    assert ours["exact"].windows == WINDOWS
    assert ours["exact"].tokens == sum(len(window) - 1 for window in windows)
    assert ours["exact"].perplexity == pytest.approx(reference_perplexity(model, windows), rel=1e-3)
    assert ours["fast"].perplexity == pytest.approx(ours["exact"].perplexity, rel=2e-3)
