"""Reader: a text that comes in pieces, read by generators as if it were whole.

Owns the looking ahead: what a read decides depends on the text alone, never on where it was cut. Must not know: what is
read. Each method that may have to wait is a generator which yields where it needs more text: call it by `yield from`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]
"""A read that returns T, and yields whenever it needs more text."""
Write = Callable[[str], None]

_SPACE = " \t\r\n"
_SCALAR = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?|true|false|null")
_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_LONGEST_SCALAR = 400
_MAX_DEPTH = 128


class Reader:
    """The text so far and a place in it."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._saved: int | None = None
        self._ended = False

    def feed(self, text: str, ended: bool = False) -> None:
        """More text, and whether it was the last."""
        start = self._at if self._saved is None else self._saved
        self._text = self._text[start:] + text
        self._at -= start
        if self._saved is not None:
            self._saved = 0
        self._ended = ended

    def save(self) -> None:
        """Remember this place, instead of the one remembered before."""
        self._saved = self._at

    def forget(self) -> None:
        """The remembered place is not needed any more."""
        self._saved = None

    def back(self) -> None:
        """Return to the remembered place."""
        if self._saved is None:
            raise ValueError("no place was saved")
        self._at, self._saved = self._saved, None

    def peek(self) -> Reading[str]:
        """The next character, left where it is; "" at the end."""
        while self._at == len(self._text) and not self._ended:
            yield
        return self._text[self._at : self._at + 1]

    def take(self) -> Reading[str]:
        """The next character; "" at the end."""
        char = yield from self.peek()
        self._at += len(char)
        return char

    def space(self) -> Reading[str]:
        """White space, as much as there is."""
        start = ""
        while (char := (yield from self.peek())) and char in _SPACE:
            start += char
            self._at += 1
        return start

    def starts(self, *words: str) -> Reading[str]:
        """Take the longest of `words` that comes next and return it; "" if none does."""
        for word in sorted(words, key=len, reverse=True):
            while (
                not self._ended and len(self._text) - self._at < len(word) and word.startswith(self._text[self._at :])
            ):
                yield
            if self._text.startswith(word, self._at):
                self._at += len(word)
                return word
        return ""

    def until(self, marks: Sequence[str], write: Write, *, take: bool = True, keep: bool = False) -> Reading[str]:
        """Write the text before the first of `marks` and return that mark; "" at the end.

        Of marks that begin at one place the longest counts. The mark itself is taken unless `take` is False; with
        `keep` the place before it is saved, and none until then.
        """
        if keep:
            self.forget()
        while True:
            found, place = self._first(marks)
            if place > self._at:
                write(self._text[self._at : place])
                self._at = place
            if found:
                if keep:
                    self.save()
                self._at += len(found) if take else 0
                return found
            if self._ended:
                return ""
            yield

    def _first(self, marks: Sequence[str]) -> tuple[str, int]:
        """The mark that comes first and its place; or "" and the place up to which there is none for certain."""
        hits = [(place, -len(mark), mark) for mark in marks if (place := self._text.find(mark, self._at)) >= 0]
        place, _, found = min(hits, default=(len(self._text), 0, ""))
        if not self._ended:
            begun = min(map(self._begun, marks), default=place)
            if begun <= place:  # there, an earlier mark or a longer one may yet turn out to be
                return "", begun
        return found, place

    def _begun(self, mark: str) -> int:
        """Where the text ends with a part of `mark`, else its end."""
        for start in range(max(self._at, len(self._text) - len(mark) + 1), len(self._text)):
            if mark.startswith(self._text[start:]):
                return start
        return len(self._text)

    # JSON

    def json_value(self, write: Write) -> Reading[bool]:
        """Copy one JSON value as it comes. False where it breaks off or is none; what was good of it is written.

        Control characters within strings, which JSON forbids and models write, become their escapes.
        """
        stack: list[str] = []
        wanted = "value"  # or: first value, key, first key, colon, next (a comma or the end)
        while True:
            if stack:
                write((yield from self.space()))
            char = yield from self.peek()
            if stack and char == stack[-1] and wanted in ("next", "first key", "first value"):
                write((yield from self.take()))
                stack.pop()
                wanted = "next"
            elif (wanted, char) == ("next", ","):
                write((yield from self.take()))
                wanted = "key" if stack[-1] == "}" else "value"
            elif (wanted, char) == ("colon", ":"):
                write((yield from self.take()))
                wanted = "value"
            elif wanted in ("key", "first key") and (yield from self.json_string(write)):
                wanted = "colon"
            elif wanted in ("value", "first value") and char in ("{", "[") and len(stack) < _MAX_DEPTH:
                write((yield from self.take()))
                stack.append("}" if char == "{" else "]")
                wanted = "first key" if char == "{" else "first value"
            elif wanted in ("value", "first value") and (yield from self._json_leaf(char, write)):
                wanted = "next"
            else:
                return False
            if not stack:
                return True

    def _json_leaf(self, char: str, write: Write) -> Reading[bool]:
        if char == '"':
            return (yield from self.json_string(write))
        size = 0
        while (text := (yield from self._ahead(size + 1)))[size:].isalnum() or text[size:] in ("+", "-", "."):
            size += 1
            if size > _LONGEST_SCALAR:
                return False
        if not _SCALAR.fullmatch(text[:size]):
            return False
        write(text[:size])
        self._at += size
        return True

    def json_string(self, write: Write) -> Reading[bool]:
        """Copy a JSON string with its quotes; False where it breaks off, or an escape is none."""
        if (yield from self.peek()) != '"':
            return False
        write((yield from self.take()))
        while char := (yield from self.peek()):
            if char == "\\":
                escape = yield from self._ahead(2)
                if escape == "\\u":
                    escape = yield from self._ahead(6)
                if not _ESCAPE.fullmatch(escape):
                    return False
                self._at += len(escape)
                write(escape)
                continue
            self._at += 1
            write(char if char >= " " else json.dumps(char)[1:-1])
            if char == '"':
                return True
        return False

    def _ahead(self, count: int) -> Reading[str]:
        """The next `count` characters, left where they are; fewer at the end."""
        while len(self._text) - self._at < count and not self._ended:
            yield
        return self._text[self._at : self._at + count]
