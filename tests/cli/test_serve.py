"""`tramontane serve` as a process: signals and exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.conftest import Shell
from tests.cli.shell import Terminal, environment
from tests.engine import checkpoints

httpx = pytest.importorskip("httpx", reason="httpx is not installed")
pytest.importorskip("fastapi", reason="the extra 'server' is not installed")


@contextmanager
def served(*options: str, keys: str | None = None) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that serves, and where it listens."""
    environment = {name: value for name, value in os.environ.items() if name != "TRAMONTANE_API_KEYS"}
    if keys is not None:
        environment["TRAMONTANE_API_KEYS"] = keys
    command = [sys.executable, "-m", "tramontane", "serve", "-m", "mock", "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        url = ""
        while "listening on" not in url:
            url = json.loads(process.stderr.readline())["message"]
        url = url.removeprefix("listening on ")
        while httpx.get(f"{url}/ready", trust_env=False).json()["status"] == "loading":
            time.sleep(0.02)
        yield process, url
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_it_end(sent: signal.Signals) -> None:
    with served("--name", "wind") as (process, url):
        with httpx.Client(base_url=url, trust_env=False) as client:
            answer = client.post("/v1/completions", json={"prompt": "a", "model": "wind", "max_tokens": 2})
            assert answer.json()["model"] == "wind"
        process.send_signal(sent)
        assert process.wait(20) == 0


def test_a_second_signal_ends_it_at_once() -> None:
    with served("--drain-timeout", "600") as (process, url):
        body = {"prompt": "a", "max_tokens": 10**6, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, trust_env=False) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            while httpx.get(f"{url}/ready", trust_env=False).status_code == 200:
                pass
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) is not None


def test_keys_come_from_the_environment_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("ann from-the-file\n")
    for options, keys, secret in (
        ((), "ann from-outside", "from-outside"),
        (("--api-keys", str(file)), None, "from-the-file"),
    ):
        with served(*options, keys=keys) as (_, url), httpx.Client(base_url=url, trust_env=False) as client:
            assert client.get("/v1/models").status_code == 401
            assert client.get("/v1/models", headers={"Authorization": f"Bearer {secret}"}).status_code == 200


def test_a_model_that_does_not_load_is_a_failure() -> None:
    command = [sys.executable, "-m", "tramontane", "serve", "-m", "./nowhere.gguf", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "nowhere.gguf" in done.stderr


def test_wrong_use_is_told_before_anything_is_opened(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRAMONTANE_API_KEYS", raising=False)
    for options, said in (
        (("--host", "0.0.0.0"), "there is no API key"),
        (("--port", "99999"), "port"),
        (("--max-n", "0"), "n"),
        (("--api-keys", "/nowhere/keys"), "cannot read"),
        (("--tls-key", "key.pem"), "go together"),
        (("--log-format", "xml"), "xml"),
        (("--backend", "abacus"), "abacus"),
        (("-o", "num_blocks"), "NAME=VALUE"),
    ):
        result = shell("serve", "-m", "mock", *options)
        assert result.exit_code == 2, options
        assert said in result.output + result.stderr, options


_LOADING = """
from tramontane.loading import build
build._LONG = {seconds}
from tramontane.cli import main
main()
"""
"""The command, to which a load is a long one after so many seconds."""


def loading(folder: Path, seconds: float) -> list[str]:
    code = _LOADING.format(seconds=seconds)
    return [sys.executable, "-c", code, "serve", "-m", str(folder), "--port", "0", "-o", "num_blocks=32"]


@pytest.mark.parametrize(("seconds", "told"), [(-1, 1), (3600, 0)])
def test_a_log_tells_of_loads_that_take_long(tmp_path: Path, seconds: float, told: int) -> None:
    command = loading(checkpoints.write(tmp_path / "model"), seconds)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment())
    try:
        assert process.stderr is not None
        said: list[str] = []
        while not said or not said[-1].startswith("ready"):
            said.append(json.loads(process.stderr.readline())["message"])
    finally:
        process.kill()
        process.communicate()
    lines = [line for line in said if line.startswith("loading model: ")]
    assert len(lines) == told
    assert all("% of " in line for line in lines)
    assert len(said) <= 3  # with that it listens, and that it is ready


@pytest.mark.parametrize("seconds", [-1, 3600])
def test_a_terminal_shows_a_bar_while_it_loads_long(tmp_path: Path, seconds: float) -> None:
    screen = Terminal(command=loading(checkpoints.write(tmp_path / "model"), seconds))
    screen.expect("ready: ")
    shown = screen.seen
    screen.send("\x03")
    assert screen.close() == 0
    assert ("loading model" in shown) == (seconds < 0)
    assert "loading model: " not in shown, "a line, and not the bar"
    hidden, back = (screen.seen.count(f"\x1b[?25{mode}") for mode in "lh")
    assert hidden == back == (seconds < 0)


def test_a_server_that_stops_while_it_loads_gives_the_cursor_back(tmp_path: Path) -> None:
    command = loading(checkpoints.write(tmp_path / "model"), -1)
    stuck = "import time\nfrom tramontane.loading import build\nbuild.Decoder = lambda *_: time.sleep(600)\n"
    screen = Terminal(command=[*command[:2], stuck + command[2], *command[3:]])
    screen.expect("listening on ")
    if "\x1b[?25l" not in screen.seen:
        screen.expect("\x1b[?25l")
    screen.send("\x03")
    assert screen.close() == 0
    assert screen.seen.count("\x1b[?25l") == screen.seen.count("\x1b[?25h") == 1
