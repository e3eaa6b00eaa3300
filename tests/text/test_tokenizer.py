"""Tokenizer: the same ids and texts as the tokenizers package and transformers give, and no trust in metadata."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from tests.text.samples import HARD_TEXTS, gguf_metadata, pre_tokenizer, random_texts, reference, sentencepiece_json
from tramontane.errors import CorruptCheckpoint, InvalidRequest, ModelNotFound, TramontaneError, UnsupportedModel
from tramontane.text import tokenizer as tokenizer_module
from tramontane.text.tokenizer import Tokenizer

PRES = ("default", "gpt-2", "smollm", "qwen2", "llama-bpe", "llama3")
TEXTS = st.one_of(st.text(max_size=40), st.text("ab '\n\t1٣é🙂<|im_end|>", max_size=40))


def real_gguf(path: Path) -> dict[str, Any]:
    gguf = pytest.importorskip("gguf", reason="the gguf package reads the reference metadata")
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def named(changes: dict[str, Any]) -> dict[str, Any]:
    return {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


@pytest.mark.parametrize("pre", PRES)
def test_gguf_vocabulary_encodes_as_the_original(pre: str) -> None:
    ours, theirs = Tokenizer.from_gguf(gguf_metadata(pre)), reference(pre)
    for text in HARD_TEXTS:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


@settings(max_examples=200)
@given(text=TEXTS, pre=st.sampled_from(PRES))
def test_gguf_vocabulary_encodes_any_text_as_the_original(text: str, pre: str) -> None:
    ours = Tokenizer.from_gguf(gguf_metadata(pre))
    assert ours.encode(text) == reference(pre).encode(text, add_special_tokens=False).ids


def test_pre_tokenizers_differ_where_they_should() -> None:
    """Guards the tests above against a vocabulary on which every pre-tokenizer would do."""
    vocab = gguf_metadata("gpt-2")

    def spelled(pre: str, text: str) -> list[str]:
        tokenizer = Tokenizer.from_gguf({**vocab, "tokenizer.ggml.pre": pre})
        return [tokenizer.token_text(id_) for id_ in tokenizer.encode(text)]

    assert spelled("smollm", "250")[0] == "2"
    assert spelled("gpt-2", "250") != spelled("smollm", "250")
    assert spelled("qwen2", "e\u0301") == spelled("qwen2", "\u00e9") != spelled("gpt-2", "e\u0301")


def test_special_tokens_in_text() -> None:
    tokenizer = Tokenizer.from_gguf(gguf_metadata())
    end, tool = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<tool>")
    assert end is not None
    assert tokenizer.special_ids == {
        tokenizer.token_to_id(name) for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    }
    assert tokenizer.encode("hi<|im_end|>")[-1] == end
    literal = tokenizer.encode("hi<|im_end|><tool>", parse_special=False)
    assert end not in literal
    assert tool in literal  # user-defined tokens are ordinary text
    assert tokenizer.decode(literal) == "hi<|im_end|><tool>"
    assert tokenizer.encode("hi<|im_end|>")[-1] == end  # the setting did not stick


def _spoken(kind: str) -> tokenizers.Tokenizer:
    """A tokenizer of this kind, with special tokens and one that is not, that spells many texts in several ways."""
    words = [
        "<s>",
        "</s>",
        "<unk>",
        "<|im_end|>",
        "<tool>",
        "<",
        ">",
        "|",
        "/",
        "s",
        "im",
        "im_end",
        "a",
        "b",
        "ab",
        " a",
    ]
    if kind == "bpe":
        return tokenizers.Tokenizer.from_str(reference("qwen2").to_str())
    if kind == "unigram":
        pieces = [(word, -float(i % 4)) for i, word in enumerate([*words, "▁", "▁a", "e", "|>"])]
        inner = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=2))
        inner.normalizer = normalizers.Lowercase()
        inner.pre_tokenizer = pre_tokenizers.Metaspace()
    elif kind == "word level":
        inner = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        inner.normalizer = normalizers.Lowercase()
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        pieces = [*words, "##a", "##b", "##s", "##>", "##|", "##im"]
        inner = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(pieces)}, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.decoder = decoders.Metaspace() if kind == "unigram" else decoders.WordPiece()
    inner.add_special_tokens([tokenizers.AddedToken(name, normalized=name == "</s>") for name in words[:4]])
    inner.add_tokens(["<tool>"])
    return inner


_MIXED = st.lists(
    st.one_of(
        st.sampled_from(["<s>", "</s>", "<S>", "</S>", "<unk>", "<|im_end|>", "<|im_end|", "<|endoftext|>", "<tool>"]),
        st.text("ab s<>|/em_n\u0130é🙂", max_size=4),
    ),
    max_size=8,
).map("".join)
KINDS = ("bpe", "unigram", "word level", "word piece")


@settings(max_examples=400)
@given(texts=st.lists(_MIXED, min_size=1, max_size=4), kind=st.sampled_from(KINDS))
def test_names_of_special_tokens_are_text_as_to_a_tokenizer_that_sees_none(texts: list[str], kind: str) -> None:
    inner = _spoken(kind)
    ours = Tokenizer(inner, source="here", bos_id=None, eos_ids=())
    literal = tokenizer_module._literal(inner)
    expected = [literal.encode(text, add_special_tokens=False).ids for text in texts]
    assert ours.encode_batch(texts, add_special_tokens=False, parse_special=False) == expected


@settings(max_examples=100, deadline=None)
@given(text=_MIXED)
def test_names_of_special_tokens_are_text_as_to_transformers(text: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is the reference")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=_spoken("bpe"))
    ours = Tokenizer(_spoken("bpe"), source="here", bos_id=None, eos_ids=())
    expected = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert ours.encode(text, add_special_tokens=False, parse_special=False) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_tokenizer_is_made_only_where_a_text_names_a_special_token(kind: str) -> None:
    ours = Tokenizer(_spoken(kind), source="here", bos_id=None, eos_ids=())
    ours.encode_batch(["a", "a ab <tool> a"], parse_special=False)
    assert ours._literal is None
    ours.encode_batch(["a", "a<|im_end|>"], parse_special=False)
    assert ours._literal is not None


@pytest.mark.parametrize("default", [None, True])
def test_bos_is_added_exactly_once(default: bool | None) -> None:
    """Llama 3 adds BOS unless the file says otherwise."""
    pre = "llama-bpe" if default is None else "gpt-2"
    tokenizer = Tokenizer.from_gguf(gguf_metadata(pre, add_bos_token=default, add_eos_token=True))
    bos, eos = tokenizer.bos_id, tokenizer.token_to_id("<|im_end|>")
    inside = tokenizer.encode("hi", add_special_tokens=False)
    assert tokenizer.encode("hi") == [bos, *inside, eos]
    assert tokenizer.encode("<|im_start|>hi<|im_end|>") == [bos, *inside, eos]
    assert tokenizer.encode("") == [bos, eos]
    assert tokenizer.encode("<|im_start|>", parse_special=False).count(bos) == 1
    assert tokenizer.encode_batch(["hi", ""]) == [[bos, *inside, eos], [bos, eos]]


@pytest.mark.parametrize("ends", [{}, {"add_bos_token": True}, {"add_bos_token": True, "add_eos_token": True}], ids=str)
def test_what_is_saved_is_read_alike_by_others(tmp_path: Path, ends: dict[str, bool]) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers reads what was saved")
    ours = Tokenizer.from_gguf(gguf_metadata("smollm", **ends))
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, min(ours.eos_ids))
    for text in HARD_TEXTS:
        if text.startswith("<|im_start|>") or text.endswith("<|im_end|>"):
            continue  # we add no second BOS or EOS
        assert theirs.encode(text) == ours.encode(text)
        ids = ours.encode(text, add_special_tokens=False)
        assert theirs.decode(ids) == ours.decode(ids, skip_special_tokens=False)


def test_bytes_and_texts_of_tokens() -> None:
    tokenizer = Tokenizer.from_gguf(gguf_metadata())
    for text in HARD_TEXTS:
        ids = tokenizer.encode(text)
        assert b"".join(map(tokenizer.id_to_bytes, ids)) == text.encode()
    assert tokenizer.id_to_bytes(tokenizer.vocab_size) == tokenizer.id_to_bytes(-1) == b""
    assert tokenizer.vocab_size == len(gguf_metadata()["tokenizer.ggml.tokens"])
    lone = tokenizer.token_to_id("Ã")
    assert lone is not None
    assert (tokenizer.id_to_bytes(lone), tokenizer.token_text(lone)) == (b"\xc3", "\ufffd")


def test_eos_ids_and_fingerprint() -> None:
    tokenizer = Tokenizer.from_gguf(gguf_metadata(eot_token_id=5))
    ends = {tokenizer.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>")}  # known to end a turn by name
    assert tokenizer.eos_ids == {5, *ends}
    more = tokenizer.with_eos_ids([7])
    assert more.eos_ids == tokenizer.eos_ids | {7}
    same = Tokenizer.from_gguf(gguf_metadata())
    assert more.fingerprint == tokenizer.fingerprint == same.fingerprint
    assert Tokenizer.from_gguf(gguf_metadata(add_bos_token=True)).fingerprint != same.fingerprint
    assert Tokenizer.from_gguf(gguf_metadata("qwen2")).fingerprint != same.fingerprint


def test_arrays_are_lists() -> None:
    types = np.array(gguf_metadata()["tokenizer.ggml.token_type"], dtype=np.int32)
    tokenizer = Tokenizer.from_gguf(gguf_metadata(token_type=types, bos_token_id=np.uint32(3)))
    assert (tokenizer.bos_id, len(tokenizer.special_ids)) == (3, 3)


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": None},
        {"tokens": []},
        {"tokens": "abc"},
        {"tokens": ["a", 3]},
        {"tokens": ["a", "a"]},
        {"tokens": ["a", "", "[EMPTY_1]"]},
        {"tokens": ["a", None]},
        {"tokens": ["a", "\udc80"]},
        {"tokens": ["a", "b" * 5000]},
        {"tokens": range(1 << 40)},
        {"merges": None},
        {"merges": ["nothing known"]},
        {"merges": ["a"]},
        {"merges": ["a "]},
        {"merges": ["a b c"]},
        {"merges": [("a", "b")]},
        {"merges": 7},
        {"token_type": [1]},
        {"token_type": ["x"]},
        {"token_type": {1: 2}},
        {"token_type": [99] * 604},
        {"bos_token_id": 10**9},
        {"bos_token_id": -1},
        {"eos_token_id": "2"},
        {"eot_token_id": True},
        {"eom_token_id": 1.5},
        {"add_bos_token": "yes"},
        {"add_bos_token": True, "bos_token_id": None},
        {"model": None},
        {"model": 3},
        {"pre": 3},
        {"add_space_prefix": 1},
    ],
)
def test_hostile_metadata_is_corrupt(changes: dict[str, Any]) -> None:
    with pytest.raises(CorruptCheckpoint, match=r"model\.gguf"):
        Tokenizer.from_gguf({**gguf_metadata(), **named(changes)}, source="model.gguf")


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"model": "rwkv"}, "rwkv"), ({"pre": "tekken9"}, "tekken9"), ({"add_space_prefix": True}, "add_space_prefix")],
)
def test_unsupported_metadata_is_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModel, match=said) as caught:
        Tokenizer.from_gguf({**gguf_metadata(), **named(changes)})
    assert caught.value.remedy


@settings(max_examples=100)
@given(
    key=st.sampled_from(["model", "pre", "tokens", "merges", "token_type", "bos_token_id", "add_bos_token"]),
    value=st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.binary(max_size=3)),
        lambda inner: st.lists(inner, max_size=4),
    ),
)
def test_any_metadata_gives_a_tokenizer_or_one_of_our_errors(key: str, value: Any) -> None:
    metadata = {**gguf_metadata(), f"tokenizer.ggml.{key}": value}
    with contextlib.suppress(TramontaneError):
        Tokenizer.from_gguf(metadata)


def test_requests_that_cannot_be_meant() -> None:
    tokenizer = Tokenizer.from_gguf(gguf_metadata())
    with pytest.raises(InvalidRequest):
        tokenizer.encode("\ud800")
    with pytest.raises(InvalidRequest):
        tokenizer.decode([-1])
    assert tokenizer.decode([10**6]) == ""


def test_sentencepiece_file(tmp_path: Path) -> None:
    file = sentencepiece_json(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(file))
    ours = Tokenizer.from_file(file, {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True})
    for text in HARD_TEXTS:
        ids = theirs.encode(text).ids
        assert ours.encode(text) == (ids[1:] if text.startswith("<s>") else ids)
        assert ours.decode(ids) == theirs.decode(ids)
    assert (ours.bos_id, ours.eos_ids, ours.special_ids) == (1, {2}, {0, 1, 2})
    assert ours.decode(ours.encode("hi x🙂")) == "hi x🙂"
    assert ours.id_to_bytes(3 + 0xE2) == b"\xe2"
    without = Tokenizer.from_file(
        file, {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False, "add_eos_token": True}
    )
    assert without.encode("hi") == [*ours.encode("hi")[1:], 2]
    assert Tokenizer.from_file(file).encode("hi") == ours.encode("hi")


def test_tokens_named_only_by_the_config(tmp_path: Path) -> None:
    file = sentencepiece_json(tmp_path)
    size = Tokenizer.from_file(file).vocab_size
    config = {"added_tokens_decoder": {str(size): {"content": "<extra>", "special": True}}, "pad_token": "<not-there>"}
    tokenizer = Tokenizer.from_file(file, config)
    assert tokenizer.vocab_size == size + 1
    assert tokenizer.encode("hi<extra>")[-1] == size
    assert size in tokenizer.special_ids


@pytest.mark.parametrize(
    "config",
    [
        {"bos_token": 3},
        {"bos_token": {"content": None}},
        {"bos_token": "<never>"},
        {"add_bos_token": True},
        {"add_bos_token": "yes", "bos_token": "<s>"},
        {"added_tokens_decoder": {"zero": "<x>"}},
        {"added_tokens_decoder": {"5": "<x>"}},
        {"added_tokens_decoder": {"5": 5}},
        {"added_tokens_decoder": [1]},
    ],
)
def test_hostile_config_is_corrupt(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(CorruptCheckpoint):
        Tokenizer.from_file(sentencepiece_json(tmp_path), config)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[" * 10000,
        b'{"version":"1.0"}',
        b'{"version":"1.0","model":{"type":"BPE","vocab":{"a":0},"merges":["a b"]}}',
        b'{"version":"1.0","model":{"type":"BPE","vocab":{"a":0,"b":1},"merges":["a b"]}}',
    ],
)
def test_hostile_file_is_corrupt(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_bytes(content)
    with pytest.raises(CorruptCheckpoint):
        Tokenizer.from_file(file)


def test_missing_file_and_unknown_decoder(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        Tokenizer.from_file(tmp_path / "tokenizer.json")
    file = sentencepiece_json(tmp_path)
    content = json.loads(file.read_text(encoding="utf-8"))
    for decoder in (None, {"type": "BPEDecoder", "suffix": "</w>"}, {"type": "Fuse"}):
        file.write_text(json.dumps({**content, "decoder": decoder}), encoding="utf-8")
        if decoder == {"type": "Fuse"}:
            assert Tokenizer.from_file(file).decode([260]) == "h"
            continue
        with pytest.raises(UnsupportedModel, match="none" if decoder is None else "BPEDecoder"):
            Tokenizer.from_file(file)


def test_truncation_in_the_file_is_not_obeyed(tmp_path: Path) -> None:
    file = sentencepiece_json(tmp_path)
    content = json.loads(file.read_text(encoding="utf-8"))
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    file.write_text(json.dumps(content), encoding="utf-8")
    assert len(Tokenizer.from_file(file).encode("x" * 50)) == 51


def test_smollm2_gguf(smollm2: Path) -> None:
    """Ids as recorded from llama.cpp on the same file."""
    tokenizer = Tokenizer.from_gguf(real_gguf(smollm2))
    assert tokenizer.encode("<|im_start|>user\nhi <|im_end|>\n<|endoftext|>") == [1, 4093, 198, 6004, 216, 2, 198, 0]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (49152, 1, {0, 2})
    for text in HARD_TEXTS[:7]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [tokenizer.token_text(id_) for id_ in tokenizer.encode("In 2024")] == ["In", " ", "2", "0", "2", "4"]


def test_smollm2_as_published(smollm2: Path) -> None:
    """Its vocabulary and merges in what its tokenizer.json says, put together by the tokenizers package."""
    metadata = real_gguf(smollm2)
    tokens, kinds, merges = (metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type", "merges"))
    vocab = {token: id_ for id_, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=pairs))
    theirs.pre_tokenizer = pre_tokenizer("smollm")
    theirs.decoder = tokenizers.decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    theirs.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in special])
    ours = Tokenizer.from_gguf(metadata)
    for text in (*HARD_TEXTS, *random_texts(500, seed=8)):
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special_tokens=False) == ids
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids, skip_special_tokens=False)


def test_stories15m_equals_transformers(stories15m: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is the reference")
    # The class that takes tokenizer.json as it is: LlamaTokenizer of transformers 5 puts rules of its own in the
    # place of the file's, and differs from it (and from SentencePiece) on a text that starts with a space.
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(stories15m)
    auto = transformers.AutoTokenizer.from_pretrained(stories15m)
    config = json.loads((stories15m / "tokenizer_config.json").read_text(encoding="utf-8"))
    ours = Tokenizer.from_file(stories15m / "tokenizer.json", config)
    for text in HARD_TEXTS:
        if text.startswith("<s>"):
            continue  # we add no second BOS
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        if not text.startswith((" ", "▁")):
            assert ids == auto.encode(text)


@pytest.mark.slow
def test_wikitext_round_trip(smollm2: Path, wikitext: Path) -> None:
    tokenizer = Tokenizer.from_gguf(real_gguf(smollm2))
    text = wikitext.read_text(encoding="utf-8")
    assert tokenizer.decode(tokenizer.encode(text)) == text
