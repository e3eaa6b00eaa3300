"""The whole engine over models of transformers: greedy answers are those of `generate`, shared prefixes or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine import checkpoints
from tramontane import LLM, UnsupportedModel
from tramontane.loading import build

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from tests.models import zoo  # noqa: E402

OPTIONS: dict[str, Any] = {
    "kernels": "cpu",
    "threads": 1,
    "block_size": 4,
    "max_num_seqs": 8,
    "dtype": "float32",
    "max_num_batched_tokens": 16,
}
TYPES = ["cwm", "granite_swa", "codegen", "lfm3", "mamba"]


@pytest.fixture(autouse=True)
def none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through transformers even where this build has a decoder of its own."""
    monkeypatch.setattr(build, "refusal_of", lambda *_: UnsupportedModel("It is tried.", ""))


@pytest.fixture(scope="module", params=TYPES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    model = zoo.save_tiny(request.param, folder, vocab_size=checkpoints.VOCAB)
    checkpoints.write_tokenizer(folder, checkpoints.TEMPLATE)
    (folder / "generation_config.json").unlink(missing_ok=True)
    return model, folder


def generated(model: Any, ids: list[int], count: int) -> list[int]:
    """What transformers answers."""
    for _ in range(count):
        with torch.no_grad():
            ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[-count:]


def test_greedy_answers_are_those_of_transformers(served: tuple[Any, Path]) -> None:
    model, folder = served
    prompts = [list(checkpoints.prompt(length, seed=1)) for length in (3, 9, 21, 33)]
    prompts.append([*prompts[3][:24], 7, 8, 9])  # begins as another
    expected = [generated(model, ids, 8) for ids in prompts]
    with LLM(folder, temperature=0.0, max_tokens=8, ignore_eos=True, **OPTIONS) as llm:
        together = llm.generate(prompts)
        cached = llm.stats().cached_tokens
        again = llm.generate(prompts)
        assert llm.stats().cached_tokens >= cached + 3 * 16  # states are remembered at few places
        choices = llm.generate(prompts[2], n=2).choices
    assert [list(answer.token_ids) for answer in together] == expected
    assert [list(answer.token_ids) for answer in again] == expected
    assert [list(choice.token_ids) for choice in choices] == [expected[2]] * 2


def test_deterministic_is_refused(served: tuple[Any, Path]) -> None:
    with pytest.raises(UnsupportedModel, match=r"deterministic=False"):
        LLM(served[1], deterministic=True, **OPTIONS)


def test_states_of_texts_are_those_of_transformers(served: tuple[Any, Path]) -> None:
    model, folder = served
    texts = ["The tramontane", "a wind from the north"]
    with LLM(folder, **OPTIONS) as llm:
        vectors = [result.vector for result in llm.embed(texts, pooling="lasttoken", normalize=False)]
        ids = [llm.tokenize(text) for text in texts]
    for vector, tokens in zip(vectors, ids, strict=True):
        with torch.no_grad():
            states = model.base_model(input_ids=torch.tensor([tokens])).last_hidden_state
        np.testing.assert_allclose(vector, states[0, -1], rtol=0, atol=2e-4)
