"""SentencePiece's compiled normalization rules: which characters of a text become others before it is cut into pieces.

Owns the format (a double-array trie over UTF-8, then the replacements) and its one operation: at each place the longest
rule that fits replaces what it fits. Must not know: spaces, pieces, symbols. The trie and its values come from a file:
nothing in them is followed beyond its bounds. Sources: the SentencePiece project's description of its normalizer;
Darts-clone for the trie's units.
"""

from __future__ import annotations

import re
from functools import cached_property

import numpy as np

from tramontane.errors import CorruptCheckpoint

_MAX_REPLACEMENT = 1024
"""Bytes; the longest of Unicode's compatibility rules makes 33."""
_ASCII_RUN = re.compile(r"[\x00-\x7f]+(?![^\x00-\x7f])")
"""ASCII that no mark follows which could combine with its last letter."""


class Charsmap:
    """The rules of one model. Immutable."""

    def __init__(self, data: bytes, source: str) -> None:
        """`data` as the model has it. Raises CorruptCheckpoint."""
        size = int.from_bytes(data[:4], "little")
        if size % 4 or not 0 < size <= len(data) - 4:
            raise CorruptCheckpoint(source, f"normalization rules of {len(data)} bytes with a trie of {size}")
        self.data = data
        self._source = source
        self._units = np.frombuffer(data, "<u4", size // 4, 4)
        self._texts = data[4 + size :]
        self._known: dict[str, tuple[str | None, int | None]] = {}
        self._root = self._child_base(0)

    def normalize(self, text: str) -> str:
        """The text with its characters replaced. Raises CorruptCheckpoint for a rule that leads nowhere."""
        out: list[str] = []
        at = 0
        while at < len(text):
            run = _ASCII_RUN.match(text, at) if self._ascii is not None else None
            if run is not None and self._ascii is not None:
                out.append(run[0].translate(self._ascii))
                at = run.end()
                continue
            value, at = self._longest(text, at)
            out.append(value)
        return "".join(out)

    def _longest(self, text: str, at: int) -> tuple[str, int]:
        """What stands for the text at a place, and where the rest begins."""
        own, node = self._of_character(text[at])
        value, end = text[at] if own is None else own, at + 1
        place = end
        while node is not None and place < len(text):
            own, node = self._walk(node, text[place])
            place += 1
            if own is not None:
                value, end = own, place
        return value, end

    @cached_property
    def _ascii(self) -> dict[int, str] | None:
        """Replacements of single ASCII characters; None where a rule joins several."""
        found: dict[int, str] = {}
        for first in map(chr, range(128)):
            own, node = self._of_character(first)
            if own is not None:
                found[ord(first)] = own
            if node is not None and any(self._step(node, second) is not None for second in range(128)):
                return None
        return found

    def _of_character(self, character: str) -> tuple[str | None, int | None]:
        if character not in self._known:
            self._known[character] = self._walk(self._root, character)
        return self._known[character]

    def _walk(self, node: int, character: str) -> tuple[str | None, int | None]:
        """One character further down the trie: the replacement that ends there, and where longer ones go on."""
        place: int | None = node
        unit = 0
        for byte in character.encode("utf-8", "surrogatepass"):
            found = None if place is None else self._step(place, byte)
            if found is None:
                return None, None
            unit, place = found
        if not unit >> 8 & 1:
            return None, place
        leaf = place if place is not None and place < len(self._units) else None
        if leaf is None:
            raise CorruptCheckpoint(self._source, "a normalization rule leads out of its trie")
        return self._text(int(self._units[leaf]) & 0x7FFFFFFF), place

    def _step(self, base: int, byte: int) -> tuple[int, int] | None:
        """The unit of a byte below a node, and the base of its own children; None without such a child."""
        index = base ^ byte
        if index >= len(self._units):
            return None
        unit = int(self._units[index])
        if unit & 0x800000FF != byte:
            return None
        return unit, self._child_base(index)

    def _child_base(self, index: int) -> int:
        unit = int(self._units[index])
        return index ^ (unit >> 10 << ((unit & 0x200) >> 6))

    def _text(self, start: int) -> str:
        end = self._texts.find(b"\0", start, start + _MAX_REPLACEMENT)
        if end < 0:
            raise CorruptCheckpoint(self._source, f"a normalization rule has no text at byte {start}")
        try:
            return self._texts[start:end].decode("utf-8")
        except UnicodeDecodeError as error:
            raise CorruptCheckpoint(self._source, "a normalization rule makes no UTF-8") from error
