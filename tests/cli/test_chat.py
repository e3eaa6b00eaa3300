"""The conversation on a terminal: keys in, screen out."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.shell import Terminal, environment, scripted
from tests.cli.test_run import Untemplated, said
from tramontane.backends.mock import MockBackend
from tramontane.cli.chat import Chat
from tramontane.llm import LLM
from tramontane.types import SamplingParams

_ECHOING = 'lambda request: "|".join(f"{m.role[0]}:{m.text}" for m in request.messages)'


@pytest.fixture
def chat() -> Iterator[Chat]:
    with LLM.from_backend(MockBackend(said)) as llm:
        yield Chat(llm, SamplingParams())


def leave(terminal: Terminal) -> None:
    """Ctrl-D, where it means the end: at the prompt."""
    terminal.expect("> ")
    terminal.send("\x04")
    assert terminal.close() == 0


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    return "".join(capsys.readouterr())


def test_a_conversation_on_a_terminal(tmp_path: Path) -> None:
    terminal = Terminal("run", command=scripted(_ECHOING), env=environment(NO_COLOR="1"))
    terminal.expect("/help lists the commands.")
    terminal.expect("> ")
    terminal.send("one\r")
    terminal.expect("u:one\r\n")
    terminal.send("two\r")
    terminal.expect("u:one|a:u:one|u:two\r\n")
    terminal.send("/system Be brief.\r")
    terminal.expect("starts anew")
    terminal.send("thrxx\x7f\x7fee\r")  # backspaces
    terminal.expect("s:Be brief.|u:three\r\n")
    terminal.send(f"/save {tmp_path}/chat.json\r")
    terminal.expect("Saved 2 messages")
    terminal.send("/reset\r")
    terminal.expect("Forgotten.")
    terminal.send("\x1b[A\x1b[A\x1b[A\r")  # up, up, up: the line before the commands
    terminal.expect("s:Be brief.|u:three\r\n")
    terminal.send("/nope\r")
    terminal.expect("There is no /nope")
    terminal.send("/help\r")
    terminal.expect("Ctrl-C stops an answer")
    terminal.send("/exit\r")
    assert terminal.close() == 0
    assert "Traceback" not in terminal.seen
    roles = [message["role"] for message in json.loads((tmp_path / "chat.json").read_text())["messages"]]
    assert roles == ["system", "user", "assistant"]


def test_ctrl_c_stops_the_answer_and_not_the_program() -> None:
    terminal = Terminal("run", "--ignore-eos", command=scripted("'ab', delay=0.02"))
    terminal.expect("> ")
    terminal.send("go on\r")
    terminal.expect("\x1b[32ma\x1b[0m\x1b[32mb\x1b[0m")
    terminal.send("\x03")
    terminal.expect("(stopped)")
    terminal.expect("> ")
    terminal.send("half a li")
    terminal.expect("half a li")
    terminal.insist("\x03", "/exit or Ctrl-D leaves")
    terminal.expect("> ")
    terminal.send("/stats\r")
    terminal.expect("last answer")
    terminal.expect("tokens/s")
    leave(terminal)
    assert "Traceback" not in terminal.seen


def test_the_prompt_has_no_colours_that_line_editing_would_count() -> None:
    terminal = Terminal("run", command=scripted("'ab'"), env=environment(INPUTRC=os.devnull))
    terminal.expect("\r\n> ")
    terminal.send("x" * 200 + "\x01y\r")  # a line longer than the screen; back to its start
    terminal.expect("\x1b[32mb\x1b[0m")
    leave(terminal)
    assert "> \x1b[3" not in terminal.seen


def test_what_is_not_utf8_is_not_sent() -> None:
    terminal = Terminal("run", command=scripted(_ECHOING), env=environment(NO_COLOR="1", INPUTRC=os.devnull))
    terminal.expect("> ")
    terminal.send(b"a\xffb\r")
    terminal.expect("not UTF-8")
    terminal.expect("> ")
    terminal.send("still here\r")
    terminal.expect("u:still here\r\n")
    leave(terminal)


def test_when_the_history_no_longer_fits_it_offers_reset() -> None:
    terminal = Terminal("run", command=scripted("'answer', context_length=60"), env=environment(NO_COLOR="1"))
    terminal.expect("> ")
    terminal.send("short\r")
    terminal.expect("answer\r\n")
    terminal.send("a question of middling length\r")
    terminal.expect("The conversation no longer fits")
    terminal.expect("/reset starts anew")
    terminal.send("/reset\r")
    terminal.expect("Forgotten.")
    terminal.send("short\r")
    terminal.expect("answer\r\n")
    leave(terminal)


def test_an_answer_cut_by_the_context_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with LLM.from_backend(MockBackend("long " * 20, context_length=50)) as llm:
        Chat(llm, SamplingParams(max_tokens=60)).handle("question")
        assert "context of 50 tokens is full; /reset" in shown(capsys)
        chat = Chat(llm, SamplingParams(max_tokens=4))
        chat.handle("question")
        assert "cut at 4 tokens" in shown(capsys)
        assert chat.messages[-1] == {"role": "assistant", "content": "long"}


def test_a_message_that_fits_nowhere_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with LLM.from_backend(MockBackend(context_length=30)) as llm:
        chat = Chat(llm, SamplingParams())
        chat.handle("x" * 40)
        told = shown(capsys)
        assert told.startswith("error: ")
        assert "context of 30" in told
        assert "/reset" not in told
        assert not chat.messages


def test_errors_do_not_end_the_conversation(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    chat.handle("one")
    chat.llm = LLM.from_backend(MockBackend("two", fail_after=1))
    chat.handle("fail")
    assert "error: " in shown(capsys)
    assert [message["content"] for message in chat.messages] == ["one", "user: one"]


def test_without_a_template_each_line_is_completed(capsys: pytest.CaptureFixture[str]) -> None:
    with LLM.from_backend(Untemplated(said)) as llm:
        chat = Chat(llm, SamplingParams())
        chat.handle("one")
        chat.handle("two")
        assert shown(capsys) == "completing 'one'\ncompleting 'two'\n"
        chat.handle("/system Be brief.")
        assert "no chat template" in shown(capsys)


def test_not_streamed(capsys: pytest.CaptureFixture[str]) -> None:
    with LLM.from_backend(MockBackend("whole")) as llm:
        Chat(llm, SamplingParams(), stream=False).handle("one")
    assert shown(capsys) == "whole\n"


def test_stats_tell_the_last_answer(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    chat.handle("/stats")
    assert "last answer" not in shown(capsys)
    chat.handle("one")
    chat.handle("/stats")
    told = shown(capsys)
    assert f"{len('user: one')} tokens" in told
    assert f"{len('user: one')} generated" in told


def test_system_shows_and_sets(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    chat.handle("/system")
    chat.handle("one")
    chat.handle("/system Be brief.")
    chat.handle("/system")
    assert "There is no system message." in (told := shown(capsys))
    assert told.endswith("Be brief.\n")
    assert not chat.messages


def test_save_never_overwrites(chat: Chat, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "a chat.json"
    chat.handle("one")
    chat.handle(f"/save {file}")
    first = file.read_bytes()
    chat.handle("two")
    chat.handle(f"/save {file}")
    assert "exists already" in shown(capsys)
    assert file.read_bytes() == first
    chat.handle("/save")
    assert "Name a file" in shown(capsys)
    chat.handle(f"/save {tmp_path}/none/file")
    assert "error: cannot save" in shown(capsys)


def test_save_on_a_full_disk_leaves_nothing(
    chat: Chat, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    opened = Path.open

    def full(path: Path, mode: str = "r", **options: object) -> object:
        path.touch(exist_ok=False)
        return opened(Path("/dev/full"), "w", encoding="utf-8")

    monkeypatch.setattr(Path, "open", full)
    chat.handle(f"/save {tmp_path}/file")
    assert "No space left" in shown(capsys)
    assert not (tmp_path / "file").exists()
