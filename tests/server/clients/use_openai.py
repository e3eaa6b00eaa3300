"""openai: chats, streams, its helpers for tools and schemas, completions, embeddings, errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, Literal

import openai
from common import CITY, QUESTION, REAL, REAL_MODEL, SCRIPTED, SCRIPTED_MODEL, SUNNY, WEATHER, WIND
from pydantic import BaseModel

ASKED = [{"role": "user", "content": QUESTION}]


class City(BaseModel):
    name: str
    people: int


class Choice(BaseModel):
    city: Literal["Nice", "Oslo"]


def chats(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=SCRIPTED_MODEL, messages=ASKED, max_completion_tokens=100)
    assert answer.choices[0].message.content == WIND
    assert answer.usage.completion_tokens == len(WIND)
    options = {"include_usage": True}
    chunks = [
        *client.chat.completions.create(model=SCRIPTED_MODEL, messages=ASKED, stream=True, stream_options=options)
    ]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == WIND
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(WIND)
    parsed = client.chat.completions.parse(model=SCRIPTED_MODEL, messages=ASKED, response_format=City)
    assert parsed.choices[0].message.parsed == City.model_validate_json(CITY)


def tools(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model=SCRIPTED_MODEL, messages=ASKED, tools=[WEATHER]) as stream:
        assert "tool_calls.function.arguments.done" in {event.type for event in stream}
        message = stream.get_final_completion().choices[0].message
    (call,) = message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Nice"})
    told = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    again = client.chat.completions.create(model=SCRIPTED_MODEL, messages=[*ASKED, message, told], tools=[WEATHER])
    assert again.choices[0].message.content == SUNNY


def real(client: openai.OpenAI) -> None:
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        answer = client.chat.completions.create(
            model=REAL_MODEL, messages=ASKED, tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False,
            max_tokens=60, temperature=0,
        )  # fmt: skip
        (call,) = answer.choices[0].message.tool_calls
        assert json.loads(call.function.arguments)["city"] in ("Nice", "Oslo")
        assert answer.choices[0].finish_reason in ("tool_calls", "stop")
    options = {"model": REAL_MODEL, "messages": ASKED, "response_format": Choice, "max_tokens": 60}
    assert client.chat.completions.parse(**options).choices[0].message.parsed.city in ("Nice", "Oslo")
    with client.chat.completions.stream(**options) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.parsed.city in ("Nice", "Oslo")
    options = {"model": REAL_MODEL, "prompt": ["One, two,", "A, B,"], "max_tokens": 4, "n": 2, "logprobs": 1}
    both = client.completions.create(**options, extra_body={"ignore_eos": True})
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert all(len(choice.logprobs.tokens) == 4 for choice in both.choices)
    assert [model.id for model in client.models.list()] == [REAL_MODEL]
    assert client.models.retrieve(REAL_MODEL).id == REAL_MODEL
    options = {"model": REAL_MODEL, "messages": ASKED, "store": True}
    refused = failing(openai.BadRequestError, client.chat.completions.create, **options)
    assert (refused.param, refused.code) == ("store", "unsupported_parameter")
    assert failing(openai.NotFoundError, client.models.retrieve, "other").code == "model_not_found"


def failing(kind: type[openai.APIError], call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The error that a call raises."""
    try:
        call(*args, **options)
    except kind as error:
        return error
    raise AssertionError("it was taken")


async def at_once() -> None:
    async with openai.AsyncOpenAI(base_url=SCRIPTED, api_key="none") as client:

        async def one() -> str:
            stream = await client.chat.completions.create(model=SCRIPTED_MODEL, messages=ASKED, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        assert await asyncio.gather(*(one() for _ in range(20))) == [WIND] * 20
        stream = await client.chat.completions.create(model=SCRIPTED_MODEL, messages=ASKED, stream=True)
        async for _ in stream:
            break
        await stream.close()


with openai.OpenAI(base_url=SCRIPTED, api_key="none") as client:
    chats(client)
    tools(client)
with openai.OpenAI(base_url=REAL, api_key="none") as client:
    real(client)
asyncio.run(at_once())
