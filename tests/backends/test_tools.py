"""Calls and reasoning on the native backend: a tiny model whose answers are forced, from tokens to chunks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.backends.test_native import CONFIG, chunks, forced, spelled
from tests.engine import checkpoints
from tests.engine.checkpoints import START
from tramontane import gather
from tramontane.backends.mailbox import coalesce
from tramontane.backends.native import NativeBackend
from tramontane.errors import InvalidRequest
from tramontane.types import Choice, Message, NamedTool, Request, SamplingParams, Tool, ToolCall

TEMPLATE = (
    "{% for t in tools or [] %}{{ t.function.name }} by <tool_call>{% endfor %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}; "
    "{% endfor %}"
    "{% if enable_thinking is defined %}{{ '<think>' if enable_thinking else '<think></think>' }}{% endif %}"
)
MISTRAL = (
    "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}[TOOL_CALLS]" + TEMPLATE.split("{% endfor %}", 1)[1]
)
TOOLS = (Tool("f", "", {"type": "object", "properties": {"x": {"type": "integer"}}}), Tool("g"))
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


@pytest.fixture(scope="module")
def backend(checkpoint: Path) -> Iterator[NativeBackend]:
    opened = NativeBackend(checkpoint, CONFIG, chat_template=TEMPLATE)
    yield opened
    opened.close()


def asked(answer: tuple[int, ...], *, sampling: dict[str, Any] | None = None, **fields: Any) -> Request:
    params = SamplingParams(logits_processors=(forced(*answer),), **(sampling or {}))
    return Request(messages=(Message("user", "Hi"),), sampling=params, **{"tools": TOOLS, **fields})


def choice(backend: NativeBackend, request: Request) -> Choice:
    answer = gather._Answer(request)
    for chunk in chunks(backend, request):
        answer.add(chunk)
    return answer.result(cancelled=False).choices[0]


def test_calls_stream_and_end_the_answer(backend: NativeBackend) -> None:
    found = chunks(backend, asked(spelled(f"One moment.\n{CALL}")))
    assert "".join(chunk.text for chunk in found) == "One moment."
    deltas = [delta for chunk in found for delta in chunk.tool_calls]
    assert deltas[0].name == "f"
    assert deltas[0].id
    (call,) = gather.joined_calls(deltas)
    assert json.loads(call.arguments) == {"x": 1}
    assert found[-1].finish_reason == "tool_calls"
    assert sum(len(chunk.token_ids) for chunk in found) == found[-1].usage.completion_tokens  # type: ignore[union-attr]


def test_reasoning_is_no_text(backend: NativeBackend) -> None:
    said = choice(backend, asked(spelled(f"<think>\nHm. <b>\n</think>\n\nYes. {CALL}")))
    assert (said.reasoning, said.text, len(said.tool_calls)) == ("Hm. <b>", "Yes.", 1)
    said = choice(backend, asked(spelled("Hm.</think>Yes."), thinking=True, tools=()))  # the prompt begins it
    assert (said.reasoning, said.text, said.finish_reason) == ("Hm.", "Yes.", "stop")
    said = choice(backend, asked(spelled("No: </think>"), thinking=False, tools=()))
    assert (said.reasoning, said.text) == ("", "No: </think>")


def test_what_is_cut_is_kept(backend: NativeBackend) -> None:
    said = choice(backend, asked(spelled(CALL), sampling={"max_tokens": 20}))
    assert (said.text, said.tool_calls, said.finish_reason) == (CALL[:20], (), "length")
    said = choice(backend, asked(spelled(CALL), sampling={"max_tokens": 45}))
    assert said.finish_reason == "length"
    assert said.tool_calls[0].arguments == CALL[:45].partition('"arguments": ')[2]
    alone = {"tool_choice": "required", "parallel_tool_calls": False}
    said = choice(backend, asked(spelled(CALL), sampling={"max_tokens": 45}, **alone))
    assert (said.finish_reason, len(said.tool_calls)) == ("length", 1)
    said = choice(backend, asked(spelled(CALL), sampling={"stop": "arg"}))
    assert (said.text, said.finish_reason, said.stop_reason) == (CALL.partition("arg")[0], "stop", "arg")


def test_one_call_ends_the_answer_where_it_may_be_the_only_one(backend: NativeBackend) -> None:
    said = choice(backend, asked(spelled(f"{CALL}\n{CALL} and more"), parallel_tool_calls=False))
    assert (len(said.tool_calls), said.finish_reason, said.text) == (1, "tool_calls", "")
    assert len(said.token_ids) == CALL.index("\n</tool_call>")
    assert len(choice(backend, asked(spelled(f"{CALL}\n{CALL}"))).tool_calls) == 2


def test_without_tools_a_call_is_text(backend: NativeBackend) -> None:
    for fields in ({"tool_choice": "none"}, {"tools": ()}):
        request = asked(spelled(CALL), **fields)
        found = chunks(backend, request)
        assert "".join(chunk.text for chunk in found) == CALL
        assert found[-1].finish_reason == "stop"
        assert backend.detokenize(found[0].prompt_ids or ()) == "user: Hi; "
    prompt = Request(prompt=CALL, sampling=SamplingParams(logits_processors=(forced(*spelled(CALL)),)))
    assert choice(backend, prompt).text == CALL


def test_choices_have_parsers_of_their_own(backend: NativeBackend) -> None:
    found = chunks(backend, asked(spelled(CALL), sampling={"n": 2}))
    ids = {delta.id for chunk in found for delta in chunk.tool_calls if delta.id}
    assert len(ids) == 2
    assert {chunk.index for chunk in found if chunk.finish_reason == "tool_calls"} == {0, 1}


def test_a_late_reader_misses_nothing(backend: NativeBackend) -> None:
    short = '<tool_call>{"name": "g"}</tool_call>'
    found = chunks(backend, asked(spelled(f"<think>Hm.</think>Yes. {short}{short}")))
    (one,) = coalesce(found)
    assert (one.reasoning, one.text) == ("Hm.", "Yes.")
    assert [(delta.index, delta.name, delta.arguments) for delta in one.tool_calls] == [
        (0, "g", "{}"),
        (1, "g", "{}"),
    ]
    assert all(delta.id for delta in one.tool_calls)


def test_earlier_calls_are_shown(backend: NativeBackend) -> None:
    messages = [
        Message("user", "Hi"),
        Message("assistant", "", (ToolCall("1", "f", '{"x": 1}'),)),
        Message("tool", "2", tool_call_id="1"),
    ]
    assert backend.render(messages) == 'user: Hi; assistant: [f {"x": 1}]; tool: 2; '
    with pytest.raises(InvalidRequest, match="not the JSON text of an object"):
        backend.render([Message("assistant", "", (ToolCall("1", "f", "[1]"),))])


def test_marks_that_are_special_tokens_are_seen_and_never_shown(tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path / "model", template=MISTRAL)
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace("<|start|>", "[TOOL_CALLS]"))
    backend = NativeBackend(folder, CONFIG)
    try:
        answer = (*spelled("Wait."), START, *spelled('[{"name": "g", "arguments": {}}]'))
        said = choice(backend, asked(answer))
        assert (said.text, said.tool_calls[0].name, said.tool_calls[0].arguments) == ("Wait.", "g", "{}")
        assert len(said.tool_calls[0].id) == 9
        assert choice(backend, asked(answer, tools=())).text == 'Wait.[{"name": "g", "arguments": {}}]'
        assert choice(backend, asked((*spelled("Hm"), START, *spelled("?")))).text == "Hm[TOOL_CALLS]?"
    finally:
        backend.close()


SMALL = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}, "on": {"enum": ["a", "b"]}},
    "required": ["n", "on"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(4))
def test_a_model_that_knows_nothing_is_made_to_call(backend: NativeBackend, seed: int) -> None:
    pytest.importorskip("llguidance", reason="it holds answers to grammars")
    tools = (Tool("pick", "", SMALL), Tool("drop", "", SMALL))
    params = SamplingParams(seed=seed, temperature=2.0)
    free = Request(messages=(Message("user", "Hi"),), sampling=params, tools=tools, thinking=False)
    for choosing, names in (("required", {"pick", "drop"}), (NamedTool("drop"), {"drop"})):
        said = choice(backend, replace(free, tool_choice=choosing, parallel_tool_calls=False))  # type: ignore[arg-type]
        (call,) = said.tool_calls
        arguments = json.loads(call.arguments)
        assert call.name in names
        assert set(arguments) == {"n", "on"}
        assert 0 <= arguments["n"] <= 9
        assert (said.text, said.finish_reason) == ("", "tool_calls")


def test_formats_can_be_named(checkpoint: Path) -> None:
    with pytest.raises(InvalidRequest, match="'nope' is unknown"):
        NativeBackend(checkpoint, CONFIG.__class__(tool_format="nope", kernels="reference"))
    with pytest.raises(InvalidRequest, match="reasoning_format"):
        NativeBackend(checkpoint, CONFIG.__class__(reasoning_format="nope", kernels="reference"))


def test_what_the_template_cannot_do_is_refused(backend: NativeBackend, checkpoint: Path) -> None:
    with pytest.raises(InvalidRequest, match="reasoning_effort"):
        chunks(backend, asked((), reasoning_effort="high"))
    plain = NativeBackend(checkpoint, CONFIG)
    try:
        with pytest.raises(InvalidRequest, match="cannot switch reasoning"):
            chunks(plain, asked((), thinking=True, tools=()))
    finally:
        plain.close()


def test_named_tools_must_exist() -> None:
    with pytest.raises(InvalidRequest, match="no tool 'h'"):
        asked((), tool_choice=NamedTool("h"))
