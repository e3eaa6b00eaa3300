"""A cursor over a mapped file: numbers, texts and counts, none of them believed.

Owns the checks that keep a reader inside its file. Must not know: any format.
"""

from __future__ import annotations

import mmap
import struct
import sys
from typing import Any, NoReturn

from tramontane.errors import CorruptCheckpoint

try:
    from tramontane import _native
except ImportError:  # a pure installation
    _native = None  # type: ignore[assignment]

_OWN_ORDER = "<" if sys.byteorder == "little" else ">"
_MAX_NAME_BYTES = 65535  # GGUF's limit for keys


class Cursor:
    """A position in the mapped file that never moves beyond its end.

    `order` is the byte order as struct writes it, `size` the number that counts and lengths are: 32 bits in version 1.
    """

    def __init__(self, path: str, data: mmap.mmap, end: int) -> None:
        self.path = path
        self.data = data
        self.end = end
        self.at = 0
        self.elements = 0
        self.order = "<"
        self.size = "Q"

    def fail(self, detail: str) -> NoReturn:
        raise CorruptCheckpoint(self.path, f"{detail} (at byte {self.at})")

    def take(self, count: int) -> bytes:
        if count > self.end - self.at:
            self.fail(f"{count} bytes wanted where the file has {self.end - self.at} left")
        self.at += count
        return self.data[self.at - count : self.at]

    def expect(self, count: int, least: int, what: str, most: int | None = None) -> None:
        """Refuse a count above `most`, or whose items, at `least` bytes each, cannot be in the rest of the file."""
        if count * least > self.end - self.at:
            self.fail(f"{count} {what} cannot be in the {self.end - self.at} bytes left")
        if most is not None and count > most:
            self.fail(f"{count} {what} are more than the {most} that any model has")

    def number(self, layout: str) -> Any:
        """One number of a struct layout letter."""
        layout = self.order + layout
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def count(self) -> int:
        """A count or a length."""
        return int(self.number(self.size))

    def name(self, what: str) -> str:
        """A text of reasonable length behind its length; `what` it is, for the error."""
        length = self.count()
        if not 0 < length <= _MAX_NAME_BYTES:
            self.fail(f"a {what} of {length} bytes")
        return self.text(length, what)

    def text(self, length: int, what: str) -> str:
        """UTF-8."""
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            self.fail(f"a {what} that is not UTF-8")

    def strings(self, count: int) -> list[str]:
        """An array of strings: a vocabulary has hundreds of thousands, which the compiled module reads where it can."""
        out: list[str] = []
        if _native is not None and self.order == _OWN_ORDER:
            out, self.at = _native.read_strings(self.data, self.at, self.end, count, struct.calcsize(self.size))
        while len(out) < count:
            if self.end - self.at < struct.calcsize(self.size):
                self.fail(f"an array of {count} strings ends after {len(out)}")
            length = self.count()
            if length > self.end - self.at:
                self.fail(f"string {len(out)} of an array claims {length} bytes")
            out.append(self.take(length).decode("utf-8", "surrogateescape"))
        return out
