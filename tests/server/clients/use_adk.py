"""google-adk: its OpenAILlm by itself, and under an agent with a tool."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from common import CITY, PARAMETERS, QUESTION, REAL, REAL_MODEL, SCRIPTED, SCRIPTED_MODEL, SUNNY, WIND
from google.adk.agents import LlmAgent
from google.adk.agents.run_config import RunConfig, StreamingMode
from google.adk.integrations.openai import OpenAILlm
from google.adk.models.llm_request import LlmRequest
from google.adk.runners import InMemoryRunner
from google.genai import types
from pydantic import BaseModel

asked_for: list[str] = []


class City(BaseModel):
    name: str
    people: int


class Choice(BaseModel):
    city: Literal["Nice", "Oslo"]


def weather(city: str) -> dict[str, str]:
    """The weather in a city now."""
    asked_for.append(city)
    return {"weather": "sunny"}


def user(text: str) -> types.Content:
    return types.Content(role="user", parts=[types.Part.from_text(text=text)])


async def ask(llm: OpenAILlm, stream: bool = False, **config: Any) -> list[Any]:
    request = LlmRequest(contents=[user(QUESTION)], config=types.GenerateContentConfig(**config))
    return [answer async for answer in llm.generate_content_async(request, stream=stream)]


async def run(agent: LlmAgent, mode: StreamingMode) -> str:
    """What the agent says in the end."""
    runner = InMemoryRunner(agent=agent, app_name="test")
    session = await runner.session_service.create_session(app_name="test", user_id="u")
    said = ""
    asked = {"user_id": "u", "session_id": session.id, "new_message": user(QUESTION)}
    async for event in runner.run_async(**asked, run_config=RunConfig(streaming_mode=mode)):
        assert event.error_code is None, event
        if event.is_final_response() and event.content:
            said = "".join(part.text or "" for part in event.content.parts)
    return said


async def main() -> None:
    scripted = OpenAILlm(model=SCRIPTED_MODEL, base_url=SCRIPTED, api_key="none")
    (answer,) = await ask(scripted, system_instruction="Be brief.")
    assert answer.content.parts[0].text == WIND
    assert answer.usage_metadata.candidates_token_count == len(WIND)
    *parts, whole = await ask(scripted, stream=True)
    assert "".join(part.content.parts[0].text for part in parts) == whole.content.parts[0].text == WIND
    (answer,) = await ask(scripted, response_schema=City)
    assert City.model_validate_json(answer.content.parts[0].text) == City.model_validate_json(CITY)
    for mode in (StreamingMode.NONE, StreamingMode.SSE):
        assert await run(LlmAgent(name="one", model=scripted, tools=[weather]), mode) == SUNNY
    assert asked_for == ["Nice", "Nice"]

    real = OpenAILlm(model=REAL_MODEL, base_url=REAL, api_key="none", max_tokens=60)
    (answer,) = await ask(real, response_schema=Choice, temperature=0.0)
    assert Choice.model_validate_json(answer.content.parts[0].text)
    declared = types.FunctionDeclaration(
        name="weather", description="The weather in a city now.", parameters_json_schema=PARAMETERS
    )
    must = types.ToolConfig(function_calling_config=types.FunctionCallingConfig(mode="ANY"))
    (answer,) = await ask(real, tools=[types.Tool(function_declarations=[declared])], tool_config=must, temperature=0.0)
    call = answer.content.parts[0].function_call
    assert (call.name, call.args["city"] in ("Nice", "Oslo")) == ("weather", True)


asyncio.run(main())
