"""Qwen2.5-Coder, twenty tasks with two tools each, streamed all at once: freely, made to call, and made to call one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import model_path
from tramontane import AsyncLLM, NamedTool, Tool
from tramontane.gather import joined_calls
from tramontane.types import ToolCall, ToolChoice

pytestmark = pytest.mark.slow

TEXT, WHOLE, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}


def tool(name: str, description: str, strict: bool = False, **properties: Any) -> Tool:
    schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    return Tool(name, description, schema, strict)


UNITS = {"type": "string", "enum": ["celsius", "fahrenheit"]}
WEATHER = tool("get_weather", "The weather in a city now.", city=TEXT, units=UNITS)
MONEY = tool("convert_currency", "Convert money to another currency.", amount=NUMBER, source=TEXT, target=TEXT)
MAIL = tool("send_email", "Send an email.", to=TEXT, subject=TEXT, body=TEXT)
TIMER = tool("set_timer", "Set a timer.", minutes=WHOLE, label=TEXT)
FILES = tool("search_files", "Find files by a pattern.", pattern=TEXT, folder=TEXT)
RUN = tool("run_query", "Run an SQL query.", strict=True, query=TEXT, limit=WHOLE)

TASKS: tuple[tuple[str, Tool, Tool], ...] = (
    ("What is the weather in Paris, in celsius?", WEATHER, MONEY),
    ("How warm is it in Boston, in fahrenheit?", WEATHER, MONEY),
    ("Is it raining in Oslo? Use celsius.", WEATHER, TIMER),
    ("Weather in São Paulo please, celsius.", WEATHER, FILES),
    ("Convert 100 US dollars to euros.", MONEY, WEATHER),
    ("How much is 2500 yen in pounds?", MONEY, MAIL),
    ("Change 19.99 euros into Swiss francs.", MONEY, TIMER),
    ("What are 3 million rupees in dollars?", MONEY, RUN),
    ("Email ada@example.com with the subject Lunch: are you free at noon?", MAIL, TIMER),
    ('Write to bob@example.com, subject "Report", that the report is late.', MAIL, MONEY),
    ('Send team@example.com a mail titled Party: we start at eight, "bring cake".', MAIL, FILES),
    ("Tell eve@example.com by email, subject Keys, that the keys are under the mat.", MAIL, WEATHER),
    ("Set a timer of 10 minutes for the pasta.", TIMER, MAIL),
    ("Remind me in 25 minutes with a timer labelled tea.", TIMER, WEATHER),
    ("Start a 90 minute timer called exam.", TIMER, MONEY),
    ("Find all *.py files in the folder src.", FILES, RUN),
    ("Which files in /var/log match error*.log?", FILES, MAIL),
    ("Search C:\\Users for report-*.pdf.", FILES, TIMER),
    ("Select every row of the table users, at most 5.", RUN, FILES),
    ("Query the names of customers in Berlin, at most 10 rows.", RUN, WEATHER),
)


@pytest.fixture(scope="module")
def llm() -> Iterator[AsyncLLM]:
    path = model_path("qwen2.5-coder-1.5b-instruct-q4_k_m.gguf")
    opened = AsyncLLM(path, context_length=1024, temperature=0.0, max_tokens=300)
    yield opened
    opened.close()


async def ask(llm: AsyncLLM, task: str, tools: tuple[Tool, ...], choice: ToolChoice) -> tuple[list[ToolCall], str, Any]:
    deltas, text, reason = [], "", None
    fields: dict[str, Any] = {"tools": tools, "tool_choice": choice}
    if choice == "required":  # which a model this small may take for an invitation to call all there is, on and on
        fields["parallel_tool_calls"] = False
    async for chunk in llm.stream([{"role": "user", "content": task}], **fields):
        deltas += chunk.tool_calls
        text += chunk.text
        reason = chunk.finish_reason
    return [*joined_calls(deltas)], text, reason


def all_tasks(llm: AsyncLLM, choices: list[ToolChoice]) -> list[tuple[list[ToolCall], str, Any]]:
    async def main() -> list[Any]:
        asked = zip(TASKS, choices, strict=True)
        return await asyncio.gather(*(ask(llm, task, tools, choice) for (task, *tools), choice in asked))  # type: ignore[arg-type]

    return asyncio.run(main())


def valid(call: ToolCall, tools: tuple[Tool, ...]) -> bool:
    """Whether the arguments are an object of the tool's schema."""
    (schema,) = (tool.parameters or {} for tool in tools if tool.name == call.name)
    arguments = json.loads(call.arguments)
    kinds: dict[str, Any] = {"string": str, "integer": int, "number": (int, float)}
    return set(arguments) == set(schema["properties"]) and all(
        isinstance(arguments[name], kinds[of["type"]]) and arguments[name] in of.get("enum", [arguments[name]])
        for name, of in schema["properties"].items()
    )


def test_free_to_call(llm: AsyncLLM) -> None:
    right = 0
    for (task, *tools), (calls, text, reason) in zip(TASKS, all_tasks(llm, ["auto"] * 20), strict=True):
        for call in calls:
            assert isinstance(json.loads(call.arguments), dict), (task, call)
        assert reason == ("tool_calls" if calls else "stop"), (task, text)
        right += [call.name for call in calls] == [tools[0].name]
    assert right >= 15


def test_made_to_call(llm: AsyncLLM) -> None:
    right = 0
    for (task, *tools), (calls, text, reason) in zip(TASKS, all_tasks(llm, ["required"] * 20), strict=True):
        assert len(calls) == 1, (task, text)
        assert text == ""
        assert reason == "tool_calls"
        assert all(valid(call, tuple(tools)) for call in calls), (task, calls)
        right += calls[0].name == tools[0].name
    assert right >= 15


def test_made_to_call_one(llm: AsyncLLM) -> None:
    choices: list[ToolChoice] = [NamedTool(other.name) for _, _, other in TASKS]  # not the one that would fit
    cut = 0
    for (task, *tools), (calls, _, reason) in zip(TASKS, all_tasks(llm, choices), strict=True):
        assert [call.name for call in calls] == [tools[1].name], task
        assert reason in ("tool_calls", "length")
        cut += reason == "length"  # a letter whose end a model this small may not find
        assert reason == "length" or valid(calls[0], tuple(tools)), (task, calls)
    assert cut <= 2
