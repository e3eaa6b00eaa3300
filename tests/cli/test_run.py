"""One answer: where the prompt comes from, and how the answer is shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cli.conftest import Shell
from tests.cli.shell import Terminal, environment, run, scripted
from tramontane.backends.base import Backend, Capabilities
from tramontane.backends.mock import MockBackend
from tramontane.types import Grammar, Request, SamplingParams

Use = Callable[[Backend], None]


class Holding(MockBackend):
    """Takes grammars, as far as it says."""

    def capabilities(self) -> Capabilities:
        own = super().capabilities()
        return replace(own, sampling_fields=own.sampling_fields | {"grammar"})


class Adapted(MockBackend):
    """Takes adapters."""

    def capabilities(self) -> Capabilities:
        own = super().capabilities()
        return replace(own, request_fields=own.request_fields | {"adapter"})


class Untemplated(MockBackend):
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities(), chat=False)


def said(request: Request) -> str:
    """An answer that tells what was asked."""
    if request.messages is None:
        return f"completing {request.prompt!r}"
    return "|".join(f"{message.role}: {message.text}" for message in request.messages)


def test_a_prompt_becomes_a_conversation(shell: Shell, answering: Use) -> None:
    answering(MockBackend(said))
    assert shell("run", "hi").output == "user: hi\n"
    assert shell("run", "--system", "Be brief.", "hi").output == "system: Be brief.|user: hi\n"
    assert shell("run", "--raw", "hi").output == "completing 'hi'\n"
    assert shell("run", "--raw", "--echo", "hi").output == "hicompleting 'hi'\n"


def test_without_a_template_it_completes(shell: Shell, answering: Use) -> None:
    answering(Untemplated(said))
    assert shell("run", "hi").output == "completing 'hi'\n"
    refused = shell("run", "--system", "Be brief.", "hi")
    assert refused.exit_code == 2
    assert "--system" in refused.stderr


@pytest.mark.parametrize("how", [[], ["--raw"], ["--no-stream"], ["--raw", "--no-stream"]])
def test_an_adapter(shell: Shell, answering: Use, how: list[str]) -> None:
    answering(Adapted(lambda request: str(request.adapter)))
    assert shell("run", "--adapter", "mine", *how, "hi").output == "mine\n"
    assert shell("run", *how, "hi").output == "None\n"
    answering(MockBackend(said))
    refused = shell("run", "--adapter", "mine", *how, "hi")
    assert refused.exit_code == 2
    assert "adapter" in refused.stderr
    assert "mistralrs" in refused.stderr


@pytest.mark.parametrize("arguments", [[], ["-"]])
def test_standard_input(shell: Shell, answering: Use, arguments: list[str]) -> None:
    answering(MockBackend(said))
    assert shell("run", *arguments, stdin="\ufeffgrüße\n".encode()).output == "user: grüße\n"


def test_standard_input_of_a_process() -> None:
    done = run("run", command=scripted("lambda request: request.messages[0].text"), stdin="Grüße".encode())
    assert done.stdout.decode() == "Grüße\n"
    # What the terminal cannot show is spelled out.
    ascii_only = environment(PYTHONUTF8="0", PYTHONIOENCODING="ascii")
    done = run("run", command=scripted("'Grüße'"), stdin=b"x", env=ascii_only)
    assert done.stdout == b"Gr\\xfc\\xdfe\n"


@pytest.mark.parametrize("how", [[], ["--no-stream"], ["--temperature", "0.5", "--seed", "1", "--top-k", "3"]])
def test_streamed_or_whole_it_is_the_same_text(shell: Shell, answering: Use, how: list[str]) -> None:
    answering(MockBackend("one\ntwo \x1b[31mthree"))
    assert shell("run", *how, "hi").output == "one\ntwo \x1b[31mthree\n"  # into a pipe it goes as it is


def test_stop_and_limits(shell: Shell, answering: Use) -> None:
    answering(MockBackend("one two three"))
    assert shell("run", "--stop", " three", "--stop", "!", "hi").output == "one two\n"
    assert shell("run", "--max-tokens", "5", "hi").output == "one t\n"
    assert shell("run", "--ignore-eos", "--max-tokens", "16", "hi").output == "one two threeone\n"


@pytest.mark.parametrize(
    ("model", "given", "used"),
    [(None, [], 0.7), (None, ["--temperature", "1"], 1.0), (0.3, [], None), (0.3, ["--temperature", "0"], 0.0)],
)
def test_the_temperature_that_nobody_names(
    shell: Shell, answering: Use, model: float | None, given: list[str], used: float | None
) -> None:
    class Advised(MockBackend):
        def capabilities(self) -> Capabilities:
            return replace(super().capabilities(), defaults=SamplingParams(temperature=model))

    answering(Advised(lambda request: str(request.sampling.temperature)))
    assert shell("run", *given, "hi").output == f"{used}\n"


def test_several_answers(shell: Shell, answering: Use) -> None:
    answering(MockBackend(["one", "two"]))
    assert shell("run", "-n", "2", "hi").output == "one\n\ntwo\n"


def test_json(shell: Shell, answering: Use) -> None:
    answering(MockBackend("gr\u00fcn \x1b\x9b"))
    result = shell("run", "--json", "-n", "2", "--logprobs", "1", "hi")
    assert result.output.count("\n") == 1
    assert "\x9b" not in result.output
    assert "ü" in result.output
    report = json.loads(result.output)
    assert report["text"] == "gr\u00fcn \x1b\x9b"
    assert len(report["choices"]) == 2
    assert report["choices"][1]["finish_reason"] == "stop"
    assert report["choices"][0]["logprobs"][0]["text"] == "g"
    usage = report["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_a_failure_midway_comes_after_what_there_was(shell: Shell, answering: Use) -> None:
    answering(MockBackend("one two", fail_after=3))
    result = shell("run", "hi")
    assert (result.exit_code, result.stdout) == (1, "one\n")
    assert result.stderr.startswith("error: ")
    assert shell("run", "--json", "hi").stdout == ""


def test_on_a_terminal_it_streams_in_green() -> None:
    terminal = Terminal("run", "hi", command=scripted("'ab\\x1b[31m\\x07c'"))
    assert terminal.close() == 0
    green = "".join(f"\x1b[32m{char}\x1b[0m" for char in "ab[31mc")
    assert terminal.seen == f"{green}\r\n"  # and what would steer the terminal is gone


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_colours_can_be_off(name: str, value: str) -> None:
    terminal = Terminal("run", "hi", command=scripted("'a\\x1b[31mb'"), env=environment(**{name: value}))
    assert terminal.close() == 0
    assert terminal.seen == "a[31mb\r\n"


def test_a_failure_leaves_the_terminal_uncoloured() -> None:
    terminal = Terminal("run", "hi", command=scripted("'abc', fail_after=2"))
    assert terminal.close() == 1
    assert terminal.seen.startswith("\x1b[32ma\x1b[0m\x1b[32mb\x1b[0m\r\n\x1b[31merror:\x1b[0m ")
    assert "\x1b" not in terminal.seen.rpartition("\x1b[0m")[2]


def test_no_stream_by_the_environment() -> None:
    env = environment(MISTRALRS_NO_STREAM="1", NO_COLOR="")
    terminal = Terminal("run", "hi", command=scripted("'abc'"), env=env)
    assert terminal.close() == 0
    assert terminal.seen == "\x1b[32mabc\x1b[0m\r\n"
    done = run("run", "hi", command=scripted("'abc'"), env=environment(MISTRALRS_NO_STREAM="maybe"))
    assert done.returncode == 2
    assert b"MISTRALRS_NO_STREAM" in done.stderr


def test_what_needs_a_prompt_says_so_on_a_terminal() -> None:
    for arguments in (["--json"], ["--raw"], ["--echo"], ["-n", "2"]):
        terminal = Terminal("run", *arguments, command=scripted("'abc'"))
        assert terminal.close() == 2
        assert arguments[0] in terminal.seen
        assert "PROMPT" in terminal.seen


def test_a_template_of_ones_own(shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: dict[str, object] = {}

    class Stop(Exception):
        pass

    def opened(*_: object, **options: object) -> None:
        given.update(options)
        raise Stop

    monkeypatch.setattr("tramontane.llm.LLM", opened)
    (tmp_path / "template.jinja").write_text("{{ messages }}", encoding="utf-8")
    options = ["--threads", "2", "-o", "num-blocks=7", "-o", "dtype=float32", "-o", "deterministic=true"]
    shell("run", "--chat-template", str(tmp_path / "template.jinja"), *options, "hi")
    given.pop("progress")
    assert given == {
        "backend": None,
        "chat_template": "{{ messages }}",
        "threads": 2,
        "num_blocks": 7,
        "dtype": "float32",
        "deterministic": True,
    }


@pytest.mark.parametrize(
    ("arguments", "grammar"),
    [
        (["--json-object"], Grammar("json_object")),
        (["--json-schema", "s.json"], Grammar("json_schema", {"type": "integer"})),
        (["--regex", "a+"], Grammar("regex", "a+")),
        (["--choice", "yes", "--choice", "no"], Grammar("choice", ("yes", "no"))),
        (["--grammar", "g.lark"], Grammar("lark", 'start: "a"')),
    ],
)
def test_what_the_answer_must_match(
    arguments: list[str],
    grammar: Grammar,
    shell: Shell,
    answering: Use,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s.json").write_text('{"type": "integer"}')
    Path("g.lark").write_text('start: "a"')
    backend = Holding(lambda request: str(request.sampling.grammar == grammar))
    answering(backend)
    assert shell("run", *arguments, "hi").output == "True\n"
    refused = shell("run", *arguments, "--regex", "b", "--json-object", "hi")
    assert refused.exit_code != 0


def test_a_schema_that_is_no_json(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text("{")
    assert "is not JSON" in shell("run", "--json-schema", str(tmp_path / "s.json"), "hi").output
    assert "cannot read" in shell("run", "--json-schema", str(tmp_path / "none.json"), "hi").output
