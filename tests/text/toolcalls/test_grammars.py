"""Grammars of calls, held against llguidance: what models are published to write is allowed, and nothing else is."""

from __future__ import annotations

import json
import random
from functools import cache
from typing import Any

import pytest

from tests.text.samples import reference
from tests.text.toolcalls.samples import ADD, TIME, TOOLS, WEATHER
from tests.text.toolcalls.test_parsers import Said
from tramontane.text.dialect import Dialect
from tramontane.text.template import ChatTemplate
from tramontane.text.tokenizer import Tokenizer
from tramontane.text.toolcalls.formats import FORMATS
from tramontane.types import Grammar, Message, NamedTool, Request, SamplingParams, Tool

llguidance = pytest.importorskip("llguidance", reason="it is what the grammars are written for")

TEMPLATE = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{% endfor %}"
)
EOS = "<|endoftext|>"
THINK = "{{ '</think>' if false }}{% if enable_thinking %}<think>{% endif %}"


@cache
def tokenizer(*special: str) -> Tokenizer:
    """Of bytes and few words, with marks that are special tokens."""
    inner = type(reference()).from_str(reference().to_str())
    inner.add_special_tokens([*special])
    return Tokenizer(inner, source="samples", bos_id=None, eos_ids=())


class Held:
    """An answer that a grammar holds."""

    def __init__(self, grammar: Grammar, tokens: Tokenizer) -> None:
        self.tokens = tokens
        inner = tokens._inner
        self.matcher = llguidance.LLMatcher(
            llguidance.LLTokenizer(inner.to_str(), eos_token=inner.token_to_id(EOS)),
            llguidance.LLMatcher.grammar_from_lark(grammar.value),
        )
        assert not self.matcher.is_error(), self.matcher.get_error()

    def takes(self, text: str) -> bool:
        """Whether an answer may be this text, from beginning to end."""
        self.matcher.reset()
        ids = self.tokens.encode(text, add_special_tokens=False)
        return all(self.matcher.consume_token(id_) for id_ in ids) and bool(self.matcher.is_accepting())

    def walk(self, rng: random.Random, longest: int = 300) -> str | None:
        """An answer drawn from all that is allowed; None if it does not end."""
        self.matcher.reset()
        ids: list[int] = []
        for _ in range(longest):
            if self.matcher.is_stopped():
                break
            allowed = mask(self.matcher.compute_bitmask())
            assert allowed
            end = self.tokens.token_to_id(EOS)
            id_ = end if end in allowed and rng.random() < 0.3 else rng.choice(allowed)
            if id_ == end:
                break
            assert self.matcher.consume_token(id_)
            ids.append(id_)
        else:
            return None
        return self.tokens.decode(ids, skip_special_tokens=False)


def mask(bits: bytes) -> list[int]:
    return [at * 8 + bit for at, byte in enumerate(bits) for bit in range(8) if byte >> bit & 1]


def held(format_: str, *, special: bool = True, thinking: bool | None = None, **fields: Any) -> tuple[Held, Any]:
    """The grammar of a request, and the parser of its answer."""
    tokens = tokenizer(*(FORMATS[format_].marks if special else ()))
    source = TEMPLATE + (THINK if thinking is not None else "")
    dialect = Dialect(ChatTemplate(source), tokens, tool_format=format_)
    request = Request(messages=(Message("user", "Hi"),), **{"tools": TOOLS, "thinking": thinking, **fields})
    said = dialect.speak(request)
    assert said.grammar is not None
    assert said.parser is not None
    return Held(said.grammar, tokens), said.parser


WRITTEN = {
    "hermes": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>',
    "llama3": '{"name": "get_weather", "parameters": {"city": "Paris"}}',
    "llama4": '[get_weather(city="Paris", days=2)]',
    "pythonic": '[get_weather(city="Paris", units="celsius")]',
    "mistral": '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}}]',
    "mistral_args": '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}',
    "mistral_ids": '[TOOL_CALLS]get_weather[CALL_ID]abc123XYZ[ARGS]{"city": "Paris"}',
    "deepseek": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n"
    '```json\n{"city": "Paris"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    "deepseek_v31": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
    '{"city": "Paris"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    "phi4": '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris"}}]<|/tool_call|>',
    "granite": '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris"}}]',
    "gemma4": '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:2}<tool_call|>',
    "functiongemma": "<start_function_call>call:get_weather{city:<escape>Paris<escape>,units:<escape>celsius<escape>}"
    "<end_function_call>",
    "lfm2": '<|tool_call_start|>[get_weather(city="Paris")]<|tool_call_end|>',
    "qwen3_coder": "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n2\n"
    "</parameter>\n</function>\n</tool_call>",
    "glm": "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>",
    "harmony": "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris"}<|call|>',
}


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_a_required_call_is_one_in_the_models_own_form(name: str, special: bool) -> None:
    by, parser = held(name, special=special, tool_choice="required")
    assert by.takes(WRITTEN[name])
    assert not by.takes("I would rather not.")
    assert not by.takes(WRITTEN[name].replace("get_weather", "get_nothing"))
    said = parse(WRITTEN[name], parser)
    assert [(call.name, json.loads(call.arguments)["city"]) for call in said.calls] == [("get_weather", "Paris")]
    only, _ = held(name, special=special, tool_choice=NamedTool("add"))
    assert not only.takes(WRITTEN[name])


def parse(text: str, parser: Any) -> Said:
    by, said = parser(), Said()
    for char in text:
        piece = by.push(char)
        said.add(piece.text, piece.reasoning, piece.calls)
    piece = by.push("", ended=True)
    said.add(piece.text, piece.reasoning, piece.calls)
    return said


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_whatever_a_grammar_allows_is_calls_that_parse(name: str, special: bool) -> None:
    rng = random.Random(7)
    small = Tool("pick", "", {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "on": {"type": "boolean"},
                       "of": {"type": "string", "enum": ["a b", "c"]}},
        "required": ["of"], "additionalProperties": False,
    }, strict=True)  # fmt: skip
    by, parser = held(name, special=special, tools=(small, TIME), tool_choice="required", parallel_tool_calls=False)
    ended = 0
    for _ in range(12):
        text = by.walk(rng)
        if text is None:
            continue
        ended += 1
        said = parse(text, parser)
        assert len(said.calls) == 1, text
        found = json.loads(said.calls[0].arguments)
        if said.calls[0].name == "pick":
            assert found["of"] in ("a b", "c")
            assert set(found) <= {"n", "on", "of"}
            assert isinstance(found.get("on", True), bool)
            assert 0 <= found.get("n", 0) <= 99
        else:
            assert found == {}
    assert ended > 3


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_strict_tools_leave_words_free_and_hold_calls(name: str, special: bool) -> None:
    strict = Tool(WEATHER.name, "", {**(WEATHER.parameters or {}), "additionalProperties": False}, strict=True)
    by, _ = held(name, special=special, tools=(strict, ADD))
    if name == "harmony":
        assert by.takes("<|channel|>final<|message|>Four.")
        assert by.takes("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Four.")
    else:
        assert by.takes("It is 4 < 5, <b>.")
    assert by.takes(WRITTEN[name])
    assert not by.takes(WRITTEN[name].replace("city", "town"))


def test_several_calls_or_one() -> None:
    two = f"{WRITTEN['hermes']}\n{WRITTEN['hermes']}"
    assert held("hermes", tool_choice="required")[0].takes(two)
    assert not held("hermes", tool_choice="required", parallel_tool_calls=False)[0].takes(two)
    mistral = f"{WRITTEN['mistral'][:-1]}, {WRITTEN['mistral'][len('[TOOL_CALLS][') :]}"
    assert held("mistral", tool_choice="required")[0].takes(mistral)


def test_reasoning_comes_before_what_is_held() -> None:
    call = WRITTEN["hermes"]
    opened, _ = held("hermes", tool_choice="required", thinking=True)
    assert opened.takes(f"Hm. <b>\n</think>\n\n{call}")
    assert not opened.takes(call)
    free, _ = held("hermes", tool_choice="required", thinking=False)
    assert free.takes(f"<think>\nHm.\n</think>\n\n{call}")
    assert free.takes(call)


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (Grammar("json_object"), '{"a": [1]}', "no"),
        (Grammar("json_schema", {"type": "integer"}), "12", '"12"'),
        (Grammar("regex", "a/?b+"), "a/bb", "ba"),
        (Grammar("choice", ("yes", "no")), "no", "maybe"),
        (Grammar("lark", 'start: word "!"\nword: /[a-z]+/'), "hey!", "Hey"),
    ],
)
def test_the_requests_own_grammar_holds_the_answer_after_reasoning_or_instead_of_calls(
    grammar: Grammar, good: str, bad: str
) -> None:
    params = SamplingParams(grammar=grammar)
    thinking, _ = held("hermes", tools=(), thinking=True, sampling=params)
    assert thinking.takes(f"Hm.</think>{good}")
    assert not thinking.takes(f"Hm.</think>{bad}")
    either, _ = held("hermes", sampling=params)
    assert either.takes(good)
    assert either.takes(WRITTEN["hermes"])
    assert not either.takes(bad)
    channels, _ = held("harmony", tools=(), sampling=params)
    assert channels.takes(
        f"<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>{good}"
    )
    assert not channels.takes(f"<|channel|>final<|message|>{bad}")


def test_words_that_no_schema_can_hold_are_passed_over_unless_strict() -> None:
    odd = Tool("f", "", {"type": "object", "properties": {"x": {"type": "string", "contentMediaType": "text/html",
                                                                  "not": {"const": "y"}}}})  # fmt: skip
    by, _ = held("hermes", tools=(odd,), tool_choice="required")
    assert by.takes('<tool_call>\n{"name": "f", "arguments": {"x": "z"}}\n</tool_call>')
