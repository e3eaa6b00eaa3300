"""How a tokenizer's decoder turns tokens into bytes, as data that decoding one token at a time can follow.

Owns reading the `decoder` of a tokenizer.json. Must not know: encoding, special tokens, the tokenizers package.
Sources: GPT-2's byte-to-unicode table; the decoders of Hugging Face tokenizers (ByteLevel, Replace, ByteFallback,
Fuse, Strip, Metaspace, WordPiece), whose output is followed to the byte, also where it is invalid UTF-8.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tramontane.errors import UnsupportedModel
from tramontane.records import dataclass


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 stands for itself, the other 68 bytes for U+0100 and up, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


BYTE_ALPHABET = _byte_alphabet()
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

# What WordPiece's decoder does to each token when it cleans up, in its order.
_CLEANUP = (
    *((f" {mark}", mark) for mark in ".?!,"),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" do not", " don't"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


@dataclass(frozen=True)
class PieceRules:
    """What decoding does to a token. `byte_level` excludes the rest, which are rules of SentencePiece and WordPiece.

    `continuing` (WordPiece's "##") marks a token that continues a word; others begin one, with a space unless first.
    `replace` lists (from, to) pairs applied in order; `byte_fallback` reads `<0xHH>` as a byte; `bare_first` is a mark
    that the first token of a text loses wherever it stands; `strip_left` is the number of leading spaces that the
    whole text loses.
    """

    byte_level: bool = False
    replace: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    strip_left: int = 0
    continuing: str | None = None
    bare_first: str | None = None

    @property
    def first_differs(self) -> bool:
        """Whether a token reads otherwise at the beginning of a text."""
        return self.continuing is not None or self.bare_first is not None

    def split(self, token: str, first: bool = False) -> tuple[bytes, bool]:
        """The token's bytes, and whether it is a lone fallback byte (which may be part of a character)."""
        if self.byte_level:
            try:
                return bytes([BYTE_ALPHABET[c] for c in token]), False
            except KeyError:  # an added token, written as it is read
                return token.encode("utf-8"), False
        if first and self.bare_first is not None:
            token = token.replace(self.bare_first, "")
        if self.continuing is not None and not first:
            joined = token.startswith(self.continuing)
            token = token[len(self.continuing) :] if joined else f" {token}"
        for old, new in self.replace:
            token = token.replace(old, new)
        match = _BYTE_TOKEN.fullmatch(token) if self.byte_fallback else None
        return (bytes([int(match[1], 16)]), True) if match else (token.encode("utf-8"), False)


def rules_from_decoder(decoder: Mapping[str, Any] | None, source: str) -> PieceRules:
    """Read the `decoder` entry of a tokenizer.json.

    Raises UnsupportedModel for a decoder that cannot be followed token by token in the same words.
    """
    steps = [] if decoder is None else decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    # Fuse joins the tokens, which we do in any case; what matters is that Strip comes after it.
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return PieceRules(byte_level=True)
    if kinds == ["WordPiece"]:
        return PieceRules(continuing=steps[0]["prefix"], replace=_CLEANUP if steps[0]["cleanup"] else ())
    if kinds == ["Metaspace"]:
        mark = steps[0]["replacement"]
        bare = mark if steps[0]["prepend_scheme"] != "never" else None
        return PieceRules(replace=((mark, " "),), bare_first=bare)
    order = ["Replace", "ByteFallback", "Fuse", "Strip"]
    known = bool(kinds) and all(kind in order for kind in kinds) and kinds == sorted(kinds, key=order.index)
    if not known or kinds.count("Strip") > 1 or "Fuse" not in kinds:
        raise _unsupported(kinds, source)
    replace: list[tuple[str, str]] = []
    strip_left = 0
    for step in steps:
        if step["type"] == "Replace":
            if "String" not in step["pattern"]:
                raise _unsupported(["Replace by regular expression"], source)
            replace.append((step["pattern"]["String"], step["content"]))
        elif step["type"] == "Strip":
            if step["content"] != " " or step["stop"] != 0:
                raise _unsupported(["Strip of other than leading spaces"], source)
            strip_left = step["start"]
    return PieceRules(False, tuple(replace), "ByteFallback" in kinds, strip_left)


def _unsupported(kinds: list[str], source: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{source}: tokenizer decoder {' + '.join(kinds) or 'none'} is not supported.",
        "Supported: ByteLevel (byte-level BPE), Replace + ByteFallback + Fuse + Strip and Metaspace (SentencePiece), "
        "WordPiece.",
    )
