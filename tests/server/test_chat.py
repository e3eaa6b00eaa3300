"""/v1/chat/completions: every field of OpenAI's schema honoured or refused by name, and what vLLM's tests assert."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, Protocol

import pytest

from tests.server.live import HELLO, Live, events, live
from tests.server.scripted import THINKS_AND_CALLS, Scripted, says
from tramontane.backends.mock import MockBackend
from tramontane.server.convert import COMPLETION_TOKENS
from tramontane.server.schemas.chat import ChatChunk, ChatReply
from tramontane.types import (
    Chunk,
    Grammar,
    ImagePart,
    Message,
    NamedTool,
    Request,
    SamplingParams,
    TextPart,
    Tool,
    ToolCall,
)

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        "strict": True,
    },
}


class Asked(Protocol):
    def __call__(self, **body: Any) -> Request: ...


@pytest.fixture(scope="module")
def asked() -> Iterator[Asked]:
    """The request that a body becomes."""
    backend = Scripted(says("hi"))
    with live(backend) as server:

        def ask(**body: Any) -> Request:
            answer = server.chat(**body)
            assert answer.status_code == 200, answer.text
            return backend.asked.pop()

        yield ask


def refusal(server: Live, **body: Any) -> dict[str, Any]:
    answer = server.chat(**body)
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error


# ---- fields that are honoured

SAMPLING = {
    "frequency_penalty": 0.5,
    "presence_penalty": -0.5,
    "logit_bias": {"7": 5.0},
    "n": 2,
    "seed": 11,
    "temperature": 0.25,
    "top_p": 0.5,
    "top_k": 40,
    "min_p": 0.1,
    "repetition_penalty": 1.2,
    "typical_p": 0.9,
    "xtc_probability": 0.5,
    "xtc_threshold": 0.2,
    "dry_multiplier": 0.8,
    "dry_base": 1.5,
    "dry_allowed_length": 3,
    "dry_range": 64,
    "dry_sequence_breakers": [";"],
    "bad_words": ["darn"],
    "allowed_token_ids": [5, 6],
    "best_of": 4,
    "length_penalty": 0.5,
    "early_stopping": "never",
    "ignore_eos": True,
    "min_tokens": 2,
    "stop_token_ids": [5],
    "skip_special_tokens": False,
}


def test_sampling_reaches_the_backend(asked: Asked) -> None:
    sampling = asked(
        **SAMPLING, stop=["a", "b"], max_tokens=9, logprobs=True, top_logprobs=3, include_stop_str_in_output=True
    ).sampling
    for name, value in SAMPLING.items():
        expected = {7: 5.0} if name == "logit_bias" else tuple(value) if isinstance(value, list) else value
        assert getattr(sampling, name) == expected, name
    assert (sampling.stop, sampling.max_tokens, sampling.logprobs, sampling.include_stop) == (("a", "b"), 9, 3, True)


def test_every_way_of_sampling_can_be_asked_for() -> None:
    renamed = {
        "beam_width",
        "stop",
        "max_tokens",
        "logprobs",
        "include_stop",
        "grammar",
    }  # asked for in the tests around
    elsewhere = {"prompt_logprobs", "echo", "logits_processors"}  # of completions; not to be sent
    assert {field.name for field in fields(SamplingParams)} == {*SAMPLING, *renamed, *elsewhere}


def test_an_adapter_by_its_name(mock: Live, asked: Asked) -> None:
    assert asked(adapter="mine").adapter == "mine"
    assert asked().adapter is None
    assert refusal(mock, adapter="mine")["param"] == "adapter"
    assert refusal(mock, adapter="")["param"] == "adapter"


def test_beams_as_vllm_asks_for_them(mock: Live, asked: Asked) -> None:
    assert asked(use_beam_search=True, n=3).sampling.beam_width == 3
    assert asked(use_beam_search=True, beam_width=4, n=2).sampling.beam_width == 4
    assert asked(beam_width=2).sampling.beam_width == 2
    assert asked(use_beam_search=False, n=3).sampling.beam_width is None
    assert refusal(mock, use_beam_search=True)["param"] == "use_beam_search"
    assert refusal(mock, beam_width=17)["param"] == "beam_width"
    assert refusal(mock, best_of=17)["param"] == "best_of"


def test_null_and_absent_are_the_same(asked: Asked) -> None:
    names = ("audio", "frequency_penalty", "function_call", "functions", "logit_bias", "logprobs",
             "max_completion_tokens", "max_tokens", "metadata", "modalities", "moderation", "n", "parallel_tool_calls",
             "prediction", "presence_penalty", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
             "reasoning_effort", "response_format", "safety_identifier", "seed", "service_tier", "stop", "store",
             "stream", "stream_options", "temperature", "tool_choice", "tools", "top_logprobs", "top_p", "user",
             "verbosity", "web_search_options", "top_k", "min_p", "cache_salt", "structured_outputs")  # fmt: skip
    assert asked(**dict.fromkeys(names)) == asked()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("store", False), ("modalities", ["text"]), ("service_tier", "auto"), ("service_tier", "default"),
        ("prompt_cache_retention", "in_memory"), ("prompt_cache_options", {"mode": "implicit"}),
        ("function_call", "none"), ("functions", []), ("verbosity", "medium"), ("tools", []), ("tool_choice", "none"),
        ("tool_choice", "auto"), ("parallel_tool_calls", True), ("response_format", {"type": "text"}),
        ("prompt_cache_key", "k"), ("safety_identifier", "s"), ("user", "u"),
    ],
)  # fmt: skip
def test_what_asks_for_nothing_is_taken(field: str, value: Any, asked: Asked) -> None:
    assert asked(**{field: value}) == asked()


def test_40_point_0_is_an_integer(mock: Live, asked: Asked) -> None:
    assert asked(top_k=40.0).sampling.top_k == 40
    assert asked(top_k=-1).sampling.top_k == 0
    assert refusal(mock, top_k=40.5)["param"] == "top_k"
    assert refusal(mock, top_k=True)["param"] == "top_k"


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_the_context_caps_the_answer(field: str, asked: Asked) -> None:
    with live(MockBackend("x", context_length=60)) as server:
        answer = server.chat(**{field: 10**9}, ignore_eos=True)
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["finish_reason"] == "length"
    assert answer.json()["usage"]["total_tokens"] == 60
    assert COMPLETION_TOKENS == 16  # of completions alone: a chat without a limit goes on to its end
    assert asked().sampling.max_tokens is None


def test_a_prompt_that_does_not_fit_is_refused_and_not_cut() -> None:
    with live(MockBackend(context_length=20)) as server:
        assert refusal(server, messages=[{"role": "user", "content": "x" * 50}])["code"] == "context_length_exceeded"


def test_two_limits_that_differ_are_refused(mock: Live, asked: Asked) -> None:
    assert asked(max_tokens=5, max_completion_tokens=5).sampling.max_tokens == 5
    assert refusal(mock, max_tokens=5, max_completion_tokens=6)["param"] == "max_tokens"


def test_conversations(asked: Asked) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    messages = asked(
        messages=[
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "Ann"},
            {"role": "assistant", "tool_calls": [call], "refusal": None, "annotations": [], "reasoning_content": "hm"},
            {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
            {"role": "assistant", "content": None},
            {"role": "assistant", "content": "It is.", "audio": None, "function_call": None},
        ]
    ).messages
    assert messages == (
        Message("developer", "Be kind."),
        Message("user", (TextPart("a"), TextPart("b")), name="Ann"),
        Message("assistant", "", (ToolCall("c1", "weather", "{}"),), reasoning="hm"),
        Message("tool", "sunny", tool_call_id="c1"),
        Message("assistant", ""),
        Message("assistant", "It is."),
    )


def test_an_answer_can_be_sent_back_as_it_came(mock: Live) -> None:
    message = mock.chat().json()["choices"][0]["message"]
    assert mock.chat(messages=[*HELLO, message, *HELLO]).status_code == 200


def test_images_are_passed_on_and_refused_by_the_model(mock: Live, asked: Asked) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA==", "detail": "low"}}
    message = {"role": "user", "content": [{"type": "text", "text": "What is this?"}, image]}
    (seen,) = asked(messages=[message]).messages or ()
    assert isinstance(seen.content[1], ImagePart)
    error = refusal(mock, messages=[message])
    assert "ImagePart" in error["message"]
    assert error["param"] == "messages"


def test_tools(asked: Asked) -> None:
    request = asked(tools=[WEATHER], tool_choice="required", parallel_tool_calls=False)
    function: Any = WEATHER["function"]
    assert request.tools == (Tool("weather", "Weather of a city", function["parameters"], True),)
    assert (request.tool_choice, request.parallel_tool_calls) == ("required", False)
    named = asked(tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "weather"}})
    assert named.tool_choice == NamedTool("weather")
    assert asked(tools=[WEATHER], tool_choice="none").tool_choice == "none"
    assert asked(tools=[WEATHER]).tool_choice == "auto"


def test_reasoning_and_template(asked: Asked) -> None:
    request = asked(reasoning_effort="high", chat_template_kwargs={"enable_thinking": True})
    assert (request.reasoning_effort, request.thinking) == ("high", None)
    assert request.template_kwargs == {"enable_thinking": True}
    request = asked(reasoning_effort="none")
    assert (request.reasoning_effort, request.thinking) == (None, False)


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("body", "grammar"),
    [
        ({"response_format": {"type": "json_object"}}, Grammar("json_object")),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
            Grammar("json_schema", SCHEMA),
        ),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, Grammar("json_object")),
        ({"guided_json": SCHEMA}, Grammar("json_schema", SCHEMA)),
        ({"guided_json": json.dumps(SCHEMA)}, Grammar("json_schema", SCHEMA)),
        ({"guided_regex": "a+"}, Grammar("regex", "a+")),
        ({"guided_choice": ["yes", "no"]}, Grammar("choice", ("yes", "no"))),
        ({"guided_grammar": 'start: "a"'}, Grammar("lark", 'start: "a"')),
        ({"structured_outputs": {"json": SCHEMA}}, Grammar("json_schema", SCHEMA)),
        ({"structured_outputs": {"regex": "a+"}}, Grammar("regex", "a+")),
        ({"structured_outputs": {"choice": ["a"]}}, Grammar("choice", ("a",))),
        ({"structured_outputs": {"grammar": "g"}}, Grammar("lark", "g")),
        ({"structured_outputs": {"json_object": True}}, Grammar("json_object")),
    ],
)  # fmt: skip
def test_what_an_answer_must_match(body: dict[str, Any], grammar: Grammar, asked: Asked) -> None:
    assert asked(**body).sampling.grammar == grammar


def test_one_grammar_is_enough(mock: Live) -> None:
    error = refusal(mock, response_format={"type": "json_object"}, guided_regex="a")
    assert error["param"] == "response_format"
    assert refusal(mock, guided_json="{")["param"] == "guided_json"


def test_what_the_backend_refuses_bears_the_clients_name(mock: Live) -> None:
    assert refusal(mock, response_format={"type": "json_object"})["param"] == "response_format"
    assert refusal(mock, guided_regex="a")["param"] == "guided_regex"
    assert refusal(mock, reasoning_effort="none")["param"] == "reasoning_effort"
    assert refusal(mock, tools=[WEATHER])["param"] == "tools"
    assert refusal(mock, chat_template_kwargs={"x": 1})["param"] == "chat_template_kwargs"


# ---- fields that are refused

REFUSED: list[tuple[str, Any]] = [
    ("audio", {"voice": "alloy", "format": "mp3"}),
    ("function_call", {"name": "f"}),
    ("functions", [{"name": "f"}]),
    ("modalities", ["audio"]),
    ("moderation", {"model": "m"}),
    ("prediction", {"type": "content", "content": "x"}),
    ("prompt_cache_retention", "24h"),
    ("service_tier", "flex"),
    ("store", True),
    ("verbosity", "low"),
    ("web_search_options", {}),
]


@pytest.mark.parametrize(("field", "value"), REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(mock: Live, field: str, value: Any) -> None:
    error = refusal(mock, **{field: value})
    assert error["param"].split("[")[0].split(".")[0] == field
    assert field in error["message"]


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"nonsense": 1}, "nonsense", "unknown_parameter"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "invalid_value"),
        ({"messages": None}, "messages", "invalid_type"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "missing_required_parameter"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", None),
        ({"messages": [{"role": "user", "content": [{"type": "film"}]}]}, "messages[0].content[0].type", None),
        ({"messages": [*HELLO, {"role": "user", "content": "x", "odd": 1}]}, "messages[1].odd", "unknown_parameter"),
        ({"temperature": "hot"}, "temperature", "invalid_type"),
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"max_tokens": -1}, "max_tokens", "invalid_value"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "invalid_value"),
        ({"seed": 2**64}, "seed", "invalid_value"),
        ({"seed": 10**400}, "seed", None),
        ({"logit_bias": {"x": 1}}, None, "invalid_value"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation", None),
        ({"stop": ""}, "stop", "invalid_value"),
        ({"stop": [""]}, "stop[0]", "invalid_value"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "invalid_value"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"tool_choice": "any"}, "tool_choice", "invalid_value"),
        ({"tools": [WEATHER, WEATHER]}, "tools", "invalid_value"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type", "invalid_value"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", None),
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
        ({"reasoning_effort": 3}, "reasoning_effort", "invalid_type"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(mock: Live, body: dict[str, Any], param: str | None, code: str | None) -> None:
    error = refusal(mock, **body)
    if param is not None:
        assert error["param"] == param, error
    if code is not None:
        assert error["code"] == code, error


def test_a_model_that_is_not_here(mock: Live) -> None:
    answer = mock.chat(model="gpt-9")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    with live(MockBackend(), names=("org/name", "short")) as server:
        assert server.chat(model="org/name").json()["model"] == "org/name"
        assert server.chat(model="short").json()["model"] == "org/name"
        assert server.get("/v1/models/org/name").json()["id"] == "org/name"
        assert [card["id"] for card in server.get("/v1/models").json()["data"]] == ["org/name", "short"]


# ---- answers


def chunks_of(text: str) -> list[dict[str, Any]]:
    *chunks, done = events(text)
    assert done == "[DONE]"
    return [json.loads(chunk) for chunk in chunks]


def test_replies_are_what_their_schema_says() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    for backend in (MockBackend("hey"), Scripted(THINKS_AND_CALLS)):
        with live(backend) as server:
            for body in ({}, {"logprobs": True, "top_logprobs": 2}, {"metadata": {"a": "b"}, "service_tier": "auto"}):
                reply = server.chat(**body)
                assert ChatReply.model_validate(reply.json(), strict=True)
                for chunk in chunks_of(server.chat(**body, stream=True, stream_options=options).text):
                    assert ChatChunk.model_validate(chunk, strict=True)


def test_metadata_comes_back(mock: Live) -> None:
    assert mock.chat(metadata={"job": "7"}).json()["metadata"] == {"job": "7"}
    assert "metadata" not in mock.chat().json()


def test_choices_streamed_are_the_choices() -> None:
    with live(lambda: MockBackend(["one", "three", "fifteen"])) as server:
        whole = server.chat(n=3, seed=0).json()["choices"]
        texts, ends = ["", "", ""], []
        for chunk in chunks_of(server.chat(n=3, seed=0, stream=True).text):
            (choice,) = chunk["choices"]
            texts[choice["index"]] += choice["delta"].get("content", "")
            if choice["finish_reason"] is not None:
                ends.append((choice["index"], choice["finish_reason"]))
    assert texts == [choice["message"]["content"] for choice in whole] == ["one", "three", "fifteen"]
    assert sorted(ends) == [(0, "stop"), (1, "stop"), (2, "stop")]  # one end each


def test_one_end_in_the_last_chunk_then_usage_without_choices(mock: Live) -> None:
    chunks = chunks_of(mock.chat(stream=True, stream_options={"include_usage": True}, max_tokens=3).text)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None, None, None, "length"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 3
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks_of(mock.chat(stream=True).text))


def test_usage_on_every_chunk(mock: Live) -> None:
    chunks = chunks_of(mock.chat(stream=True, stream_options={"continuous_usage_stats": True}, max_tokens=3).text)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 1, 2, 3]
    assert len({chunk["usage"]["prompt_tokens"] for chunk in chunks}) == 1
    assert chunks[0]["usage"]["prompt_tokens"] > 0


def test_logprobs(mock: Live) -> None:
    none = mock.chat(max_tokens=2).json()["choices"][0]["logprobs"]
    zero = mock.chat(max_tokens=2, logprobs=True, top_logprobs=0).json()["choices"][0]["logprobs"]["content"]
    one = mock.chat(max_tokens=2, logprobs=True, top_logprobs=1).json()["choices"][0]["logprobs"]["content"]
    assert none is None
    assert [(token["token"], token["bytes"], token["top_logprobs"]) for token in zero] == [
        ("T", [84], []),
        ("h", [104], []),
    ]
    assert [len(token["top_logprobs"]) for token in one] == [1, 1]


def test_seeds_repeat() -> None:
    with live(lambda: MockBackend(["one", "two"])) as server:
        answers = [server.chat(seed=seed).json()["choices"][0]["message"]["content"] for seed in (0, 1, 0, 1)]
    assert answers == ["one", "two", "one", "two"]


def test_thoughts_and_calls_at_once_and_streamed() -> None:
    with live(Scripted(THINKS_AND_CALLS)) as server:
        whole = server.chat(tools=[WEATHER]).json()
        chunks = chunks_of(server.chat(tools=[WEATHER], stream=True).text)
    (choice,) = whole["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert choice["message"]["reasoning_content"] == "I need the weather."
    assert choice["message"]["tool_calls"] == [
        {"id": "call-1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Nice"}'}},
        {"id": "call-2", "type": "function", "function": {"name": "time", "arguments": "{}"}},
    ]
    assert whole["usage"] == {
        "prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9, "prompt_tokens_details": {"cached_tokens": 2},
    }  # fmt: skip
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "I need the weather."
    pieces = [piece for delta in deltas for piece in delta.get("tool_calls", ())]
    assert [(p["index"], p.get("id"), p["function"].get("name"), p["function"]["arguments"]) for p in pieces] == [
        (0, "call-1", "weather", ""),
        (0, None, None, '{"city":'),
        (0, None, None, '"Nice"}'),
        (1, "call-2", "time", "{}"),
    ]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_a_stop_says_which_it_was(mock: Live) -> None:
    choice = mock.chat(stop="wind").json()["choices"][0]
    assert (choice["message"]["content"], choice["stop_reason"]) == ("The ", "wind")
    assert (
        mock.chat(stop="wind", include_stop_str_in_output=True).json()["choices"][0]["message"]["content"] == "The wind"
    )


def test_half_a_character_pair_is_written_as_json_has_it() -> None:
    with live(Scripted([Chunk("r", 0, "\ud83d", (1,), finish_reason="stop")])) as server:
        assert server.chat().json()["choices"][0]["message"]["content"] == "\ud83d"
        assert "ud83d" in server.chat(stream=True).text
