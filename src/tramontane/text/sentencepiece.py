"""`tokenizer.model`: a SentencePiece model, read without the sentencepiece package.

Owns the file's encoding (Protocol Buffers) and the meaning of the fields that matter. Must not know: how pieces become
a tokenizer (`scored`), what tokenizer_config.json adds. Files are hostile: every length is checked against what is
there, and nothing is nested deeper than the format goes.
Sources: the Protocol Buffers encoding specification; sentencepiece_model.proto for field numbers and defaults.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

from tramontane.errors import CorruptCheckpoint, UnsupportedModel
from tramontane.records import dataclass
from tramontane.text.scored import Kind, Scored
from tramontane.text.vocab import MAX_TOKENS

_MODELS: dict[int, Literal["unigram", "bpe", "char"]] = {1: "unigram", 2: "bpe", 4: "char"}  # 3 is whole words
_Value = int | bytes


@dataclass(frozen=True)
class SentencePieceModel:
    """What a `tokenizer.model` says. Ids are None where the model has no such token."""

    pieces: Scored
    bos_id: int | None
    eos_id: int | None


def parse(data: bytes, source: str) -> SentencePieceModel:
    """Read a model. Raises CorruptCheckpoint, or UnsupportedModel for models of whole words."""
    texts: list[str] = []
    scores: list[float] = []
    kinds: list[int] = []
    sections = {2: b"", 3: b""}  # the trainer's and the normalizer's settings
    for field, value in _fields(data, source):
        if field == 1:
            text, score, kind = _piece(_message(value, source), source)
            texts.append(text)
            scores.append(score)
            kinds.append(kind)
            if len(texts) > MAX_TOKENS:
                raise CorruptCheckpoint(source, f"more than {MAX_TOKENS} pieces cannot be meant")
        elif field in sections:
            sections[field] += _message(value, source)
    trainer, normalizer = (dict(_fields(section, source)) for section in sections.values())
    model = _MODELS.get(_number(trainer, 3, 1, source))
    if model is None:
        raise _unsupported(source, "of whole words" if trainer[3] == 3 else f"of type {trainer[3]!r:.40}")
    if _number(trainer, 24, 0, source):
        raise _unsupported(source, "with spaces at the ends of words")
    if not _number(normalizer, 5, 1, source):
        raise _unsupported(source, "that leaves spaces as they are")
    space_prefix = bool(_number(normalizer, 3, 1, source))
    pieces = Scored(
        model=model,
        texts=texts,
        scores=scores,
        kinds=kinds,
        space_prefix=space_prefix,
        trim=bool(_number(normalizer, 4, 1, source)),
        charsmap=_message(normalizer.get(2, b""), source),
        raw_symbols=space_prefix,
    )
    ends = (_control(trainer, field, default, pieces, source) for field, default in ((41, 1), (42, 2)))
    bos_id, eos_id = ends
    return SentencePieceModel(pieces, bos_id, eos_id)


def in_fairseqs_order(model: SentencePieceModel, config: Mapping[str, Any], source: str) -> SentencePieceModel:
    """A `sentencepiece.bpe.model`, whose ids are not the file's own but those that fairseq's XLM-R gave its pieces.

    Raises UnsupportedModel for other families, whose ids depend on languages, or on a file of their own.
    """
    pieces = model.pieces
    if "XLMRoberta" not in str(config.get("tokenizer_class")) or tuple(pieces.texts[:3]) != ("<unk>", "<s>", "</s>"):
        raise UnsupportedModel(
            f"{source}: the ids of such a file's pieces are known for XLM-R alone, not for "
            f"{str(config.get('tokenizer_class'))!r:.40}.",
            "Use the model's tokenizer.json, if it has one.",
        )
    ends = [Kind.CONTROL, Kind.CONTROL, Kind.CONTROL, Kind.UNKNOWN]
    ordered = replace(
        pieces,
        texts=["<s>", "<pad>", "</s>", "<unk>", *pieces.texts[3:], "<mask>"],
        scores=[0.0] * 4 + [*pieces.scores[3:], 0.0],
        kinds=[*ends, *pieces.kinds[3:], Kind.CONTROL],
    )
    return SentencePieceModel(ordered, 0, 2)


def _unsupported(source: str, what: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{source}: a SentencePiece model {what} is not supported.", "Use the model's tokenizer.json, if it has one."
    )


def _piece(message: bytes, source: str) -> tuple[str, float, int]:
    text, score, kind = b"", 0.0, int(Kind.NORMAL)
    for field, value in _fields(message, source):
        if field == 1:
            text = _message(value, source)
        elif field == 2:
            if not isinstance(value, bytes) or len(value) != 4:
                raise CorruptCheckpoint(source, "a piece's score is not a number of four bytes")
            score = float(struct.unpack("<f", value)[0])
        elif field == 3:
            kind = value if isinstance(value, int) else 0
    if not 1 <= kind <= len(Kind):
        raise CorruptCheckpoint(source, f"a piece is of kind {kind}; known are 1 to {len(Kind)}")
    try:
        return text.decode("utf-8"), score, kind
    except UnicodeDecodeError as error:
        raise CorruptCheckpoint(source, "a piece is not UTF-8") from error


def _control(trainer: dict[int, _Value], field: int, default: int, pieces: Scored, source: str) -> int | None:
    """A special token's id; -1 and an id that is no control piece (trainers' defaults stay behind) mean none."""
    id_ = _number(trainer, field, default, source)
    if not 0 <= id_ < len(pieces.kinds) or pieces.kinds[id_] != Kind.CONTROL:
        return None
    return id_


def _message(value: _Value, source: str) -> bytes:
    if not isinstance(value, bytes):
        raise CorruptCheckpoint(source, "a number stands where a message belongs")
    return value


def _number(fields: dict[int, _Value], field: int, default: int, source: str) -> int:
    """An integer field; negative ones are written as their 64-bit complement."""
    value = fields.get(field, default)
    if not isinstance(value, int):
        raise CorruptCheckpoint(source, f"field {field} of the settings is not a number")
    return value - (1 << 64) if value >= 1 << 63 else value


def _fields(data: bytes, source: str) -> Iterator[tuple[int, _Value]]:
    """The fields of one message in order: integers as they are, all else as bytes."""
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at, source)
        field, wire = key >> 3, key & 7
        if wire == 0:
            number, at = _varint(data, at, source)
            yield field, number
            continue
        if wire == 2:
            size, at = _varint(data, at, source)
        else:
            size = {1: 8, 5: 4}.get(wire, -1)
        if field == 0 or not 0 <= size <= end - at:
            raise CorruptCheckpoint(source, f"not a SentencePiece model: a field of {size} bytes at byte {at} of {end}")
        yield field, data[at : at + size]
        at += size


def _varint(data: bytes, at: int, source: str) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & ((1 << 64) - 1), at
    raise CorruptCheckpoint(source, f"not a SentencePiece model: a number breaks off at byte {at}")
