"""Texts cut to fit, alone and in pairs: the same ids and types as transformers' tokenizers give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from tests.text.test_wordpiece import bert, gguf, tokens_of
from tramontane.text.tokenizer import Tokenizer

QUERY = "do not don't we've"
DOCUMENTS = ["n't ?", "they're I'm n't , . ? ! ' s don't we've", ""]
LENGTHS = (5, 6, 7, 8, 9, 12, 15, 64)
BERT = {"pair": "[CLS] $A [SEP] $B:1 [SEP]:1", "single": "[CLS] $A [SEP]"}
ROBERTA = {"pair": "<s> $A </s> </s> $B </s>", "single": "<s> $A </s>"}


def wordpiece() -> tokenizers.Tokenizer:
    copy = tokenizers.Tokenizer.from_str(bert().to_str())
    named = [("[CLS]", 2), ("[SEP]", 3)]
    copy.post_processor = processors.TemplateProcessing(**BERT, special_tokens=named)
    return copy


def roberta() -> tokenizers.Tokenizer:
    words = ["<s>", "<pad>", "</s>", "<unk>", *sorted({c for text in (QUERY, *DOCUMENTS) for c in text.split()})]
    tokenizer = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(**ROBERTA, special_tokens=[("<s>", 0), ("</s>", 2)])
    return tokenizer


def check(ours: Tokenizer, theirs: tokenizers.Tokenizer) -> None:
    """As the tokenizers package cuts, by the strategy that transformers takes for one text and for pairs."""
    for length in LENGTHS:
        theirs.enable_truncation(length, strategy="longest_first")
        cut = [theirs.encode(text) for text in (QUERY, *DOCUMENTS)]
        for got, wanted in zip(ours.encode_within([QUERY, *DOCUMENTS], length), cut, strict=True):
            assert (list(got.ids), list(got.types)) == (wanted.ids, wanted.type_ids)
            assert got.truncated == bool(wanted.overflowing)
        pairs = [theirs.encode(QUERY, document) for document in DOCUMENTS]
        for got, wanted in zip(ours.encode_pairs(QUERY, DOCUMENTS, length), pairs, strict=True):
            assert (list(got.ids), list(got.types)) == (wanted.ids, wanted.type_ids)
            assert got.truncated == bool(wanted.overflowing)
    theirs.no_truncation()


@pytest.mark.parametrize("make", [wordpiece, roberta])
def test_a_tokenizer_json(tmp_path: Path, make: Any) -> None:
    theirs = make()
    theirs.save(str(tmp_path / "tokenizer.json"))
    check(Tokenizer.from_file(tmp_path / "tokenizer.json"), theirs)


def test_the_files_own_padding_and_truncation_are_left_out(tmp_path: Path) -> None:
    theirs = wordpiece()
    theirs.enable_padding(length=32)
    theirs.enable_truncation(16)
    theirs.save(str(tmp_path / "tokenizer.json"))
    check(Tokenizer.from_file(tmp_path / "tokenizer.json"), wordpiece())


def test_bert_without_a_post_processor(tmp_path: Path) -> None:
    theirs = wordpiece()
    (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens_of(theirs)), encoding="utf-8")
    check(Tokenizer.from_file(tmp_path / "vocab.txt"), theirs)
    check(Tokenizer.from_gguf(gguf(theirs)), theirs)


def test_a_decoders_texts_stand_side_by_side(tmp_path: Path) -> None:
    theirs = roberta()
    theirs.post_processor = processors.ByteLevel()
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.from_file(tmp_path / "tokenizer.json")
    (pair,) = ours.encode_pairs("do not", ["we've"], 64)
    wanted = theirs.encode("do not", "we've")
    assert (list(pair.ids), list(pair.types)) == (wanted.ids, wanted.type_ids)


def test_no_room_leaves_the_ends(tmp_path: Path) -> None:
    theirs = wordpiece()
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert [fitted.ids for fitted in ours.encode_within(["a b"], 1)] == [(2, 3)]
    assert [fitted.ids for fitted in ours.encode_pairs("a", ["b"], 2)] == [(2, 3, 3)]
