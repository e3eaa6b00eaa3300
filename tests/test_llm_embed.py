"""LLM.embed, rerank and get_embeddings over the mock backend: shapes, options, errors, the async facade."""

from __future__ import annotations

import asyncio
import math
import pickle
from collections.abc import Iterator
from typing import Any

import pytest

from tramontane import (
    LLM,
    AsyncLLM,
    ContextLengthExceeded,
    Embedding,
    EmbedRequest,
    EngineClosed,
    InvalidRequest,
    RerankRequest,
    RerankResult,
    UnsupportedModel,
    Usage,
)
from tramontane.backends.base import Capabilities
from tramontane.backends.mock import BOS_ID, MockBackend, hashed

DOCUMENTS = ["a cat sat", "nothing here", "the cat sat on the mat"]


@pytest.fixture
def llm() -> Iterator[LLM]:
    with LLM.from_backend(MockBackend(context_length=64)) as llm:
        yield llm


def test_one_in_one_out_and_a_list_in_a_list_out(llm: LLM) -> None:
    one = llm.embed("ab")
    assert isinstance(one, Embedding)
    assert (one.usage, one.truncated) == (Usage(3), False)
    assert math.hypot(*one.vector) == pytest.approx(1)
    many = llm.embed(["x", "ab", [BOS_ID, 97, 98]])
    assert [vector.vector == one.vector for vector in many] == [False, True, True]
    nothing: list[str] = []
    assert llm.embed(nothing) == []
    assert llm.get_embeddings("ab") == list(one.vector)


def test_options(llm: LLM) -> None:
    raw = hashed("query: ab")
    assert llm.embed("ab", prompt="query: ", normalize=False).vector == raw
    short = llm.embed("ab", prompt="query: ", dimensions=4).vector
    length = math.hypot(*raw[:4])
    assert short == pytest.approx([value / length for value in raw[:4]])
    assert llm.capabilities().embeds
    assert llm.capabilities().reranks


def test_a_long_text_is_cut_and_says_so_or_is_refused(llm: LLM) -> None:
    long = llm.embed("x" * 100)
    assert long.truncated
    assert long.usage == Usage(64)
    assert long.vector == llm.embed("x" * 63).vector
    with pytest.raises(ContextLengthExceeded):
        llm.embed("x" * 100, truncate=False)
    with pytest.raises(ContextLengthExceeded):
        llm.rerank("cat", ["x" * 100], truncate=False)
    assert llm.rerank("cat", ["x" * 100]).results[0].truncated


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"pooling": "median"}, "pooling"),
        ({"prompt": "a", "prompt_name": "b"}, "prompt_name"),
        ({"prompt": 3}, "prompt"),
        ({"prompt_name": "query"}, "prompt_name"),
        ({"normalize": 1}, "normalize"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": 33}, "dimensions"),
        ({"dimensions": 2.0}, "dimensions"),
        ({"truncate": None}, "truncate"),
    ],
)
def test_what_cannot_be_done_is_named(llm: LLM, options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        llm.embed("a", **options)
    assert error.value.field == field


def test_inputs_are_texts_or_token_ids(llm: LLM) -> None:
    wrong: list[Any] = [3, {"role": "user", "content": "x"}, [["a"]], [[-1]], [[]], [None]]
    for given in wrong:
        with pytest.raises(InvalidRequest):
            llm.embed(given)
    with pytest.raises(InvalidRequest) as error:
        llm.embed([[1, 2], "a"], prompt="query: ")
    assert error.value.field == "prompt"


def test_reranking(llm: LLM) -> None:
    found = llm.rerank("cat mat", DOCUMENTS)
    assert isinstance(found, RerankResult)
    assert [(one.index, one.score) for one in found.results] == [(2, 1.0), (0, 0.5), (1, 0.0)]
    assert found.usage.prompt_tokens == sum(1 + 7 + len(document) for document in DOCUMENTS)
    assert [one.index for one in llm.rerank("cat mat", DOCUMENTS, top_n=1).results] == [2]
    assert llm.rerank("cat mat", []).results == ()
    wrong: list[tuple[Any, ...]] = [(3, ["a"]), ("a", "text"), ("a", [3]), ("a", ["b"], 0)]
    for given in wrong:
        with pytest.raises(InvalidRequest):
            llm.rerank(*given)


def test_scripted_vectors_and_scores() -> None:
    backend = MockBackend(vector=lambda text: [3.0, len(text)], relevance=lambda query, document: -len(document))
    with LLM.from_backend(backend) as llm:
        assert llm.embed("abcd").vector == pytest.approx((0.6, 0.8))
        assert [one.index for one in llm.rerank("q", ["abc", "a", "ab"]).results] == [1, 2, 0]
    with pytest.raises(EngineClosed):
        llm.embed("a")
    with pytest.raises(EngineClosed):
        llm.rerank("a", ["b"])


def test_a_backend_that_cannot_says_so() -> None:
    class Plain:
        def capabilities(self) -> Capabilities:
            return Capabilities("plain", "none", 8, frozenset(), chat=False)

    llm = LLM.from_backend(Plain())  # type: ignore[arg-type]  # it never answers
    with pytest.raises(UnsupportedModel, match="'plain' does not embed"):
        llm.embed("a")
    with pytest.raises(UnsupportedModel, match="'plain' does not rank"):
        llm.rerank("a", ["b"])


def test_async() -> None:
    async def main() -> None:
        async with AsyncLLM.from_backend(MockBackend()) as llm:
            one, many = await asyncio.gather(llm.embed("a"), llm.embed(["a", "b"]))
            assert many[0] == one
            assert await llm.get_embeddings("a") == list(one.vector)
            assert (await llm.rerank("cat", DOCUMENTS, top_n=1)).results[0].index == 0

    asyncio.run(main())


def test_requests_pickle() -> None:
    for value in (EmbedRequest(("a", (1,)), dimensions=2), RerankRequest("a", ("b",)), Embedding((1.0,), Usage(1))):
        assert pickle.loads(pickle.dumps(value)) == value
