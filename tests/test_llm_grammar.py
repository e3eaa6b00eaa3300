"""Structured output as a Python user asks for it, over the native backend: a tiny random model, and real ones.

`pytest -m slow tests/test_llm_grammar.py` asks each model for two answers a schema; ANSWERS=20 for twenty, which makes
a thousand.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine import checkpoints
from tests.schemas import SCHEMAS
from tramontane import LLM, AsyncLLM, InvalidRequest, SamplingParams
from tramontane.inputs import merge_sampling
from tramontane.types import Chunk, Grammar

pytest.importorskip("llguidance", reason="the extra 'grammar' is not installed")

OPTIONS: dict[str, Any] = {"kernels": "reference", "threads": 1, "block_size": 4, "num_blocks": 400}
WORDS = "[a-c]{2,9}( [a-c]{2,9}){0,3}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder, max_tokens=40, seed=3, deterministic=True, **OPTIONS) as llm:
        yield llm


def test_each_kind_by_its_keyword(llm: LLM) -> None:
    assert llm.generate("a", choice=["red", "green"]).text in ("red", "green")
    assert re.fullmatch(WORDS, llm.generate("a", regex=WORDS).text)
    assert re.fullmatch("x[0-9]+", llm.generate("a", lark='start: "x" /[0-9]{2}/').text)
    assert json.loads(llm.chat([{"role": "user", "content": "Hi"}], json_schema={"enum": [1, 2]}).text) in (1, 2)
    assert llm.generate("a", json_object=True).text.startswith("{")
    assert llm.generate("a", json_object=False, regex=None).text == llm.generate("a").text


def test_a_pydantic_class_stands_for_its_schema(llm: LLM) -> None:
    pydantic = pytest.importorskip("pydantic", reason="pydantic makes the class")
    answer = pydantic.create_model("Answer", yes=(bool, ...), __config__=pydantic.ConfigDict(extra="forbid"))
    assert answer.model_validate_json(llm.generate("a", json_schema=answer, seed=1).text).yes in (True, False)


def test_one_grammar_is_enough() -> None:
    for given in ({"regex": "a", "json_object": True}, {"regex": "a", "grammar": Grammar("regex", "b")}):
        with pytest.raises(InvalidRequest, match="one grammar"):
            merge_sampling(None, given)
    with pytest.raises(InvalidRequest):
        merge_sampling(None, {"choice": "yes"})
    with pytest.raises(InvalidRequest):
        merge_sampling(None, {"json_object": {"a": 1}})


def test_streamed_and_batched_equal_one_by_one(llm: LLM) -> None:
    each = [
        SamplingParams(grammar=Grammar("regex", WORDS)),
        SamplingParams(),
        SamplingParams(grammar=Grammar("json_schema", SCHEMAS["an order"]), n=2),
        SamplingParams(grammar=Grammar("choice", ("abc", "abd")), n=3),
    ]
    prompts = ["one", "two", "three", "four"]
    alone = [llm.generate(prompt, params) for prompt, params in zip(prompts, each, strict=True)]
    together = llm.generate(prompts, each)
    assert [r.choices for r in together] == [r.choices for r in alone]
    for prompt, params, result in zip(prompts, each, alone, strict=True):
        texts = [""] * len(result.choices)
        for chunk in llm.stream(prompt, params):
            texts[chunk.index] += chunk.text
        assert texts == [choice.text for choice in result.choices]


def test_the_last_token_is_part_of_the_text(llm: LLM) -> None:
    result = llm.generate("a", choice=["abc"])
    assert (result.text, result.finish_reason, result.choices[0].stop_reason) == ("abc", "stop", None)
    assert result.usage.completion_tokens == 3
    assert llm.generate("a", choice=["abc"], echo=True).text == "aabc"


def test_a_stop_string_ends_it_wherever_it_is(llm: LLM) -> None:
    result = llm.generate("a", choice=["abcdef"], stop=["cd"])
    assert (result.text, result.finish_reason, result.choices[0].stop_reason) == ("ab", "stop", "cd")


def test_a_length_cuts_it(llm: LLM) -> None:
    assert (llm.generate("a", choice=["abcdef"], max_tokens=3)).finish_reason == "length"


def test_a_refused_grammar_refuses_its_request_and_no_other(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="unclosed group") as refused:
        llm.generate("a", regex="(")
    assert refused.value.field == "grammar"
    assert llm.generate("a", choice=["b"]).text == "b"


def test_a_model_level_grammar_holds_every_answer(folder: Path) -> None:
    with LLM(folder, grammar=Grammar("choice", ("b", "c")), **OPTIONS) as llm:
        assert {result.text for result in llm.generate(["x"] * 4)} <= {"b", "c"}
        assert llm.score("some text").total < 0


def test_it_compiles_beside_the_event_loop(folder: Path) -> None:
    """Something else goes on while a heavy grammar is compiled."""
    words = [f"w{i}" for i in range(3000)]

    async def main() -> tuple[int, str]:
        with_llm = await asyncio.to_thread(lambda: AsyncLLM(folder, **OPTIONS))
        asked = asyncio.ensure_future(with_llm.generate("x", choice=words))
        turns = 0
        while not asked.done():
            turns += 1
            await asyncio.sleep(0)
        with_llm.close()
        return turns, (await asked).text

    turns, text = asyncio.run(main())
    assert turns > 10
    assert text in words


# ---- real models


@pytest.fixture(scope="module", params=["smollm2", "qwen_coder"])
def real(request: pytest.FixtureRequest) -> Iterator[LLM]:
    with LLM(request.getfixturevalue(request.param), context_length=1024, num_blocks=1024, deterministic=True) as llm:
        yield llm


def asked(answers: int) -> list[tuple[str, Any, SamplingParams]]:
    """(name, messages, parameters) of so many answers a schema."""
    return [
        (name, [{"role": "user", "content": f"Answer in JSON: {name}."}], _params(name, seed))
        for seed in range(answers)
        for name in SCHEMAS
    ]


def _params(name: str, seed: int) -> SamplingParams:
    warmth = (0.0, 0.7, 1.0)[seed % 3]
    return SamplingParams(
        grammar=Grammar("json_schema", SCHEMAS[name]), seed=seed, temperature=warmth, max_tokens=160, top_k=0, top_p=1.0
    )


@pytest.mark.slow
def test_every_answer_that_ends_validates(real: LLM) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema judges")
    requests = asked(int(os.environ.get("ANSWERS", "2")))
    results = real.chat([messages for _, messages, _ in requests], [params for *_, params in requests])
    ended: Counter[str] = Counter(result.finish_reason for result in results)
    for (name, *_), result in zip(requests, results, strict=True):
        if result.finish_reason == "stop":
            value = json.loads(result.text)
            jsonschema.validate(value, SCHEMAS[name], cls=jsonschema.Draft202012Validator)
    print(f"{dict(ended)} of {len(requests)} answers")
    assert {*ended} <= {"stop", "length"}
    assert ended["stop"] > 0.5 * len(requests)


@pytest.mark.slow
def test_real_answers_streamed_and_batched_equal_one_by_one(real: LLM) -> None:
    requests = asked(2)[::5]
    batched = real.chat([messages for _, messages, _ in requests], [params for *_, params in requests])
    for (_, messages, params), result in zip(requests, batched, strict=True):
        chunks: list[Chunk] = list(real.stream(messages, params))
        assert "".join(chunk.text for chunk in chunks) == result.text
        assert chunks[-1].finish_reason == result.finish_reason
