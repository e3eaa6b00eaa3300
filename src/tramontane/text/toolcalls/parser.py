"""AnswerParser: one answer's text, in pieces, to what it says.

Owns the driving of a reading function. Must not know: which syntax it reads.
"""

from __future__ import annotations

from collections.abc import Callable

from tramontane.text.toolcalls.output import Enough, Output, Piece
from tramontane.text.toolcalls.reader import Reader, Reading

Read = Callable[[Reader, Output], Reading[None]]


class AnswerParser:
    """What it gives out, joined, is the same however the text was cut; nothing that more text could change is given
    out. `done`: the answer may say no more, since it has made the one call that it may make."""

    def __init__(self, read: Read, output: Output) -> None:
        self._reader, self._output = Reader(), output
        self._reading = read(self._reader, output)
        self.done = False

    @property
    def made_calls(self) -> bool:
        return self._output.calls > 0

    def push(self, text: str, ended: bool = False) -> Piece:
        """More text; what is certain now. With `ended` it was the last, and all is certain."""
        if not self.done:
            self.done = self._read(text)
            if ended and not self.done:  # apart: a call that only the end of the text ends is not whole
                self._read("", ended)
        return self._output.take(ended or self.done)

    def _read(self, text: str, ended: bool = False) -> bool:
        """Read on. Whether that made the one call that may be made."""
        self._reader.feed(text, ended)
        try:
            next(self._reading)
        except StopIteration:
            pass
        except Enough:
            return True
        return False
