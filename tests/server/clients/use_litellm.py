"""litellm: through its provider for servers that speak OpenAI's interface."""

from __future__ import annotations

import asyncio
import json

import litellm
from common import CITY, PARAMETERS, QUESTION, REAL, REAL_MODEL, SCRIPTED, SCRIPTED_MODEL, SUNNY, WEATHER, WIND

litellm.telemetry = False
asked = [{"role": "user", "content": QUESTION}]
scripted = {"model": f"openai/{SCRIPTED_MODEL}", "api_base": SCRIPTED, "api_key": "none"}
real = {"model": f"openai/{REAL_MODEL}", "api_base": REAL, "api_key": "none", "temperature": 0, "max_tokens": 60}
CHOICE = {"type": "json_schema", "json_schema": {"name": "choice", "schema": PARAMETERS, "strict": True}}

answer = litellm.completion(messages=asked, **scripted)
assert answer.choices[0].message.content == WIND
assert answer.usage.completion_tokens == len(WIND)
chunks = [*litellm.completion(messages=asked, stream=True, stream_options={"include_usage": True}, **scripted)]
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == WIND
assert litellm.stream_chunk_builder(chunks).usage.completion_tokens == len(WIND)
formatted = litellm.completion(messages=asked, response_format={"type": "json_object"}, **scripted)
assert json.loads(formatted.choices[0].message.content) == json.loads(CITY)

chunks = [*litellm.completion(messages=asked, tools=[WEATHER], stream=True, **scripted)]
message = litellm.stream_chunk_builder(chunks, messages=asked).choices[0].message
(call,) = message.tool_calls
assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Nice"})
told = [*asked, message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
assert litellm.completion(messages=told, tools=[WEATHER], **scripted).choices[0].message.content == SUNNY

answer = litellm.completion(messages=asked, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, **real)
assert json.loads(answer.choices[0].message.tool_calls[0].function.arguments)["city"] in ("Nice", "Oslo")
answer = litellm.completion(messages=asked, response_format=CHOICE, **real)
assert json.loads(answer.choices[0].message.content)["city"] in ("Nice", "Oslo")
assert litellm.text_completion(prompt="One, two,", **{**real, "model": f"text-completion-openai/{REAL_MODEL}"})


async def at_once() -> None:
    answers = await asyncio.gather(*(litellm.acompletion(messages=asked, **scripted) for _ in range(10)))
    assert {answer.choices[0].message.content for answer in answers} == {WIND}


asyncio.run(at_once())
