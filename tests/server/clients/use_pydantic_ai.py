"""pydantic-ai: agents with a tool, streamed too, and output by tool and by schema."""

from __future__ import annotations

import asyncio
from typing import Literal

from common import CITY, QUESTION, REAL, REAL_MODEL, SCRIPTED, SCRIPTED_MODEL, SUNNY, WIND
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class City(BaseModel):
    name: str
    people: int


class Choice(BaseModel):
    """The city that is meant."""

    city: Literal["Nice", "Oslo"]


scripted = OpenAIChatModel(SCRIPTED_MODEL, provider=OpenAIProvider(base_url=SCRIPTED, api_key="none"))
real = OpenAIChatModel(REAL_MODEL, provider=OpenAIProvider(base_url=REAL, api_key="none"))
asked_for: list[str] = []


async def main() -> None:
    plain = Agent(scripted, instructions="Be brief.")
    answer = await plain.run(QUESTION)
    assert answer.output == WIND
    assert answer.usage.output_tokens == len(WIND)
    async with plain.run_stream(QUESTION) as stream:
        assert [text async for text in stream.stream_text(debounce_by=None)][-1] == WIND

    agent = Agent(scripted)

    @agent.tool_plain
    def weather(city: Literal["Nice", "Oslo"]) -> str:
        """The weather in a city now."""
        asked_for.append(city)
        return "sunny"

    assert (await agent.run(QUESTION)).output == SUNNY
    async with agent.run_stream(QUESTION) as stream:
        assert await stream.get_output() == SUNNY
    assert asked_for == ["Nice", "Nice"]

    assert (await Agent(scripted, output_type=NativeOutput(City)).run(QUESTION)).output == City.model_validate_json(
        CITY
    )
    settings = {"temperature": 0.0, "max_tokens": 80, "parallel_tool_calls": False}
    for output in (NativeOutput(Choice), ToolOutput(Choice)):
        made = Agent(real, output_type=output, retries=0, model_settings=settings)
        assert (await made.run(QUESTION)).output.city in ("Nice", "Oslo"), output
        async with made.run_stream(QUESTION) as stream:
            assert (await stream.get_output()).city in ("Nice", "Oslo"), output


asyncio.run(main())
