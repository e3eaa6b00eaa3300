"""What a terminal shows: colours where wanted, foreign text made harmless, the progress of downloads and loads.

Owns escape sequences and the two streams' manners. Must not know: models, requests.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from tramontane.types import Choice, Chunk

GREEN, RED, YELLOW, DIM = "32", "31", "33", "2"

# Control characters that foreign text must not send to a terminal: all of C0 and C1 but tab and newline.
_HARMLESS = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}

_PAUSE = 5.0
"""Seconds between two lines of progress."""


def coloured(stream: TextIO) -> bool:
    """Whether to colour this stream: a terminal that can, and NO_COLOR (no-color.org) not set."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def style(text: str, code: str, stream: TextIO | None = None) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if coloured(stream or sys.stdout) else text


def harmless(text: str) -> str:
    """The text without characters that steer a terminal. Tabs and newlines stay."""
    return text.translate(_HARMLESS)


def one_line(text: str, width: int | None = None) -> str:
    """Foreign text as one harmless line, of at most `width` characters."""
    line = harmless(" ".join(text.split()))
    return line if width is None or len(line) <= width else line[: width - 1] + "…"


def complain(kind: str, message: str) -> None:
    """One line on standard error: `kind` is error or warning."""
    colour = RED if kind == "error" else YELLOW
    print(f"{style(f'{kind}:', colour, sys.stderr)} {one_line(message)}", file=sys.stderr)


def print_json(value: Any) -> None:
    """One line of JSON, readable where the stream can carry it; control characters are always escaped."""
    unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    text = json.dumps(value, ensure_ascii=not unicode)
    print(text.translate({code: f"\\u{code:04x}" for code in range(0x7F, 0xA0)}))


class Complaints(logging.Handler):
    """Shows what the package logs as single lines: a traceback says nothing to most users of a shell."""

    def emit(self, record: logging.LogRecord) -> None:
        complain(record.levelname.lower(), record.getMessage())


class AnswerWriter:
    """Writes an answer to standard output as it comes: green on a terminal, as it is into a file or pipe. Reasoning is
    dim, and only on a terminal, if `reasoning`; calls of tools have a line each.

    The colour is taken back after every piece, so that no interruption leaves the terminal green.
    """

    def __init__(self, reasoning: bool = True) -> None:
        self._thoughts = reasoning and sys.stdout.isatty()
        self._part = ""
        self._terminal = sys.stdout.isatty()
        self._coloured = coloured(sys.stdout)
        self._last = "\n"

    def __enter__(self) -> AnswerWriter:
        return self

    def show(self, said: Chunk | Choice) -> None:
        """A piece of an answer, or a whole one."""
        if self._thoughts:
            self._write(said.reasoning, DIM, "reasoning")
        self.write(said.text)
        for call in said.tool_calls:
            if call.name:
                self._part = ""
                self._write(f"{call.name} ", YELLOW, "call")
            self._write(call.arguments, YELLOW, "call")

    def write(self, text: str) -> None:
        self._write(text, GREEN, "text")

    def _write(self, text: str, colour: str, part: str) -> None:
        if self._terminal:
            text = harmless(text)
        if not text:
            return
        if part != self._part and self._last != "\n":
            text = f"\n{text}"
        self._part = part
        sys.stdout.write(f"\x1b[{colour}m{text}\x1b[0m" if self._coloured else text)
        sys.stdout.flush()
        self._last = text[-1]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._last != "\n":
            sys.stdout.write("\n")
            sys.stdout.flush()


class DownloadBar:
    """Hears (done bytes, total bytes or None, label) and shows it on standard error: a bar on a terminal, which goes
    when the context ends, else a line for each label, but none for loading. Standard output is never touched."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._label: str | None = None

    def __call__(self, done: int, total: int | None, label: str) -> None:
        if label != self._label:
            self._label = label
            if not coloured(sys.stderr) and label.startswith("loading "):
                return
            if not coloured(sys.stderr):
                print(f"fetching {one_line(label)}", file=sys.stderr, flush=True)
            else:
                self._begin(one_line(label, 48))
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total)

    def _begin(self, label: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        if self._bar is None:
            text = TextColumn("{task.description}", markup=False)
            columns = (text, BarColumn(), DownloadColumn(), TransferSpeedColumn())
            console = Console(stderr=True)
            self._bar = Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=True)
            self._bar.start()
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(label, total=None)

    def __enter__(self) -> DownloadBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


class ProgressLines:
    """Hears the same and says it in a few lines: where a label begins, and at each further quarter of it, but nothing
    within seconds of the last line."""

    def __init__(self, say: Callable[[str], object]) -> None:
        self._say = say
        self._told: tuple[str, int] | None = None
        self._at = -math.inf

    def __call__(self, done: int, total: int | None, label: str) -> None:
        from tramontane.loading.memory import shown

        now, here = time.monotonic(), (label, 4 * done // total if total else 0)
        if here == self._told or now - self._at < _PAUSE:
            return
        self._told, self._at = here, now
        doing = label if label.startswith("loading ") else f"fetching {label}"
        self._say(one_line(doing) + (f": {done / total:.0%} of {shown(total)}" if total else ""))
