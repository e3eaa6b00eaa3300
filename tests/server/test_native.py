"""The server over our own engine: a tiny model for what must hold always, a real one for what people see."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.engine import checkpoints
from tests.server.live import HELLO, Live, events, live, until
from tramontane.backends.native import NativeBackend
from tramontane.config import EngineConfig
from tramontane.llm import LLM

OPTIONS = {"threads": 1, "num_blocks": 200, "block_size": 4, "max_num_seqs": 4, "deterministic": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def tiny(folder: Path) -> Iterator[Live]:
    with live(lambda: NativeBackend(folder, EngineConfig.from_options(OPTIONS)), names=("tiny",)) as running:
        yield running


def blocks_used(server: Live) -> int:
    backend: Any = server.service.backend
    used: int = backend.stats().blocks_used
    return used


def test_answers_are_those_of_the_library(tiny: Live, folder: Path) -> None:
    with LLM(folder, **OPTIONS) as llm:
        texts = [f"text number {number}" for number in range(8)]
        options = {"max_tokens": 12, "temperature": 0.8, "ignore_eos": True}
        expected = [llm.generate(text, seed=number, **options).text for number, text in enumerate(texts)]
        said = llm.chat(HELLO, max_tokens=9, temperature=0).text

    def ask(number: int) -> str:
        body = {"prompt": texts[number], "seed": number, **options}
        if number % 2:
            return str(tiny.complete(**body).json()["choices"][0]["text"])
        chunks = events(tiny.complete(**body, stream=True).text)[:-1]
        return "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks)

    with ThreadPoolExecutor(8) as pool:  # twice as many as there are seats
        assert list(pool.map(ask, range(8))) == expected
    assert tiny.chat(max_tokens=9, temperature=0).json()["choices"][0]["message"]["content"] == said
    assert blocks_used(tiny) == 0


def test_a_scored_prompt_is_scored_as_by_the_library(tiny: Live, folder: Path) -> None:
    ids = [10, 20, 30, 40, 50]
    with LLM(folder, **OPTIONS) as llm:
        expected = llm.score(ids).logprobs
    choice = tiny.complete(prompt=ids, echo=True, logprobs=1, max_tokens=0).json()["choices"][0]
    assert choice["logprobs"]["token_logprobs"] == [None, *(pytest.approx(p, abs=1e-5) for p in expected[1:])]
    assert choice["finish_reason"] == "length"
    both = tiny.complete(prompt=ids, echo=True, logprobs=2, max_tokens=3, n=2, ignore_eos=True).json()["choices"]
    assert [len(one["logprobs"]["tokens"]) for one in both] == [8, 8]
    assert all(1 <= len(top) <= 3 for one in both for top in one["logprobs"]["top_logprobs"][1:])


def test_token_ids_go_through_as_they_are(tiny: Live) -> None:
    tokens = tiny.post("/tokenize", {"prompt": "Grüße, 世界"}).json()["tokens"]
    assert tiny.post("/detokenize", {"tokens": tokens}).json()["prompt"].endswith("Grüße, 世界")
    by_ids = tiny.complete(prompt=tokens, temperature=0, max_tokens=4).json()["choices"][0]["text"]
    assert by_ids == tiny.complete(prompt="Grüße, 世界", temperature=0, max_tokens=4).json()["choices"][0]["text"]


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_drawn_and_not_told_is_counted(tiny: Live, stream: bool) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    answer = tiny.complete(best_of=4, max_tokens=3, ignore_eos=True, **options)
    whole = json.loads(events(answer.text)[-2]) if stream else answer.json()
    assert whole["usage"]["completion_tokens"] == 12


def test_prefixes_are_remembered_within_a_salt_and_not_beyond(tiny: Live) -> None:
    def cached(salt: str) -> int:
        usage = tiny.complete(prompt="The same long beginning " * 3, max_tokens=1, cache_salt=salt).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert cached("one") == 0
    assert cached("one") > 40
    assert cached("two") == 0


def test_a_client_that_leaves_frees_its_blocks(tiny: Live) -> None:
    for stream in (True, False):
        with tiny.raw() as connection:
            body = json.dumps({"prompt": "Hello", "max_tokens": 140, "ignore_eos": True, "stream": stream}).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            until(lambda: tiny.service.open_requests == 1)
        until(lambda: tiny.service.open_requests == 0 and blocks_used(tiny) == 0)


@pytest.mark.parametrize(
    "extra",
    [
        {"top_k": 2**31 - 1}, {"max_tokens": 2**63 - 1}, {"min_tokens": 2**63 - 1}, {"seed": -(2**63)},
        {"seed": 2**63 - 1}, {"temperature": 5e-324}, {"top_p": 5e-324}, {"repetition_penalty": 5e-324},
        {"repetition_penalty": 100.0}, {"logit_bias": {"1": 100.0}}, {"logit_bias": {"999999999": 1.0}},
        {"stop_token_ids": [2**31 - 1]}, {"prompt": [2**31 - 1]}, {"prompt": ""}, {"prompt": "\x00"},
        {"prompt": "a" * 5000}, {"stop": ["a" * 10000]}, {"n": 16, "max_tokens": 1}, {"priority": 2**31 - 1},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_extreme_is_answered_or_refused(tiny: Live, extra: dict[str, Any]) -> None:
    answer = tiny.complete(**{"max_tokens": 2, **extra})
    assert answer.status_code in (200, 400), answer.text
    assert tiny.complete(max_tokens=1).status_code == 200
    assert blocks_used(tiny) == 0


def test_the_engine_waits_in_line_by_key_and_refuses_what_is_too_much(folder: Path) -> None:
    config = EngineConfig.from_options({**OPTIONS, "max_num_seqs": 1, "max_waiting": 1})
    with live(lambda: NativeBackend(folder, config)) as server:
        body = {"max_tokens": 130, "ignore_eos": True}
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda _: server.complete(**body), range(12)))
        codes = {answer.status_code for answer in answers}
        assert codes <= {200, 429}
        refused = [answer for answer in answers if answer.status_code == 429]
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        assert server.complete(max_tokens=1).status_code == 200


def test_an_engine_that_dies_is_told_to_all_and_ends_the_server(folder: Path) -> None:
    backend = NativeBackend(folder, EngineConfig.from_options(OPTIONS))
    with live(backend) as server:
        broken = threading.Event()

        def step(*_: Any) -> Any:
            broken.wait(20)
            raise RuntimeError("the engine is broken")

        backend._loop._engine.scheduler.schedule = step  # type: ignore[method-assign]
        with ThreadPoolExecutor(2) as pool:
            whole = pool.submit(server.complete)
            streamed = pool.submit(server.complete, stream=True)
            until(lambda: server.service.open_requests == 2)
            broken.set()
            assert {whole.result().status_code, streamed.result().status_code} == {503}
        server.thread.join(20)
        assert not server.thread.is_alive()
        assert server.service.phase == "failed"


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99}}, "required": ["n"]}


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_keeps_to_its_schema(tiny: Live, stream: bool) -> None:
    """A model of random weights, which by itself would never."""
    body = {"guided_json": {**SCHEMA, "additionalProperties": False}, "max_tokens": 100, "stream": stream, "seed": 5}
    answer = tiny.complete(**body)
    assert answer.status_code == 200, answer.text
    chunks = [json.loads(chunk) for chunk in events(answer.text)[:-1]] if stream else [answer.json()]
    text = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
    if chunks[-1]["choices"][0]["finish_reason"] == "stop":
        assert isinstance(json.loads(text)["n"], int)
    else:
        assert text.lstrip().startswith("{")
    choice = tiny.complete(guided_choice=["north", "south"], max_tokens=20).json()["choices"][0]
    assert choice["text"] in ("north", "south")


@pytest.mark.parametrize(
    "grammar", [{"guided_regex": "("}, {"guided_grammar": "start: x"}, {"guided_json": {"type": 7}}]
)
def test_a_grammar_that_is_none_is_refused_by_its_name(tiny: Live, grammar: dict[str, Any]) -> None:
    answer = tiny.complete(**grammar)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == next(iter(grammar))


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_a_real_model_calls_tools_and_keeps_to_schemas(qwen_coder: Path, stream: bool) -> None:
    config = EngineConfig.from_options({"context_length": 1024})
    city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tool = {"type": "function", "function": {"name": "weather", "description": "Weather now", "parameters": city}}
    question = [{"role": "user", "content": "What is the weather in Nice?"}]
    with live(lambda: NativeBackend(qwen_coder, config), names=("qwen",), wait=False) as server:
        until(lambda: server.get("/ready").status_code == 200, 120)
        base: dict[str, Any] = {"messages": question, "temperature": 0, "max_tokens": 100, "stream": stream}
        for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
            message = whole(server.chat(**base, tools=[tool], tool_choice=choice), stream)
            assert message["tool_calls"][0]["function"]["name"] == "weather"
            assert "nice" in json.loads(message["tool_calls"][0]["function"]["arguments"])["city"].lower()
        formatted = {"type": "json_schema", "json_schema": {"name": "city", "schema": city, "strict": True}}
        assert json.loads(whole(server.chat(**base, response_format=formatted), stream)["content"])["city"]


def whole(answer: Any, stream: bool) -> dict[str, Any]:
    """The message of an answer, or of a stream that OpenAI's client puts together."""
    assert answer.status_code == 200, answer.text
    if not stream:
        message: dict[str, Any] = answer.json()["choices"][0]["message"]
        return message
    content, calls = "", {}
    for chunk in map(json.loads, events(answer.text)[:-1]):
        delta = chunk["choices"][0]["delta"]
        content += delta.get("content", "")
        for piece in delta.get("tool_calls", ()):
            call = calls.setdefault(piece["index"], {"function": {"name": "", "arguments": ""}})
            for name in ("name", "arguments"):
                call["function"][name] += piece["function"].get(name, "")
    return {"content": content, "tool_calls": [calls[index] for index in sorted(calls)]}


@pytest.mark.slow
def test_a_real_model_serves_many_at_once(smollm2: Path) -> None:
    config = EngineConfig.from_options({"deterministic": True, "context_length": 512})
    questions = [f"What is {number} plus {number}?" for number in range(24)]
    options = {"max_tokens": 16, "temperature": 0}
    with LLM(str(smollm2), deterministic=True, context_length=512) as llm:
        chats = [[{"role": "user", "content": question}] for question in questions]
        expected = [result.text for result in llm.chat(chats, **options)]

    with live(lambda: NativeBackend(smollm2, config), names=("smol",), wait=False) as server:
        until(lambda: server.get("/ready").status_code == 200, 60)

        def ask(question: str) -> str:
            body = {"messages": [{"role": "user", "content": question}], "stream": True, **options}
            chunks = events(server.post("/v1/chat/completions", body).text)[:-1]
            return "".join(json.loads(chunk)["choices"][0]["delta"].get("content", "") for chunk in chunks)

        with ThreadPoolExecutor(24) as pool:
            assert list(pool.map(ask, questions)) == expected
        assert blocks_used(server) == 0
