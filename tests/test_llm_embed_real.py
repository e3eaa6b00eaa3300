"""all-MiniLM-L6-v2, a real sentence-transformers model: the vectors that transformers and its pooling give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import model_path
from tests.models.dequantized import dequantized
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


def test_a_chat_model(smollm2: Path) -> None:
    """SmolLM2's last states, and their mean, beside transformers' with the file's values."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    model = dequantized(smollm2).eval().model
    texts = [TEXTS[0], TEXTS[5], TEXTS[6]]
    with LLM(smollm2, arithmetic="exact", deterministic=True, cache_dtype="float32") as llm, torch.no_grad():
        states = [model(torch.tensor([llm.tokenize(text)])).last_hidden_state[0] for text in texts]
        last = torch.nn.functional.normalize(torch.stack([one[-1] for one in states]), dim=1).numpy()
        mean = torch.nn.functional.normalize(torch.stack([one.mean(0) for one in states]), dim=1).numpy()
        np.testing.assert_allclose([one.vector for one in llm.embed(texts, normalize=True)], last, atol=1e-4)
        np.testing.assert_allclose(
            [one.vector for one in llm.embed(texts, normalize=True, pooling="mean")], mean, atol=1e-4
        )
        assert len(llm.get_embeddings(texts[0])) == 576
