"""SentencePiece's compiled normalization rules, against the package's own normalizer."""

from __future__ import annotations

import random
import struct
from typing import Any

import pytest

from tests.text.samples import HARD_TEXTS, random_texts
from tests.text.test_sentencepiece import SETTINGS, trained
from tramontane.errors import CorruptCheckpoint
from tramontane.text import scored, sentencepiece
from tramontane.text.charsmap import Charsmap
from tramontane.text.tokenizer import Tokenizer

spm = pytest.importorskip("sentencepiece", reason="the sentencepiece package trains and reads the references")

MARKS = "\u0301\u0323\u064b\u0e33\u3099\u1161\u11a8\ufe0f\u200d"


@pytest.fixture(scope="module", params=["nmt_nfkc", "lower", "nfkc, bytes"])
def rules(request: pytest.FixtureRequest) -> tuple[Any, Charsmap]:
    data = trained("unigram", SETTINGS[request.param])
    as_they_are = {"add_dummy_prefix": False, "remove_extra_whitespaces": False, "escape_whitespaces": False}
    charsmap = sentencepiece.parse(data, "x").pieces.charsmap
    return spm.SentencePieceNormalizer(model_proto=data, **as_they_are), Charsmap(charsmap, "x")


def test_every_character(rules: tuple[Any, Charsmap]) -> None:
    theirs, ours = rules
    characters = [chr(code) for code in (*range(0xD800), *range(0xE000, 0x20000))]
    whole = "|".join(characters)
    assert ours.normalize(whole) == theirs.normalize(whole)


def test_characters_with_marks(rules: tuple[Any, Charsmap]) -> None:
    """Ligatures, presentation forms and numerals keep the marks that follow; letters join theirs."""
    theirs, ours = rules
    texts = [chr(code) + mark for code in (*range(0x20, 0x3400), *range(0xF900, 0x10000)) for mark in MARKS]
    for text in ("".join(texts), *HARD_TEXTS, *random_texts(1000, seed=12)):
        assert ours.normalize(text) == theirs.normalize(text)
    assert ours.normalize("\ufedf\u064b") == "\u0644\u064b"


def test_fixed_cost_for_plain_text(rules: tuple[Any, Charsmap]) -> None:
    _, ours = rules
    plain = "A line of plain text.\tAnother. " * 1000
    assert ours.normalize(plain).casefold() == plain.replace("\t", " ").casefold()
    assert ours.normalize("") == ""


def model(**options: Any) -> tuple[Any, Tokenizer]:
    data = trained("unigram", {"control_symbols": ["<ctl>"], "user_defined_symbols": ["ﬁ", "<user>"], **options})
    pieces = sentencepiece.parse(data, "x").pieces
    inner = scored.build(pieces, "x")
    ours = Tokenizer(inner, source="x", bos_id=1, eos_ids=[2], charsmap=scored.charsmap_of(pieces, "x"))
    return spm.SentencePieceProcessor(model_proto=data), ours


def test_rules_make_no_symbols_of_what_is_none() -> None:
    theirs, ours = model()
    control = ours.token_to_id("<ctl>")
    assert control in ours.encode("a <ctl> b")
    assert control not in ours.encode("a <ctl> b", parse_special=False)
    for text in ("a ＜ctl＞ b", "＜/s＞", "<ctl\u200d>"):
        assert not {control, 2} & set(ours.encode(text, add_special_tokens=False)), text
        plain = ours.encode(text, add_special_tokens=False, parse_special=False)
        assert plain == theirs.encode(text) == ours.encode(text, add_special_tokens=False)


def test_rules_leave_symbols_alone() -> None:
    theirs, ours = model()
    symbol = ours.token_to_id("ﬁ")
    assert ours.encode("ﬁ", add_special_tokens=False) == theirs.encode("ﬁ")[1:] == [symbol]
    assert symbol in ours.encode("aﬁb ﬂ")


def test_fingerprints_tell_rules_apart() -> None:
    _, ours = model()
    data = bytearray(ours._charsmap.data if ours._charsmap else b"")
    data[-2] ^= 1
    other = Tokenizer(ours._inner, source="x", bos_id=1, eos_ids=[2], charsmap=Charsmap(bytes(data), "x"))
    assert other.fingerprint != ours.fingerprint
    assert ours.with_eos_ids([5]).fingerprint == ours.fingerprint
    assert ours.with_eos_ids([5]).encode("ｶﾞ") == ours.encode("ｶﾞ")


@pytest.mark.parametrize(
    "data", [b"", b"\x01\0\0\0", b"\x04\0\0\0", b"\x05\0\0\0" + b"x" * 5, struct.pack("<I", 2**31) + b"x" * 9]
)
def test_hostile_sizes(data: bytes) -> None:
    with pytest.raises(CorruptCheckpoint, match="normalization rules"):
        Charsmap(data, "x")


def test_hostile_rules(rules: tuple[Any, Charsmap]) -> None:
    """Whatever bytes the trie and its texts have: text, or a typed error; never beyond their bounds, nor endless."""
    _, sound = rules
    rng = random.Random(3)
    corrupt = 0
    for _ in range(60):
        data = bytearray(sound.data)
        for _ in range(rng.choice((30, 3000))):
            data[rng.randrange(4, len(data))] = rng.randrange(256)
        damaged = Charsmap(bytes(data), "x")
        for text in (*HARD_TEXTS[:40], "".join(map(chr, range(0x80, 0x800)))):
            try:
                damaged.normalize(text)
            except CorruptCheckpoint:
                corrupt += 1
    assert corrupt
