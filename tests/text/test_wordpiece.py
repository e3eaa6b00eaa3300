"""WordPiece and unigram: vocab.txt, tokenizer.json and GGUF against the tokenizers package's own classes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.text.samples import HARD_TEXTS, random_texts
from tests.text.test_detokenizer import pieces
from tramontane.errors import CorruptCheckpoint
from tramontane.text.tokenizer import Tokenizer, tokenizer_file

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CORPUS = [*HARD_TEXTS, "do not don't we've they're I'm n't , . ? ! ' s", *random_texts(50, seed=8)]


@functools.cache
def bert(lowercase: bool = True) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=700, special_tokens=SPECIALS, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    single = "[CLS] $A [SEP]"
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return tokenizer


@functools.cache
def unigram() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    names = ["<s>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=700, special_tokens=names, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


def tokens_of(tokenizer: tokenizers.Tokenizer) -> list[str]:
    vocab = tokenizer.get_vocab()
    return sorted(vocab, key=vocab.__getitem__)


def gguf(tokenizer: tokenizers.Tokenizer, **changes: Any) -> dict[str, Any]:
    """As llama.cpp's converter writes BERT: a mark where a word begins, none where it goes on."""
    tokens = tokens_of(tokenizer)
    spelled = [t if t in SPECIALS else t[2:] if t.startswith("##") else f"▁{t}" for t in tokens]
    entries = {
        "model": "bert",
        "tokens": spelled,
        "token_type": [3 if token in SPECIALS else 1 for token in tokens],
        "cls_token_id": 2,
        "seperator_token_id": 3,
        "unknown_token_id": 1,
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in entries.items() if value is not None}


@pytest.mark.parametrize("lowercase", [True, False])
def test_three_sources_of_bert_are_one(tmp_path: Path, lowercase: bool) -> None:
    theirs = bert(lowercase)
    file = tmp_path / "vocab.txt"
    file.write_text("".join(f"{token}\n" for token in tokens_of(theirs)), encoding="utf-8")
    theirs.save(str(tmp_path / "tokenizer.json"))
    for ours in (
        Tokenizer.from_file(file, {"do_lower_case": lowercase}),
        Tokenizer.from_file(tmp_path / "tokenizer.json"),
        Tokenizer.from_gguf(gguf(theirs, **{"normalizer.lowercase": lowercase})),
    ):
        for text in CORPUS:
            ids = theirs.encode(text).ids
            assert ours.encode(text) == ids
            assert ours.decode(ids) == theirs.decode(ids)
        assert ours.special_ids == {0, 1, 2, 3, 4}
        assert 2 not in ours.encode("[CLS]", parse_special=False)[1:]


def test_unigram_json(tmp_path: Path) -> None:
    theirs = unigram()
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.from_file(tmp_path / "tokenizer.json")
    for text in CORPUS:
        ids = theirs.encode(text).ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids)


def test_names_of_special_tokens_are_text_when_asked(tmp_path: Path) -> None:
    """A unigram model would find the name in its vocabulary, and give away the token it stands for."""
    unigram().save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert ours.encode("a</s>b<s>")[-1] == ours.token_to_id("<s>")
    literal = ours.encode("a</s>b<s>", parse_special=False)
    assert not {ours.token_to_id("<s>"), ours.token_to_id("</s>")}.intersection(literal)


@pytest.mark.parametrize("make", [bert, unigram])
def test_streams_as_it_decodes(tmp_path: Path, make: Any) -> None:
    theirs = make()
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.from_file(tmp_path / "tokenizer.json")

    @settings(max_examples=300)
    @given(ids=st.lists(st.integers(0, ours.vocab_size + 2), max_size=20), skip=st.booleans())
    def check(ids: list[int], skip: bool) -> None:
        assert "".join(pieces(ours, ids, skip)) == theirs.decode(ids, skip_special_tokens=skip)

    check()


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": ["a", "b"], "token_type": None},
        {"cls_token_id": 10**6},
        {"token_type": [1]},
        {"normalizer.lowercase": 3},
        {"tokens": ["a", "▁##a", "b", "c"], "token_type": None, "cls_token_id": 0},
    ],
)
def test_hostile_metadata_is_corrupt(changes: dict[str, Any]) -> None:
    with pytest.raises(CorruptCheckpoint):
        Tokenizer.from_gguf(gguf(bert(), **changes))


@pytest.mark.parametrize("data", [b"", b"\xff", b"a\na\n", b"a\nb\n", b"[CLS]\n\n[SEP]\n[UNK]\n"])
def test_hostile_vocab_txt_is_corrupt(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "vocab.txt"
    file.write_bytes(data)
    with pytest.raises(CorruptCheckpoint):
        Tokenizer.from_file(file)


def test_the_best_file_of_a_folder(tmp_path: Path) -> None:
    assert tokenizer_file(tmp_path) is None
    for name in ("vocab.txt", "tokenizer.model", "tekken.json", "tokenizer.json"):
        (tmp_path / name).touch()
        assert tokenizer_file(tmp_path) == tmp_path / name
