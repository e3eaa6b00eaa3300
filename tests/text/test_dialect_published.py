"""Dialects of published models: prompts are transformers' own, and what mistral-common writes is read.

`python tests/fetch_tokenizers.py` puts the files into $TEST_MODELS.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.conftest import model_path
from tests.text.toolcalls.samples import TOOLS, same
from tests.text.toolcalls.test_parsers import parser, read
from tramontane.text.conversation import tool_mapping
from tramontane.text.dialect import Dialect
from tramontane.text.template import ChatTemplate
from tramontane.text.tokenizer import Tokenizer
from tramontane.types import Message, Request, ToolCall

CALL = ToolCall("abcABC123", "get_weather", '{"city": "Zürich", "days": 2}')
CONVERSATION = (
    Message("user", "Weather?"),
    Message("assistant", "", (CALL,)),
    Message("tool", '{"sun": true}', tool_call_id=CALL.id),
)
THEIRS: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "", "tool_calls": [{"id": CALL.id, "type": "function", "function": {
        "name": CALL.name, "arguments": json.loads(CALL.arguments)}}]},
    {"role": "tool", "content": '{"sun": true}', "tool_call_id": CALL.id, "name": CALL.name},
]  # fmt: skip


def published(name: str) -> tuple[Dialect, dict[str, Any]]:
    folder = model_path("tokenizers") / name
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    named = {
        key: value["content"] if isinstance(value, dict) else value
        for key in ("bos_token", "eos_token")
        if (value := config.get(key)) is not None
    }
    source = config["chat_template"]
    if isinstance(source, list):
        source = next(entry["template"] for entry in source if entry["name"] == "default")
    template = ChatTemplate(source, bos_token=named.get("bos_token"), eos_token=named.get("eos_token"))
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json", config)
    return Dialect(template, tokenizer), {"chat_template": source, **named}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "format_"), [("qwen2_5", "hermes"), ("llama3_2", "llama3"), ("mistral_nemo", "mistral")]
)
def test_prompts_with_tools_are_transformers(name: str, format_: str) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils", reason="transformers is the reference")
    dialect, theirs = published(name)
    assert dialect.format_name == format_
    for turns in (1, 3):
        rendered, _ = utils.render_jinja_template(
            [THEIRS[:turns]], tools=[tool_mapping(tool) for tool in TOOLS], add_generation_prompt=True, **theirs
        )
        assert dialect.speak(Request(messages=CONVERSATION[:turns], tools=TOOLS)).prompt == rendered[0]


@pytest.mark.slow
def test_deepseek_gets_arguments_as_text_and_no_content() -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils", reason="transformers is the reference")
    dialect, theirs = published("deepseek_v3")
    assert dialect.format_name == "deepseek"
    call = {"id": CALL.id, "type": "function", "function": {"name": CALL.name, "arguments": CALL.arguments}}
    turns = [THEIRS[0], {"role": "assistant", "content": None, "tool_calls": [call]}, THEIRS[2]]
    rendered, _ = utils.render_jinja_template([turns], add_generation_prompt=True, **theirs)
    assert dialect.render(CONVERSATION) == rendered[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "format_"), [("gemma3", "pythonic"), ("command_r_plus", "hermes"), ("deepseek_v3", "deepseek")]
)
def test_templates_without_tools_are_helped(name: str, format_: str) -> None:
    dialect, _ = published(name)
    assert dialect.format_name == format_
    prompt = dialect.speak(Request(messages=CONVERSATION, tools=TOOLS)).prompt
    for tool in TOOLS:
        assert json.dumps(tool_mapping(tool), ensure_ascii=False) in prompt
    assert '{"sun": true}' in prompt
    assert "Zürich" in prompt


@pytest.mark.slow
def test_marks_that_are_special_tokens_are_shown() -> None:
    for name, marks in (("mistral_nemo", {"[TOOL_CALLS]"}), ("llama3_2", {"<|python_tag|>"}), ("qwen2_5", set())):
        dialect, _ = published(name)
        tokenizer = Tokenizer.from_file(model_path("tokenizers") / name / "tokenizer.json")
        shown = dialect.speak(Request(messages=CONVERSATION, tools=TOOLS)).shown
        assert {tokenizer.token_text(id_) for id_ in shown} == marks
        assert dialect.speak(Request(messages=CONVERSATION)).shown == frozenset()


@pytest.mark.parametrize("version", ["v3", "v7"])
def test_what_mistral_common_writes_is_read(version: str) -> None:
    mistral = pytest.importorskip("mistral_common.tokens.tokenizers.mistral", reason="mistral-common is the reference")
    from mistral_common.protocol.instruct.messages import AssistantMessage, ToolMessage, UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.protocol.instruct.tool_calls import FunctionCall
    from mistral_common.protocol.instruct.tool_calls import ToolCall as Theirs
    from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy

    given = [("abcABC123", "get_weather", CALL.arguments), ("abcABC124", "get_time", "{}")]
    calls = [Theirs(id=id_, function=FunctionCall(name=name, arguments=text)) for id_, name, text in given]
    results = [ToolMessage(tool_call_id=id_, name=name, content="x") for id_, name, _ in given]
    request = ChatCompletionRequest(
        messages=[UserMessage(content="hi"), AssistantMessage(content=None, tool_calls=calls), *results]
    )
    tokenizer = getattr(mistral.MistralTokenizer, version)()
    tokens = tokenizer.encode_chat_completion(request).tokens
    written = tokenizer.decode(tokens, special_token_policy=SpecialTokenPolicy.KEEP)
    answer = written.partition("[/INST]")[2].partition("</s>")[0].replace("▁", " ")
    said = read(answer, parser("mistral"))
    assert [call.name for call in said.calls] == ["get_weather", "get_time"]
    assert all(same(call.arguments, json.loads(text)) for call, (_, _, text) in zip(said.calls, given, strict=True))
    assert said.text == ""
