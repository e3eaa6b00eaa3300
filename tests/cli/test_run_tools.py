"""Tools and reasoning in the shell: a file of tools, calls as lines, reasoning dim or hidden, a chat about results."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import Shell
from tests.cli.shell import Terminal, environment, scripted
from tramontane.backends.base import Backend
from tramontane.backends.mock import MockBackend
from tramontane.cli.chat import Chat
from tramontane.llm import LLM
from tramontane.types import Request, SamplingParams, Tool

Use = Callable[[Backend], None]
CALL = '<tool_call>{"name": "wind", "arguments": {"at": "sea"}}</tool_call>'


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    file = tmp_path / "tools.json"
    file.write_text(json.dumps([{"type": "function", "function": {"name": "wind"}}]))
    return file


def test_a_call_is_a_line(shell: Shell, answering: Use, tools: Path) -> None:
    answering(MockBackend(f"<think>Hm.</think>Let me see. {CALL}"))
    for arguments in ([], ["--no-stream"]):
        assert shell("run", "--tools", str(tools), *arguments, "hi").output == 'Let me see.\nwind {"at": "sea"}\n'
    found = json.loads(shell("run", "--tools", str(tools), "--json", "hi").output)["choices"][0]
    assert found["reasoning"] == "Hm."
    assert found["tool_calls"][0]["arguments"] == '{"at": "sea"}'
    assert CALL in shell("run", "--tools", str(tools), "--tool-choice", "none", "hi").output


def test_what_cannot_be_is_refused(shell: Shell, answering: Use, tools: Path, tmp_path: Path) -> None:
    answering(MockBackend("x"))
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    for arguments, words in (
        (["--tools", str(broken)], "not JSON"),
        (["--tools", str(tools), "--raw"], "--raw"),
        (["--tools", str(tools), "--tool-choice", "rain"], "rain"),
        (["--think"], "thinking"),
        (["--reasoning-effort", "high"], "reasoning_effort"),
    ):
        refused = shell("run", *arguments, "hi")
        assert refused.exit_code == 2
        assert words in refused.stderr


@pytest.mark.parametrize(("arguments", "shown"), [([], True), (["--hide-reasoning"], False)])
def test_reasoning_is_dim_on_a_terminal(arguments: list[str], shown: bool) -> None:
    command = scripted("'<think>Hm, so.</think>Yes.'")
    terminal = Terminal("run", *arguments, "hi", command=command, env=environment())
    screen = terminal.expect("s\x1b[0m\x1b[32m.\x1b[0m\r\n")
    assert terminal.close() == 0
    assert ("\x1b[2mH\x1b[0m" in screen) == shown


@pytest.fixture
def chat() -> Iterator[Chat]:
    def script(request: Request) -> str:
        last = (request.messages or ())[-1]
        return f"It is {last.text}." if last.role == "tool" else CALL

    with LLM.from_backend(MockBackend(script)) as llm:
        yield Chat(llm, SamplingParams(), fields={"tools": (Tool("wind"),)})


def test_a_chat_asks_what_a_call_came_to(
    chat: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("builtins.input", lambda prompt: f"{prompt}strong")
    chat.handle("How is the wind?")
    assert "It is result of wind> strong." in capsys.readouterr().out
    assert [message["role"] for message in chat.messages] == ["user", "assistant", "tool", "assistant"]
    assert chat.messages[2]["tool_call_id"] == chat.messages[1]["tool_calls"][0]["id"]


def test_a_call_left_without_its_result_is_forgotten(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(prompt: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupt)
    with pytest.raises(KeyboardInterrupt):
        chat.handle("How is the wind?")
    assert chat.messages == []
