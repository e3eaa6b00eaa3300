"""Answers as the makers of models publish them, a few for each format, with what they say; written by hand.

Sources: Meta's pages on Llama 3.1, 3.2 and 4; Qwen's on function calling and Qwen3-Coder's template; mistral-common's
tests; DeepSeek's templates of V3, R1 and V3.1; Google's on FunctionGemma, Gemma 3 and Gemma 4; Microsoft's card of
Phi-4-mini; OpenAI's on harmony; IBM's on Granite; Liquid's on LFM2; Zhipu's template of GLM-4.5.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from tramontane.types import Tool

WEATHER = Tool(
    "get_weather",
    "The weather in a city.",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "units": {"type": "string", "enum": ["celsius", "fahrenheit"]},
        },
        "required": ["city"],
    },
)
ADD = Tool(
    "add",
    "Add numbers.",
    {
        "type": "object",
        "properties": {"numbers": {"type": "array", "items": {"type": "number"}}, "round": {"type": "boolean"}},
        "required": ["numbers"],
    },
)
TIME = Tool("get_time", "What time it is.")
TOOLS = (WEATHER, ADD, TIME)


class Sample(NamedTuple):
    """What a model wrote, and what it says."""

    format: str
    written: str
    calls: tuple[tuple[str, Any], ...] = ()
    text: str = ""
    reasoning: str = ""
    kind: str | None = None
    """Of reasoning, where the format has none of its own."""
    opened: bool = False
    """Whether the prompt began the reasoning."""


PARIS = ("get_weather", {"city": "Paris"})
ROME = ("get_weather", {"city": "Rome", "days": 3})
SUM = ("add", {"numbers": [1, 2.5], "round": True})
NOW = ("get_time", {})

_HERMES = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
_HERMES_SUM = '<tool_call>\n{"name": "add", "arguments": {"numbers": [1, 2.5], "round": true}}\n</tool_call>'
_V3 = '<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{"city": "Paris"}\n```<｜tool▁call▁end｜>'
_V3_SUM = (
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n"
    '```json\n{"numbers": [1, 2.5], "round": true}\n```<｜tool▁call▁end｜>'
)
_XML = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>\nRome\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
    "</function>\n</tool_call>"
)
_HARMONY_CALL = '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris"}'

SAMPLES = (
    Sample("hermes", _HERMES, (PARIS,)),
    Sample("hermes", f"I'll look.\n{_HERMES}", (PARIS,), "I'll look."),
    Sample("hermes", f"{_HERMES}\n{_HERMES_SUM}", (PARIS, SUM)),
    Sample("hermes", f"{_HERMES}\nDone, I think.", (PARIS,), "\nDone, I think."),
    Sample("hermes", '<tool_call>{"arguments": {"city": "Paris"}, "name": "get_weather"}</tool_call>', (PARIS,)),
    Sample("hermes", '<tool_call>\n{"name": "get_time"}\n</tool_call>', (NOW,)),
    Sample("hermes", '<tool_call>\n{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}', (PARIS,)),
    Sample("hermes", "No call: <tool_call>, as a word.", (), "No call: <tool_call>, as a word."),
    Sample("hermes", f"<tool_call>\n{{oops}}\n{_HERMES}", (PARIS,), "<tool_call>\n{oops}"),
    Sample("hermes", ' <tool_call>\n{"name": "get_wea', (), ' <tool_call>\n{"name": "get_wea'),
    Sample("hermes", f"<think>\nParis it is.\n</think>\n\n{_HERMES}", (PARIS,), "", "Paris it is.", "think"),
    Sample("hermes", f"Paris it is.\n</think>\n\nHm.\n{_HERMES}", (PARIS,), "Hm.", "Paris it is.", "think", True),
    Sample("hermes", "<think>\n\n</think>\n\nHello!", (), "Hello!", "", "think"),
    Sample("hermes", "Hello <think> there.", (), "Hello <think> there.", "", "think"),
    Sample("hermes", "<think>never done", (), "", "never done", "think"),
    Sample("hermes", '{"name": "get_weather", "arguments": {"city": "Paris"}}', (PARIS,)),
    Sample("hermes", '```json\n{\n  "name": "get_weather",\n  "arguments": {"city": "Paris"}\n}\n```', (PARIS,)),
    Sample("hermes", 'So:\n```json\n{"name": "Ada"}\n```', (), 'So:\n```json\n{"name": "Ada"}\n```'),
    Sample("hermes", '{"name": "Ada", "arguments": {}}', (), '{"name": "Ada", "arguments": {}}'),
    Sample("llama3", '{"name": "get_weather", "parameters": {"city": "Paris"}}', (PARIS,)),
    Sample("llama3", '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}', (PARIS,)),
    Sample(
        "llama3",
        '<|python_tag|>{"type": "function", "name": "get_weather", "parameters": {"city": "Paris"}}; '
        '{"name": "get_time", "parameters": {}}',
        (PARIS, NOW),
    ),
    Sample("llama3", '{"name": "Ada", "parameters": {"x": 1}}', (), '{"name": "Ada", "parameters": {"x": 1}}'),
    Sample("llama3", "Sure, {this} is text.", (), "Sure, {this} is text."),
    Sample("llama3", '<|python_tag|>brave_search.call(query="x")', (), '<|python_tag|>brave_search.call(query="x")'),
    Sample("qwen3_coder", _XML, (ROME,)),
    Sample("qwen3_coder", f"Let me see.\n\n{_XML}\n{_XML}", (ROME, ROME), "Let me see."),
    Sample(
        "qwen3_coder",
        "<tool_call>\n<function=add>\n<parameter=numbers>\n[1, 2.5]\n</parameter>\n<parameter=round>\nTrue\n"
        "</parameter>\n</function>\n</tool_call>",
        (SUM,),
    ),
    Sample(
        "qwen3_coder",
        '<tool_call>\n<function=get_weather>\n<parameter=city>\nif a < b:\n  say "x\\n"\n</parameter>\n'
        "</function>\n</tool_call>",
        (("get_weather", {"city": 'if a < b:\n  say "x\\n"'}),),
    ),
    Sample("qwen3_coder", "<tool_call>\n<function=get_time>\n</function>\n</tool_call>", (NOW,)),
    Sample("qwen3_coder", "In C, <function = x> is none.", (), "In C, <function = x> is none."),
    Sample(
        "glm",
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n<arg_key>days</arg_key>\n"
        "<arg_value>3</arg_value>\n</tool_call>",
        (ROME,),
    ),
    Sample("glm", "<tool_call>get_time\n</tool_call>", (NOW,)),
    Sample("mistral", '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}}]', (PARIS,)),
    Sample(
        "mistral",
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}, "id": "VvvODy9mT"}, '
        '{"name": "add", "arguments": {"numbers": [1, 2.5], "round": true}, "id": "0aPk8Qr2z"}]',
        (PARIS, SUM),
    ),
    Sample("mistral", "Wait. [TOOL_CALLS] none", (), "Wait. [TOOL_CALLS] none"),
    Sample("mistral_args", '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}', (PARIS,)),
    Sample(
        "mistral_args",
        'Let me see.[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]get_time[ARGS]{}',
        (PARIS, NOW),
        "Let me see.",
    ),
    Sample("mistral_args", '[TOOL_CALLS]get_weather{"city": "Paris"}', (PARIS,)),
    Sample(
        "mistral_args",
        '[THINK]Paris.[/THINK][TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}',
        (PARIS,),
        "",
        "Paris.",
        "mistral",
    ),
    Sample("mistral_ids", '[TOOL_CALLS]get_weather[CALL_ID]VvvODy9mT[ARGS]{"city": "Paris"}', (PARIS,)),
    Sample("deepseek", f"<｜tool▁calls▁begin｜>{_V3}<｜tool▁calls▁end｜>", (PARIS,)),
    Sample(
        "deepseek",
        f"One moment.<｜tool▁calls▁begin｜>{_V3}\n{_V3_SUM}<｜tool▁calls▁end｜>",
        (PARIS, SUM),
        "One moment.",
    ),
    Sample(
        "deepseek",
        f"Paris.\n</think>\n\n<｜tool▁calls▁begin｜>{_V3}<｜tool▁calls▁end｜>",
        (PARIS,),
        "",
        "Paris.",
        "think",
        True,
    ),
    Sample("deepseek", "<｜tool▁calls▁begin｜>what?", (), "<｜tool▁calls▁begin｜>what?"),
    Sample(
        "deepseek_v31",
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris"}<｜tool▁call▁end｜>'
        "<｜tool▁call▁begin｜>get_time<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        (PARIS, NOW),
    ),
    Sample("phi4", '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris"}}]<|/tool_call|>', (PARIS,)),
    Sample("phi4", '<|tool_call|>{"name": "get_time", "arguments": {}}<|/tool_call|>', (NOW,)),
    Sample(
        "phi4",
        'functools[{"name": "get_weather", "arguments": {"city": "Paris"}}, {"name": "get_time", "arguments": {}}]',
        (PARIS, NOW),
    ),
    Sample("granite", '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris"}}]', (PARIS,)),
    Sample(
        "granite",
        'Here is my thought process: Paris. Here is my response: <|tool_call|>[{"name": "get_time", "arguments": {}}]',
        (NOW,),
        "",
        "Paris.",
        "granite",
    ),
    Sample(
        "functiongemma",
        "<start_function_call>call:get_weather{city:<escape>Rome<escape>,days:3}<end_function_call>",
        (ROME,),
    ),
    Sample(
        "functiongemma",
        "<start_function_call>call:add{numbers:[1,2.5],round:true}<end_function_call>"
        "<start_function_call>call:get_time{}<end_function_call>",
        (SUM, NOW),
    ),
    Sample("gemma4", '<|tool_call>call:get_weather{city:<|"|>Rome<|"|>,days:3}<tool_call|>', (ROME,)),
    Sample(
        "gemma4",
        "<|channel>thought\nRome.<channel|>Looking."
        '<|tool_call>call:get_weather{city:<|"|>a, {b}: "c"<|"|>}<tool_call|>',
        (("get_weather", {"city": 'a, {b}: "c"'}),),
        "Looking.",
        "Rome.",
        "gemma",
    ),
    Sample(
        "gemma4",
        '<|tool_call>call:add{numbers:[1,2.5],deep:{a:[<|"|>x<|"|>,{}],b:null}}<tool_call|>',
        (("add", {"numbers": [1, 2.5], "deep": {"a": ["x", {}], "b": None}}),),
    ),
    Sample("gemma4", "<|tool_call>call me{", (), "<|tool_call>call me{"),
    Sample("pythonic", "[get_weather(city='Rome', days=3)]", (ROME,)),
    Sample("pythonic", "[add(numbers=[1, 2.5], round=True), get_time()]", (SUM, NOW)),
    Sample("pythonic", '```tool_code\n[get_weather(city="Paris")]\n```', (PARIS,)),
    Sample(
        "pythonic",
        "[get_weather(city='it\\'s \"x\", (y)', extra={'a': (1, None), 'b': [False]})]",
        (("get_weather", {"city": 'it\'s "x", (y)', "extra": {"a": [1, None], "b": [False]}}),),
    ),
    Sample("pythonic", "[1, 2] is a list; [f(x=1)] too.", (), "[1, 2] is a list; [f(x=1)] too."),
    Sample("llama4", "<|python_start|>[get_weather(city='Rome', days=3)]<|python_end|>", (ROME,)),
    Sample(
        "lfm2",
        '<|tool_call_start|>[get_weather(city="Paris")]<|tool_call_end|>Checking now.',
        (PARIS,),
        "Checking now.",
    ),
    Sample(
        "harmony",
        f"<|channel|>analysis<|message|>Need the weather.<|end|><|start|>assistant{_HARMONY_CALL}<|call|>",
        (PARIS,),
        "",
        "Need the weather.",
    ),
    Sample(
        "harmony",
        "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant<|channel|>final<|message|>Four.<|return|>",
        (),
        "Four.",
        "Easy.",
    ),
    Sample(
        "harmony",
        "<|channel|>commentary<|message|>I will look it up.<|end|><|start|>assistant to=functions.get_time"
        "<|channel|>commentary <|constrain|>json<|message|>{}",
        (NOW,),
        "I will look it up.",
    ),
    Sample("harmony", "Four.", (), "Four."),
    Sample(
        "harmony",
        "<|channel|>analysis<|message|>A<|end|><|start|>assistant<|channel|>analysis<|message|>B",
        (),
        "",
        "A\n\nB",
    ),
    Sample("harmony", "<|channel|>final", (), "<|channel|>final"),
)


def same(given: str, wanted: Any) -> bool:
    """Whether a text is the JSON of a value, types and all."""
    return json.dumps(json.loads(given), sort_keys=True) == json.dumps(wanted, sort_keys=True)
