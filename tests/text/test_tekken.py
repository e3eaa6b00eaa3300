"""tekken.json against mistral-common's own tokenizer, and small files that are no such thing."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from tests.text.samples import GPT2, HARD_TEXTS, random_texts
from tramontane.errors import CorruptCheckpoint, TramontaneError, UnsupportedModel
from tramontane.text.tokenizer import Tokenizer


def small(**changes: Any) -> dict[str, Any]:
    """A file of 256 bytes and a few words; `changes` replace parts of its config, or of itself."""
    tokens = [*(bytes([byte]) for byte in range(256)), b"th", b"the", b" the", b"\xc3\xa9", b"unused"]
    config = {"pattern": GPT2, "default_vocab_size": 270, "default_num_special_tokens": 10, "version": "v7"}
    specials = [{"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(("<unk>", "<s>", "</s>"))]
    file: dict[str, Any] = {
        "config": {**config, **{key: value for key, value in changes.items() if key in config}},
        "vocab": [{"rank": i, "token_bytes": base64.b64encode(token).decode()} for i, token in enumerate(tokens)],
        "special_tokens": specials,
    }
    return {**file, **{key: value for key, value in changes.items() if key not in config}}


def read(folder: Path, content: object) -> Tokenizer:
    file = folder / "tekken.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    return Tokenizer.from_file(file)


def test_published_files_encode_as_mistral_common() -> None:
    common = pytest.importorskip("mistral_common", reason="mistral-common is the reference, and brings files along")
    tekken = pytest.importorskip("mistral_common.tokens.tokenizers.tekken", reason="mistral-common is the reference")
    for file in sorted(Path(common.__file__).parent.glob("data/tekken*.json"))[:1]:
        theirs, ours = tekken.Tekkenizer.from_file(file), Tokenizer.from_file(file)
        for text in (*HARD_TEXTS, *random_texts(500, seed=7), "[INST] <s></s>"):
            ids = theirs.encode(text, False, False)
            assert ours.encode(text, add_special_tokens=False, parse_special=False) == ids
            assert ours.encode(text, parse_special=False) == theirs.encode(text, True, False)
            assert ours.decode(ids) == theirs.decode(ids) == text
        assert ours.encode("[INST]hi[/INST]")[::2] == [1, ours.encode("hi")[1]]
        assert ours.token_to_id("[TOOL_CALLS]") == theirs.get_special_token("[TOOL_CALLS]")
        assert (ours.vocab_size, ours.bos_id, ours.eos_ids) == (theirs.n_words, theirs.bos_id, {theirs.eos_id})


def test_small_file(tmp_path: Path) -> None:
    tokenizer = read(tmp_path, small())
    assert tokenizer.encode("the the") == [1, 267, 268]
    assert tokenizer.encode("é", add_special_tokens=False) == [269]
    assert tokenizer.encode("</s>", add_special_tokens=False) == [2]
    assert tokenizer.token_to_id("<SPECIAL_5>") == 5
    assert tokenizer.vocab_size == 270
    old = small(special_tokens=None, default_num_special_tokens=20, default_vocab_size=280)
    assert read(tmp_path, old).token_to_id("[TOOL_CALLS]") == 9


@pytest.mark.parametrize(
    "content",
    [
        [],
        {},
        {**small(), "config": 3},
        {**small(), "vocab": {}},
        {**small(), "vocab": [3]},
        {**small(), "special_tokens": [{"rank": 99, "token_str": "<x>"}]},
        {**small(), "special_tokens": [{"rank": 0}]},
        {**small(), "special_tokens": []},
        small(pattern=3),
        small(pattern="("),
        small(pattern="a" * 5000),
        small(default_vocab_size=10**12),
        small(default_vocab_size=-1),
        small(default_vocab_size=300),
        small(default_num_special_tokens=270),
        {**small(), "vocab": [*small()["vocab"][:-2], {"rank": 3, "token_bytes": "YQ=="}] * 2},
        {**small(), "vocab": [*small()["vocab"][:259], {"rank": 259, "token_bytes": "YQ=="}]},  # twice
        {**small(), "vocab": [*small()["vocab"][:259], {"rank": 259, "token_bytes": "!"}]},
        {**small(), "vocab": [*small()["vocab"][:259], {"rank": 259, "token_bytes": ""}]},
        {**small(), "vocab": list(reversed(small()["vocab"]))},
    ],
)
def test_hostile_files_are_corrupt(tmp_path: Path, content: object) -> None:
    with pytest.raises(CorruptCheckpoint, match=r"tekken\.json"):
        read(tmp_path, content)


def test_files_that_are_no_json(tmp_path: Path) -> None:
    for data in (b"", b"{", b"[" * 100_000, b"\xff"):
        (tmp_path / "tekken.json").write_bytes(data)
        with pytest.raises(TramontaneError):
            Tokenizer.from_file(tmp_path / "tekken.json")


def test_a_new_version_that_lists_no_control_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="v99"):
        read(tmp_path, small(version="v99", special_tokens=None))
