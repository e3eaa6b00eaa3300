"""Detokenizer: what comes out piece by piece is what decoding everything at once gives."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text.samples import HARD_TEXTS, byte_level, sentencepiece_json
from tramontane.text.detokenizer import Detokenizer
from tramontane.text.tokenizer import Tokenizer

BYTE_LEVEL = byte_level()


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_file(sentencepiece_json(tmp_path_factory.mktemp("sp")), {"bos_token": "<s>"})


def pieces(tokenizer: Tokenizer, ids: list[int], skip: bool = True) -> list[str]:
    stream = Detokenizer(tokenizer, skip)
    return [*(stream.push(id_) for id_ in ids), stream.flush()]


@settings(max_examples=300)
@given(ids=st.lists(st.integers(0, BYTE_LEVEL.vocab_size + 2), max_size=30), skip=st.booleans())
def test_byte_level_random_ids(ids: list[int], skip: bool) -> None:
    assert "".join(pieces(BYTE_LEVEL, ids, skip)) == BYTE_LEVEL.decode(ids, skip_special_tokens=skip)


@settings(max_examples=300)
@given(data=st.lists(st.sampled_from(b"a \xc3\xa9\xe2\x82\xac\xf0\x9f\x99\x82\xed\xa0\xff"), max_size=20))
def test_byte_level_broken_characters(data: list[int]) -> None:
    ids = [next(i for i in range(300) if BYTE_LEVEL.id_to_bytes(i) == bytes([byte])) for byte in data]
    assert "".join(pieces(BYTE_LEVEL, ids)) == BYTE_LEVEL.decode(ids) == bytes(data).decode("utf-8", "replace")


@settings(max_examples=400)
@given(data=st.data())
def test_sentencepiece_random_ids(sentencepiece: Tokenizer, data: st.DataObject) -> None:
    often = [1, 3 + 0x20, 3 + 0xC3, 3 + 0xA9, 3 + 0xF0, 3 + 0x9F, 3 + 0x99, 3 + 0x82, *range(259, 267)]
    ids = data.draw(st.lists(st.one_of(st.sampled_from(often), st.integers(0, 270)), max_size=20))
    skip = data.draw(st.booleans())
    assert "".join(pieces(sentencepiece, ids, skip)) == sentencepiece.decode(ids, skip_special_tokens=skip)


def test_no_character_is_split(sentencepiece: Tokenizer) -> None:
    for tokenizer in (BYTE_LEVEL, sentencepiece):
        for text in HARD_TEXTS:
            out = pieces(tokenizer, tokenizer.encode(text, parse_special=False))
            spelled = text.replace("▁", " ") if tokenizer is sentencepiece else text  # its marks are spaces
            assert "".join(out) == spelled
            assert "\ufffd" in text or "\ufffd" not in "".join(out)


def test_byte_level_text_comes_as_soon_as_it_is_whole() -> None:
    ids = BYTE_LEVEL.encode("é🙂")
    out = pieces(BYTE_LEVEL, ids)
    assert "".join(out[:-1]) == "é🙂"
    assert out[-1] == ""


def test_flush_ends_an_unfinished_character() -> None:
    stream = Detokenizer(BYTE_LEVEL)
    for id_ in BYTE_LEVEL.encode("🙂")[:-1]:
        assert stream.push(id_) == ""
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_leading_space_depends_on_the_prompt(sentencepiece: Tokenizer) -> None:
    hi = sentencepiece.encode("hi", add_special_tokens=False)
    prompt = sentencepiece.encode("x")

    def after(prompt_ids: list[int]) -> str:
        stream = Detokenizer(sentencepiece, prompt_ids=prompt_ids)
        return "".join(map(stream.push, hi)) + stream.flush()

    assert after([]) == after([1]) == "hi"
    assert after(prompt) == " hi"
    assert sentencepiece.decode(prompt + hi) == "x" + after(prompt)


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_character_begun_by_the_prompt_is_completed(sentencepiece: Tokenizer, cut: int) -> None:
    smile = list("🙂".encode())
    for tokenizer, first in ((sentencepiece, sentencepiece.encode("x🙂")), (BYTE_LEVEL, BYTE_LEVEL.encode("x🙂"))):
        head, tail = first[: -(len(smile) - cut)], first[-(len(smile) - cut) :]
        stream = Detokenizer(tokenizer, prompt_ids=head)
        assert "".join(map(stream.push, tail)) + stream.flush() == "🙂"


def test_a_prompt_is_not_repeated(sentencepiece: Tokenizer) -> None:
    """The prompt ends in a run of fallback bytes, whose text only the next token would have made certain."""
    stream = Detokenizer(sentencepiece, prompt_ids=sentencepiece.encode("x🙂"))
    assert stream.push(sentencepiece.encode(" hi")[-1]) == " hi"


def test_stories15m_random_ids(stories15m: Path) -> None:
    tokenizer = Tokenizer.from_file(stories15m / "tokenizer.json")

    @settings(max_examples=100)
    @given(ids=st.lists(st.one_of(st.integers(0, 260), st.integers(0, 31999)), max_size=30), skip=st.booleans())
    def check(ids: list[int], skip: bool) -> None:
        assert "".join(pieces(tokenizer, ids, skip)) == tokenizer.decode(ids, skip_special_tokens=skip)

    check()
