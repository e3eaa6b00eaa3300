"""SentencePiece's models of merges, of scores and of characters, from pieces with scores, for the tokenizers package.

Owns how pieces, their kinds and the normalizer's settings become a tokenizer. Must not know: where they were read
(`sentencepiece` files, GGUF metadata), BOS and EOS. Sources: the SentencePiece project's description of its model and
normalizer; llama.cpp, whose "llama" and "t5" vocabularies are the same data.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from enum import IntEnum
from typing import Literal

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from tramontane.errors import CorruptCheckpoint
from tramontane.records import dataclass
from tramontane.text.charsmap import Charsmap
from tramontane.text.vocab import derive_merges, number, soundness

MARK = "\u2581"


class Kind(IntEnum):
    """What a piece is: the same numbers in SentencePiece's files and in GGUF's."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_WHOLE = frozenset({Kind.UNKNOWN, Kind.CONTROL, Kind.USER_DEFINED})
"""Found in a text as they are."""


@dataclass(frozen=True)
class Scored:
    """Pieces and settings. `texts`, `scores` and `kinds` are of one length, by id.

    `space_prefix`: a text gets a space in front. `trim`: spaces at the ends go, and runs of them become one.
    `charsmap`: SentencePiece's compiled normalization rules. `raw_symbols`: user-defined pieces are found in the text
    as it was given, not as it was normalized. `rstrip`: symbols that take the spaces after them along.
    """

    model: Literal["bpe", "unigram", "char"]
    texts: Sequence[str]
    scores: Sequence[float]
    kinds: Sequence[int]
    space_prefix: bool
    trim: bool
    charsmap: bytes = b""
    raw_symbols: bool = True
    rstrip: frozenset[str] = frozenset()


def build(pieces: Scored, source: str) -> tokenizers.Tokenizer:
    """The tokenizer, for texts that `charsmap_of(pieces)` has rewritten. Raises CorruptCheckpoint for pieces that make
    none.

    It differs from SentencePiece in rare cases, as transformers does: where texts get a space in front, so does what
    follows a user-defined piece; unigram scores are summed in double precision, which decides some ties otherwise.
    """
    ids = number(pieces.texts, source, "the vocabulary")
    if not all(map(math.isfinite, pieces.scores)):
        raise CorruptCheckpoint(source, "the vocabulary has scores that are no numbers")
    unknown = next((id_ for id_, kind in enumerate(pieces.kinds) if kind == Kind.UNKNOWN), None)
    has_bytes = all(f"<0x{byte:02X}>" in ids for byte in range(256))
    with soundness(source, "vocabulary"):
        model: models.Model
        if pieces.model != "unigram":
            unk = None if unknown is None else pieces.texts[unknown]
            merges = _merges(pieces, source) if pieces.model == "bpe" else []
            model = models.BPE(vocab=ids, merges=merges, unk_token=unk, fuse_unk=True, byte_fallback=has_bytes)
        else:
            scored = list(zip(pieces.texts, pieces.scores, strict=True))
            model = models.Unigram(scored, unk_id=unknown, byte_fallback=has_bytes)
        inner = tokenizers.Tokenizer(model)
        steps = _normalizers(pieces)
        inner.normalizer = normalizers.Sequence(steps)
        if pieces.model == "unigram" and has_bytes:
            # The written name of a byte is no byte: cut within, it cannot be found as one piece.
            inner.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"(?<=<)(?=0x[0-9A-F]{2}>)"), "isolated")
        inner.decoder = _decoder(pieces.space_prefix)
        add_symbols(inner, pieces.texts, pieces.kinds, raw=pieces.raw_symbols, rstrip=pieces.rstrip)
    return inner


def charsmap_of(pieces: Scored, source: str) -> Charsmap | None:
    """The rules that rewrite characters, if there are any. Not left to the tokenizers package, which applies them to
    characters together with their marks and loses the marks. Raises CorruptCheckpoint."""
    return Charsmap(pieces.charsmap, source) if pieces.charsmap else None


def add_symbols(
    inner: tokenizers.Tokenizer,
    texts: Sequence[str],
    kinds: Sequence[int],
    raw: bool = True,
    rstrip: Container[str] = (),
) -> None:
    """Tell the tokenizer which tokens are found whole: control and unknown ones, and those the user defined."""
    inner.add_tokens(
        [
            tokenizers.AddedToken(
                text,
                normalized=kind == Kind.USER_DEFINED and not raw,
                special=kind != Kind.USER_DEFINED,
                rstrip=text in rstrip,
            )
            for text, kind in zip(texts, kinds, strict=True)
            if kind in _WHOLE
        ]
    )


def _normalizers(pieces: Scored) -> list[normalizers.Normalizer]:
    steps: list[normalizers.Normalizer] = []
    if pieces.trim:
        steps.append(normalizers.Replace(tokenizers.Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(tokenizers.Regex(" {2,}"), " "))
    if pieces.space_prefix:
        steps.append(normalizers.Prepend(MARK))
    return [*steps, normalizers.Replace(" ", MARK)]


def _decoder(space_prefix: bool) -> decoders.Decoder:
    steps: list[decoders.Decoder] = [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if space_prefix else steps)


def _merges(pieces: Scored, source: str) -> list[tuple[str, str]]:
    """The pairs that join into a piece, best score first: SentencePiece merges whatever makes a piece."""
    numbered = enumerate(zip(pieces.texts, pieces.kinds, strict=True))
    ids = {text: id_ for id_, (text, kind) in numbered if kind == Kind.NORMAL}
    return derive_merges(sorted(ids, key=lambda text: (-pieces.scores[ids[text]], ids[text])), ids, source)
