"""Published tokenizers: the same ids and texts from tokenizer.json, and from GGUF metadata made of it.

`python tests/fetch_tokenizers.py` puts the files into $TEST_MODELS.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from tests.conftest import model_path
from tests.text.gguf_written import written
from tests.text.samples import HARD_TEXTS, random_texts
from tests.text.test_detokenizer import pieces
from tramontane.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

# Each with the name of its pre-tokenizer in GGUF (None: SentencePiece) and what its GGUF file says besides.
MODELS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "llama2": (None, {}),
    "gemma3": (None, {"add_space_prefix": False}),
    "llama3_2": ("llama-bpe", {}),
    "qwen2_5": ("qwen2", {}),
    "mistral_nemo": ("tekken", {}),
    "deepseek_v3": ("deepseek-v3", {}),
    "command_r_plus": ("command-r", {}),
    "gpt2": ("gpt-2", {}),
    "phi3": (None, {}),
}
CONFIGURED = ("mistral_nemo", "deepseek_v3", "command_r_plus")  # begin with BOS because their config says so


Loaded = tuple[str, tokenizers.Tokenizer, Tokenizer, Tokenizer]


def phi3(folder: Path) -> Path:
    """Phi-3's tokenizer: Llama 2's vocabulary, and tokens of its own that take the spaces after them along."""
    original = model_path("tokenizers") / "llama2"
    content = json.loads((original / "tokenizer.json").read_text(encoding="utf-8"))
    names = ["<|endoftext|>", "<|assistant|>", *(f"<|placeholder{number}|>" for number in range(1, 5))]
    names += ["<|system|>", "<|end|>", "<|placeholder5|>", "<|placeholder6|>", "<|user|>"]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"] = [{"id": id_, "content": name, **plain} for id_, name in enumerate(("<unk>", "<s>"))]
    content["added_tokens"] += [{"id": 2, "content": "</s>", **plain, "rstrip": True, "special": False}]
    content["added_tokens"] += [
        {"id": 32_000 + number, "content": name, **plain, "rstrip": number > 0} for number, name in enumerate(names)
    ]
    config = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "unk_token": "<unk>", "add_bos_token": True}
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module", params=MODELS)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A name, the tokenizers package's reading, ours, and ours of the GGUF metadata."""
    name: str = request.param
    folder = phi3(tmp_path_factory.mktemp("m") / name) if name == "phi3" else model_path("tokenizers") / name
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    original = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    pre, changes = MODELS[name]
    return (
        name,
        original,
        Tokenizer.from_file(folder / "tokenizer.json", config),
        Tokenizer.from_gguf({**written(folder, pre, **changes), "general.name": name}, name),
    )


def test_encodes_and_decodes_as_the_original(loaded: Loaded) -> None:
    name, original, from_json, from_gguf = loaded
    for text in (*HARD_TEXTS, *random_texts(1000, seed=1), "<|user|>\n hi <|end|>  \n<|assistant|>  x </s>  y"):
        ids = original.encode(text, add_special_tokens=False).ids
        # A mark in the text itself meets Gemma's runs of marks, which GGUF writes as runs of spaces.
        for ours in (from_json,) if name == "gemma3" and "▁" in text else (from_json, from_gguf):
            assert ours.encode(text, add_special_tokens=False) == ids, text
            assert ours.decode(ids, skip_special_tokens=False) == original.decode(ids, skip_special_tokens=False)


def test_ends_are_added_once_and_alike(loaded: Loaded) -> None:
    name, original, from_json, from_gguf = loaded
    ids = from_json.encode("Hello, world")
    inside = original.encode("Hello, world", add_special_tokens=False).ids
    assert from_gguf.encode("Hello, world") == ids
    assert ids in (inside, [from_json.bos_id, *inside])
    assert (len(ids) > len(inside)) == (name in ("llama2", "llama3_2", "gemma3", "phi3", *CONFIGURED))
    if len(ids) > len(inside):
        assert from_gguf.encode(f"{original.id_to_token(ids[0])}Hello").count(ids[0]) == 1


def test_any_ids_decode_alike_piece_by_piece(loaded: Loaded) -> None:
    """Random ids are mostly invalid UTF-8."""
    _, original, *ours = loaded
    rng = random.Random(2)
    for _ in range(300):
        ids = [rng.choice((rng.randrange(original.get_vocab_size()), rng.randrange(400))) for _ in range(12)]
        for tokenizer in ours:
            expected = original.decode(ids, skip_special_tokens=False)
            assert tokenizer.decode(ids, skip_special_tokens=False) == expected
            assert "".join(pieces(tokenizer, ids, skip=False)) == expected


def test_transformers_agrees_with_the_package(loaded: Loaded) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is the reference")
    name, _, from_json, from_gguf = loaded
    if name != "qwen2_5":
        pytest.skip("transformers puts rules of its own in the place of other files'")
    theirs = transformers.AutoTokenizer.from_pretrained(model_path("tokenizers") / name)
    for text in HARD_TEXTS:
        assert theirs.encode(text) == from_json.encode(text) == from_gguf.encode(text)
