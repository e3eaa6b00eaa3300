"""langchain-openai: chats, streams, tools, structured output by each of its methods."""

from __future__ import annotations

from typing import Literal

from common import CITY, QUESTION, REAL, REAL_MODEL, SCRIPTED, SCRIPTED_MODEL, SUNNY, WIND
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel


class City(BaseModel):
    """A city."""

    name: str
    people: int


class Choice(BaseModel):
    """The city that is meant."""

    city: Literal["Nice", "Oslo"]


@tool
def weather(city: Literal["Nice", "Oslo"]) -> str:
    """The weather in a city now."""
    return f"sunny in {city}"


asked = [SystemMessage("Be brief."), HumanMessage([{"type": "text", "text": QUESTION}])]
scripted = ChatOpenAI(base_url=SCRIPTED, api_key="none", model=SCRIPTED_MODEL, stream_usage=True)
answer = scripted.invoke(asked)
assert answer.content == WIND
assert answer.usage_metadata["output_tokens"] == len(WIND)
chunks = [*scripted.stream(asked)]
assert "".join(chunk.content for chunk in chunks) == WIND
assert sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata) == len(WIND)
assert scripted.with_structured_output(City).invoke(asked) == City.model_validate_json(CITY)

caller = scripted.bind_tools([weather])
called = None
for chunk in caller.stream(asked):
    called = chunk if called is None else called + chunk
(call,) = called.tool_calls
assert (call["name"], call["args"]) == ("weather", {"city": "Nice"})
told = weather.invoke(call)
assert isinstance(told, ToolMessage)
assert caller.invoke([*asked, called, told]).content == SUNNY

real = ChatOpenAI(base_url=REAL, api_key="none", model=REAL_MODEL, temperature=0, max_tokens=60)
for method in ("json_schema", "function_calling"):
    assert real.with_structured_output(Choice, method=method).invoke(asked).city in ("Nice", "Oslo"), method
(call,) = real.bind_tools([weather], tool_choice="required", parallel_tool_calls=False).invoke(asked).tool_calls
assert weather.invoke(call).content.startswith("sunny in ")
assert len(real.batch(["One", "Two", "Three"])) == 3
assert OpenAI(base_url=REAL, api_key="none", model=REAL_MODEL, max_tokens=4, temperature=0).invoke("One, two,")
