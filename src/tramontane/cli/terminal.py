"""What a terminal shows: colours where wanted, model text made harmless, a download's progress.

Owns escape sequences and nothing else. Must not know: models, requests.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TextIO

GREEN, RED, DIM, BOLD = "32", "31", "2", "1"

# Control characters that a model's text must not send to a terminal: all of C0 and C1 but tab and newline.
_HARMLESS = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}


def coloured(stream: TextIO) -> bool:
    """Whether to colour this stream: a terminal, and NO_COLOR (no-color.org) not set."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def style(text: str, code: str, stream: TextIO | None = None) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if coloured(stream or sys.stdout) else text


class AnswerWriter:
    """Writes a streamed answer to standard output: green on a terminal, as it is into a file or pipe."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._coloured = coloured(sys.stdout)

    def __enter__(self) -> AnswerWriter:
        if self._coloured:
            sys.stdout.write(f"\x1b[{GREEN}m")
        return self

    def write(self, text: str) -> None:
        sys.stdout.write(text.translate(_HARMLESS) if self._terminal else text)
        sys.stdout.flush()

    def __exit__(self, *exc: object) -> None:
        sys.stdout.write("\x1b[0m\n" if self._coloured else "\n")
        sys.stdout.flush()


def progress_bar() -> Callable[[int, int | None, str], None]:
    """A callback (done bytes, total bytes or None, label) that draws a bar on standard error, or lines where it is none."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(*columns, console=console, transient=True)
    tasks: dict[str, TaskID] = {}

    def update(done: int, total: int | None, label: str) -> None:
        if label not in tasks:
            if not console.is_terminal:
                print(label, file=sys.stderr)
            tasks[label] = bar.add_task(label, total=total)
            bar.start()
        bar.update(tasks[label], completed=done, total=total)
        if total is not None and done >= total:
            bar.stop()

    return update
