"""Dialect: which format a template shows, what a conversation becomes, what a template cannot do."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.text.samples import reference
from tests.text.toolcalls.samples import TOOLS, WEATHER
from tramontane.errors import InvalidRequest, TemplateError
from tramontane.text.conversation import reasoning_variables
from tramontane.text.dialect import Dialect
from tramontane.text.template import ChatTemplate
from tramontane.text.tokenizer import Tokenizer
from tramontane.types import Message, Request, Tool, ToolCall

TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
CALLS = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.id }}={{ c.function | tojson }}{% endfor %}{% endfor %}"
)
STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}<start_of_turn>"
)


def dialect(source: str, **options: Any) -> Dialect:
    return Dialect(ChatTemplate(source), _TOKENIZER, **options)


_TOKENIZER = Tokenizer(reference(), source="samples", bos_id=None, eos_ids=())
CONVERSATION = (
    Message("system", "Be brief."),
    Message("user", "Weather?"),
    Message("assistant", "", (ToolCall("call_1", "get_weather", '{"city": "Paris"}'),), reasoning="Hm."),
    Message("tool", "sunny", tool_call_id="call_1"),
)


@pytest.mark.parametrize(
    ("shown", "name"),
    [
        ("<tool_call>", "hermes"),
        ("<tool_call><function=x>", "qwen3_coder"),
        ("<tool_call><arg_key>", "glm"),
        ("[TOOL_CALLS]", "mistral"),
        ("[TOOL_CALLS][ARGS]", "mistral_args"),
        ("[TOOL_CALLS][CALL_ID][ARGS]", "mistral_ids"),
        ("<｜tool▁calls▁begin｜>", "deepseek_v31"),
        ("<｜tool▁calls▁begin｜>```json", "deepseek"),
        ("<|tool_call|><|/tool_call|>", "phi4"),
        ("<|tool_call|>", "granite"),
        ("<|tool_call>", "gemma4"),
        ("<start_function_call>", "functiongemma"),
        ("<|channel|><|message|>", "harmony"),
        ("<|tool_call_start|>", "lfm2"),
        ('<|start_header_id|>"parameters": ', "llama3"),
        ("nothing known", "hermes"),
    ],
)
def test_the_template_shows_the_format(shown: str, name: str) -> None:
    assert dialect(CALLS + shown).format_name == name
    assert dialect(CALLS + shown, tool_format="pythonic").format_name == "pythonic"


def test_tools_and_calls_reach_a_template_as_it_wants_them() -> None:
    said = dialect(CALLS + "<tool_call>").speak(Request(messages=CONVERSATION, tools=(WEATHER,)))
    tool = {"type": "function", "function": {"name": "get_weather", "description": WEATHER.description,
                                             "parameters": WEATHER.parameters}}  # fmt: skip
    assert said.prompt.startswith(json.dumps(tool))
    assert 'call_1={"name": "get_weather", "arguments": {"city": "Paris"}}<tool>sunny' in said.prompt
    text = CALLS.replace("c.function | tojson", "c.function.name + c.function.arguments")
    assert 'get_weather{"city": "Paris"}' in dialect(text + "<tool_call>").render(CONVERSATION)
    none = CALLS.replace("{{ m.content }}", "{{ m.content if m.content is not none }}").replace(
        "{% for c in m.tool_calls or [] %}", "{% for c in (m.tool_calls if m.content is none else []) or [] %}"
    )
    assert '<assistant>call_1={"name"' in dialect(none + "<tool_call>").render(CONVERSATION)


def test_mistral_gets_ids_of_nine_characters() -> None:
    strict = CALLS.replace("{{ c.id }}", "{{ c.id if c.id | length == 9 else raise_exception('nine!') }}")
    prompt = dialect(strict + "[TOOL_CALLS]").render(CONVERSATION)
    assert "nine" not in prompt
    kept = (*CONVERSATION[:2], Message("assistant", "", (ToolCall("abcABC123", "f", "{}"),)))
    assert "abcABC123=" in dialect(strict + "[TOOL_CALLS]").render(kept)


def test_what_a_template_does_not_show_is_told_in_words() -> None:
    speaking = dialect(TURNS)
    prompt = speaking.speak(Request(messages=CONVERSATION, tools=TOOLS)).prompt
    assert prompt.startswith("<system>Be brief.\n\n")
    assert '"name": "get_weather"' in prompt
    assert '<assistant><tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>' in prompt
    assert "<user><tool_response>\nsunny\n</tool_response></user>" in prompt
    plain = (Message("user", "a"), Message("user", "b"))
    assert speaking.render(plain) == "<user>a</user><user>b</user>"  # what needs no telling stays as it is


def test_templates_that_want_turns_to_alternate_get_that() -> None:
    turns = (*CONVERSATION[1:], Message("tool", "windy", tool_call_id="call_1"), Message("user", "So?"))
    prompt = dialect(STRICT).speak(Request(messages=turns, tools=TOOLS)).prompt
    assert prompt.startswith("<user>You have access to these functions:\n")
    assert "\n\nWeather?<assistant>[get_weather(city='Paris')]" in prompt
    assert "sunny\n</tool_response>\n<tool_response>\nwindy\n</tool_response>\nSo?" in prompt


def test_templates_that_show_calls_and_no_tools_are_helped_in_their_own_form() -> None:
    source = TURNS.replace(
        "</{{ m.role }}>",
        "{% for c in m.tool_calls or [] %}<｜tool▁calls▁begin｜>{{ c.function.name }}\n```json\n"
        "{{ c.function.arguments | tojson }}{% endfor %}",
    )
    speaking = dialect(source)
    assert speaking.format_name == "deepseek"
    prompt = speaking.speak(Request(messages=CONVERSATION, tools=TOOLS)).prompt
    assert "<tool>sunny" in prompt
    assert prompt.count("<｜tool▁calls▁begin｜>") == 2  # in the words, and in the conversation


def test_a_form_that_words_cannot_ask_for_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="'mistral' cannot be asked for in words"):
        dialect(TURNS, tool_format="mistral").speak(Request(messages=CONVERSATION, tools=TOOLS))


@pytest.mark.parametrize("source", [CALLS + "<tool_call>", TURNS])
def test_schemas_that_are_no_data_are_refused(source: str) -> None:
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"items": deep}
    for parameters in ({"x": object()}, deep):
        tool = Tool("f", "", parameters, strict=True)
        with pytest.raises(InvalidRequest, match=r"tools|nested"):
            dialect(source).speak(Request(messages=CONVERSATION, tools=(tool,)))
    odd = Tool("f", "", {"required": 5, "properties": {"x": True}}, strict=True)
    assert dialect(source, tool_format="pythonic").speak(Request(messages=CONVERSATION, tools=(odd,))).grammar


def test_the_templates_own_refusals_are_told() -> None:
    with pytest.raises(TemplateError, match="alternate"):
        dialect(STRICT).render([Message("user", "a"), Message("user", "b")])


def test_developers_are_the_system_where_a_template_knows_none() -> None:
    turns = (Message("developer", "Be kind."), Message("user", "Hi"))
    assert dialect(TURNS).render(turns) == "<system>Be kind.</system><user>Hi</user>"
    assert dialect(TURNS + "{# developer #}").render(turns).startswith("<developer>")


def test_a_fields_variable_is_given_once() -> None:
    source = CALLS + "<tool_call>{{ enable_thinking }}"
    asked = {"messages": CONVERSATION, "tools": TOOLS, "thinking": True}
    assert dialect(source).speak(Request(**asked)).prompt.endswith("True")
    for kwargs in ({"enable_thinking": True}, {"tools": []}):
        with pytest.raises(InvalidRequest, match="template_kwargs"):
            dialect(source).speak(Request(**asked, template_kwargs=kwargs))


def never() -> bool:
    return False


@pytest.mark.parametrize(
    ("source", "thinking", "effort", "wanted"),
    [
        ("{{ enable_thinking }}", True, None, {"enable_thinking": True}),
        ("{% if enable_thinking is defined and enable_thinking is false %}x{% endif %}", False, None,
         {"enable_thinking": False}),
        ("{% if not enable_thinking is defined %}{% set enable_thinking = true %}{% endif %}{{ enable_thinking }}",
         False, None, {"enable_thinking": False}),
        ("{% if thinking %}x{% endif %}", True, None, {"thinking": True}),
        ("{{ reasoning_effort or 'medium' }}", None, "high", {"reasoning_effort": "high"}),
        ("{{ enable_thinking }}", None, "none", {"enable_thinking": False}),
        ("{{ enable_thinking }}{{ reasoning_effort }}", True, "low",
         {"enable_thinking": True, "reasoning_effort": "low"}),
        ("{{ x }}", None, None, {}),
    ],
)  # fmt: skip
def test_switches_of_reasoning_by_the_names_that_templates_read(
    source: str, thinking: bool | None, effort: str | None, wanted: dict[str, Any]
) -> None:
    assert reasoning_variables(ChatTemplate(source).variables, thinking, effort, always=never) == wanted


@pytest.mark.parametrize(("thinking", "effort"), [(True, None), (False, None), (None, "low"), (None, "none")])
def test_switches_that_a_template_lacks_are_refused(thinking: bool | None, effort: str | None) -> None:
    with pytest.raises(InvalidRequest, match=r"cannot switch reasoning|no effort"):
        reasoning_variables(frozenset({"messages"}), thinking, effort, always=never)


def test_a_model_that_always_reasons_may_be_told_to() -> None:
    source = TURNS + "{{ '</think>' if false }}<think>\n"
    assert dialect(source).speak(Request(messages=CONVERSATION, thinking=True)).parser is not None
    with pytest.raises(InvalidRequest, match="cannot turn reasoning off"):
        dialect(source).speak(Request(messages=CONVERSATION, thinking=False))


def test_reasoning_can_be_named_or_none() -> None:
    source = TURNS + "{{ '</think>' if false }}"
    assert dialect(source).speak(Request(messages=CONVERSATION)).parser is not None
    assert dialect(source, reasoning_format="none").speak(Request(messages=CONVERSATION)).parser is None
    assert dialect(TURNS, reasoning_format="mistral").reasoning is not None
