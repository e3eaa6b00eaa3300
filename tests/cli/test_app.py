"""The command tree: help, version, completion, exit codes, and every failure as one line."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Shell
from tests.cli.shell import COMMAND, environment, interrupted, run, scripted
from tramontane import __version__

_HEAVY = [
    "numpy",
    "tokenizers",
    "jinja2",
    "huggingface_hub",
    "safetensors",
    "torch",
    "tramontane.llm",
    "tramontane.types",
]


def assert_fails(result: subprocess.CompletedProcess[bytes], code: int, *words: str) -> None:
    said = result.stderr.decode()
    assert result.returncode == code, said
    assert said.startswith("error: "), said
    assert said.count("\n") == 1, said
    for word in words:
        assert word in said


def test_version_and_help(shell: Shell) -> None:
    assert shell("--version").output == f"tramontane {__version__}\n"
    listed = shell("--help").output
    assert all(name in listed for name in ("run", "inspect", "bench", "eval", "doctor"))
    assert shell("run", "--help").exit_code == shell("eval", "--help").exit_code == 0


@pytest.mark.parametrize("completing", [False, True])
def test_help_and_completion_import_nothing_heavy(completing: bool) -> None:
    code = (
        "import atexit, sys; sys.argv = ['tramontane', '--help']\n"
        f"atexit.register(lambda: print([m for m in {_HEAVY!r} if m in sys.modules], file=sys.stderr))\n"
        "from tramontane.cli import main; main()"
    )
    words = {"_TRAMONTANE_COMPLETE": "complete_bash", "COMP_WORDS": "tramontane in", "COMP_CWORD": "1"}
    env = environment(**(words if completing else {}))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=env)
    assert done.stderr.decode().splitlines()[-1] == "[]"
    assert b"inspect" in done.stdout


def test_a_run_makes_no_other_command_and_looks_for_no_garbage_before_it_has_started() -> None:
    code = (
        "import atexit, gc, sys; sys.argv = ['tramontane', 'run', '-m', 'mock', 'hi']\n"
        "usual, passes = gc.get_threshold(), []\n"
        "def told():\n"
        "    others = ('bench', 'doctor', 'inspect', 'models', 'serve')\n"
        "    commands = [name for name in others if f'tramontane.cli.{name}' in sys.modules]\n"
        "    print(commands, passes, gc.get_threshold() == usual, gc.get_freeze_count() > 0, file=sys.stderr)\n"
        "atexit.register(told)\n"
        "from tramontane.cli import main\n"
        "gc.callbacks.append(lambda phase, info: gc.get_freeze_count() or passes.append(info['generation']))\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment())
    assert done.stderr.decode().splitlines()[-1] == "[] [] True True"
    assert done.stdout


def test_a_run_of_a_model_imports_nothing_that_it_does_not_need(smollm2: Path) -> None:
    needless = (
        *("email", "fastapi", "http.client", "huggingface_hub", "importlib.metadata", "llguidance", "multiprocessing"),
        *("numpy.testing", "pydantic", "rich", "safetensors", "torch", "tramontane.server", "transformers", "unittest"),
    )
    arguments = ["tramontane", "run", "-m", str(smollm2), "--max-tokens", "1", "hi"]
    code = (
        f"import atexit, sys; sys.argv = {arguments!r}\n"
        f"atexit.register(lambda: print([m for m in {needless!r} if m in sys.modules], file=sys.stderr))\n"
        "from tramontane.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment())
    assert done.stderr.decode().splitlines()[-1] == "[]"
    assert done.stdout


def test_completion_installs(tmp_path: Path) -> None:
    bash = "/bin/bash"
    if not os.path.exists(bash):
        pytest.skip("no bash here")
    line = " ".join(f"'{word}'" for word in COMMAND)
    script = f"{line} --show-completion; {line} --install-completion; exit $?"  # bash must stay their parent
    done = subprocess.run([bash, "-c", script], capture_output=True, env=environment(HOME=str(tmp_path)))
    assert done.returncode == 0, done.stderr.decode()
    assert b"_TRAMONTANE_COMPLETE=complete_bash" in done.stdout
    assert "tramontane" in (tmp_path / ".bashrc").read_text()


@pytest.mark.parametrize(
    "arguments",
    [["run", "--nope"], ["nope"], ["run", "--top-k", "many"], ["eval", "perplexity"], ["bench", "--batch", "0"]],
)
def test_wrong_use_is_told_by_the_parser(shell: Shell, arguments: list[str]) -> None:
    result = shell(*arguments)
    assert result.exit_code == 2
    assert "Usage" in result.stderr
    assert not result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run", "-m", "/no/such.gguf", "hi"], 1, ["/no/such.gguf", "Check the name"]),
        (["inspect", "-m", "/no/such.gguf"], 1, ["/no/such.gguf"]),
        (["run", "-m", "pypi:incomplete", "hi"], 2, ["PACKAGE==VERSION/FILE"]),
        (["run", "-m", "mock", "--temperature", "-1", "hi"], 2, ["temperature", "-1.0", "at least 0.0"]),
        (["run", "-m", "mock", "--top-p", "0", "hi"], 2, ["top_p"]),
        (["run", "-m", "mock", "--max-tokens", "-1", "hi"], 2, ["max_tokens"]),
        (["run", "-m", "mock", "--min-tokens", "9", "--max-tokens", "3", "hi"], 2, ["min_tokens"]),
        (["run", "-m", "mock", "--logprobs", "3", "hi"], 2, ["--json"]),
        (["run", "-m", "no.gguf", "-o", "blocks=3", "hi"], 2, ["blocks", "num_blocks"]),
        (["run", "-m", "mock", "-o", "num_blocks", "hi"], 2, ["NAME=VALUE"]),
        (["run", "-m", "mock", "-o", "progress=1", "hi"], 2, ["progress"]),
        (["run", "-m", "mock", "-o", "top_k=1", "hi"], 2, ["top_k", "run --help"]),
        (["run", "-m", "mock", "-o", "num_blocks=1", "hi"], 2, ["num_blocks", "mock backend", "native"]),
        (["run", "--backend", "llamafile", "hi"], 2, ["llamafile", "native"]),
        (["run", "-m", "mock", "-o", "context_length=1.5", "hi"], 2, ["context_length"]),
        (["run", "-m", "mock", "-o", "threads=1", "-o", "threads=2", "hi"], 2, ["twice"]),
        (["run", "-m", "mock", "-o", "threads=1", "--threads", "2", "hi"], 2, ["both"]),
        (["run", "-m", "no.gguf", "--device", "toaster", "hi"], 2, ["toaster"]),
        (["run", "-m", "mock", "-o", "context_length=4", "a prompt that is too long"], 2, ["context of 4"]),
        (["run", "-m", "mock", "--raw", "--system", "Be brief.", "hi"], 2, ["--system"]),
    ],
)
def test_failures_are_one_line_with_a_remedy(shell: Shell, arguments: list[str], code: int, words: list[str]) -> None:
    result = shell(*arguments)
    assert result.exit_code == code
    assert not result.stdout
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


def test_files_that_are_not_what_they_should_be(shell: Shell, tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"GGUF\xff\xfe\x00")
    for arguments, code in (
        (["inspect", "-m", str(binary)], 1),
        (["run", "-m", str(binary), "hi"], 1),
        (["run", "-m", "mock", "--chat-template", str(binary), "hi"], 2),
        (["run", "-m", "mock", "--chat-template", str(tmp_path), "hi"], 2),
        (["run", "-m", "mock", "--chat-template", f"{tmp_path}/none", "hi"], 2),
        (["eval", "perplexity", str(binary), "-m", "mock"], 2),
        (["eval", "perplexity", f"{tmp_path}/none", "-m", "mock"], 2),
    ):
        result = shell(*arguments)
        assert result.exit_code == code, arguments
        assert str(tmp_path) in result.stderr
        assert result.stderr.count("\n") == 1


def test_no_home(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "TRAMONTANE_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA", "USERPROFILE"):
        monkeypatch.delenv(name, raising=False)

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    for command in (["run", "hi"], ["inspect"]):
        result = shell(*command)
        assert result.exit_code == 1
        assert "TRAMONTANE_CACHE" in result.stderr
        assert result.stderr.count("\n") == 1
    assert "TRAMONTANE_CACHE" in shell("doctor").stdout


@pytest.mark.parametrize("stdin", [b"\xff\xfe\x00binary", b"", b" \n"])
def test_standard_input_that_holds_no_prompt(stdin: bytes) -> None:
    assert_fails(run("run", "-m", "mock", stdin=stdin), 2, "PROMPT", "standard input")


def test_closed_streams() -> None:
    line = " ".join(f"'{word}'" for word in COMMAND)
    for redirection, code in (("<&-", 2), (">&-", 0), ("2>&-", 0)):
        prompt = "" if redirection == "<&-" else "hi"
        script = f"{line} run -m mock {prompt} {redirection}"
        done = subprocess.run(["/bin/sh", "-c", script], capture_output=True, env=environment())
        assert done.returncode == code, done.stderr.decode()
        assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["run", "-m", "mock", "--ignore-eos", "--max-tokens", "4000", "hi"], ["--help"]])
def test_a_reader_that_goes_away_is_no_event(arguments: list[str]) -> None:
    process = subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() in (0, 1)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_is_told() -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*COMMAND, "run", "-m", "mock", "hi"], stdout=full, stderr=subprocess.PIPE, env=environment()
        )
    assert done.returncode == 1
    assert done.stderr.decode() == "error: No space left on device\n"


@pytest.mark.parametrize("how", [[], ["--no-stream"], ["-n", "2"], ["--json"]])
def test_ctrl_c_prints_what_there_was_and_ends_with_130(how: list[str]) -> None:
    code, out, err = interrupted(scripted("'ab', delay=0.02"), "run", "--ignore-eos", *how, "hi")
    assert (code, err) == (130, "")
    if "--json" in how:
        assert out == ""
    else:
        assert out.startswith("ab" if how != ["-n", "2"] else "a")
        assert out.endswith("\n")


def test_bugs_are_one_line_too(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("of all\nthings")

    monkeypatch.setattr("tramontane.cli.run.open_llm", broken)
    result = shell("run", "hi")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: unexpected ValueError: of all things. This is a bug")
    assert result.stderr.count("\n") == 1
    monkeypatch.setenv("TRAMONTANE_DEBUG", "1")
    assert "Traceback" in shell("run", "hi").stderr


def test_what_the_package_logs_is_one_line(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def noisy(*_: object, **__: object) -> None:
        try:
            raise KeyError("inner")
        except KeyError:
            logging.getLogger("tramontane.engine").exception("something\x1b[31m\nhappened")
        raise MemoryError

    monkeypatch.setattr("tramontane.cli.run.open_llm", noisy)
    result = shell("run", "hi")
    assert result.stderr.splitlines() == [
        "error: something[31m happened",
        "error: out of memory. Use a smaller context, batch or model.",
    ]
