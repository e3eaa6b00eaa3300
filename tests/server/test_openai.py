"""OpenAI's own client, against a server on a real socket."""

from __future__ import annotations

import math

import pydantic
import pytest

from tests.server.live import HELLO, Live, live
from tests.server.scripted import THINKS_AND_CALLS, Scripted, says
from tests.server.test_chat import WEATHER
from tramontane.backends.mock import hashed

openai = pytest.importorskip("openai", reason="openai is not installed")


@pytest.fixture
def client(mock: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{mock.url}/v1", api_key="none")


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="mock", messages=HELLO)
    assert answer.choices[0].message.content == "The wind is up."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len("The wind is up.")


def test_chat_streamed(client: openai.OpenAI) -> None:
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(model="mock", messages=HELLO, stream=True, stream_options=options))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == "The wind is up."
    assert [c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason] == ["stop"]
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len("The wind is up.")


def test_stream_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="mock", messages=HELLO) as stream:
        for _ in stream:
            pass
        whole = stream.get_final_completion()
    assert whole.choices[0].message.content == "The wind is up."


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="mock", prompt=["a", "b"], max_tokens=3, n=2)
    assert [(choice.index, choice.text) for choice in answer.choices] == [(i, "The") for i in range(4)]


def test_embeddings_which_this_client_asks_for_in_base64(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model="mock", input=["a", "b"])
    length = math.hypot(*hashed("a"))
    assert answer.data[0].embedding == pytest.approx([value / length for value in hashed("a")], abs=1e-6)


def test_answers_parsed_into_a_model() -> None:
    class City(pydantic.BaseModel):
        name: str

    backend = Scripted(says('{"name": "Nice"}'))
    with live(backend) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
        answer = client.chat.completions.parse(model="mock", messages=HELLO, response_format=City)
        assert answer.choices[0].message.parsed == City(name="Nice")
    grammar = backend.asked[0].sampling.grammar
    assert grammar is not None
    assert grammar.value["required"] == ["name"]


def test_calls_through_the_stream_helper() -> None:
    with live(Scripted(THINKS_AND_CALLS)) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
        with client.chat.completions.stream(model="mock", messages=HELLO, tools=[WEATHER]) as stream:
            kinds = {event.type for event in stream}
            whole = stream.get_final_completion()
        assert "tool_calls.function.arguments.done" in kinds
        message = whole.choices[0].message
        calls = message.tool_calls or []
        assert [(call.id, call.function.name, call.function.arguments) for call in calls] == [
            ("call-1", "weather", '{"city":"Nice"}'),
            ("call-2", "time", "{}"),
        ]
        # What the client got can be sent back with the tools' answers.
        answers = [{"role": "tool", "tool_call_id": call.id, "content": "fine"} for call in calls]
        again = client.chat.completions.create(model="mock", messages=[*HELLO, message, *answers])
        assert again.choices[0].finish_reason == "tool_calls"


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["mock"]
    assert client.models.retrieve("mock").id == "mock"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_errors_have_the_shape_that_the_client_reads(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="mock", messages=HELLO, store=True)
    assert caught.value.param == "store"
    assert caught.value.code == "unsupported_parameter"
    assert caught.value.type == "invalid_request_error"
