"""all-MiniLM-L6-v2, a real sentence-transformers model: the vectors that transformers and its pooling give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import model_path
from tramontane import LLM

pytestmark = pytest.mark.slow

TEXTS = [
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
    "A cheetah is running behind its prey.",
    "",
    "Ünïcode — 東京 is big, isn't it? " * 3,
    "The quick brown fox jumps over the lazy dog. " * 60,
]


@pytest.fixture(scope="module")
def folder() -> Path:
    return model_path("all-MiniLM-L6-v2")


def reference(folder: Path, texts: list[str]) -> Any:
    """Mean over the tokens, normalized: what the model's card says to compute."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="[PAD]")
    inputs = tokenizer(texts, padding="longest", truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        states = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1).numpy()


def test_vectors(folder: Path) -> None:
    expected = reference(folder, TEXTS)
    with LLM(folder) as llm:
        found = llm.embed(TEXTS)
        np.testing.assert_allclose(np.array([one.vector for one in found]), expected, atol=1e-4)
        assert [one.truncated for one in found] == [False] * 6 + [True]
        alone = np.array([llm.embed(text).vector for text in TEXTS])
        np.testing.assert_allclose(alone, expected, atol=1e-4)


def test_what_is_alike_is_near(folder: Path) -> None:
    with LLM(folder) as llm:
        eating, bread, girl, cheetah = (np.array(one.vector) for one in llm.embed(TEXTS[:4]))
    assert eating @ bread > 0.7
    assert eating @ bread > 2 * max(eating @ girl, eating @ cheetah)
