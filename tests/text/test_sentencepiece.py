"""tokenizer.model read by our own parser, and GGUF's "llama" and "t5" made of it, against the sentencepiece package."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text.samples import HARD_TEXTS, random_texts
from tests.text.test_detokenizer import pieces
from tramontane.errors import CorruptCheckpoint, UnsupportedModel
from tramontane.text import sentencepiece
from tramontane.text.stops import StopMatcher
from tramontane.text.tokenizer import Tokenizer

spm = pytest.importorskip("sentencepiece", reason="the sentencepiece package trains and reads the references")

IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
SYMBOLS = ["<user>", "▁▁", "▁▁▁", "\n", "\n\n"]
SETTINGS: dict[str, dict[str, Any]] = {
    "nmt_nfkc": {},  # SentencePiece's defaults, as T5 and XLM-R have them
    "nfkc, bytes": {"byte_fallback": True},
    "llama": {"byte_fallback": True, **IDENTITY},
    "gemma": {
        "byte_fallback": True,
        "add_dummy_prefix": False,
        "split_digits": True,
        "user_defined_symbols": SYMBOLS,
        "allow_whitespace_only_pieces": True,
        **IDENTITY,
    },
    "symbols": {"user_defined_symbols": ["<user>"], "control_symbols": ["<ctl>"], **IDENTITY},
    "lower": {"normalization_rule_name": "nmt_nfkc_cf", "byte_fallback": True},
    "across": {"split_by_whitespace": False, "max_sentencepiece_length": 12},
}
# No ties: SentencePiece sums single precision, and would decide them otherwise.
TEXTS = tuple(text for text in HARD_TEXTS if not text.startswith("aaaa"))


def trained(kind: str, options: dict[str, Any]) -> bytes:
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([text.replace("\n", " ") for text in (*TEXTS, *random_texts(200, seed=3)) if text]),
        model_writer=model,
        vocab_size=800,
        model_type=kind,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
        **options,
    )
    return model.getvalue()


# Gemma's overlapping symbols come with BPE only.
MODELS = [(kind, name) for kind in ("bpe", "unigram") for name in SETTINGS if (kind, name) != ("unigram", "gemma")]
MODELS += [("char", name) for name in ("nmt_nfkc", "nfkc, bytes", "llama", "symbols")]


@pytest.fixture(scope="module", params=MODELS, ids=str)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Tokenizer, bytes]:
    kind, name = request.param
    data = trained(kind, SETTINGS[name])
    file = tmp_path_factory.mktemp("sp") / "tokenizer.model"
    file.write_bytes(data)
    return spm.SentencePieceProcessor(model_proto=data), Tokenizer.from_file(file), data


def test_encodes_and_decodes_as_the_package(models: tuple[Any, Tokenizer, bytes]) -> None:
    theirs, ours, _ = models
    for text in TEXTS:
        ids = theirs.encode(text)
        # What looks like a control token is plain text to SentencePiece.
        assert ours.encode(text, add_special_tokens=False, parse_special=False) == ids, text
        if theirs.unk_id() not in ids and not text.startswith("▁"):  # it shows ⁇ for what it does not know
            assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
            assert "".join(pieces(ours, ids, skip=False)) == theirs.decode(ids)


def test_random_texts_encode_as_in_the_package(models: tuple[Any, Tokenizer, bytes]) -> None:
    theirs, ours, _ = models
    for text in random_texts(500, seed=4):
        assert ours.encode(text, add_special_tokens=False, parse_special=False) == theirs.encode(text)


def test_special_tokens(models: tuple[Any, Tokenizer, bytes]) -> None:
    theirs, ours, data = models
    kind = sentencepiece.parse(data, "x").pieces.model
    first, last = {"bpe": ([1], []), "unigram": ([], [2]), "char": ([], [])}[kind]
    inside = ours.encode("is there", add_special_tokens=False)
    assert ours.encode("is there") == [*first, *inside, *last]
    assert ours.encode("</s><s>") == [*first, 2, 1, *last]
    assert {0, 1, 2} <= ours.special_ids
    assert (ours.bos_id, ours.eos_ids, ours.vocab_size) == (1, {2}, theirs.vocab_size())


def test_stop_strings_that_span_tokens_are_never_half_emitted(models: tuple[Any, Tokenizer, bytes]) -> None:
    _, ours, _ = models
    for stop in ("🙂 stop", "é here", "there we"):
        stream = pieces(ours, ours.encode(f"a house {stop} and more", parse_special=False))
        text = "".join(stream)
        end = text.find(stop)
        if end < 0:
            continue  # the model does not know the character
        matcher, shown = StopMatcher([stop]), ""
        for piece in stream:
            safe, found = matcher.push(piece)
            shown += safe
            assert text[:end].startswith(shown)
            if found:
                break
        assert (shown, found) == (text[:end], stop)


def test_gguf_made_of_it_is_the_same(models: tuple[Any, Tokenizer, bytes]) -> None:
    _, ours, data = models
    model = sentencepiece.parse(data, "x").pieces
    if not model.raw_symbols and 4 in model.kinds:
        pytest.skip("the converter writes such symbols with spaces")
    unigram = model.model == "unigram"
    if model.model == "char" or (model.trim and not unigram):
        pytest.skip("GGUF has no such model, or its llama no such normalizer")
    metadata = {
        "model": "t5" if unigram else "llama",
        "tokens": list(model.texts),
        "scores": list(model.scores),
        "token_type": list(model.kinds),
        "add_space_prefix": model.space_prefix,
        "remove_extra_whitespaces": model.trim,
        "precompiled_charsmap": list(model.charsmap),
        "eos_token_id": 2,
    }
    gguf = Tokenizer.from_gguf({f"tokenizer.ggml.{key}": value for key, value in metadata.items()})
    for text in (*TEXTS, *random_texts(100, seed=5)):
        assert gguf.encode(text) == ours.encode(text)
    assert (gguf.eos_ids, gguf.special_ids) == (ours.eos_ids, ours.special_ids)


def test_xlm_rs_ids_are_fairseqs(tmp_path: Path) -> None:
    """One more than the package's, but for the unknown; before and after stand tokens of fairseq's own."""
    file = tmp_path / "sentencepiece.bpe.model"
    file.write_bytes(trained("unigram", {"user_defined_symbols": ["<user>"]}))
    theirs = spm.SentencePieceProcessor(model_file=str(file))
    ours = Tokenizer.from_file(file, {"tokenizer_class": "XLMRobertaTokenizer"})
    for text in TEXTS:
        ids = [0, *(id_ + 1 if id_ else 3 for id_ in theirs.encode(text)), 2]
        assert ours.encode(text, parse_special=False) == ids, text
    assert (ours.bos_id, ours.eos_ids, ours.vocab_size) == (0, {2}, theirs.vocab_size() + 2)
    assert ours.encode("<mask>") == [0, ours.vocab_size - 1, 2]
    for config in ({}, {"tokenizer_class": "NllbTokenizer"}):
        with pytest.raises(UnsupportedModel, match=r"for XLM-R alone.*tokenizer\.json"):
            Tokenizer.from_file(file, config)


def test_models_of_words_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"of whole words.*tokenizer\.json"):
        sentencepiece.parse(trained("word", {"use_all_vocab": True}), "x.model")


def test_spaces_at_the_ends_of_words_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="ends of words"):
        sentencepiece.parse(trained("bpe", {"treat_whitespace_as_suffix": True}), "x.model")


def test_mistral_published_models() -> None:
    common = pytest.importorskip("mistral_common", reason="mistral-common brings published models along")
    for file in sorted(Path(common.__file__).parent.glob("data/*.model*")):
        theirs, ours = spm.SentencePieceProcessor(model_file=str(file)), Tokenizer.from_file(file)
        for text in (*HARD_TEXTS, *random_texts(300, seed=6)):
            ids = theirs.encode(text)
            assert ours.encode(text, parse_special=False) == [1, *ids]
            assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


LLAMA = trained("bpe", SETTINGS["llama"])


@settings(max_examples=100)
@given(text=st.text(max_size=30))
def test_any_text(text: str) -> None:
    ours = _tokenizer(LLAMA)
    assert ours.encode(text, add_special_tokens=False, parse_special=False) == _processor(LLAMA).encode(text)


def _processor(data: bytes) -> Any:
    return spm.SentencePieceProcessor(model_proto=data)


def _tokenizer(data: bytes) -> Tokenizer:
    from tramontane.text import scored  # the file's way in, without a file

    inner = scored.build(sentencepiece.parse(data, "x").pieces, "x")
    return Tokenizer(inner, source="x", bos_id=1, eos_ids=[2])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x0a",
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",  # a length that no file has
        b"\x0a\x80",
        b"\xff" * 20,
        b"\x0b\x0c",  # groups, which the format no longer has
        b"\x08\x01",  # a number for a piece
        b"\x0a\x05\x0a\x01\xff\x18\x01",  # not UTF-8
        b"\x0a\x05\x0a\x01a\x18\x09",  # a kind beyond the known
        b"\x0a\x04\x0a\x01a\x10",
        b"\x0a\x03\x0a\x01a" * 2,  # the same piece twice
        b"\x0a\x08\x0a\x01a\x15\x00\x00\xc0\x7f",  # a score that is no number
        LLAMA[:-7],
        LLAMA[: len(LLAMA) // 2 + 1],
    ],
)
def test_hostile_files_are_corrupt(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(data)
    with pytest.raises(CorruptCheckpoint, match=r"tokenizer\.model"):
        Tokenizer.from_file(file)
