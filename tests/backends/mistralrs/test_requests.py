"""What each field of a request becomes for the wheel, or why it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import pytest

from tests.backends.mistralrs.conftest import Open
from tramontane.backends.mistralrs.backend import MistralRSBackend
from tramontane.backends.mistralrs.requests import RAW, wrapped
from tramontane.errors import ContextLengthExceeded, InvalidRequest
from tramontane.types import (
    AudioPart,
    Grammar,
    ImagePart,
    Message,
    NamedTool,
    Request,
    SamplingParams,
    TextPart,
    Tool,
    ToolCall,
)

TOOL = Tool("weather", "of a city", {"type": "object", "properties": {"city": {"type": "string"}}})
HELLO = (Message("user", "hello"),)


def sent(backend: MistralRSBackend, request: Request) -> dict[str, Any]:
    return dict(backend._planner.plan(request).arguments)


def sampled(backend: MistralRSBackend, **sampling: Any) -> dict[str, Any]:
    return sent(backend, Request(prompt="hi", sampling=SamplingParams(**sampling)))


@pytest.mark.parametrize(
    ("name", "value", "key", "wanted"),
    [
        ("temperature", 0, "temperature", 0.0),
        ("temperature", 0.5, "temperature", 0.5),
        ("top_k", 7, "top_k", 7),
        ("top_p", 0.5, "top_p", 0.5),
        ("min_p", 0.25, "min_p", 0.25),
        ("repetition_penalty", 1.5, "repetition_penalty", 1.5),
        ("presence_penalty", 0.5, "presence_penalty", 0.5),
        ("frequency_penalty", -0.5, "frequency_penalty", -0.5),
        ("logit_bias", {7: 2.0}, "logit_bias", {7: 2.0}),
        ("max_tokens", 9, "max_tokens", 9),
        ("ignore_eos", True, "ignore_eos", True),
        ("logprobs", 5, "top_logprobs", 5),
        ("logprobs", 0, "top_logprobs", 1),
        ("stop_token_ids", [259], "stop_seqs", ["<|end|>"]),
    ],
)
def test_sampling(opened: Open, name: str, value: Any, key: str, wanted: Any) -> None:
    assert sampled(opened()[0], **{name: value})[key] == wanted


def test_every_open_field_is_sent(opened: Open) -> None:
    """So that the wheel takes none from a configuration of its own."""
    arguments = sampled(opened()[0])
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0,
               "presence_penalty": 0.0, "frequency_penalty": 0.0, "ignore_eos": False}  # fmt: skip
    assert {name: arguments[name] for name in neutral} == neutral
    assert arguments["stream"]
    assert "seed" not in arguments


def test_dry(opened: Open) -> None:
    backend, _ = opened()
    arguments = sampled(backend, dry_multiplier=0.5, dry_base=2, dry_allowed_length=3, dry_sequence_breakers=["\n"])
    told = {name: value for name, value in arguments.items() if name.startswith("dry_")}
    assert told == {"dry_multiplier": 0.5, "dry_base": 2.0, "dry_allowed_length": 3, "dry_sequence_breakers": ["\n"]}
    assert sampled(backend, dry_multiplier=1)["dry_sequence_breakers"] == ["\n", ":", '"', "*"]
    assert "dry_multiplier" not in sampled(backend)
    with pytest.raises(InvalidRequest, match="dry_sequence_breakers"):
        sampled(backend, dry_multiplier=1, dry_sequence_breakers=[[1, 2]])


@pytest.mark.parametrize("name", ["seed", "prompt_logprobs", "min_tokens", "logits_processors", "skip_special_tokens"])
def test_fields_that_the_wheel_has_not(opened: Open, name: str) -> None:
    assert name not in opened()[0].capabilities().sampling_fields


@pytest.mark.parametrize("name", ["stop_token_ids", "logit_bias"])
def test_tokens_that_the_model_has_not(opened: Open, name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        sampled(opened()[0], **{name: {100_000: 1.0} if name == "logit_bias" else [100_000]})
    assert caught.value.field == name


@pytest.mark.parametrize(
    ("grammar", "kind", "text"),
    [
        (Grammar("regex", "a+"), "regex", "a+"),
        (Grammar("lark", 'start: "a"'), "lark", 'start: "a"'),
        (Grammar("choice", ('a"b', "é")), "lark", 'start: "a\\"b" | "é"'),
        (Grammar("json_object"), "json_schema", '{"type": "object"}'),
        (Grammar("json_schema", {"type": "integer"}), "json_schema", '{"type": "integer"}'),
        (Grammar("json_schema", True), "json_schema", "true"),
    ],
)
def test_grammars(opened: Open, grammar: Grammar, kind: str, text: str) -> None:
    arguments = sampled(opened()[0], grammar=grammar)
    assert (arguments["grammar_type"], arguments["grammar"]) == (kind, text)
    assert arguments["stop_seqs"] == ["<s>", "</s>", "<|start|>", "<|end|>"]  # the wheel ends a match with any of them


def test_prompts_are_passed_through(opened: Open) -> None:
    backend, wheel = opened()
    assert sent(backend, Request(prompt=" hi\n"))["messages"] == [{"role": RAW, "content": " hi\n"}]
    assert sent(backend, Request(prompt_ids=(256, 71, 72)))["messages"] == [{"role": RAW, "content": "<s>hi"}]
    with pytest.raises(InvalidRequest, match="prompt_ids"):
        sent(backend, Request(prompt_ids=(71, 72)))  # the wheel would begin the text with <s>
    with pytest.raises(InvalidRequest, match="no tokens"):
        opened()[0]._planner.__class__(**{**vars(backend._planner), "tokenize": lambda *_: []}).plan(Request(prompt=""))
    with pytest.raises(ContextLengthExceeded):
        sent(backend, Request(prompt="x" * 160))
    rendered = jinja2.Environment().from_string(wheel.template).render
    assert rendered(messages=[{"role": RAW, "content": " {{ x }}\n"}]) == " {{ x }}\n"
    text = rendered(messages=[{"role": "user", "content": "x"}], add_generation_prompt=True)
    assert text == backend.render((Message("user", "x"),))


def test_a_model_without_a_template() -> None:
    assert "raise_exception" in wrapped(None)


def test_conversations_are_rendered_here(opened: Open) -> None:
    backend, _ = opened()
    arguments = sent(backend, Request(messages=HELLO, tools=(TOOL,), thinking=True, reasoning_effort="high"))
    assert arguments["messages"] == [{"role": RAW, "content": backend.render(HELLO)}]
    (schema,) = map(json.loads, arguments["tool_schemas"])
    assert schema["function"] == {"name": "weather", "description": "of a city", "parameters": TOOL.parameters}
    assert arguments["tool_choice"] == "auto"
    assert (arguments["enable_thinking"], arguments["reasoning_effort"]) == (True, "high")


def test_templates_see_tools_calls_and_thinking(opened: Open) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{% for c in m.tool_calls or [] %}"
        "[{{ c.function.name }} {{ c.function.arguments.city }}]{% endfor %}{% endfor %}"
        "{% for t in tools or [] %}<{{ t.function.name }}>{% endfor %}{{ enable_thinking }}{{ reasoning_effort }}"
    )
    backend, _ = opened()
    backend = MistralRSBackend(Path(backend.capabilities().model), {}, chat_template=template)
    turns = (
        Message("user", (TextPart("a"), TextPart("b"))),
        Message("assistant", "", (ToolCall("1", "weather", '{"city": "Oslo"}'),)),
        Message("tool", "cold", tool_call_id="1"),
    )
    request = Request(messages=turns, tools=(TOOL,), thinking=False, reasoning_effort="off")
    text = sent(backend, request)["messages"][0]["content"]
    assert text == "user:abassistant:[weather Oslo]tool:cold<weather>Falseoff"
    unused = sent(backend, Request(messages=turns, tools=(TOOL,), tool_choice="none"))
    assert "tool_schemas" not in unused
    assert "<weather>" not in unused["messages"][0]["content"]
    backend.close()


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"tools": (TOOL,), "tool_choice": "required"}, "tool_choice"),
        ({"tools": (TOOL,), "tool_choice": NamedTool("weather")}, "tool_choice"),
        ({"tools": (TOOL,), "parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"tools": (Tool("x", strict=True),)}, "tools.strict"),
        ({"reasoning_effort": "enormous"}, "reasoning_effort"),
        ({"reasoning_effort": "off", "thinking": True}, "reasoning_effort"),
    ],
)
def test_what_the_wheel_cannot_be_asked(opened: Open, fields: dict[str, Any], name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        sent(opened()[0], Request(messages=HELLO, **fields))
    assert caught.value.field == name


def test_media(opened: Open, tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    parts = (
        TextPart("what?"),
        ImagePart(str(tmp_path / "a.png")),
        ImagePart("data:image/png;base64,AA"),
        AudioPart("https://example.com/a.wav"),
    )
    request = Request(messages=(Message("system", "look"), Message("user", parts)))
    with pytest.raises(InvalidRequest, match="neither images nor audio"):
        sent(opened()[0], request)
    backend, wheel = opened(kind="multimodal")
    marks = "{% for m in messages %}{% for p in m.content %}{{ p.text or '<' ~ p.type ~ '>' }}{% endfor %}|{% endfor %}"
    told = MistralRSBackend(Path(backend.capabilities().model), {"kind": "multimodal"}, chat_template=marks)
    plan = told._planner.plan(request)
    assert plan.prompt_ids is None  # the wheel alone knows how media become tokens
    first, whole = plan.arguments["messages"]
    assert (first, whole["role"]) == ({"role": RAW, "content": ""}, "user")
    assert [part["type"] for part in whole["content"]] == ["image_url", "image_url", "audio_url", "text"]
    assert whole["content"][-1]["text"] == "look|what?<image><image><audio>|"
    rendered = jinja2.Environment().from_string(wheel.template).render
    assert rendered(messages=[first, whole]) == rendered(messages=[first, {"content": whole["content"][-1]["text"]}])
    told.close()
    # A template without marks for media: the wheel puts its own, and renders.
    assert backend._planner.plan(request).arguments["messages"] == [
        {"role": "system", "content": "look"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "what?"},
                {"type": "image_url", "image_url": {"url": str(tmp_path / "a.png")}},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}},
                {"type": "audio_url", "audio_url": {"url": "https://example.com/a.wav"}},
            ],
        },
    ]
    for wrong in (ImagePart("nothing.png"), AudioPart("nothing.wav")):
        with pytest.raises(InvalidRequest, match="no file"):
            sent(backend, Request(messages=(Message("user", (wrong,)),)))
    with pytest.raises(InvalidRequest, match="template_kwargs"):
        sent(backend, Request(messages=request.messages, template_kwargs={"x": 1}))
