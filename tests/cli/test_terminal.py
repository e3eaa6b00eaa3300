"""What reaches a terminal, and what must not."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cli.shell import Terminal, environment
from tramontane.cli import terminal
from tramontane.cli.terminal import DownloadBar, ProgressLines, harmless, one_line, print_json

_DOWNLOADING = """
import sys
from tramontane.cli.terminal import DownloadBar
with DownloadBar() as progress:
    for label in ("a-package[/red]", "a-file"):
        for done in (0, 50, 100):
            progress(done, 100 if done else None, label)
        print('{"in": "between"}', flush=True)
    if "fail" in sys.argv:
        raise SystemExit("failed")
"""


@given(st.text())
def test_harmless_text_steers_nothing(text: str) -> None:
    left = harmless(text)
    assert all(char in "\t\n" or not (ord(char) < 32 or 127 <= ord(char) < 160) for char in left)
    assert harmless("plain\tgrüße 👍\n") == "plain\tgrüße 👍\n"
    assert "\n" not in one_line(text)
    assert len(one_line(text, 10)) <= 10


@given(
    st.recursive(
        st.text() | st.integers() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_json_is_one_harmless_line_that_reads_back(value: object) -> None:
    for encoding in ("utf-8", "ascii"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
        with contextlib.redirect_stdout(stream):
            print_json(value)
        stream.seek(0)
        text = stream.read()
        assert text == harmless(text)
        assert text.count("\n") == 1
        assert json.loads(text) == value


def test_a_download_on_a_pipe_is_a_line_for_each_label() -> None:
    done = subprocess.run([sys.executable, "-c", _DOWNLOADING], capture_output=True, env=environment())
    assert done.stdout.decode().splitlines() == ['{"in": "between"}'] * 2
    assert done.stderr.decode().splitlines() == ["fetching a-package[/red]", "fetching a-file"]


@pytest.mark.parametrize("failing", [False, True])
def test_a_download_on_a_terminal_is_a_bar_that_goes(failing: bool) -> None:
    screen = Terminal(*["fail"] * failing, command=[sys.executable, "-c", _DOWNLOADING])
    assert screen.close() == failing
    assert "a-package[/red]" in screen.seen
    assert screen.seen.count("\x1b[?25l") == screen.seen.count("\x1b[?25h") == 1  # the cursor is back
    assert screen.seen.count('{"in": "between"}') == 2


def test_standard_output_stays_clean_while_the_bar_is_on_the_terminal() -> None:
    shell = ["/bin/sh", "-c", f"'{sys.executable}' -c '{_DOWNLOADING.replace(chr(39), chr(34) * 3)}' | cat >&2"]
    screen = Terminal(command=shell)
    screen.close()
    assert screen.seen.count('{"in": "between"}') == 2


def test_loading_says_nothing_into_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    with DownloadBar() as progress:
        progress(1, 2, "loading m.gguf")
        progress(2, 2, "loading m.gguf")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("pause", "told"),
    [
        (0.1, ["1%", "25%", "50%", "75%", "100%"]),
        (2.5, ["1%", "41%", "81%"]),
        (9.0, ["1%"]),
    ],
)
def test_a_log_hears_of_a_load_in_a_few_lines(pause: float, told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    now = 0.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    monkeypatch.setattr(terminal, "_PAUSE", pause)
    progress = ProgressLines(said.append)
    for percent in range(1, 101):
        now += 0.0625
        progress(percent << 10, 100 << 10, "loading m.gguf")
    assert said == [f"loading m.gguf: {share} of 100.0 KiB" for share in told]


def test_a_log_hears_of_many_files_in_a_few_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    now = 0.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    progress = ProgressLines(said.append)
    for i in range(100):
        for done in (0, 1, 2):
            now += 0.03125
            progress(done, None if i < 10 else 2, f"part-{i}\x1b")
    assert said == ["fetching part-0", "fetching part-53: 50% of 2 bytes"]


def test_nothing_is_drawn_where_nothing_is_fetched(capsys: pytest.CaptureFixture[str]) -> None:
    with DownloadBar():
        pass
    assert capsys.readouterr() == ("", "")


def test_colours_need_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    assert terminal.coloured(Screen())
    assert not terminal.coloured(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "")  # only a value that is not empty counts (no-color.org)
    assert terminal.coloured(Screen())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not terminal.coloured(Screen())
