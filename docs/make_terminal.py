"""Draw docs/terminal.svg from what the commands print on a terminal, in colours as they come.

    python docs/make_terminal.py

Needs the demo model in the cache, and a system with pseudo terminals.
"""

from __future__ import annotations

import io
import os
import pty
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH = 104
SESSION = (
    ["run", "--temperature", "0", "--max-tokens", "64", "Why is the sky blue?"],
    ["inspect"],
)


def recorded(arguments: list[str]) -> str:
    """What `tramontane ARGUMENTS` writes to a terminal."""
    pieces: list[bytes] = []

    def read(screen: int) -> bytes:
        pieces.append(os.read(screen, 65536))
        return pieces[-1]

    status = pty.spawn([sys.executable, "-m", "tramontane", *arguments], read)
    if os.waitstatus_to_exitcode(status):
        sys.exit(f"tramontane {arguments[0]} failed")
    text = b"".join(pieces).decode("utf-8").replace("\r\n", "\n").rstrip()
    return text.replace("\x1b[0m\x1b[32m", "")  # pieces of one colour as one


def main() -> None:
    os.environ.update(COLUMNS=str(WIDTH), TERM="xterm")
    os.environ.pop("NO_COLOR", None)
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    for arguments in SESSION:
        line = " ".join(f'"{word}"' if " " in word else word for word in arguments)
        console.print(Text.assemble(("$ ", "bold"), f"tramontane {line}"))
        console.print(Text.from_ansi(recorded(arguments)))
        console.print()
    svg = console.export_svg(title="tramontane")
    svg = re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # a picture that fetches nothing
    svg = svg.replace("<svg ", '<svg xml:space="preserve" ', 1)
    Path(__file__).with_name("terminal.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
