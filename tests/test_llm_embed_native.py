"""LLM.embed and rerank over the native backend: models with and without heads, lengths, lists, cancelling, closing."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine import checkpoints
from tests.engine.checkpoints import BOS, CONTEXT, VOCAB
from tramontane import (
    LLM,
    AsyncLLM,
    ContextLengthExceeded,
    Embedding,
    EngineClosed,
    InvalidRequest,
    UnsupportedModel,
)
from tramontane.types import Pooling

OPTIONS: dict[str, Any] = {
    "kernels": "reference",
    "threads": 1,
    "block_size": 4,
    "num_blocks": 200,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 8,
}
TEXTS = ["a", "The tramontane", "is a wind from the north that " * 3, "Nord, nord-ouest." * 8]


def vectors(embeddings: list[Embedding]) -> Any:
    return np.array([embedding.vector for embedding in embeddings])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder, **OPTIONS) as llm:
        yield llm


@pytest.mark.parametrize("pooling", [None, "mean", "cls", "max"])
def test_a_chat_model_embeds_as_transformers_would(llm: LLM, folder: Path, pooling: Pooling | None) -> None:
    """Texts on both sides of the window and of what a step holds."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval().model
    expected = []
    for text in TEXTS:
        with torch.no_grad():
            states = model(torch.tensor([llm.tokenize(text)])).last_hidden_state[0]
        pooled = {None: states[-1], "mean": states.mean(0), "cls": states[0], "max": states.max(0).values}[pooling]
        expected.append(pooled.numpy())
    got = llm.embed(TEXTS, pooling=pooling)
    assert [one.usage.prompt_tokens for one in got] == [len(llm.tokenize(text)) for text in TEXTS]
    np.testing.assert_allclose(vectors(got), expected, atol=1e-4)
    normalized = vectors(llm.embed(TEXTS, pooling=pooling, normalize=True))
    np.testing.assert_allclose(normalized, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-4)


def test_alone_is_as_among_others_and_ids_are_taken_as_they_are(llm: LLM) -> None:
    together = llm.embed([*TEXTS, [BOS, 65, 66]])
    for text, embedding in zip(TEXTS, together, strict=False):
        np.testing.assert_allclose(llm.embed(text).vector, embedding.vector, atol=1e-5)
    assert llm.embed([BOS, 65, 66]) == together[-1]
    assert llm.get_embeddings(TEXTS[0]) == list(llm.embed(TEXTS[0]).vector)
    assert llm.capabilities().embeds
    assert not llm.capabilities().reranks


def test_deterministic_is_bit_by_bit(folder: Path) -> None:
    with LLM(folder, **{**OPTIONS, "deterministic": True}) as llm:
        together = llm.embed(TEXTS, pooling="mean")
        assert [llm.embed(text, pooling="mean") for text in TEXTS] == together
    with LLM(folder, **{**OPTIONS, "deterministic": True, "max_num_batched_tokens": 32}) as llm:
        assert llm.embed(TEXTS, pooling="lasttoken")[3] == llm.embed(TEXTS[3], pooling="lasttoken")


def test_long_texts(llm: LLM) -> None:
    long = llm.embed("x" * 500)
    assert long.truncated
    assert long.usage.prompt_tokens == CONTEXT
    with pytest.raises(ContextLengthExceeded) as error:
        llm.embed(["a", "x" * 500], truncate=False)
    assert error.value.prompt_tokens == 501
    assert llm.embed(list(range(100)) * 3).truncated


def test_what_cannot_be_read_is_refused(llm: LLM, folder: Path) -> None:
    with pytest.raises(InvalidRequest, match="vocabulary"):
        llm.embed([[1], [VOCAB]])
    with pytest.raises(InvalidRequest, match="Unicode"):
        llm.embed("\ud800")
    with pytest.raises(InvalidRequest) as error:
        llm.embed("a", dimensions=1000)
    assert error.value.field == "dimensions"
    with pytest.raises(InvalidRequest, match="brings none"):
        llm.embed("a", prompt_name="query")
    with pytest.raises(UnsupportedModel, match="qwen2 model does not score"):
        llm.rerank("a", ["b"])


def test_a_list_does_not_stall_answers(folder: Path) -> None:
    """A request that comes while a long list is read ends long before it."""
    with LLM(folder, **OPTIONS) as llm:
        done: list[str] = []
        thread = threading.Thread(target=lambda: (llm.embed(["x" * 60] * 100), done.append("list")))
        thread.start()
        llm.generate("a", max_tokens=3)
        done.append("answer")
        thread.join()
    assert done == ["answer", "list"]


def test_cancelling_and_closing(folder: Path) -> None:
    async def main() -> None:
        llm = AsyncLLM(folder, **OPTIONS)
        task = asyncio.ensure_future(llm.embed(["x" * 60] * 2000))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await llm.embed("a")).vector
        task = asyncio.ensure_future(llm.embed(["x" * 60] * 2000))
        await asyncio.sleep(0.05)
        await asyncio.to_thread(llm.close)
        with pytest.raises(EngineClosed):
            await task
        with pytest.raises(EngineClosed):
            await llm.embed("a")

    asyncio.run(main())


def test_sentence_transformers_files_are_obeyed(tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path / "model")
    kinds = ["Transformer", "Pooling", "Normalize"]
    modules = [
        {"path": "" if place == 0 else f"{place}_{kind}", "type": f"sentence_transformers.models.{kind}"}
        for place, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = {"pooling_mode_mean_tokens": True, "include_prompt": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    prompts = {"prompts": {"query": "query: ", "plain": ""}, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 20, "do_lower_case": true}')
    with LLM(folder, **OPTIONS) as llm:
        plain = llm.embed("Abc", prompt="")
        assert np.linalg.norm(plain.vector) == pytest.approx(1)
        assert llm.embed("ABC", prompt_name="plain") == plain
        asked = llm.embed("Abc")
        assert llm.embed("Abc", prompt_name="query") == llm.embed("Abc", prompt="query: ") == asked
        states = [
            llm.embed(llm.tokenize("query: abc")[: 9 + i], pooling="lasttoken", normalize=False) for i in range(3)
        ]
        mean = vectors(states).mean(0)
        np.testing.assert_allclose(asked.vector, mean / np.linalg.norm(mean), atol=1e-5)
        assert llm.embed("x" * 30).usage.prompt_tokens == 20
        with pytest.raises(InvalidRequest, match="It has query, plain"):
            llm.embed("a", prompt_name="document")


def test_files_that_are_not_understood_do_not_keep_a_model_from_answering(tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path / "model")
    (folder / "modules.json").write_text('[{"path": "", "type": "their.own.Module"}]')
    with LLM(folder, **OPTIONS) as llm:
        assert llm.generate("a", max_tokens=1).text is not None
        assert not llm.capabilities().embeds
        with pytest.raises(UnsupportedModel, match=r"their\.own\.Module"):
            llm.embed("a")
